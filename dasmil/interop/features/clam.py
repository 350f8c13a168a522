"""The kind ``clam`` of the verb ``import``: CLAM's feature files and patches → bag files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dasmil.bags import ExtractorCard
from dasmil.embedding.restricted import load_restricted
from dasmil.errors import InputError
from dasmil.interop.features.hdf5 import (
    FAR,
    as_features,
    attribute,
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
)
from dasmil.units import Scale


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
    """Features that CLAM extracted at one or several magnifications → a folder of bags.

    CLAM's feature files say where tiles lie, its patch files how large they are; neither says µm. A
    scale's tiles are taken for what its name says; where the cohort table has the slide's mpp, that
    is checked. CLAM lays a grid anew for every contour: where all magnifications were cut with the
    same segmentation these nest, and each contour is moved as a whole onto the bag's one grid;
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
        the name of the network, which the files do not say; features of other names never mix.
    tile_px:
        side of a tile as the network saw it, where CLAM resized tiles (its --target_patch_size):
        then patches of 512 px at 40x are x20 for tiles of 256 px.
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
    if set(patches) != set(features):
        raise InputError(
            f"patches: given for {', '.join(sorted(patches))}, features for "
            f"{', '.join(sorted(features))}; give both of each scale"
        )
    files = [_feature_files(folder) for folder in folders]
    grids = [_inner(Path(patches[scale.name]), "patches") for scale in scales]
    mpps = table_mpps(cohort, files)

    def read(slide_id: str) -> tuple[SlideFeatures, dict[str, ExtractorCard]]:
        paths = [found[slide_id] for found in files]
        pairs = list(zip(paths, patches_of(slide_id), strict=True))
        return read_slide(slide_id, scales, pairs, encoder, tile_px, mpps.get(slide_id))

    def patches_of(slide_id: str) -> list[Path]:
        """Files of the same name as those of the features."""
        names = [found[slide_id].stem if slide_id in found else slide_id for found in files]
        return [grid / f"{name}.h5" for grid, name in zip(grids, names, strict=True)]

    return import_features(
        dest, scales, files, read, cohort, "clam", orphans, dtype, mpps, patches_of
    )


def _inner(folder: Path, name: str) -> Path:
    """CLAM's folder, or the one inside that holds the files."""
    return folder / name if (folder / name).is_dir() else folder


def _feature_files(folder: Path) -> dict[str, Path]:
    """h5 files where there are any, since they say where tiles lie; else the bare tensors."""
    inner = _inner(folder, "h5_files")
    if inner.is_dir() and any(inner.glob("*.h5")):
        return files_by_slide(inner)
    tensors = _inner(folder, "pt_files")
    if tensors.is_dir() and any(tensors.glob("*.pt")):
        return files_by_slide(tensors, ".pt")
    return files_by_slide(inner)


@dataclass(frozen=True)
class Patches:
    """What a file of create_patches says.

    Parameters
    ----------
    place: (N, 2) x, y in level-0 pixels.
    tile_px: side of a tile in pixels of its level.
    side_px0: and in level-0 pixels.
    size_px0: of the slide.
    """

    place: npt.NDArray[np.int64]
    tile_px: int
    side_px0: float
    size_px0: tuple[int, int]


def read_patches(path: Path) -> Patches:
    """CLAM's ``patches/<slide_id>.h5``; its downsample may be one number or two."""
    with open_h5(path) as file:
        place = np.rint(read_places(file)).astype(np.int64)
        coords = file["coords"]
        tile_px = whole(coords, "patch_size")
        try:
            downsample = np.broadcast_to(np.asarray(attribute(coords, "downsample"), float), 2)
            size = np.asarray(attribute(coords, "level_dim"), float) * downsample
            custom = float(coords.attrs.get("custom_downsample", 1))
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: its attributes are no numbers ({error})") from error
        if not ((downsample > 0) & (downsample < FAR)).all() or not 0 < custom < FAR:
            raise InputError(f"{path}: its downsample is {downsample[0]:g}; cut the patches again")
        if size.shape != (2,) or not ((size >= 1) & (size < FAR)).all():
            raise InputError(
                f"{path}: its level_dim is the size of no slide; cut the patches again"
            )
    width, height = np.rint(size).astype(int).tolist()
    side = tile_px * int(downsample[0]) * custom  # as CLAM steps, though levels are 4.0003
    if side < 0.99 * tile_px * downsample[0] * custom:
        raise InputError(
            f"{path}: CLAM laid tiles with a step of {int(downsample[0])} px on a level of "
            f"downsample {downsample[0]:g}, so they overlap; cut them anew with dasmil tile"
        )
    return Patches(place, tile_px, side, (width, height))


def read_slide(
    slide_id: str,
    scales: tuple[Scale, ...],
    paths: list[tuple[Path, Path]],
    encoder: str,
    seen_px: int | None,
    mpp: float | None,
) -> tuple[SlideFeatures, dict[str, ExtractorCard]]:
    """One slide of CLAM's, coarse to fine; ``paths`` of features and of patches."""
    found, tile_px, sizes, cards = [], [], [], {}
    side = 0.0
    for scale, (path, grid) in zip(scales, paths, strict=True):
        patches = read_patches(grid)
        values, place = _read_features(path)
        if place is None:
            place = patches.place
            if len(values) != len(place):
                raise InputError(
                    f"{path}: {len(values)} features for the {len(place)} patches of {grid}; "
                    "extract them again from that file"
                )
        elif not _same_places(place, patches.place):
            raise InputError(
                f"{path}: its coords are not those of {grid}; give the patches that it was "
                "extracted from"
            )
        side = patches.side_px0
        tile_px.append(seen_px or patches.tile_px)
        if mpp is not None:
            check_mpp(path, scale, mpp * side / tile_px[-1])
        found.append(ScaleFeatures(path, values, place, side))
        sizes.append(patches.size_px0)
        cards[scale.name] = imported_card("clam", encoder, scale, tile_px[-1], values)
    if len(set(tile_px)) > 1:
        raise InputError(
            f"{paths[-1][1]}: the tile size differs from scale to scale ({tile_px[0]}, "
            f"{tile_px[-1]} px); if all were resized for the network say to what, by --tile_px"
        )
    shared = tile_px[-1]
    slide = SlideFeatures(
        slide_id, scales, shared, tuple(found), shared * scales[-1].mpp / side, sizes[-1]
    )
    return slide, cards


def _read_features(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64] | None]:
    """Features, and where they lie as far as the file says."""
    if path.suffix == ".pt":
        return _load_tensor(path), None
    with open_h5(path) as file:
        values, place = read_features(file, "features"), read_places(file)
    if len(values) != len(place):
        raise InputError(f"{path}: {len(values)} features for {len(place)} coords; extract again")
    return values, np.rint(place).astype(np.int64)


def _load_tensor(path: Path) -> npt.NDArray[Any]:
    values = load_restricted(path, kind="tensor of features")
    if not isinstance(values, torch.Tensor) or values.ndim != 2 or values.is_sparse:
        raise InputError(f"{path}: not a tensor of (tiles, features)")
    if values.dtype == torch.bfloat16:  # which numpy does not know
        values = values.float()
    return as_features(path, values.detach().numpy())


def _same_places(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> bool:
    return one.shape == other.shape and set(map(tuple, one.tolist())) == set(
        map(tuple, other.tolist())
    )
