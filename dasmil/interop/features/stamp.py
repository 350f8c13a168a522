"""The kind ``stamp`` of the verb ``import``: STAMP's feature files → bag files."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from dasmil.errors import InputError
from dasmil.interop.features import hdf5
from dasmil.interop.features.importer import import_slides
from dasmil.interop.features.nesting import Dtype, Orphans, ScaleFeatures, SlideFeatures
from dasmil.interop.features.sources import feature_source, list_files, require_mpp, require_same
from dasmil.slides.cohort import SlideRow
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
    """Import features that STAMP extracted at one or several magnifications into a bag folder.

    STAMP counts in µm and does not keep the slide's mpp. If the cohort table has it, places are in
    level-0 pixels as everywhere. If not, they are in pixels of the finest scale: enough for
    training and scores, but not for overlays, and ``test --truth`` refuses such a slide. Scales
    keep STAMP's own µm per pixel: tiles of 256 µm in 224 px have 1.143 µm/px, which passes for x10
    since it differs by less than a fifth.

    STAMP rounds a tile up to whole level-0 pixels. 256 and 128 µm are 1,024 and 512 px at 0.25
    µm/px, which nest; at 0.2277 µm/px they are 1,125 and 563 px, which do not and are refused.

    Parameters
    ----------
    dest:
        folder for the bags.
    features:
        per scale a folder of <slide_id>.h5, one of STAMP's extractor folders.
    cohort:
        table with the labels and, best, the mpp: a cohort table (slide_id, path, label, mpp, ...)
        or CLAM's (case_id, slide_id, label); without it the bags are for predict.
    orphans:
        keep or drop tiles without a parent, and coarser ones without a child.
    dtype:
        keep the float16 or float32 of the files, or convert to one of them.

    Returns
    -------
    The exit code: 1 if a slide failed, else 0.
    """
    source = feature_source(
        "stamp",
        features,
        read_slide,
        cohort,
        orphans,
        dtype,
        list_files=partial(list_files, below=True),  # STAMP keeps the folders of the slides
        needs_mpp=True,
    )
    code = import_slides(dest, source)
    unknown = sum(not row.mpp and not row.fault_in("mpp") for row in source.rows)
    if unknown:
        print(
            f"import stamp: the mpp of {unknown} of {len(source.rows)} slides is not known, so "
            "their places count in pixels of the finest scale; give --cohort a table with the "
            "column mpp for overlays and test --truth"
        )
    return code


def read_slide(row: SlideRow, scales: tuple[Scale, ...], paths: list[Path]) -> SlideFeatures:
    """Read one slide from STAMP's files, coarse to fine."""
    mpp = row.mpp
    files, tile_px, true_scales = [], [], []
    for scale, path in zip(scales, paths, strict=True):
        with hdf5.open_h5(path) as file:
            values, place_um = hdf5.read_tiles(file, "feats", "features")
            unit = hdf5.read_text(file, "unit")
            if unit not in MICROMETRE:
                raise InputError(f"{path}: its coords are in {unit!r}, not in um; {hdf5.AGAIN}")
            side_um = hdf5.read_positive(file, "tile_size_um")
            tile_px.append(hdf5.read_pixels(file, "tile_size_px"))
            encoder = hdf5.read_text(file, "extractor")
        true_mpp = side_um / tile_px[-1]
        require_mpp(path, scale, true_mpp, tolerance=0.2)
        true_scales.append(replace(scale, mpp=Mpp(true_mpp)))
        side = math.ceil(side_um / mpp) if mpp else side_um
        cells, drift_um = _find_cells(path, place_um, side_um, mpp)
        if mpp is None and len(scales) > 1 and drift_um > ROUNDED_UM:
            raise InputError(
                f"{path}: its grid shows that tiles were rounded to whole level-0 px, and whether "
                "those of several magnifications nest depends on the slide's mpp; give --cohort a "
                "table with the column mpp"
            )
        files.append(ScaleFeatures(path, encoder, values, cells * side, side))
    finest = files[-1].side
    if mpp and any(file.side != finest * round(file.side / finest) for file in files):
        sides = ", ".join(f"{s.name} {file.side:g} px" for s, file in zip(scales, files))
        raise InputError(
            f"{paths[0]}: STAMP rounds tiles up to whole level-0 px, on this slide {sides}, so the "
            "grids do not nest; import one magnification, or cut with dasmil tile"
        )
    return SlideFeatures(
        slide_id=row.slide_id,
        scales=tuple(true_scales),
        tile_px=require_same(tile_px, "the tile size", paths[-1]),
        files=tuple(files),
        mpp_is_known=bool(mpp),
    )


def _find_cells(
    path: Path, place_um: np.ndarray, side_um: float, mpp: float | None
) -> tuple[np.ndarray, float]:
    """(N, 2) column, row of tiles; and the largest distance in µm from a grid of exact sides.

    STAMP cuts supertiles of some tiles, each rounded up to whole level-0 pixels. It counts from a
    supertile's corner in tiles of exactly ``side_um``. The two differ by less than half a tile.
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
                f"on a slide of {mpp:g} µm/px; correct the mpp in the cohort table"
                if mpp
                else "without the slide's mpp; give --cohort a table with the column mpp"
            )
        )
    return cells, float(np.abs(place_um - cells * side_um).max(initial=0))
