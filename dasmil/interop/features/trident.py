"""The kind ``trident`` of the verb ``import``: TRIDENT's feature files → bag files."""

from collections.abc import Sequence
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
)
from dasmil.interop.features.nesting import (
    Dtype,
    Orphans,
    ScaleFeatures,
    SlideFeatures,
    check_mpp,
    same,
)
from dasmil.units import Scale

SIDES = ("width", "height")


def trident(
    dest: Path,
    features: dict[str, Path],
    cohort: Path | None = None,
    orphans: Orphans = "keep",
    dtype: Dtype = "keep",
) -> int:
    """Features that TRIDENT extracted at one or several magnifications → a folder of bags.

    Its files say all that is needed: places, tile size and magnification. Its grids start at the
    slide's origin, so those of 5x, 10x and 20x nest. DEST/import.csv says of every slide how many
    tiles lie in no coarser one (orphans) or hold no finer one (childless).

    Parameters
    ----------
    dest:
        folder for the bags.
    features:
        per scale a folder of <slide_id>.h5, for example --features.x20
        20x_256px_0px_overlap/features_uni_v1.
    cohort:
        table with the labels: ours (slide_id, path, label, ...) or CLAM's (case_id, slide_id,
        label); without it the bags are for predict.
    orphans:
        keep or drop tiles without a parent, and coarser ones without a child.
    dtype:
        keep the files' float16 or float32, or make it one of them.

    Returns
    -------
    The exit code: 1 when a slide failed, else 0.
    """
    scales, folders = parse_folders(features)
    files = [files_by_slide(folder) for folder in folders]

    def read(slide_id: str) -> tuple[SlideFeatures, dict[str, ExtractorCard]]:
        return read_slide(slide_id, scales, [found[slide_id] for found in files])

    return import_features(dest, scales, files, read, cohort, "trident", orphans, dtype)


def read_slide(
    slide_id: str, scales: tuple[Scale, ...], paths: list[Path]
) -> tuple[SlideFeatures, dict[str, ExtractorCard]]:
    """One slide of TRIDENT's, coarse to fine."""
    found, tile_px, slide_mpp, sizes, cards = [], [], [], [], {}
    for scale, path in zip(scales, paths, strict=True):
        with open_h5(path) as file:
            values, place = read_features(file, "features"), read_places(file)
            coords = file["coords"]
            if len(values) != len(place):
                raise InputError(
                    f"{path}: {len(values)} features for {len(place)} coords; extract it again"
                )
            overlap = attribute(coords, "overlap")
            if overlap != 0:
                raise InputError(
                    f"{path}: its tiles overlap by {overlap} px, so one lies in several coarser "
                    "ones; extract it with --overlap 0"
                )
            tile_px.append(whole(coords, "patch_size"))
            side = number(coords, "patch_size_level0")
            slide_mpp.append(10 / number(coords, "level0_magnification"))
            target_mpp = 10 / number(coords, "target_magnification")
            check_mpp(path, scale, target_mpp)
            check_mpp(path, scale, slide_mpp[-1] * side / tile_px[-1])
            if "level0_width" in coords.attrs:
                sizes.append(
                    (
                        whole(coords, "level0_width"),
                        whole(coords, "level0_height"),
                    )
                )
        sides = (round(side), round(tile_px[-1] * target_mpp / slide_mpp[-1]), side)
        found.append(ScaleFeatures(path, values, place, step(path, place, sides)))
        encoder = path.parent.name.removeprefix("features_")
        cards[scale.name] = imported_card("trident", encoder, scale, tile_px[-1], values)
    same(slide_mpp, "the magnification of level 0", paths[-1])
    shared = same(tile_px, "the tile size", paths[-1])
    slide = SlideFeatures(
        slide_id=slide_id,
        scales=scales,
        tile_px=shared,
        files=tuple(found),
        slide_mpp=shared * scales[-1].mpp / found[-1].side,  # so that places are the grid's
        size_px0=same(sizes, "the size of the slide", paths[-1]) if sizes else None,
    )
    return slide, cards


def step(path: Path, place: np.ndarray, sides: Sequence[float]) -> float:
    """The step of the grid: TRIDENT rounds the side of a tile before it lays the grid.

    Parameters
    ----------
    sides: what it may have made of it; the first with which all places are of the grid is taken.
    """
    for side in sides:
        if side > 0 and np.abs(place - np.rint(place / side) * side).max(initial=0) <= 0.5:
            return float(side)
    raise InputError(
        f"{path}: its coords lie on no grid of {sides[-1]:g} level-0 px from the slide's origin; "
        "extract it again with TRIDENT, or cut with dasmil tile"
    )
