"""Bags become TRIDENT's files, and come back from them unchanged."""

import h5py
import numpy as np
import pytest
import torch
from bag_factory import with_changes, write_bags
from feature_files import (
    CELLS,
    ancestors,
    bag_of,
    clam_folders,
    rows_by_slide,
    run_clam,
    run_import,
    trident_folders,
    write_stamp,
)

from dasmil.bags import bag_path, write_bag
from dasmil.cli import main


def export(bags, output, dtype="keep"):
    return main(["export", str(bags), str(output), "--dtype", dtype])


@pytest.mark.parametrize("slide_mpp", [0.25, 0.2277])
def test_bags_come_back_unchanged(tmp_path, slide_mpp):
    labels, dims = {"a": "normal", "b": "tumour"}, {"x5": 3, "x10": 6, "x20": 4}
    folder = write_bags(tmp_path / "bags", labels, dims=dims, scales=tuple(dims))
    bags = {slide_id: bag_of(folder, slide_id) for slide_id in labels}
    for slide_id, bag in bags.items():
        bags[slide_id] = with_changes(bag, mpp=slide_mpp)
        write_bag(bag_path(folder, slide_id), bags[slide_id])
    assert export(folder, tmp_path / "out") == 0
    header = bags["a"].header
    folders = {
        name: tmp_path
        / "out"
        / f"{name[1:]}x_{header.tile_px}px_0px_overlap"
        / f"features_{header.extractors[name].name}"
        for name in dims
    }
    table = tmp_path / "out" / "cohort.csv"
    assert run_import("trident", tmp_path / "BACK", folders, "--cohort", table) == 0
    for slide_id, bag in bags.items():
        back = bag_of(tmp_path / "BACK", slide_id)
        assert back.header.extent.mpp == pytest.approx(slide_mpp)
        assert back.header.extent.size_px0 == bag.header.extent.size_px0
        for scale in bag.scales:
            assert torch.equal(back.grid[scale], bag.grid[scale])
            assert torch.equal(back.features[scale], bag.features[scale])
            assert torch.equal(back.boxes_px0(scale), bag.boxes_px0(scale))
        for scale in bag.scales[1:]:
            assert torch.equal(back.parent[scale], bag.parent[scale])
    assert rows_by_slide(tmp_path / "BACK" / "cohort.csv")["b"]["label"] == "tumour"


def test_files_of_trident_come_back_unchanged(tmp_path):
    folders = trident_folders(tmp_path / "in", scales=("x10", "x20"), dtype=np.float16)
    assert run_import("trident", tmp_path / "BAGS", folders) == 0
    assert export(tmp_path / "BAGS", tmp_path / "out") == 0
    for folder in folders.values():
        path = tmp_path / "out" / folder.parent.name / folder.name / "s1.h5"
        with h5py.File(folder / "s1.h5") as before, h5py.File(path) as after:
            assert after["features"].dtype == before["features"].dtype
            assert after["coords"].dtype == np.int64
            tiles = [
                sorted(zip(file["coords"][:].tolist(), file["features"][:].tolist()))
                for file in (before, after)
            ]
            assert tiles[0] == tiles[1]
            attributes = dict(before["coords"].attrs)
            del attributes["savetodir"]
            assert dict(after["coords"].attrs) == attributes
        patches = tmp_path / "out" / folder.parent.name / "patches" / "s1_patches.h5"
        with h5py.File(patches) as file:
            assert list(file) == ["coords"]


def test_other_code_reads_exported_features_without_a_cast(tmp_path):
    """As CLAM does: torch.from_numpy(file["features"][:]) through a Linear of float32."""
    folders = trident_folders(tmp_path / "in", scales=("x20",), dtype=np.float16)
    assert run_import("trident", tmp_path / "BAGS", folders) == 0
    assert main(["export", str(tmp_path / "BAGS"), str(tmp_path / "out")]) == 0
    with h5py.File(tmp_path / "out" / "20x_256px_0px_overlap/features_uni_v1/s1.h5") as file:
        features = torch.from_numpy(file["features"][:])
    assert torch.nn.Linear(8, 2)(features).shape == (len(CELLS), 2)
    assert torch.equal(features, bag_of(tmp_path / "BAGS").features["x20"].float())


def test_bags_of_stamp_come_back_by_their_own_magnification(tmp_path):
    folders = {
        "x10": write_stamp(tmp_path, "s1", ancestors(CELLS, 2), tile_um=256.0),
        "x20": write_stamp(tmp_path, "s1", CELLS, tile_um=128.0),
    }
    table = tmp_path / "cohort.csv"
    table.write_text("slide_id,path,mpp\ns1,s1.svs,0.25\n")
    assert run_import("stamp", tmp_path / "BAGS", folders, "--cohort", table) == 0
    assert export(tmp_path / "BAGS", tmp_path / "out") == 0
    names = {"x8.75": "x10", "x17.5": "x20"}
    written = {
        own: tmp_path / "out" / f"{own[1:]}x_224px_0px_overlap" / "features_ctranspath"
        for own in names
    }
    with h5py.File(written["x17.5"] / "s1.h5") as file:
        assert "level0_width" not in file["coords"].attrs  # it is not known
    assert run_import("trident", tmp_path / "BACK", written) == 0
    bag, back = bag_of(tmp_path / "BAGS"), bag_of(tmp_path / "BACK")
    for own, name in names.items():
        assert torch.equal(back.boxes_px0(own), bag.boxes_px0(name))
        assert torch.equal(back.features[own], bag.features[name])
    assert torch.equal(back.parent["x17.5"], bag.parent["x20"])
    assert not back.header.extent.size_is_known


def test_slides_whose_tiles_were_moved_are_named(tmp_path, capsys):
    assert run_clam(tmp_path / "BAGS", *clam_folders(tmp_path)) == 0
    assert export(tmp_path / "BAGS", tmp_path / "out") == 0
    assert "moved: 1 slide(s) have tiles that `import` moved" in capsys.readouterr().out


def test_features_that_float16_cannot_hold_are_not_exported_as_such(tmp_path, capsys):
    folder = trident_folders(tmp_path, scales=("x20",))["x20"]
    with h5py.File(folder / "s1.h5", "a") as file:
        file["features"][3, 3] = 70_000
    assert run_import("trident", tmp_path / "BAGS", {"x20": folder}) == 0
    assert export(tmp_path / "BAGS", tmp_path / "out", "float16") == 1
    assert "s1: some x20 features are too large for float16" in capsys.readouterr().out


def test_a_bag_that_cannot_be_read_is_named(tmp_path, capsys):
    folder = write_bags(tmp_path / "bags", {"a": None, "b": None})
    path = bag_path(folder, "a")
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["export", str(folder), str(tmp_path / "out")]) == 1
    text = capsys.readouterr().out
    assert f"failed: {path}" in text and "1 done, 1 failed" in text
