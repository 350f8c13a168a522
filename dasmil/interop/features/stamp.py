"""The kind ``stamp`` of the verb ``import``: STAMP's feature files → bag files."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from dasmil.bags import ExtractorCard
from dasmil.errors import InputError
from dasmil.interop.features.hdf5 import (
    attribute,
    number,
    open_h5,
    read_features,
    read_places,
    whole,
)
from dasmil.interop.features.importer import (
    files_by_slide,
    import_features,
    imported_card,
    parse_folders,
    table_mpps,
)
from dasmil.interop.features.nesting import (
    Dtype,
    Orphans,
    ScaleFeatures,
    SlideFeatures,
    check_mpp,
    same,
)
from dasmil.slides.cohort import read_cohort
from dasmil.units import Mpp, Scale

MICROMETRE = frozenset(["um", "µm", "μm"])
ROUNDED_UM = 1.0  # of places
ROUNDED_MPP = 3e-4  # of a table with four digits
SUPERTILE = 64  # more tiles in a row than any supertile has; by default 8 of 128 µm at 0.25 µm/px


def stamp(
    dest: Path,
    features: dict[str, Path],
    cohort: Path | None = None,
    orphans: Orphans = "keep",
    dtype: Dtype = "keep",
) -> int:
    """Features that STAMP extracted at one or several magnifications → a folder of bags.

    STAMP counts in µm and does not keep the slide's mpp. Where the cohort table has it, places are
    in level-0 pixels as everywhere; where not, in pixels of the finest scale, which training and
    scores do not mind; overlays do, and ``test --truth`` refuses such a slide. Scales keep STAMP's
    own µm per pixel: tiles of 256 µm in 224 px have 1.143 µm/px, which goes for x10 within a fifth.

    It rounds a tile up to whole level-0 pixels: 256 and 128 µm are 1,024 and 512 px at 0.25 µm/px,
    which nest, but 1,125 and 563 px at 0.2277, which do not and are refused.

    Parameters
    ----------
    dest:
        folder for the bags.
    features:
        per scale a folder of <slide_id>.h5, one of STAMP's extractor folders.
    cohort:
        table with the labels and, best, the mpp: ours (slide_id, path, label, mpp, ...) or CLAM's
        (case_id, slide_id, label); without it the bags are for predict.
    orphans:
        keep or drop tiles without a parent, and coarser ones without a child.
    dtype:
        keep the files' float16 or float32, or make it one of them.

    Returns
    -------
    The exit code: 1 when a slide failed, else 0.
    """
    scales, folders = parse_folders(features)
    files = [files_by_slide(folder, below=True) for folder in folders]  # as the slides lay
    mpps = table_mpps(cohort, files)

    def read(slide_id: str) -> tuple[SlideFeatures, dict[str, ExtractorCard]]:
        return read_slide(slide_id, scales, [f[slide_id] for f in files], mpps.get(slide_id))

    code = import_features(dest, scales, files, read, cohort, "stamp", orphans, dtype, mpps)
    rows = read_cohort(dest / "cohort.csv")
    unknown = sum(not row.mpp and not row.fault_in("mpp") for row in rows)
    if unknown:
        print(
            f"import stamp: the mpp of {unknown} of {len(rows)} slides is not known, so their "
            "places count in pixels of the finest scale; give --cohort a table with the column mpp "
            "for overlays and test --truth"
        )
    return code


def read_slide(
    slide_id: str, scales: tuple[Scale, ...], paths: list[Path], mpp: float | None
) -> tuple[SlideFeatures, dict[str, ExtractorCard]]:
    """One slide of STAMP's, coarse to fine."""
    found, tile_px, true_scales, cards = [], [], [], {}
    for scale, path in zip(scales, paths, strict=True):
        with open_h5(path) as file:
            values, place_um = read_features(file, "feats", "features"), read_places(file)
            if len(values) != len(place_um):
                raise InputError(
                    f"{path}: {len(values)} feats for {len(place_um)} coords; extract it again"
                )
            unit = attribute(file, "unit")
            unit = unit.decode() if isinstance(unit, bytes) else str(unit)
            if unit not in MICROMETRE:
                raise InputError(f"{path}: its coords are in {unit!r}, not in um; extract it again")
            side_um = number(file, "tile_size_um")
            tile_px.append(whole(file, "tile_size_px"))
            extractor = attribute(file, "extractor")
            encoder = extractor.decode() if isinstance(extractor, bytes) else str(extractor)
        true_mpp = side_um / tile_px[-1]
        check_mpp(path, scale, true_mpp, within=0.2)
        true_scales.append(replace(scale, mpp=Mpp(true_mpp)))
        side = math.ceil(side_um / mpp) if mpp else side_um
        cells, drift_um = _cells(path, place_um, side_um, mpp)
        if mpp is None and len(scales) > 1 and drift_um > ROUNDED_UM:
            raise InputError(
                f"{path}: its grid shows that tiles were rounded to whole level-0 px, and whether "
                "those of several magnifications nest depends on the slide's mpp; give --cohort a "
                "table with the column mpp"
            )
        found.append(ScaleFeatures(path, values, cells * side, side))
        cards[scale.name] = imported_card("stamp", encoder, scale, tile_px[-1], values)
    finest = found[-1].side
    if mpp and any(f.side != finest * round(f.side / finest) for f in found):
        sides = ", ".join(f"{s.name} {f.side:g} px" for s, f in zip(scales, found))
        raise InputError(
            f"{paths[0]}: STAMP rounds tiles up to whole level-0 px, on this slide {sides}, so the "
            "grids do not nest; import one magnification, or cut with dasmil tile"
        )
    slide = SlideFeatures(
        slide_id=slide_id,
        scales=tuple(true_scales),
        tile_px=same(tile_px, "the tile size", paths[-1]),
        files=tuple(found),
        slide_mpp=side_um / finest if mpp else true_scales[-1].mpp,  # so that a tile is `side` wide
        size_px0=None,
        mpp_is_known=bool(mpp),
    )
    return slide, cards


def _cells(
    path: Path, place_um: np.ndarray, side_um: float, mpp: float | None
) -> tuple[np.ndarray, float]:
    """(N, 2) column, row of tiles, and by how much at most a place is not that many times the side.

    STAMP cuts supertiles of some tiles, each rounded up to whole level-0 pixels, and counts from a
    supertile's corner in tiles of exactly ``side_um``: between the two lies less than half a tile.
    """
    step = math.ceil(side_um / mpp) * mpp if mpp else side_um
    cells = np.rint(place_um / step)
    behind = cells * step - place_um
    if mpp:
        rounded = ROUNDED_UM + ROUNDED_MPP * place_um
        fits = (-rounded <= behind) & (behind <= SUPERTILE * (step - side_um) + rounded)
    else:
        fits = (-0.45 * side_um <= behind) & (behind <= ROUNDED_UM)
    if not fits.all():
        raise InputError(
            f"{path}: its coords lie on no grid of {side_um:g} µm "
            + (
                f"on a slide of {mpp:g} µm/px; is the mpp of the table the slide's own?"
                if mpp
                else "without the slide's mpp; give --cohort a table with the column mpp"
            )
        )
    return cells, float(np.abs(place_um - cells * side_um).max(initial=0))
