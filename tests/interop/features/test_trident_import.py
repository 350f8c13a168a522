"""TRIDENT's feature files become bags."""

import h5py
import numpy as np
import pytest
import torch
from feature_files import (
    CELLS,
    ancestors,
    bag_of,
    corners,
    rows_by_slide,
    run_import,
    trident_folders,
    write_trident,
)


@pytest.mark.parametrize(
    ("level0", "scales"),
    [(20, ("x20",)), (40, ("x10", "x20")), (60, ("x5", "x20")), (80, ("x5", "x10", "x20"))],
)
def test_tiles_keep_place_features_and_parents(tmp_path, level0, scales):
    folders = trident_folders(tmp_path, scales=scales, level0=level0)
    assert run_import("trident", tmp_path / "BAGS", folders) == 0
    bag = bag_of(tmp_path / "BAGS")
    assert bag.scales == scales
    for scale, folder in folders.items():
        with h5py.File(folder / "s1.h5") as file:
            features = {tuple(xy): f for xy, f in zip(file["coords"][:].tolist(), file["features"])}
        places = bag.boxes_px0(scale)[:, :2].tolist()
        assert len(places) == len(features)
        for xy, of_tile in zip(places, bag.features[scale], strict=True):
            assert np.array_equal(of_tile.numpy(), features[tuple(xy)])
    assert all((bag.parent[scale] >= 0).all() for scale in scales[1:])  # read_bag checks where
    assert bag.header.extent.size_px0 == (40_000, 30_000) and bag.header.extent.size_is_known
    assert bag.header.extent.mpp == pytest.approx(10 / level0)


def test_widths_and_dtypes_are_kept_per_scale(tmp_path):
    folders = {
        "x10": write_trident(tmp_path, "s1", 10, ancestors(CELLS, 2), width=5, dtype=np.float16),
        "x20": write_trident(tmp_path, "s1", 20, CELLS, width=9, encoder="virchow2"),
    }
    assert run_import("trident", tmp_path / "BAGS", folders) == 0
    bag = bag_of(tmp_path / "BAGS")
    assert (bag.features["x10"].dtype, bag.features["x20"].dtype) == (torch.float16, torch.float32)
    assert (bag.features["x10"].shape[1], bag.features["x20"].shape[1]) == (5, 9)
    assert bag.header.extractors["x20"].name == "virchow2"
    assert run_import("trident", tmp_path / "HALF", folders, "--dtype", "float16") == 0
    assert torch.equal(bag_of(tmp_path / "HALF").features["x20"], bag.features["x20"].half())


def test_a_batch_axis_and_double_precision_are_removed(tmp_path):
    folders = trident_folders(tmp_path, scales=("x20",), dtype=np.float64, batched=True)
    assert run_import("trident", tmp_path / "BAGS", folders) == 0
    features = bag_of(tmp_path / "BAGS").features["x20"]
    assert (features.shape, features.dtype) == ((len(CELLS), 8), torch.float32)


@pytest.mark.parametrize(
    ("level0", "side", "step"),
    [(40, 512.4, 512), (40, 562, 562), (41, 524.8, 525), (41, 524, 525)],
)
def test_places_follow_the_step_of_the_coords(tmp_path, level0, side, step):
    """TRIDENT's versions round the attributes differently; the coords show what was done."""
    folder = write_trident(tmp_path, "s1", 20, CELLS, level0=level0, side=side)
    with h5py.File(folder / "s1.h5", "a") as file:
        file["coords"][:] = np.array(CELLS) * step
    assert run_import("trident", tmp_path / "BAGS", {"x20": folder}) == 0
    places = corners(bag_of(tmp_path / "BAGS"), "x20")
    assert places == sorted((c * step, r * step) for c, r in CELLS)
    assert rows_by_slide(tmp_path / "BAGS" / "import.csv")["s1"]["max_moved_px0"] == "0.0"


def test_a_grid_that_does_not_start_at_the_origin_is_refused(tmp_path, capsys):
    folders = trident_folders(tmp_path, scales=("x10", "x20"))
    with h5py.File(folders["x20"] / "s1.h5", "a") as file:
        file["coords"][:] = file["coords"][:] + np.array((256, 0))  # half a fine tile
    assert run_import("trident", tmp_path / "BAGS", folders) == 2
    error = capsys.readouterr().err
    assert str(folders["x20"] / "s1.h5") in error and "lie on no grid of 512 level-0 px" in error
    assert not (tmp_path / "BAGS").exists()


CONTRADICTIONS = [
    ("overlap", 64, "tiles overlap by 64 px"),
    ("target_magnification", 40, "x20 is 0.5"),
    ("patch_size_level0", 1024, "its tiles have 1 µm/px"),
    ("level0_magnification", None, "attribute level0_magnification is missing"),
    ("level0_magnification", 0, "is 0, not a positive number"),
    ("level0_magnification", "40x", "is '40x', not a positive number"),
]


def test_attributes_that_contradict_each_other_cost_one_slide_each(tmp_path):
    folder = write_trident(tmp_path, "sound", 20, CELLS)
    for number, (name, value, _) in enumerate(CONTRADICTIONS):
        write_trident(tmp_path, f"s{number}", 20, CELLS)
        with h5py.File(folder / f"s{number}.h5", "a") as file:
            if value is None:
                del file["coords"].attrs[name]
            else:
                file["coords"].attrs[name] = value
    assert run_import("trident", tmp_path / "BAGS", {"x20": folder}) == 1
    rows = rows_by_slide(tmp_path / "BAGS" / "import.csv")
    assert rows.pop("sound")["state"] == "done"
    for number, (*_, words) in enumerate(CONTRADICTIONS):
        message = rows[f"s{number}"]["message"]
        assert words in message and str(folder / f"s{number}.h5") in message
