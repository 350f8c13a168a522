"""CLAM's feature files and patches become bags."""

import h5py
import numpy as np
import pytest
import torch
from feature_files import (
    bag_of,
    clam_coords,
    clam_folders,
    folder_options,
    make_features,
    rows_by_slide,
    run_clam,
    write_clam,
)

from dasmil.cli import main


@pytest.mark.parametrize("as_pt", [False, True], ids=["h5_files", "pt_files"])
def test_contours_nest_and_are_moved_as_wholes(tmp_path, as_pt, capsys):
    features, patches = clam_folders(tmp_path, as_pt)
    assert run_clam(tmp_path / "BAGS", features, patches) == 0
    bag = bag_of(tmp_path / "BAGS")
    assert bag.num_tiles() == {"x10": 3 * 8, "x20": 3 * 32}
    assert (bag.parent["x20"] >= 0).all()
    row = rows_by_slide(tmp_path / "BAGS" / "import.csv")["s1"]
    assert (row["orphans"], row["childless"]) == ("0", "0")
    assert 0 < float(row["max_moved_px0"]) <= 512
    assert "moved: 1 slide(s) have pieces of tissue with grids" in capsys.readouterr().out
    # every tile has its own features, wherever its contour was moved
    places = zip(map(tuple, make_features(96, 8, seed=0).tolist()), clam_coords(256, 1))
    place_of = dict(places)
    for box, of_tile in zip(bag.boxes_px0("x20").tolist(), bag.features["x20"].tolist()):
        x, y = place_of[tuple(of_tile)]
        assert max(abs(box[0] - x), abs(box[1] - y)) <= float(row["max_moved_px0"])


def test_grids_of_other_contours_do_not_nest(tmp_path, capsys):
    features, patches = clam_folders(tmp_path)
    shifted = [(x + 100, y) for x, y in clam_coords(256, 2)]
    write_clam(tmp_path / "x10", "s1", shifted, level=1, downsample=2)
    assert run_clam(tmp_path / "BAGS", features, patches) == 1
    assert "do not nest" in capsys.readouterr().out


def test_features_of_other_patches_are_refused(tmp_path, capsys):
    features, patches = clam_folders(tmp_path)
    coords = np.array(clam_coords(256, 1))
    write_clam(tmp_path / "x20", "s1", coords, level=0, downsample=1, feature_coords=coords + 1)
    assert run_clam(tmp_path / "BAGS", features, patches) == 2
    assert "its coords are not those of" in capsys.readouterr().err


def test_a_known_mpp_is_compared_with_the_tiles(tmp_path, capsys):
    features, patches = clam_folders(tmp_path)
    table = tmp_path / "cohort.csv"
    table.write_text("slide_id,path,mpp\ns1,s1.svs,0.5\n")
    assert run_clam(tmp_path / "BAGS", features, patches, "--cohort", table) == 0
    table.write_text("slide_id,path,mpp\ns1,s1.svs,0.25\n")
    assert run_clam(tmp_path / "OTHER", features, patches, "--cohort", table) == 2
    assert "its tiles have 0.5 µm/px, x10 is 1" in capsys.readouterr().err


def test_scales_of_different_tile_sizes_are_refused(tmp_path, capsys):
    features, patches = clam_folders(tmp_path)
    options = {"level": 1, "downsample": 2, "patch_size": 512}
    write_clam(tmp_path / "x10", "s1", clam_coords(256, 4), **options)
    assert run_clam(tmp_path / "BAGS", features, patches) == 2
    assert "tile size differs between scales (512, 256)" in capsys.readouterr().err


def test_tiles_may_have_been_resized_for_the_network(tmp_path):
    """Of a 40x slide with levels of 40x and 10x: x20 is 512 px at 40x, shown as 256."""
    features, patches = {}, {}
    for scale, size, level, downsample in (("x10", 256, 1, 4), ("x20", 512, 0, 1)):
        coords = clam_coords(512, size * downsample // 512)
        options = {"level": level, "downsample": downsample, "patch_size": size}
        features[scale], patches[scale] = write_clam(tmp_path / scale, "s1", coords, **options)
    table = tmp_path / "cohort.csv"
    table.write_text("slide_id,path,mpp\ns1,s1.svs,0.25\n")
    options = ("--cohort", table, "--tile_px", 256)
    assert run_clam(tmp_path / "BAGS", features, patches, *options) == 0
    bag = bag_of(tmp_path / "BAGS")
    assert (bag.header.tile_px, bag.header.extent.mpp) == (256, pytest.approx(0.25))
    assert (bag.parent["x20"] >= 0).all() and bag.num_tiles() == {"x10": 24, "x20": 96}
    boxes = bag.boxes_px0("x20")
    assert set((boxes[:, 2] - boxes[:, 0]).tolist()) == {512}
    assert run_clam(tmp_path / "OTHER", features, patches, "--cohort", table) == 2


@pytest.mark.parametrize("width", [47_823, 31_337])
def test_downsamples_are_not_quite_whole(tmp_path, width):
    """CLAM keeps 47,823 / 2,988 = 16.005 as a downsample and steps by 16 times the patch."""
    features, patches = {}, {}
    for scale, level, whole in (("x2.5", 2, 16), ("x10", 1, 4)):
        coords = clam_coords(1024, whole // 4, zoom=4)
        downsample = width / (width // whole)
        assert int(downsample) == whole != downsample
        options = {"level": level, "downsample": downsample, "size": (width, width)}
        features[scale], patches[scale] = write_clam(tmp_path / scale, "s1", coords, **options)
    assert run_clam(tmp_path / "BAGS", features, patches) == 0
    bag = bag_of(tmp_path / "BAGS")
    assert (bag.parent["x10"] >= 0).all() and bag.num_tiles() == {"x2.5": 6, "x10": 96}
    assert bag.header.extent.size_px0 == (width, width)


def test_tiles_that_overlap_since_clam_rounds_are_refused(tmp_path, capsys):
    features, patches = write_clam(tmp_path, "s1", clam_coords(768, 1), level=1, downsample=3.9998)
    assert run_clam(tmp_path / "BAGS", {"x20": features}, {"x20": patches}) == 2
    assert "a step of 3 px on a level of downsample 3.9998" in capsys.readouterr().err


def test_the_encoder_must_be_named(tmp_path, capsys):
    features, patches = clam_folders(tmp_path)
    command = [*folder_options(features), *folder_options(patches, "patches")]
    assert main(["import", "clam", str(tmp_path / "BAGS"), *command]) == 2
    assert "encoder" in capsys.readouterr().err


def test_a_pickle_is_not_opened(tmp_path, capsys):
    features, patches = clam_folders(tmp_path, as_pt=True)
    torch.save({"f": print}, features["x20"] / "pt_files" / "s1.pt")
    assert run_clam(tmp_path / "BAGS", features, patches) == 2
    assert "is not loaded: it asks for" in capsys.readouterr().err


def test_a_bag_is_created_again_if_the_patches_have_changed(tmp_path):
    features, patches = clam_folders(tmp_path, as_pt=True)
    assert run_clam(tmp_path / "BAGS", features, patches) == 0
    before = bag_of(tmp_path / "BAGS").boxes_px0("x20")
    for folder in patches.values():
        with h5py.File(folder / "patches" / "s1.h5", "a") as file:
            file["coords"][:] = file["coords"][:] + 2560
    assert run_clam(tmp_path / "BAGS", features, patches) == 0
    assert (bag_of(tmp_path / "BAGS").boxes_px0("x20") - before).min() > 2000
