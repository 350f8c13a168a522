"""Write feature files in the layout of TRIDENT, CLAM and STAMP, and import them."""

import math
from pathlib import Path

import h5py
import numpy as np
import torch

from dasmil.bags import Bag, BagHeader, bag_path, read_bag, read_header
from dasmil.cli import main
from dasmil.tables import read_csv

# finest tiles of a slide: (column, row); each coarser scale has their ancestors
CELLS = [(c, r) for r in range(4, 12) for c in range(8, 14)]
RATIOS = {"x5": 4, "x10": 2, "x20": 1}  # side of a tile in sides of the finest
CONTOURS = [(1000, 2000), (9137, 2111), (1003, 9001)]  # where CLAM starts its grids


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
    """Write ``features_<encoder>/<slide>.h5`` as TRIDENT does; returns that folder."""
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
    """Write ``patches/<slide>.h5`` and ``h5_files/`` or ``pt_files/`` as CLAM does."""
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
    """Write ``<extractor>/<slide>.h5`` as STAMP does; returns that folder.

    A tile is rounded up to whole level-0 pixels. Supertiles of at most 4,096 pixels lie side by
    side; inside one, places are counted in ``tile_um``.
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


def trident_folders(root, slide_id="s1", scales=("x5", "x10", "x20"), cells=CELLS, **options):
    """Per scale the folder of one slide's features, whose tiles nest."""
    return {
        s: write_trident(root, slide_id, int(s[1:]), ancestors(cells, RATIOS[s]), **options)
        for s in scales
    }


def clam_coords(side, ratio, zoom=1):
    """Coords of tiles on a grid per contour, each of eight by four finest tiles."""
    step = side * ratio
    return [
        (zoom * x + c * step, zoom * y + r * step)
        for x, y in CONTOURS
        for r in range(4 // ratio)
        for c in range(8 // ratio)
    ]


def clam_folders(root, as_pt=False):
    """Folders of features and of patches: x10 at level 1, x20 at level 0 of a slide of 20x."""
    features, patches = {}, {}
    for scale, ratio in (("x10", 2), ("x20", 1)):
        options = {"level": ratio - 1, "downsample": ratio, "as_pt": as_pt}
        features[scale], patches[scale] = write_clam(
            root / scale, "s1", clam_coords(256, ratio), **options
        )
    return features, patches


def folder_options(folders, name="features"):
    return [text for s, f in folders.items() for text in (f"--{name}.{s}", str(f))]


def run_import(kind, dest, folders, *options):
    return main(["import", kind, str(dest), *folder_options(folders), *map(str, options)])


def run_clam(dest, features, patches, *options):
    options = (*folder_options(patches, "patches"), "--encoder", "resnet50", *options)
    return run_import("clam", dest, features, *options)


def bag_of(folder, slide_id="s1") -> Bag:
    return read_bag(bag_path(folder, slide_id))


def header_of(folder, slide_id="s1") -> BagHeader:
    return read_header(bag_path(folder, slide_id))


def corners(bag, scale):
    """Sorted x, y of the tiles of a bag, in level-0 pixels."""
    return sorted(map(tuple, bag.boxes_px0(scale)[:, :2].tolist()))


def rows_by_slide(path):
    return {row["slide_id"]: row for row in read_csv(path)[1]}
