"""TRIDENT's, CLAM's and STAMP's feature files become bags, and bags TRIDENT's files."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from bag_factory import write_bags
from feature_files import CELLS, ancestors, make_features, write_clam, write_stamp, write_trident
from road import CONF, CONFIGS

from dasmil.bags import bag_path, read_bag, read_header, write_bag
from dasmil.cli import main
from dasmil.interop.features import trident as trident_module
from dasmil.tables import read_csv

SCALES = {"x5": 4, "x10": 2, "x20": 1}  # ratio to the finest


def trident_folders(root, slide_id="s1", scales=("x5", "x10", "x20"), cells=CELLS, **options):
    return {
        s: write_trident(root, slide_id, int(s[1:]), ancestors(cells, SCALES[s]), **options)
        for s in scales
    }


def folder_options(folders, name="features"):
    return [text for s, f in folders.items() for text in (f"--{name}.{s}", str(f))]


def run(kind, dest, folders, *options):
    return main(["import", kind, str(dest), *folder_options(folders), *map(str, options)])


def rows_of(path):
    return {row["slide_id"]: row for row in read_csv(path)[1]}


# TRIDENT


@pytest.mark.parametrize("level0", [20, 40, 60, 80])
@pytest.mark.parametrize("scales", [("x20",), ("x10", "x20"), ("x5", "x20"), ("x5", "x10", "x20")])
def test_tridents_tiles_keep_place_features_and_parents(tmp_path, level0, scales):
    folders = trident_folders(tmp_path, scales=scales, level0=level0)
    assert run("trident", tmp_path / "BAGS", folders) == 0
    bag = read_bag(bag_path(tmp_path / "BAGS", "s1"))
    assert bag.scales == scales
    for scale, folder in folders.items():
        with h5py.File(folder / "s1.h5") as file:
            places = {tuple(xy): f for xy, f in zip(file["coords"][:].tolist(), file["features"])}
        corners = bag.boxes_px0(scale)[:, :2].tolist()
        assert len(corners) == len(places)
        for xy, found in zip(corners, bag.features[scale], strict=True):
            assert np.array_equal(found.numpy(), places[tuple(xy)])
    assert all((bag.parent[scale] >= 0).all() for scale in scales[1:])  # validate() checked where
    assert bag.header.size_px0 == (40_000, 30_000) and not bag.header.size_is_extent
    assert bag.header.slide_mpp == pytest.approx(10 / level0)


def test_widths_and_dtypes_are_kept_per_scale(tmp_path):
    folders = {
        "x10": write_trident(tmp_path, "s1", 10, ancestors(CELLS, 2), width=5, dtype=np.float16),
        "x20": write_trident(tmp_path, "s1", 20, CELLS, width=9, encoder="virchow2"),
    }
    assert run("trident", tmp_path / "BAGS", folders) == 0
    bag = read_bag(bag_path(tmp_path / "BAGS", "s1"))
    assert (bag.features["x10"].dtype, bag.features["x20"].dtype) == (torch.float16, torch.float32)
    assert (bag.features["x10"].shape[1], bag.features["x20"].shape[1]) == (5, 9)
    assert bag.header.extractors["x20"].name == "virchow2"
    assert run("trident", tmp_path / "HALF", folders, "--dtype", "float16") == 0
    half = read_bag(bag_path(tmp_path / "HALF", "s1"))
    assert torch.equal(half.features["x20"], bag.features["x20"].half())


def test_features_that_float16_cannot_hold_are_refused(tmp_path, capsys):
    folders = trident_folders(tmp_path, scales=("x20",))
    with h5py.File(folders["x20"] / "s1.h5", "a") as file:
        file["features"][3, 3] = 70_000
    assert run("trident", tmp_path / "HALF", folders, "--dtype", "float16") == 1
    text = capsys.readouterr().out
    assert "s1.h5: some features are too large for float16; give --dtype keep or float32" in text
    assert run("trident", tmp_path / "HALF", folders) == 0


def test_a_batch_axis_and_double_precision_are_taken_off(tmp_path):
    folders = trident_folders(tmp_path, scales=("x20",), dtype=np.float64, batched=True)
    assert run("trident", tmp_path / "BAGS", folders) == 0
    bag = read_bag(bag_path(tmp_path / "BAGS", "s1"))
    assert bag.features["x20"].shape == (len(CELLS), 8)
    assert bag.features["x20"].dtype == torch.float32


@pytest.mark.parametrize(
    ("level0", "side", "step"),
    [(40, 512.4, 512), (40, 562, 562), (41, 524.8, 525), (41, 524, 525)],
)
def test_places_are_those_of_the_step_that_the_coords_have(tmp_path, level0, side, step):
    """Attributes are rounded, or not, by this version or that; the coords say what was done."""
    folder = write_trident(tmp_path, "s1", 20, CELLS, level0=level0, side=side)
    with h5py.File(folder / "s1.h5", "a") as file:
        file["coords"][:] = np.array(CELLS) * step
    assert run("trident", tmp_path / "BAGS", {"x20": folder}) == 0
    bag = read_bag(bag_path(tmp_path / "BAGS", "s1"))
    assert sorted(map(tuple, bag.boxes_px0("x20")[:, :2].tolist())) == sorted(
        (c * step, r * step) for c, r in CELLS
    )
    assert rows_of(tmp_path / "BAGS" / "import.csv")["s1"]["max_moved_px0"] == "0.0"


def test_orphans_are_counted_and_kept_or_dropped(tmp_path, capsys):
    coarse = [cell for cell in ancestors(CELLS, 2) if cell != (4, 2)] + [(20, 20)]
    folders = {
        "x10": write_trident(tmp_path, "s1", 10, coarse),
        "x20": write_trident(tmp_path, "s1", 20, CELLS),
    }
    assert run("trident", tmp_path / "BAGS", folders) == 0
    text = capsys.readouterr().out
    assert "orphans: 4 tiles lie in no coarser tile, 1 hold no finer one (rule: keep)" in text
    row = rows_of(tmp_path / "BAGS" / "import.csv")["s1"]
    assert (row["orphans"], row["childless"], row["rule"]) == ("4", "1", "keep")
    kept = read_bag(bag_path(tmp_path / "BAGS", "s1"))
    assert (kept.parent["x20"] < 0).sum() == 4 and kept.num_tiles() == {"x10": 12, "x20": 48}
    assert run("trident", tmp_path / "BAGS", folders, "--orphans", "drop") == 0
    dropped = read_bag(bag_path(tmp_path / "BAGS", "s1"))  # other options: made anew
    assert (dropped.parent["x20"] >= 0).all() and dropped.num_tiles() == {"x10": 11, "x20": 44}
    assert len(dropped.parent["x20"].unique()) == 11


def test_a_folder_holds_one_configuration_also_of_slides_not_asked_for_now(tmp_path, capsys):
    """Other scales, encoders and options of other slides are refused by what differs."""
    assert run("trident", tmp_path / "BAGS", trident_folders(tmp_path / "one", "s1")) == 0
    before = (tmp_path / "BAGS" / "cohort.csv").read_bytes()
    folders = trident_folders(tmp_path / "two", "s2")
    coarse = {scale: folders[scale] for scale in ("x5", "x10")}
    for given, options, words in (
        (coarse, [], "scales x5, x10, x20 instead of x5, x10"),
        (folders, ["--orphans", "drop"], "orphans keep → drop"),
    ):
        assert run("trident", tmp_path / "BAGS", given, *options) == 2
        said = capsys.readouterr().err
        assert f"{tmp_path / 'BAGS' / 's1.safetensors'}: made otherwise" in said and words in said
        assert (tmp_path / "BAGS" / "cohort.csv").read_bytes() == before
    write_bags(tmp_path / "OWN", {"s9": "normal"})
    assert run("trident", tmp_path / "OWN", folders) == 2
    assert "embed made it" in capsys.readouterr().err
    assert run("trident", tmp_path / "BAGS", folders) == 0


def test_dropping_goes_down_and_up_the_whole_pyramid(tmp_path):
    """A x10 tile without a x5 tile takes its x20 tiles along; a x5 tile left alone goes too."""
    folders = trident_folders(tmp_path)
    lonely = [cell for cell in ancestors(CELLS, 4) if cell != (2, 1)]
    folders["x5"] = write_trident(tmp_path, "s1", 5, lonely)
    assert run("trident", tmp_path / "BAGS", folders, "--orphans", "drop") == 0
    bag = read_bag(bag_path(tmp_path / "BAGS", "s1"))
    assert bag.num_tiles() == {"x5": 3, "x10": 8, "x20": 32}


def test_a_slide_without_tiles_is_legal(tmp_path):
    for slide_id, cells in (("s1", CELLS), ("s2", [])):
        folders = trident_folders(tmp_path, slide_id, cells=cells)
    assert run("trident", tmp_path / "BAGS", folders) == 0
    assert set(read_bag(bag_path(tmp_path / "BAGS", "s2")).num_tiles().values()) == {0}
    assert rows_of(tmp_path / "BAGS" / "import.csv")["s2"]["state"] == "empty"


def shifted(folder, by):
    with h5py.File(folder / "s1.h5", "a") as file:
        file["coords"][:] = file["coords"][:] + np.array(by)


def test_a_grid_that_does_not_start_at_the_origin_is_refused(tmp_path, capsys):
    folders = trident_folders(tmp_path, scales=("x10", "x20"))
    shifted(folders["x20"], (256, 0))  # half a fine tile
    assert run("trident", tmp_path / "BAGS", folders) == 2
    error = capsys.readouterr().err
    assert str(folders["x20"] / "s1.h5") in error and "lie on no grid of 512 level-0 px" in error
    assert not bag_path(tmp_path / "BAGS", "s1").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("overlap", 64, "tiles overlap by 64 px"),
        ("target_magnification", 40, "x20 is 0.5"),
        ("patch_size_level0", 1024, "its tiles have 1 µm/px"),
        ("level0_magnification", None, "attribute level0_magnification is missing"),
        ("level0_magnification", 0, "is 0, not a positive number"),
        ("level0_magnification", "40x", "is '40x', not a positive number"),
    ],
)
def test_attributes_that_contradict_are_refused(tmp_path, capsys, name, value, words):
    folders = trident_folders(tmp_path, scales=("x20",))
    write_trident(tmp_path, "s2", 20, CELLS)
    with h5py.File(folders["x20"] / "s1.h5", "a") as file:
        if value is None:
            del file["coords"].attrs[name]
        else:
            file["coords"].attrs[name] = value
    assert run("trident", tmp_path / "BAGS", folders) == 1
    text = capsys.readouterr().out
    assert words in text and str(folders["x20"] / "s1.h5") in text
    assert "1 done, 1 failed" in text


def test_one_bad_file_costs_one_row(tmp_path, capsys):
    for slide_id in ("s1", "s2", "s3", "s4", "s5", "s6"):
        folders = trident_folders(tmp_path, slide_id, scales=("x10", "x20"))
    (folders["x20"] / "s6.h5").unlink()
    (folders["x20"] / "s6.h5").symlink_to(tmp_path / "gone.h5")
    (folders["x20"] / "s1.h5").write_bytes(b"no HDF5")
    (folders["x10"] / "s2.h5").unlink()
    with h5py.File(folders["x20"] / "s3.h5", "a") as file:
        file["features"][3, 3] = np.nan
    write_trident(tmp_path, "s4", 20, CELLS, width=7)
    assert run("trident", tmp_path / "BAGS", folders) == 1
    capsys.readouterr()
    found = rows_of(tmp_path / "BAGS" / "import.csv")
    states = [found[f"s{n}"]["state"] for n in range(1, 7)]
    assert states == [*["failed"] * 4, "done", "failed"]
    for slide_id, words in (
        ("s1", "not a readable HDF5 file"),
        ("s2", "no feature file at x10"),
        ("s3", "some features are not finite; extract it again"),
        ("s4", "7 wide"),
        ("s6", "s6.h5: does not exist; extract it again"),
    ):
        assert words in found[slide_id]["message"], found[slide_id]
    assert main(["status", str(tmp_path / "BAGS")]) == 0
    assert "1 done, 5 failed" in capsys.readouterr().out


def test_the_next_run_does_what_is_left(tmp_path):
    for slide_id in ("s1", "s2"):
        folders = trident_folders(tmp_path, slide_id, scales=("x10", "x20"))
    broken = folders["x20"] / "s1.h5"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    assert run("trident", tmp_path / "BAGS", folders) == 1
    done = bag_path(tmp_path / "BAGS", "s2")
    before = done.stat().st_mtime_ns
    broken.write_bytes(whole)
    assert run("trident", tmp_path / "BAGS", folders) == 0
    assert done.stat().st_mtime_ns == before
    assert read_bag(bag_path(tmp_path / "BAGS", "s1")).num_tiles()["x20"] == len(CELLS)


def test_encoders_never_mix(tmp_path):
    one = trident_folders(tmp_path / "a", scales=("x20",))
    other = trident_folders(tmp_path / "b", scales=("x20",), encoder="gigapath")
    assert run("trident", tmp_path / "ONE", one) == run("trident", tmp_path / "TWO", other) == 0
    cards = [
        read_header(bag_path(tmp_path / name, "s1")).extractors["x20"] for name in ("ONE", "TWO")
    ]
    assert cards[0].fingerprint != cards[1].fingerprint
    records = json.loads((tmp_path / "ONE" / "extractors.json").read_text())
    assert records["x20"]["trained_on"] is None


# the table


def test_labels_come_from_clams_table_and_nobody_is_lost_silently(tmp_path, capsys):
    for slide_id in ("s1", "s2", "extra"):
        folders = trident_folders(tmp_path, slide_id, scales=("x20",))
    table = tmp_path / "dataset.csv"
    table.write_text("case_id,slide_id,label\np1,s1.svs,tumour\np1,s2,normal\np2,s3,normal\n")
    assert run("trident", tmp_path / "BAGS", folders, "--cohort", table) == 1
    text = capsys.readouterr().out
    assert "left out: 1 slide(s) with features are not in the table: extra" in text
    rows = rows_of(tmp_path / "BAGS" / "cohort.csv")
    assert [(r["slide_id"], r["label"], r["patient_id"]) for r in rows.values()] == [
        ("s1", "tumour", "p1"),
        ("s2", "normal", "p1"),
        ("s3", "normal", "p2"),
    ]
    assert "no feature file at x20" in rows_of(tmp_path / "BAGS" / "import.csv")["s3"]["message"]


def test_fit_and_predict_run_on_imported_bags_of_two_widths(tmp_path):
    lines = ["slide_id,path,label,split"]
    for number in range(8):
        cells = CELLS[number:]
        write_trident(tmp_path, f"s{number}", 10, ancestors(cells, 2), width=5)
        write_trident(tmp_path, f"s{number}", 20, cells, width=9, encoder="b")
        part = ("train", "train", "val", "test")[number // 2]
        lines.append(f"s{number},s{number}.svs,{('normal', 'tumour')[number % 2]},{part}")
    (tmp_path / "cohort.csv").write_text("\n".join(lines))
    folders = {
        "x10": tmp_path / "10x_256px_0px_overlap" / "features_uni_v1",
        "x20": tmp_path / "20x_256px_0px_overlap" / "features_b",
    }
    bags = tmp_path / "BAGS"
    assert run("trident", bags, folders, "--cohort", tmp_path / "cohort.csv") == 0
    fit = ["fit", "--config", str(CONFIGS / "mil.yaml"), "--config", str(CONF / "dasmil.yaml")]
    fit += ["--data.bags", str(bags), "--trainer.max_epochs", "1"]
    fit += ["--output", str(tmp_path / "run")]
    assert main(fit) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    command = ["--ckpt_path", str(checkpoint), "--bags", str(bags), "--output", str(tmp_path / "P")]
    assert main(["predict", *command]) == 0
    assert len(rows_of(tmp_path / "P" / "predictions.csv")) == 8


# CLAM


def clam_contours(side, ratio, origins):
    """Coords of tiles that start anew at each contour; all of six by four finest tiles."""
    step = side * ratio
    columns, rows = 8 // ratio, 4 // ratio
    return [
        (x + c * step, y + r * step)
        for x, y in origins
        for r in range(rows)
        for c in range(columns)
    ]


ORIGINS = [(1000, 2000), (9137, 2111), (1003, 9001)]


def clam_folders(root, as_pt=False, slide_id="s1"):
    """x10 at level 1, x20 at level 0 of a slide of 20x."""
    features, patches = {}, {}
    for scale, ratio in (("x10", 2), ("x20", 1)):
        coords = clam_contours(256, ratio, ORIGINS)
        features[scale], patches[scale] = write_clam(
            root / scale, slide_id, coords, level=ratio - 1, downsample=ratio, as_pt=as_pt
        )
    return features, patches


def run_clam(dest, features, patches, *options):
    encoder = () if "--encoder" in options else ("--encoder", "resnet50")
    return run("clam", dest, features, *folder_options(patches, "patches"), *encoder, *options)


@pytest.mark.parametrize("as_pt", [False, True], ids=["h5_files", "pt_files"])
def test_clams_contours_nest_and_are_moved_as_wholes(tmp_path, as_pt, capsys):
    features, patches = clam_folders(tmp_path, as_pt)
    assert run_clam(tmp_path / "BAGS", features, patches) == 0
    bag = read_bag(bag_path(tmp_path / "BAGS", "s1"))
    assert bag.num_tiles() == {"x10": 3 * 8, "x20": 3 * 32}
    assert (bag.parent["x20"] >= 0).all()
    row = rows_of(tmp_path / "BAGS" / "import.csv")["s1"]
    assert (row["orphans"], row["childless"]) == ("0", "0")
    assert 0 < float(row["max_moved_px0"]) <= 512
    assert "grids of pieces of tissue were moved onto one" in capsys.readouterr().out
    # every tile has its own features, wherever its contour was moved
    expected = dict(
        zip(clam_contours(256, 1, ORIGINS), map(tuple, make_features(96, 8, seed=0).tolist()))
    )
    by_features = {features: place for place, features in expected.items()}
    for box, found in zip(bag.boxes_px0("x20").tolist(), bag.features["x20"].tolist()):
        x, y = by_features[tuple(found)]
        assert max(abs(box[0] - x), abs(box[1] - y)) <= float(row["max_moved_px0"])


def test_clams_grids_of_other_contours_are_refused(tmp_path, capsys):
    features, patches = clam_folders(tmp_path)
    other = [(x + 100, y) for x, y in clam_contours(256, 2, ORIGINS)]
    features["x10"], patches["x10"] = write_clam(
        tmp_path / "x10", "s1", other, level=1, downsample=2
    )
    assert run_clam(tmp_path / "BAGS", features, patches) == 1
    assert "do not nest" in capsys.readouterr().out


def test_features_of_other_patches_are_refused(tmp_path, capsys):
    features, patches = clam_folders(tmp_path)
    coords = np.array(clam_contours(256, 1, ORIGINS))
    write_clam(tmp_path / "x20", "s1", coords, level=0, downsample=1, feature_coords=coords + 1)
    assert run_clam(tmp_path / "BAGS", features, patches) == 2
    assert "its coords are not those of" in capsys.readouterr().err


def test_a_known_mpp_is_held_against_clams_tiles(tmp_path, capsys):
    features, patches = clam_folders(tmp_path)
    table = tmp_path / "cohort.csv"
    table.write_text("slide_id,path,mpp\ns1,s1.svs,0.5\n")
    assert run_clam(tmp_path / "BAGS", features, patches, "--cohort", table) == 0
    table.write_text("slide_id,path,mpp\ns1,s1.svs,0.25\n")
    assert run_clam(tmp_path / "OTHER", features, patches, "--cohort", table) == 2
    assert "its tiles have 0.5 µm/px, x10 is 1" in capsys.readouterr().err


def test_scales_of_other_tile_sizes_are_refused(tmp_path, capsys):
    features, patches = clam_folders(tmp_path)
    write_clam(
        tmp_path / "x10",
        "s1",
        clam_contours(256, 4, ORIGINS),
        level=1,
        downsample=2,
        patch_size=512,
    )
    assert run_clam(tmp_path / "BAGS", features, patches) == 2
    assert "tile size differs from scale to scale (512, 256 px)" in capsys.readouterr().err


def test_clams_tiles_may_have_been_resized_for_the_network(tmp_path):
    """Of a 40x slide with levels of 40x and 10x: x20 is 512 px at 40x, shown as 256."""
    features, patches = {}, {}
    for scale, size, level, downsample in (("x10", 256, 1, 4), ("x20", 512, 0, 1)):
        coords = clam_contours(512, size * downsample // 512, ORIGINS)
        options = {"level": level, "downsample": downsample, "patch_size": size}
        features[scale], patches[scale] = write_clam(tmp_path / scale, "s1", coords, **options)
    table = tmp_path / "cohort.csv"
    table.write_text("slide_id,path,mpp\ns1,s1.svs,0.25\n")
    options = ("--cohort", table, "--tile_px", 256)
    assert run_clam(tmp_path / "BAGS", features, patches, *options) == 0
    bag = read_bag(bag_path(tmp_path / "BAGS", "s1"))
    assert (bag.header.tile_px, bag.header.slide_mpp) == (256, pytest.approx(0.25))
    assert (bag.parent["x20"] >= 0).all() and bag.num_tiles() == {"x10": 24, "x20": 96}
    boxes = bag.boxes_px0("x20")
    assert set((boxes[:, 2] - boxes[:, 0]).tolist()) == {512}
    assert run_clam(tmp_path / "OTHER", features, patches, "--cohort", table) == 2


@pytest.mark.parametrize("width", [47_823, 31_337])
def test_clams_levels_are_not_quite_whole(tmp_path, width):
    """CLAM keeps 47,823 / 2,988 = 16.005 for a downsample and steps by 16 times the patch."""
    features, patches = {}, {}
    for scale, level, whole in (("x2.5", 2, 16), ("x10", 1, 4)):
        coords = clam_contours(1024, whole // 4, [(4 * x, 4 * y) for x, y in ORIGINS])
        downsample = width / (width // whole)
        assert int(downsample) == whole != downsample
        options = {"level": level, "downsample": downsample, "size": (width, width)}
        features[scale], patches[scale] = write_clam(tmp_path / scale, "s1", coords, **options)
    assert run_clam(tmp_path / "BAGS", features, patches) == 0
    bag = read_bag(bag_path(tmp_path / "BAGS", "s1"))
    assert (bag.parent["x10"] >= 0).all() and bag.num_tiles() == {"x2.5": 6, "x10": 96}
    assert bag.header.size_px0 == (width, width)


def test_clams_tiles_that_overlap_for_its_rounding_are_refused(tmp_path, capsys):
    folders = write_clam(tmp_path, "s1", clam_contours(768, 1, ORIGINS), level=1, downsample=3.9998)
    assert run_clam(tmp_path / "BAGS", {"x20": folders[0]}, {"x20": folders[1]}) == 2
    assert "a step of 3 px on a level of downsample 3.9998" in capsys.readouterr().err


def test_clams_encoder_must_be_named(tmp_path, capsys):
    features, patches = clam_folders(tmp_path)
    command = [*folder_options(features), *folder_options(patches, "patches")]
    assert main(["import", "clam", str(tmp_path / "BAGS"), *command]) == 2
    assert "encoder" in capsys.readouterr().err


def test_a_pickle_is_not_opened(tmp_path, capsys):
    features, patches = clam_folders(tmp_path, as_pt=True)
    torch.save({"f": print}, features["x20"] / "pt_files" / "s1.pt")
    assert run_clam(tmp_path / "BAGS", features, patches) == 2
    assert "is not loaded: it asks for" in capsys.readouterr().err


# STAMP


BLOCK = [(c, r) for r in range(60, 88) for c in range(100, 128)]


def stamp_table(path, mpp):
    path.write_text(f"slide_id,path,mpp\ns1,s1.svs,{mpp}\n")
    return path


@pytest.mark.parametrize("mpp", [0.25, 0.252, 0.2277, 0.2485, 0.5, 0.5021])
def test_stamps_micrometres_become_pixels_of_the_slide(tmp_path, mpp):
    folders = {"x20": write_stamp(tmp_path, "s1", BLOCK, tile_um=128.0, mpp=mpp)}
    table = stamp_table(tmp_path / "cohort.csv", mpp)
    assert run("stamp", tmp_path / "BAGS", folders, "--cohort", table) == 0
    bag = read_bag(bag_path(tmp_path / "BAGS", "s1"))
    assert bag.features["x20"].dtype == torch.float16
    assert bag.header.scales[0].mpp == pytest.approx(128 / 224)
    side = math.ceil(128 / mpp)
    places = [(c * side, r * side) for c, r in BLOCK]
    assert sorted(map(tuple, bag.boxes_px0("x20")[:, :2].tolist())) == sorted(places)
    assert bag.header.slide_mpp == pytest.approx(mpp, rel=1 / side)
    assert rows_of(tmp_path / "BAGS" / "import.csv")["s1"]["moved"] == "0"
    assert bag.header.mpp_is_known and bag.header.size_is_extent

    assert run("stamp", tmp_path / "PLAIN", folders) == 0
    plain = read_bag(bag_path(tmp_path / "PLAIN", "s1"))
    assert torch.equal(plain.grid["x20"], bag.grid["x20"])
    assert torch.equal(plain.features["x20"], bag.features["x20"])
    assert not plain.header.mpp_is_known and plain.header.size_is_extent


@pytest.mark.parametrize(
    ("mpp", "nests"), [(0.25, True), (0.5, True), (0.2526, True), (0.2277, False)]
)
def test_stamps_magnifications_nest_where_its_pixels_do(tmp_path, capsys, mpp, nests):
    """256 and 128 µm are 1,014 and 507 px at 0.2526 µm/px, but 1,125 and 563 at 0.2277."""
    folders = {
        "x10": write_stamp(tmp_path, "s1", ancestors(BLOCK, 2), tile_um=256.0, mpp=mpp, width=5),
        "x20": write_stamp(tmp_path, "s1", BLOCK, tile_um=128.0, mpp=mpp),
    }
    table = stamp_table(tmp_path / "cohort.csv", mpp)
    if not nests:
        assert run("stamp", tmp_path / "BAGS", folders, "--cohort", table) == 2
        words = "on this slide x10 1125 px, x20 563 px, so the grids do not nest"
        assert words in capsys.readouterr().err
    else:
        assert run("stamp", tmp_path / "BAGS", folders, "--cohort", table) == 0
        bag = read_bag(bag_path(tmp_path / "BAGS", "s1"))
        assert bag.num_tiles() == {"x10": 196, "x20": 784}
        assert (bag.parent["x20"] >= 0).all()
    capsys.readouterr()
    if mpp in (0.25, 0.5):
        assert run("stamp", tmp_path / "PLAIN", folders) == 0
        assert "the mpp of 1 of 1 slides is not known, so their places" in capsys.readouterr().out
    else:
        assert run("stamp", tmp_path / "PLAIN", folders) == 2
        assert "nest depends on the slide's mpp; give --cohort" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mpp", "wrong"), [(0.2485, 0.5021), (0.25, 0.2485), (0.25, 0.2277), (0.5, 0.49)]
)
def test_a_wrong_mpp_is_seen_by_stamps_places(tmp_path, capsys, mpp, wrong):
    folders = {"x20": write_stamp(tmp_path, "s1", BLOCK, tile_um=128.0, mpp=mpp)}
    table = stamp_table(tmp_path / "cohort.csv", wrong)
    assert run("stamp", tmp_path / "BAGS", folders, "--cohort", table) == 2
    assert f"on a slide of {wrong:g} µm/px; is the mpp of the table the" in capsys.readouterr().err


@pytest.mark.parametrize(("mpp", "written"), [(0.22774, 0.2277), (0.25203, 0.252)])
def test_an_mpp_that_a_table_rounds_is_near_enough_for_stamps_places(tmp_path, mpp, written):
    folders = {"x20": write_stamp(tmp_path, "s1", BLOCK, tile_um=128.0, mpp=mpp)}
    table = stamp_table(tmp_path / "cohort.csv", written)
    assert run("stamp", tmp_path / "BAGS", folders, "--cohort", table) == 0
    side = math.ceil(128 / mpp)
    places = read_bag(bag_path(tmp_path / "BAGS", "s1")).boxes_px0("x20")[:, :2].tolist()
    assert sorted(map(tuple, places)) == sorted((c * side, r * side) for c, r in BLOCK)


def test_stamps_folders_of_slides_are_looked_into(tmp_path, capsys):
    for slide_id in ("gdc-1/s1", "gdc-2/s2", "s3"):
        folders = {"x20": write_stamp(tmp_path, slide_id, CELLS, tile_um=128.0)}
    assert run("stamp", tmp_path / "BAGS", folders) == 0
    assert set(rows_of(tmp_path / "BAGS" / "import.csv")) == {"s1", "s2", "s3"}
    write_stamp(tmp_path, "gdc-4/s3", CELLS, tile_um=128.0)
    assert run("stamp", tmp_path / "OTHER", folders) == 2
    assert "are of the same slide; keep one of them" in capsys.readouterr().err


def test_stamp_says_of_how_many_slides_the_mpp_is_not_known(tmp_path, capsys):
    for slide_id in ("s1", "s2", "s3"):
        folders = {"x20": write_stamp(tmp_path, slide_id, CELLS, tile_um=128.0)}
    table = tmp_path / "cohort.csv"
    rows = ["s1,s1.svs,0.25", "s2,s2.svs,", "s3,s3.svs,"]
    for known, words in ((1, "the mpp of 2 of 3 slides is not known"), (3, "")):
        lines = [row if row[-1] != "," else row + "0.25" * (known == 3) for row in rows]
        table.write_text("\n".join(["slide_id,path,mpp", *lines]))
        assert run("stamp", tmp_path / "BAGS", folders, "--cohort", table) == 0
        printed = capsys.readouterr().out
        assert words in printed and ("import stamp: the mpp" in printed) == bool(words)


def test_stamps_other_units_and_magnifications_are_refused(tmp_path, capsys):
    folder = write_stamp(tmp_path, "s1", CELLS, tile_um=128.0, unit="px")
    assert run("stamp", tmp_path / "BAGS", {"x20": folder}) == 2
    assert "its coords are in 'px'" in capsys.readouterr().err
    folder = write_stamp(tmp_path, "s1", CELLS, tile_um=256.0)
    assert run("stamp", tmp_path / "BAGS", {"x20": folder}) == 2
    assert "its tiles have 1.14 µm/px, x20 is 0.5" in capsys.readouterr().err


def test_other_folders_of_the_same_encoder_are_imported_anew(tmp_path):
    """Also where they are older than the bags."""
    first, second = (
        {"x20": write_trident(tmp_path / name, "s1", 20, CELLS, dtype=np.float16)}
        for name in ("v1", "v2")
    )
    with h5py.File(second["x20"] / "s1.h5", "a") as file:
        file["features"][:] = 2 * file["features"][:]
    os.utime(second["x20"] / "s1.h5", (1e9, 1e9))
    found = []
    for folders in (first, second, second):
        assert run("trident", tmp_path / "BAGS", folders) == 0
        found.append(bag_path(tmp_path / "BAGS", "s1").stat().st_mtime_ns)
        bag = read_bag(bag_path(tmp_path / "BAGS", "s1"))
    with h5py.File(first["x20"] / "s1.h5") as file:
        assert bag.features["x20"].sum() == 2 * torch.from_numpy(file["features"][:]).sum()
    assert found[0] < found[1] == found[2]


def test_what_a_slide_is_made_of_is_looked_at_again(tmp_path):
    """STAMP's places follow from the table's mpp, CLAM's from its patches."""
    folders = {"x20": write_stamp(tmp_path, "s1", CELLS, tile_um=128.0)}
    assert run("stamp", tmp_path / "BAGS", folders) == 0
    table = stamp_table(tmp_path / "cohort.csv", 0.25)
    assert run("stamp", tmp_path / "BAGS", folders, "--cohort", table) == 0
    header = read_header(bag_path(tmp_path / "BAGS", "s1"))
    assert header.slide_mpp == pytest.approx(0.25)

    features, patches = clam_folders(tmp_path, as_pt=True)
    assert run_clam(tmp_path / "CLAM", features, patches) == 0
    before = read_bag(bag_path(tmp_path / "CLAM", "s1")).boxes_px0("x20")
    for folder in patches.values():
        path = folder / "patches" / "s1.h5"
        with h5py.File(path, "a") as file:
            file["coords"][:] = file["coords"][:] + 2560
    assert run_clam(tmp_path / "CLAM", features, patches) == 0
    after = read_bag(bag_path(tmp_path / "CLAM", "s1")).boxes_px0("x20")
    assert (after - before).min() > 2000


def test_a_table_with_a_slide_twice_is_refused(tmp_path, capsys):
    folders = trident_folders(tmp_path, scales=("x20",))
    table = tmp_path / "dataset.csv"
    table.write_text("slide_id,label\ns1,a\ns1.svs,a\n")
    assert run("trident", tmp_path / "BAGS", folders, "--cohort", table) == 2
    assert "slide_id 's1' stands twice" in capsys.readouterr().err
    assert not (tmp_path / "BAGS" / "cohort.csv").exists()


@pytest.mark.parametrize("columns", ["slide_id,path,mpp", "slide_id,label,mpp"])
@pytest.mark.parametrize("text", ["?", "0", "nan"])
def test_an_mpp_that_is_no_number_costs_a_slide_of_stamps_and_none_of_tridents(
    tmp_path, columns, text
):
    """STAMP's places need the mpp; TRIDENT's files have their own."""
    table = tmp_path / "cohort.csv"
    table.write_text(f"{columns}\ns1,a,0.25\ns2,a,{text}\n")
    for slide_id in ("s1", "s2"):
        trident = trident_folders(tmp_path, slide_id, scales=("x20",))
        stamp = {"x20": write_stamp(tmp_path / "stamp", slide_id, CELLS, tile_um=128.0)}
    assert run("trident", tmp_path / "TRIDENT", trident, "--cohort", table) == 0
    assert run("stamp", tmp_path / "BAGS", stamp) == 0  # a bag of before does not stay
    assert run("stamp", tmp_path / "BAGS", stamp, "--cohort", table) == 1
    rows = rows_of(tmp_path / "BAGS" / "status.csv")
    assert (rows["s1"]["state"], rows["s2"]["state"]) == ("done", "failed")
    assert f"cohort.csv line 3: mpp {text!r} is no positive number" in rows["s2"]["message"]
    assert not bag_path(tmp_path / "BAGS", "s2").exists()
    assert read_header(bag_path(tmp_path / "BAGS", "s1")).slide_mpp == 0.25


def test_what_follows_the_last_dot_is_no_suffix_of_a_name(tmp_path):
    """Slides 16 and 16.1 are two, each with its own mpp; only suffixes of slides are left out."""
    for slide_id, mpp in (("16", 0.25), ("16.1", 0.5), ("17", 0.25)):
        folder = write_stamp(tmp_path, slide_id, CELLS, tile_um=128.0, mpp=mpp)
    table = tmp_path / "cohort.csv"
    table.write_text("slide_id,path,mpp\n16,16.svs,0.25\n16.1,16.1.svs,0.5\n17.SVS,17.SVS,0.25\n")
    assert run("stamp", tmp_path / "BAGS", {"x20": folder}, "--cohort", table) == 0
    found = {s: read_header(bag_path(tmp_path / "BAGS", s)).slide_mpp for s in ("16", "16.1", "17")}
    assert found == {"16": 0.25, "16.1": 0.5, "17": 0.25}


def test_features_in_linked_folders_and_under_names_with_blanks_are_found(tmp_path):
    stamp = write_stamp(tmp_path / "far", "s1", CELLS, tile_um=128.0)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "linked").symlink_to(stamp)
    assert run("stamp", tmp_path / "BAGS", {"x20": tmp_path / "here"}) == 0
    features, patches = clam_folders(tmp_path / "clam")
    for folder in (*features.values(), *patches.values()):
        for path in folder.rglob("s1.h5"):
            path.rename(path.with_name(" s1 .h5"))
    assert run_clam(tmp_path / "CLAM", features, patches) == 0
    assert rows_of(tmp_path / "CLAM" / "import.csv")["s1"]["state"] == "done"


# what cannot be


@pytest.mark.parametrize("name", ["features", "coords"])
@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", "<f8", "i1", "u1", ">i2", "u4", ">u8"])
def test_numbers_of_any_width_sign_and_byte_order_are_read(tmp_path, name, dtype):
    cells = [(c, r) for r in range(2) for c in range(3)]
    values = {"features": np.arange(18).reshape(6, 3), "coords": np.array(cells) * 32}
    for slide_id in ("s1", "s2"):  # the first as TRIDENT writes it
        folder = write_trident(tmp_path, slide_id, 20, cells, patch_size=16, width=3)
        with h5py.File(folder / f"{slide_id}.h5", "a") as file:
            attributes = dict(file["coords"].attrs)
            del file["features"], file["coords"]
            for key, array in values.items():
                kind = dtype if key == name and slide_id == "s2" else "f4"
                file.create_dataset(key, data=array.astype(kind))
            file["coords"].attrs.update(attributes)
    assert run("trident", tmp_path / "BAGS", {"x20": folder}) == 0
    one, two = (read_bag(bag_path(tmp_path / "BAGS", s)) for s in ("s1", "s2"))
    assert torch.equal(one.features["x20"], two.features["x20"].float())
    assert torch.equal(one.grid["x20"], two.grid["x20"])


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("features", np.ones((48, 8), bool), "its features are of type bool"),
        ("features", np.ones((48, 8), complex), "its features are of type complex128"),
        ("features", np.full((48, 8), b"a"), "its features are of type |S1"),
        (
            "features",
            h5py.ExternalLink("other.h5", "features"),
            "features is a link to another file",
        ),
        ("features", h5py.SoftLink("nowhere"), "features cannot be read"),
        ("coords", np.full((48, 2), np.nan), "some coords lie on no slide"),
        ("coords", np.full((48, 2), -256), "some coords lie on no slide"),
        ("coords", np.ones((48, 3)), "coords of the shape (48, 3)"),
    ],
    ids=["bool", "complex", "text", "outside", "nowhere", "NaN", "negative", "three columns"],
)
def test_what_is_no_number_costs_its_slide_alone(tmp_path, name, values, words):
    for slide_id in ("s1", "s2", "s3"):
        folder = write_trident(tmp_path, slide_id, 20, CELLS)
    with h5py.File(folder / "s2.h5", "a") as file:
        attributes = dict(file["coords"].attrs)
        del file[name]
        file[name] = values
        file["coords"].attrs.update(attributes)
    assert run("trident", tmp_path / "BAGS", {"x20": folder}) == 1
    rows = rows_of(tmp_path / "BAGS" / "import.csv")
    assert {s: row["state"] for s, row in rows.items()} == {
        "s1": "done",
        "s2": "failed",
        "s3": "done",
    }
    assert words in rows["s2"]["message"]


def test_a_library_that_fails_costs_one_slide_too(tmp_path, monkeypatch):
    for slide_id in ("s1", "s2"):
        folder = write_trident(tmp_path, slide_id, 20, CELLS)

    def fail(file):
        raise ZeroDivisionError("as libraries do")

    real = trident_module.read_places
    monkeypatch.setattr(
        trident_module, "read_places", lambda f: (fail if "s1" in f.filename else real)(f)
    )
    assert run("trident", tmp_path / "BAGS", {"x20": folder}) == 1
    rows = rows_of(tmp_path / "BAGS" / "import.csv")
    assert (rows["s1"]["message"], rows["s2"]["state"]) == (
        "ZeroDivisionError: as libraries do",
        "done",
    )


def test_a_slide_without_tiles_need_not_say_how_wide_features_are(tmp_path):
    for slide_id in ("a", "s1"):
        folder = write_trident(tmp_path, slide_id, 20, CELLS)
    with h5py.File(folder / "a.h5", "a") as file:
        attributes = dict(file["coords"].attrs)
        del file["features"], file["coords"]
        file["features"], file["coords"] = np.empty(0, np.float32), h5py.Empty("f8")
        file["coords"].attrs.update(attributes)
    assert run("trident", tmp_path / "BAGS", {"x20": folder}) == 0
    assert rows_of(tmp_path / "BAGS" / "import.csv")["a"]["state"] == "empty"
    assert read_bag(bag_path(tmp_path / "BAGS", "a")).features["x20"].shape == (0, 8)


def test_features_that_were_too_large_for_their_file_are_told_so(tmp_path, capsys):
    features = make_features(len(CELLS), 8).astype(np.float16)
    features[0, 0] = np.inf
    folder = write_trident(tmp_path, "s1", 20, CELLS, features=features)
    write_trident(tmp_path, "s2", 20, CELLS, dtype=np.float16)
    assert run("trident", tmp_path / "BAGS", {"x20": folder}) == 1
    assert "extract it in float32 (float16 ends at 65,504)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["trident", "stamp"])
def test_dsmils_tables_are_refused_with_the_reason(tmp_path, capsys, kind):
    folder = tmp_path / "tumor"
    folder.mkdir()
    (folder / "s1.csv").write_text("0,1,2\n0.1,0.2,0.3\n")
    assert run(kind, tmp_path / "BAGS", {"x20": folder}) == 2
    assert "they do not say where a tile lies" in capsys.readouterr().err
    (folder / "s1.csv").write_text("slide_id,status,seg_level\ns1,processed,2\n")  # CLAM's list
    assert run(kind, tmp_path / "BAGS", {"x20": folder}) == 2
    assert f"{folder}: no .h5 file in it" in capsys.readouterr().err


def test_tiles_that_overlap_are_refused(tmp_path, capsys):
    folder = write_trident(tmp_path, "s1", 20, [*CELLS, CELLS[0]])
    write_trident(tmp_path, "s2", 20, CELLS)
    assert run("trident", tmp_path / "BAGS", {"x20": folder}) == 1
    assert "overlap each other" in capsys.readouterr().out


# export


def exported(root: Path, bag):
    return {
        scale.name: root
        / f"{scale.name[1:]}x_{bag.header.tile_px}px_0px_overlap"
        / f"features_{bag.header.extractors[scale.name].name}"
        for scale in bag.header.scales
    }


@pytest.mark.parametrize("slide_mpp", [0.25, 0.5, 0.2277])
def test_bags_come_back_from_tridents_files_as_they_were(tmp_path, slide_mpp):
    labels = {"a": "normal", "b": "tumour"}
    folder = write_bags(
        tmp_path / "bags", labels, dims={"x5": 3, "x10": 6, "x20": 4}, scales=("x5", "x10", "x20")
    )
    bags = {}
    for slide_id in labels:
        bag = read_bag(bag_path(folder, slide_id))
        bags[slide_id] = replace(bag, header=replace(bag.header, slide_mpp=slide_mpp))
        write_bag(bag_path(folder, slide_id), bags[slide_id])
    assert main(["export", str(folder), str(tmp_path / "out"), "--dtype", "keep"]) == 0
    folders = exported(tmp_path / "out", bags["a"])
    table = tmp_path / "out" / "cohort.csv"
    assert run("trident", tmp_path / "BACK", folders, "--cohort", table) == 0
    for slide_id, bag in bags.items():
        back = read_bag(bag_path(tmp_path / "BACK", slide_id))
        assert back.header.slide_mpp == pytest.approx(slide_mpp)
        assert back.header.size_px0 == bag.header.size_px0
        for scale in bag.scales:
            assert torch.equal(back.grid[scale], bag.grid[scale])
            assert torch.equal(back.features[scale], bag.features[scale])
            assert torch.equal(back.boxes_px0(scale), bag.boxes_px0(scale))
        for scale in bag.scales[1:]:
            assert torch.equal(back.parent[scale], bag.parent[scale])
    assert rows_of(tmp_path / "BACK" / "cohort.csv")["b"]["label"] == "tumour"


def test_tridents_files_come_back_from_bags_as_they_were(tmp_path):
    folders = trident_folders(tmp_path / "in", scales=("x10", "x20"), dtype=np.float16)
    assert run("trident", tmp_path / "BAGS", folders) == 0
    assert main(["export", str(tmp_path / "BAGS"), str(tmp_path / "out"), "--dtype", "keep"]) == 0
    for folder in folders.values():
        ours = tmp_path / "out" / folder.parent.name / folder.name / "s1.h5"
        with h5py.File(folder / "s1.h5") as theirs, h5py.File(ours) as file:
            assert file["features"].dtype == theirs["features"].dtype
            assert file["coords"].dtype == np.int64
            pairs = [
                sorted(
                    zip(map(tuple, f["coords"][:].tolist()), map(tuple, f["features"][:].tolist()))
                )
                for f in (theirs, file)
            ]
            assert pairs[0] == pairs[1]
            attributes = dict(theirs["coords"].attrs)
            del attributes["savetodir"]
            assert dict(file["coords"].attrs) == attributes
        patches = tmp_path / "out" / folder.parent.name / "patches" / "s1_patches.h5"
        with h5py.File(patches) as file:
            assert list(file) == ["coords"]


def test_others_code_reads_exported_features_without_a_cast(tmp_path):
    """As CLAM does: torch.from_numpy(file["features"][:]) through a Linear of float32."""
    folders = trident_folders(tmp_path / "in", scales=("x20",), dtype=np.float16)
    assert run("trident", tmp_path / "BAGS", folders) == 0
    assert main(["export", str(tmp_path / "BAGS"), str(tmp_path / "out")]) == 0
    with h5py.File(tmp_path / "out" / "20x_256px_0px_overlap/features_uni_v1/s1.h5") as file:
        features = torch.from_numpy(file["features"][:])
    assert torch.nn.Linear(8, 2)(features).shape == (len(CELLS), 2)
    bag = read_bag(bag_path(tmp_path / "BAGS", "s1"))
    assert torch.equal(features, bag.features["x20"].float())


def test_exported_bags_of_stamp_come_back_by_their_own_magnification(tmp_path):
    folders = {
        "x10": write_stamp(tmp_path, "s1", ancestors(CELLS, 2), tile_um=256.0),
        "x20": write_stamp(tmp_path, "s1", CELLS, tile_um=128.0),
    }
    table = stamp_table(tmp_path / "cohort.csv", 0.25)
    assert run("stamp", tmp_path / "BAGS", folders, "--cohort", table) == 0
    assert main(["export", str(tmp_path / "BAGS"), str(tmp_path / "out"), "--dtype", "keep"]) == 0
    names = {"x8.75": "x10", "x17.5": "x20"}
    written = {
        own: tmp_path / "out" / f"{own[1:]}x_224px_0px_overlap" / "features_ctranspath"
        for own in names
    }
    with h5py.File(written["x17.5"] / "s1.h5") as file:
        assert "level0_width" not in file["coords"].attrs  # nobody knows it
    assert run("trident", tmp_path / "BACK", written) == 0  # --features.x8.75, --features.x17.5
    bag, back = (read_bag(bag_path(tmp_path / name, "s1")) for name in ("BAGS", "BACK"))
    for own, name in names.items():
        assert torch.equal(back.boxes_px0(own), bag.boxes_px0(name))
        assert torch.equal(back.features[own], bag.features[name])
    assert torch.equal(back.parent["x17.5"], bag.parent["x20"])
    assert back.header.size_is_extent


def test_places_that_were_moved_are_told_when_they_go_out(tmp_path, capsys):
    features, patches = clam_folders(tmp_path)
    assert run_clam(tmp_path / "BAGS", features, patches) == 0
    assert main(["export", str(tmp_path / "BAGS"), str(tmp_path / "out")]) == 0
    assert "moved: tiles of 1 slide(s) do not lie where they were cut" in capsys.readouterr().out


def test_features_that_float16_cannot_hold_are_not_exported_as_such(tmp_path, capsys):
    folder = trident_folders(tmp_path, scales=("x20",))["x20"]
    with h5py.File(folder / "s1.h5", "a") as file:
        file["features"][3, 3] = 70_000
    assert run("trident", tmp_path / "BAGS", {"x20": folder}) == 0
    out = ["--dtype", "float16"]
    assert main(["export", str(tmp_path / "BAGS"), str(tmp_path / "out"), *out]) == 1
    assert "s1: some x20 features are too large for float16" in capsys.readouterr().out


def test_a_bag_that_cannot_be_read_is_named(tmp_path, capsys):
    folder = write_bags(tmp_path / "bags", {"a": None, "b": None})
    path = bag_path(folder, "a")
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["export", str(folder), str(tmp_path / "out")]) == 1
    text = capsys.readouterr().out
    assert f"failed: {path}" in text and "1 done, 1 failed" in text
