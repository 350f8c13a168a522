"""The kind ``clam`` of the verb ``import``: CLAM's feature files and patches → bag files."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dasmil.embedding.restricted import load_restricted
from dasmil.errors import InputError, explaining
from dasmil.interop.features import hdf5
from dasmil.interop.features.importer import import_slides
from dasmil.interop.features.nesting import Dtype, Orphans, ScaleFeatures, SlideFeatures
from dasmil.interop.features.sources import (
    FilesBySlide,
    feature_source,
    list_files,
    require_mpp,
    require_same,
)
from dasmil.slides.cohort import SlideRow
from dasmil.units import Scale, parse_scales

AGAIN = "cut the patches again"


def clam(
    dest: Path,
    features: dict[str, Path],
    patches: dict[str, Path],
    encoder: str,
    tile_px: int | None = None,
    cohort: Path | None = None,
    orphans: Orphans = "keep",
    dtype: Dtype = "keep",
) -> int:
    """Import features that CLAM extracted at one or several magnifications into a bag folder.

    CLAM's feature files hold the places of tiles, its patch files their size; neither holds µm. The
    name of a scale tells the µm/px of its tiles; if the cohort table has the slide's mpp, the two
    are compared. CLAM starts a new grid at every contour. The grids nest if all magnifications were
    cut with the same segmentation. Each contour is moved as a whole onto the bag's one grid;
    DEST/import.csv says by how much.

    Parameters
    ----------
    dest:
        folder for the bags.
    features:
        per scale CLAM's feature folder, with h5_files/<slide_id>.h5 or pt_files/<slide_id>.pt.
    patches:
        per scale the folder of create_patches, with patches/<slide_id>.h5.
    encoder:
        name of the network, which the files do not tell; features of different names never mix.
    tile_px:
        side of a tile as the network saw it, if CLAM resized tiles (its --target_patch_size):
        patches of 512 px at 40x are x20 for tiles of 256 px.
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
    if set(patches) != set(features):
        raise InputError(
            f"patches: given for {', '.join(sorted(patches))}, features for "
            f"{', '.join(sorted(features))}; give both for each scale"
        )
    grids = [_inner(Path(patches[scale.name]), "patches") for scale in parse_scales(features)]

    def list_patches(slide_id: str, files: Sequence[FilesBySlide]) -> list[Path]:
        """The files with the same names as those of the features."""
        names = [paths[slide_id].stem if slide_id in paths else slide_id for paths in files]
        return [grid / f"{name}.h5" for grid, name in zip(grids, names, strict=True)]

    source = feature_source(
        "clam",
        features,
        partial(read_slide, encoder=encoder, seen_px=tile_px),
        cohort,
        orphans,
        dtype,
        list_files=_list_features,
        needs_mpp=True,
        other_files=list_patches,
    )
    return import_slides(dest, source)


def _inner(folder: Path, name: str) -> Path:
    """CLAM's folder, or the one inside that holds the files."""
    return folder / name if (folder / name).is_dir() else folder


def _list_features(folder: Path) -> dict[str, Path]:
    """HDF5 files if there are any, since they hold the places of tiles; else tensors."""
    tensors = _inner(folder, "pt_files")
    if any(_inner(folder, "h5_files").glob("*.h5")) or not any(tensors.glob("*.pt")):
        return list_files(_inner(folder, "h5_files"))
    return list_files(tensors, ".pt")


@dataclass(frozen=True)
class Patches:
    """The content of a file of create_patches.

    Parameters
    ----------
    place: (N, 2) x, y in level-0 pixels.
    tile_px: side of a tile in pixels of its level.
    side_px0: side of a tile in level-0 pixels.
    size_px0: width and height of the slide.
    """

    place: npt.NDArray[np.int64]
    tile_px: int
    side_px0: float
    size_px0: tuple[int, int]


def read_patches(path: Path) -> Patches:
    """Read CLAM's ``patches/<slide_id>.h5``; its downsample may be one number or two."""
    with hdf5.open_h5(path) as file:
        place = np.rint(hdf5.read_places(file)).astype(np.int64)
        coords = file["coords"]
        tile_px = hdf5.read_pixels(coords, "patch_size")
        with explaining(f"{path}: its attributes are no numbers", AGAIN, TypeError, ValueError):
            downsample = np.broadcast_to(
                np.asarray(hdf5.read_attribute(coords, "downsample"), float), 2
            )
            size = np.asarray(hdf5.read_attribute(coords, "level_dim"), float) * downsample
            custom = float(coords.attrs.get("custom_downsample", 1))
        if not ((downsample > 0) & (downsample < hdf5.FAR)).all() or not 0 < custom < hdf5.FAR:
            raise InputError(f"{path}: its downsample is {downsample[0]:g}; {AGAIN}")
        if size.shape != (2,) or not ((size >= 1) & (size < hdf5.FAR)).all():
            raise InputError(f"{path}: its level_dim is not the size of a slide; {AGAIN}")
    width, height = np.rint(size).astype(int).tolist()
    side = tile_px * int(downsample[0]) * custom  # CLAM's own step, although levels are 4.0003
    if side < 0.99 * tile_px * downsample[0] * custom:
        raise InputError(
            f"{path}: CLAM placed tiles with a step of {int(downsample[0])} px on a level of "
            f"downsample {downsample[0]:g}, so they overlap; cut them again with dasmil tile"
        )
    return Patches(place, tile_px, side, (width, height))


def read_slide(
    row: SlideRow, scales: tuple[Scale, ...], paths: list[Path], encoder: str, seen_px: int | None
) -> SlideFeatures:
    """Read one slide from CLAM's files, coarse to fine.

    Parameters
    ----------
    paths: of features, then of patches.
    seen_px: side of a tile as the network saw it; None if CLAM did not resize tiles.
    """
    files, tile_px, sizes = [], [], []
    for scale, path, grid in zip(scales, paths, paths[len(scales) :]):
        patches = read_patches(grid)
        values, place = _read_features(path)
        if place is None:
            place = patches.place
            if len(values) != len(place):
                raise InputError(
                    f"{path}: {len(values)} features for the {len(place)} patches of {grid}; "
                    "extract them again from that file"
                )
        elif not _are_same_places(place, patches.place):
            raise InputError(
                f"{path}: its coords are not those of {grid}; give the patches from which the "
                "features were extracted"
            )
        tile_px.append(seen_px or patches.tile_px)
        if row.mpp is not None:
            require_mpp(path, scale, row.mpp * patches.side_px0 / tile_px[-1])
        files.append(ScaleFeatures(path, encoder, values, place, patches.side_px0))
        sizes.append(patches.size_px0)
    require_same(tile_px, "the tile size", paths[-1], "or give --tile_px if CLAM resized tiles")
    return SlideFeatures(row.slide_id, scales, tile_px[-1], tuple(files), sizes[-1])


def _read_features(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64] | None]:
    """Features, and their places unless the file is only a tensor."""
    if path.suffix == ".pt":
        return _load_tensor(path), None
    with hdf5.open_h5(path) as file:
        values, place = hdf5.read_tiles(file, "features")
    return values, np.rint(place).astype(np.int64)


def _load_tensor(path: Path) -> npt.NDArray[Any]:
    values = load_restricted(path, kind="tensor of features")
    if not isinstance(values, torch.Tensor) or values.ndim != 2 or values.is_sparse:
        raise InputError(f"{path}: not a tensor of (tiles, features); extract the features again")
    if values.dtype == torch.bfloat16:  # NumPy lacks it
        values = values.float()
    return hdf5.to_features(path, values.detach().numpy())


def _are_same_places(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> bool:
    pairs, others = (set(map(tuple, places.tolist())) for places in (one, other))
    return one.shape == other.shape and pairs == others
