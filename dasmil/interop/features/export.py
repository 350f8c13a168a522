"""The verb ``export``: our bags → feature files as TRIDENT writes them."""

from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from dasmil.bags import Bag, all_finite, bag_path, read_bag
from dasmil.errors import DiskFullError, InputError, some_of
from dasmil.files import atomic_path, must_exist
from dasmil.interop.features.nesting import Dtype
from dasmil.names import path_inside
from dasmil.progress import progress
from dasmil.slides.cohort import SlideRow, read_cohort
from dasmil.tables import read_csv, write_csv
from dasmil.units import Scale


def export(bags: Path, output: Path, dtype: Dtype = "float32") -> int:
    """Write every bag as TRIDENT's HDF5 files, which other tools' MIL code reads.

    For each scale OUTPUT/<magnification>x_<tile px>px_0px_overlap/ with TRIDENT's folders:
    features_<extractor>/<slide_id>.h5 holds features, coords (level-0 pixels) and all attributes,
    patches/<slide_id>_patches.h5 the coords alone. OUTPUT/cohort.csv is a table as CLAM reads it
    (case_id, slide_id, label). Parents are not written: they follow from the coords.

    Parameters
    ----------
    bags:
        folder that embed or import wrote.
    output:
        folder for the files; what is there of the same slides is replaced.
    dtype:
        of the features: float32, which others' code takes without a cast, float16, or as they are
        in the bag (keep).

    Returns
    -------
    The exit code: 1 when a bag is missing or cannot be read, else 0.
    """
    must_exist(bags, "give the folder that embed or import wrote")
    rows = read_cohort(bags / "cohort.csv")
    failed = []
    done: list[SlideRow] = []
    for row in progress(rows, "export", unit="slide"):
        try:
            bag = read_bag(bag_path(bags, row.slide_id))
            features = {name: _as_asked(bag, name, dtype) for name in bag.scales}
            for scale in bag.header.scales:
                _write_scale(bag, scale, output, features[scale.name])
        except DiskFullError:
            raise
        except InputError as error:
            failed.append(f"failed: {error}")
            continue
        done.append(row)
    columns = ("case_id", "slide_id", "label")
    records = ({"case_id": r.patient, "slide_id": r.slide_id, "label": r.label} for r in done)
    write_csv(output / "cohort.csv", columns, records)
    if moved := _moved(bags):
        print(
            f"moved: tiles of {len(moved)} slide(s) do not lie where they were cut, see "
            f"max_moved_px0 in {bags / 'import.csv'}: {some_of(moved)}"
        )
    print("\n".join([*failed, f"export: {len(done)} done, {len(failed)} failed; see {output}"]))
    return int(bool(failed))


def scale_folder(bag: Bag, scale: Scale, output: Path) -> Path:
    """The folder that TRIDENT would give a scale."""
    return output / f"{_whole(10 / scale.mpp):g}x_{bag.header.tile_px}px_0px_overlap"


def _moved(bags: Path) -> list[str]:
    """Slides of CLAM's whose contours `import` has moved onto one grid."""
    path = bags / "import.csv"
    rows = read_csv(path)[1] if path.is_file() else []
    return [row["slide_id"] for row in rows if row.get("moved", "") not in ("", "0")]


def _as_asked(bag: Bag, scale: str, dtype: Dtype) -> Tensor:
    features = bag.features[scale]
    if dtype == "keep":
        return features
    found = features.to(getattr(torch, dtype))
    if not all_finite(found):
        raise InputError(
            f"{bag.slide_id}: some {scale} features are too large for {dtype}; give --dtype keep"
        )
    return found


def _write_scale(bag: Bag, scale: Scale, output: Path, features: Tensor) -> None:
    folder = scale_folder(bag, scale, output)
    extractor = bag.header.extractors[scale.name].name.replace("/", "_")
    corners = bag.boxes_px0(scale.name)[:, :2].numpy().astype(np.int64)
    for path, holds_features in (
        (path_inside(folder, f"features_{extractor}", f"{bag.slide_id}.h5"), True),
        (path_inside(folder, "patches", f"{bag.slide_id}_patches.h5"), False),
    ):
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            coords = file.create_dataset("coords", data=corners)
            coords.attrs.update(_attributes(bag, scale))
            if holds_features:
                file.create_dataset("features", data=features.numpy())


def _attributes(bag: Bag, scale: Scale) -> dict[str, int | float | str]:
    header = bag.header
    side_px0 = float(header.tile_px * scale.mpp / header.slide_mpp)
    nearest = round(side_px0)
    known = not header.size_is_extent
    size = zip(("level0_width", "level0_height"), header.size_px0) if known else ()
    return {
        "patch_size": int(header.tile_px),
        "patch_size_level0": nearest if abs(side_px0 - nearest) < 1e-6 else side_px0,
        "level0_magnification": _whole(10 / header.slide_mpp),
        "target_magnification": _whole(10 / scale.mpp),
        "overlap": 0,
        "name": bag.slide_id,
        **dict(size),
    }


def _whole(value: float) -> int | float:
    """A whole number where it is one but for rounding."""
    return round(value) if abs(value - round(value)) < 1e-6 else float(value)
