"""Feature files written by h5py in the very layout of TRIDENT, CLAM and STAMP."""

import math
from pathlib import Path

import h5py
import numpy as np
import torch

# finest tiles of a slide: (column, row); each coarser scale has their ancestors
CELLS = [(c, r) for r in range(4, 12) for c in range(8, 14)]


def ancestors(cells, ratio):
    return sorted({(c // ratio, r // ratio) for c, r in cells}, key=lambda cell: cell[::-1])


def make_features(count, width, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(dtype)


def write_trident(
    root: Path,
    slide_id: str,
    magnification: int,
    cells,
    *,
    level0: int = 40,
    patch_size: int = 256,
    width: int = 8,
    dtype=np.float32,
    encoder: str = "uni_v1",
    side=None,
    overlap: int = 0,
    batched: bool = False,
    features=None,
) -> Path:
    """``features_<encoder>/<slide>.h5`` as TRIDENT writes it; returns that folder."""
    folder = root / f"{magnification}x_{patch_size}px_{overlap}px_overlap" / f"features_{encoder}"
    folder.mkdir(parents=True, exist_ok=True)
    ratio = level0 / magnification
    stride = round(patch_size * ratio)
    coords = np.array(cells, dtype=np.int64).reshape(-1, 2) * stride
    if features is None:
        features = make_features(len(coords), width, seed=magnification, dtype=dtype)
    with h5py.File(folder / f"{slide_id}.h5", "w") as file:
        file.create_dataset("features", data=features[None] if batched else features)
        dataset = file.create_dataset("coords", data=coords)
        dataset.attrs["patch_size"] = patch_size
        dataset.attrs["patch_size_level0"] = patch_size * ratio if side is None else side
        dataset.attrs["level0_magnification"] = level0
        dataset.attrs["target_magnification"] = magnification
        dataset.attrs["overlap"] = overlap
        dataset.attrs["name"] = slide_id
        dataset.attrs["savetodir"] = str(root)
        dataset.attrs["level0_width"] = 40_000
        dataset.attrs["level0_height"] = 30_000
    return folder


def write_clam(
    root: Path,
    slide_id: str,
    coords,
    *,
    level: int,
    downsample: float,
    patch_size: int = 256,
    width: int = 8,
    size=(40_000, 30_000),
    as_pt: bool = False,
    feature_coords=None,
) -> tuple[Path, Path]:
    """``patches/<slide>.h5`` and ``h5_files/`` or ``pt_files/`` as CLAM writes them."""
    (root / "patches").mkdir(parents=True, exist_ok=True)
    coords = np.array(coords, dtype=np.int32).reshape(-1, 2)
    with h5py.File(root / "patches" / f"{slide_id}.h5", "w") as file:
        dataset = file.create_dataset("coords", data=coords)
        dataset.attrs["patch_size"] = patch_size
        dataset.attrs["patch_level"] = level
        dataset.attrs["downsample"] = (downsample, downsample)
        level_dim = tuple(round(side / downsample) for side in size)
        dataset.attrs["downsampled_level_dim"] = level_dim
        dataset.attrs["level_dim"] = level_dim
        dataset.attrs["name"] = slide_id
        dataset.attrs["save_path"] = str(root)
    features = make_features(len(coords), width, seed=level)
    out = root / "FEATURES"
    if as_pt:
        (out / "pt_files").mkdir(parents=True, exist_ok=True)
        torch.save(torch.from_numpy(features), out / "pt_files" / f"{slide_id}.pt")
    else:
        (out / "h5_files").mkdir(parents=True, exist_ok=True)
        with h5py.File(out / "h5_files" / f"{slide_id}.h5", "w") as file:
            file.create_dataset("features", data=features)
            file.create_dataset("coords", data=coords if feature_coords is None else feature_coords)
    return out, root


def write_stamp(
    root: Path,
    slide_id: str,
    cells,
    *,
    tile_um: float,
    mpp: float = 0.25,
    tile_px: int = 224,
    width: int = 8,
    extractor: str = "ctranspath",
    unit: str = "um",
    name: str = "feats",
) -> Path:
    """``<extractor>/<slide>.h5`` as STAMP writes it; returns that folder.

    Tiles are of whole level-0 pixels, rounded up; supertiles of at most 4,096 of them lie side by
    side, and inside one places are counted in ``tile_um``.
    """
    folder = root / f"{tile_um:g}um" / extractor
    folder.mkdir(parents=True, exist_ok=True)
    side_px0 = math.ceil(tile_um / mpp)
    tiles = max(1, int(4096 * mpp // tile_um))
    supertile, inside = np.divmod(np.array(cells, dtype=np.float64).reshape(-1, 2), tiles)
    coords = supertile * tiles * side_px0 * mpp + inside * tile_um
    (folder / slide_id).parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"{slide_id}.h5", "w") as file:
        file.create_dataset("coords", data=coords)
        file.create_dataset(name, data=make_features(len(coords), width, dtype=np.float16))
        file.attrs["extractor"] = extractor
        file.attrs["unit"] = unit
        file.attrs["tile_size_um"] = tile_um
        file.attrs["tile_size_px"] = tile_px
    return folder
