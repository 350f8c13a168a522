"""The verb ``export``: our bags → feature files as TRIDENT writes them."""

from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from dasmil.bags import Bag, bag_path, read_bag
from dasmil.errors import InputError
from dasmil.files import atomic_path, write_csv
from dasmil.slides.cohort import SlideRow, read_cohort
from dasmil.units import Scale


def export(bags: Path, output: Path) -> int:
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

    Returns
    -------
    The exit code: 1 when a bag is missing or cannot be read, else 0.
    """
    rows = read_cohort(bags / "cohort.csv")
    failed = []
    done: list[SlideRow] = []
    for row in tqdm(rows, "export", unit="slide"):
        try:
            bag = read_bag(bag_path(bags, row.slide_id))
        except InputError as error:
            failed.append(f"failed: {error}")
            continue
        for scale in bag.header.scales:
            _write_scale(bag, scale, output)
        done.append(row)
    columns = ("case_id", "slide_id", "label")
    records = ({"case_id": r.patient, "slide_id": r.slide_id, "label": r.label} for r in done)
    write_csv(output / "cohort.csv", columns, records)
    print("\n".join([*failed, f"export: {len(done)} done, {len(failed)} failed; see {output}"]))
    return int(bool(failed))


def scale_folder(bag: Bag, scale: Scale, output: Path) -> Path:
    """The folder that TRIDENT would give a scale."""
    return output / f"{scale.name.removeprefix('x')}x_{bag.header.tile_px}px_0px_overlap"


def _write_scale(bag: Bag, scale: Scale, output: Path) -> None:
    folder = scale_folder(bag, scale, output)
    extractor = bag.header.extractors[scale.name].name.replace("/", "_")
    corners = bag.boxes_px0(scale.name)[:, :2].numpy().astype(np.int64)
    features = bag.features[scale.name].numpy()
    for path, holds_features in (
        (folder / f"features_{extractor}" / f"{bag.slide_id}.h5", True),
        (folder / "patches" / f"{bag.slide_id}_patches.h5", False),
    ):
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            coords = file.create_dataset("coords", data=corners)
            coords.attrs.update(_attributes(bag, scale))
            if holds_features:
                file.create_dataset("features", data=features)


def _attributes(bag: Bag, scale: Scale) -> dict[str, int | float | str]:
    header = bag.header
    side_px0 = float(header.tile_px * scale.mpp / header.slide_mpp)
    nearest = round(side_px0)
    width, height = header.size_px0
    return {
        "patch_size": int(header.tile_px),
        "patch_size_level0": nearest if abs(side_px0 - nearest) < 1e-6 else side_px0,
        "level0_magnification": _whole(10 / header.slide_mpp),
        "target_magnification": _whole(10 / scale.mpp),
        "overlap": 0,
        "name": bag.slide_id,
        "level0_width": width,
        "level0_height": height,
    }


def _whole(value: float) -> int | float:
    """A whole number where it is one but for rounding."""
    return round(value) if abs(value - round(value)) < 1e-6 else float(value)
