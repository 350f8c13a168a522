"""The verb ``export``: bags → feature files in TRIDENT's layout."""

from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from dasmil.bags import Bag, all_finite, bag_path, read_bag
from dasmil.errors import DiskFullError, InputError, join_few
from dasmil.files import atomic_path, must_exist
from dasmil.interop.features.nesting import Dtype
from dasmil.names import path_inside
from dasmil.progress import progress
from dasmil.slides.cohort import SlideRow, read_cohort
from dasmil.tables import read_csv, write_csv
from dasmil.units import Scale


def export(bags: Path, output: Path, dtype: Dtype = "float32") -> int:
    """Write each bag as TRIDENT's HDF5 files, which the MIL code of other tools reads.

    Each scale gets a folder OUTPUT/<magnification>x_<tile px>px_0px_overlap/ with TRIDENT's
    subfolders: features_<extractor>/<slide_id>.h5 holds features, coords (level-0 pixels) and all
    attributes, patches/<slide_id>_patches.h5 only the coords. OUTPUT/cohort.csv is a table that
    CLAM reads (case_id, slide_id, label). Parents are not written: they follow from the coords.

    Parameters
    ----------
    bags:
        folder that embed or import wrote.
    output:
        folder for the files; existing files of the same slides are replaced.
    dtype:
        of the features: float32, which other code reads without a cast, float16, or that of the
        bag (keep).

    Returns
    -------
    The exit code: 1 if a bag is missing or cannot be read, else 0.
    """
    must_exist(bags, "give the folder that embed or import wrote")
    failed: list[str] = []
    done: list[SlideRow] = []
    for row in progress(read_cohort(bags / "cohort.csv"), "export", unit="slide"):
        try:
            bag = read_bag(bag_path(bags, row.slide_id))
            features = {name: _convert(bag, name, dtype) for name in bag.scales}
            for scale in bag.tiles.scales:
                _write_scale(bag, scale, output, features[scale.name])
            done.append(row)
        except DiskFullError:
            raise
        except InputError as error:
            failed.append(f"failed: {error}")
    columns = ("case_id", "slide_id", "label")
    records = ({"case_id": r.patient, "slide_id": r.slide_id, "label": r.label} for r in done)
    write_csv(output / "cohort.csv", columns, records)
    if moved := _list_moved(bags):
        print(
            f"moved: {len(moved)} slide(s) have tiles that `import` moved, see max_moved_px0 in "
            f"{bags / 'import.csv'}: {join_few(moved)}"
        )
    print("\n".join([*failed, f"export: {len(done)} done, {len(failed)} failed; see {output}"]))
    return int(bool(failed))


def _list_moved(bags: Path) -> list[str]:
    """Slides with pieces of tissue that `import` moved onto one grid."""
    path = bags / "import.csv"
    rows = read_csv(path)[1] if path.is_file() else []
    return [row["slide_id"] for row in rows if row.get("moved", "") not in ("", "0")]


def _convert(bag: Bag, scale: str, dtype: Dtype) -> Tensor:
    features = bag.features[scale]
    if dtype == "keep":
        return features
    converted = features.to(getattr(torch, dtype))
    if not all_finite(converted):
        raise InputError(
            f"{bag.slide_id}: some {scale} features are too large for {dtype}; give --dtype keep"
        )
    return converted


def _write_scale(bag: Bag, scale: Scale, output: Path, features: Tensor) -> None:
    folder = output / f"{_round(10 / scale.mpp):g}x_{bag.tiles.tile_px}px_0px_overlap"
    extractor = bag.extractors[scale.name].name.replace("/", "_")
    corners = bag.boxes_px0(scale.name)[:, :2].numpy().astype(np.int64)
    for path, has_features in (
        (path_inside(folder, f"features_{extractor}", f"{bag.slide_id}.h5"), True),
        (path_inside(folder, "patches", f"{bag.slide_id}_patches.h5"), False),
    ):
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            coords = file.create_dataset("coords", data=corners)
            coords.attrs.update(_attributes(bag, scale))
            if has_features:
                file.create_dataset("features", data=features.numpy())


def _attributes(bag: Bag, scale: Scale) -> dict[str, int | float | str]:
    tile_px, extent = int(bag.tiles.tile_px), bag.tiles.extent
    size = extent.size_px0 if extent.size_is_known else ()
    return {
        "patch_size": tile_px,
        "patch_size_level0": _round(float(tile_px * scale.mpp / extent.mpp)),
        "level0_magnification": _round(10 / extent.mpp),
        "target_magnification": _round(10 / scale.mpp),
        "overlap": 0,
        "name": bag.slide_id,
        **dict(zip(("level0_width", "level0_height"), size)),
    }


def _round(value: float) -> int | float:
    """The nearest integer if the difference is a rounding error, else the value."""
    return round(value) if abs(value - round(value)) < 1e-6 else float(value)
