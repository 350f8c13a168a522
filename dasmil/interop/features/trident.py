"""The kind ``trident`` of the verb ``import``: TRIDENT's feature files → bag files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dasmil.errors import InputError
from dasmil.interop.features import hdf5
from dasmil.interop.features.importer import import_slides
from dasmil.interop.features.nesting import Dtype, Orphans, ScaleFeatures, SlideFeatures
from dasmil.interop.features.sources import feature_source, require_mpp, require_same
from dasmil.slides.cohort import SlideRow
from dasmil.units import Scale


def trident(
    dest: Path,
    features: dict[str, Path],
    cohort: Path | None = None,
    orphans: Orphans = "keep",
    dtype: Dtype = "keep",
) -> int:
    """Import features that TRIDENT extracted at one or several magnifications into a bag folder.

    TRIDENT's files hold all that is needed: places, tile size and magnification. Its grids start at
    the slide's origin, so those of 5x, 10x and 20x nest. Per slide, DEST/import.csv counts the
    tiles that lie in no coarser one (orphans) and those that hold no finer one (childless).

    Parameters
    ----------
    dest:
        folder for the bags.
    features:
        per scale a folder of <slide_id>.h5, for example --features.x20
        20x_256px_0px_overlap/features_uni_v1.
    cohort:
        table with the labels: a cohort table (slide_id, path, label, ...) or CLAM's (case_id,
        slide_id, label); without it the bags are for predict.
    orphans:
        keep or drop tiles without a parent, and coarser ones without a child.
    dtype:
        keep the float16 or float32 of the files, or convert to one of them.

    Returns
    -------
    The exit code: 1 if a slide failed, else 0.
    """
    return import_slides(
        dest, feature_source("trident", features, read_slide, cohort, orphans, dtype)
    )


def read_slide(row: SlideRow, scales: tuple[Scale, ...], paths: list[Path]) -> SlideFeatures:
    """Read one slide from TRIDENT's files, coarse to fine."""
    files, tile_px, slide_mpp, sizes = [], [], [], []
    for scale, path in zip(scales, paths, strict=True):
        with hdf5.open_h5(path) as file:
            values, place = hdf5.read_tiles(file, "features")
            coords = file["coords"]
            overlap = hdf5.read_attribute(coords, "overlap")
            if overlap != 0:
                raise InputError(
                    f"{path}: its tiles overlap by {overlap} px, so one lies in several coarser "
                    "ones; extract the features again with --overlap 0"
                )
            tile_px.append(hdf5.read_pixels(coords, "patch_size"))
            side = hdf5.read_positive(coords, "patch_size_level0")
            slide_mpp.append(10 / hdf5.read_positive(coords, "level0_magnification"))
            target_mpp = 10 / hdf5.read_positive(coords, "target_magnification")
            if "level0_width" in coords.attrs:
                width = hdf5.read_pixels(coords, "level0_width")
                sizes.append((width, hdf5.read_pixels(coords, "level0_height")))
        require_mpp(path, scale, target_mpp)
        require_mpp(path, scale, slide_mpp[-1] * side / tile_px[-1])
        sides = (round(side), round(tile_px[-1] * target_mpp / slide_mpp[-1]), side)
        encoder = path.parent.name.removeprefix("features_")
        files.append(ScaleFeatures(path, encoder, values, place, find_step(path, place, sides)))
    require_same(slide_mpp, "the magnification of level 0", paths[-1])
    require_same(tile_px, "the tile size", paths[-1])
    size_px0 = require_same(sizes, "the size of the slide", paths[-1]) if sizes else None
    return SlideFeatures(row.slide_id, scales, tile_px[-1], tuple(files), size_px0)


def find_step(path: Path, place: np.ndarray, sides: Sequence[float]) -> float:
    """The step of the grid in level-0 pixels; TRIDENT rounds the side of a tile to get it.

    Parameters
    ----------
    sides: candidates; the first one on whose grid all places lie is taken.
    """
    for side in sides:
        if side > 0 and np.abs(place - np.rint(place / side) * side).max(initial=0) <= 0.5:
            return float(side)
    raise InputError(
        f"{path}: its coords lie on no grid of {sides[-1]:g} level-0 px from the slide's origin; "
        "extract the features again with TRIDENT, or cut with dasmil tile"
    )
