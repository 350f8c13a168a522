"""What imports from all tools share: a row per bad file, resuming, sharing, nesting."""

import json
import os
import re

import h5py
import numpy as np
import pytest
import torch
from bag_factory import write_bags
from feature_files import (
    CELLS,
    ancestors,
    bag_of,
    header_of,
    make_features,
    rows_by_slide,
    run_import,
    trident_folders,
    write_trident,
)
from mil4wsi_cases import blocks, make_data, write_data
from road import REPOSITORY

from dasmil.bags import bag_path, write_bag
from dasmil.cli import main
from dasmil.interop.features import hdf5, importer

# bad files


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
    assert run_import("trident", tmp_path / "BAGS", folders) == 1
    capsys.readouterr()
    rows = rows_by_slide(tmp_path / "BAGS" / "import.csv")
    assert [row["state"] for row in rows.values()] == [*["failed"] * 4, "done", "failed"]
    for slide_id, words in (
        ("s1", "not a readable HDF5 file"),
        ("s2", "no features at x10"),
        ("s3", "some features are not finite; extract them again"),
        ("s4", "7 wide"),
        ("s6", "s6.h5: does not exist; extract the features again"),
    ):
        assert words in rows[slide_id]["message"], rows[slide_id]
    assert rows["s5"]["file"] == str(folders["x10"] / "s5.h5")
    assert main(["status", str(tmp_path / "BAGS")]) == 0
    assert "1 done, 5 failed" in capsys.readouterr().out


def test_an_error_of_a_library_costs_one_slide(tmp_path, monkeypatch):
    for slide_id in ("s1", "s2"):
        folder = write_trident(tmp_path, slide_id, 20, CELLS)
    read_tiles = hdf5.read_tiles

    def fail_once(file, *names):
        if "s1" in file.filename:
            raise ZeroDivisionError("as libraries do")
        return read_tiles(file, *names)

    monkeypatch.setattr(hdf5, "read_tiles", fail_once)
    assert run_import("trident", tmp_path / "BAGS", {"x20": folder}) == 1
    rows = rows_by_slide(tmp_path / "BAGS" / "import.csv")
    assert rows["s1"]["message"] == "ZeroDivisionError: as libraries do"
    assert rows["s2"]["state"] == "done"


def test_numbers_of_any_width_sign_and_byte_order_are_read(tmp_path):
    cells = [(c, r) for r in range(2) for c in range(3)]
    values = {"features": np.arange(18).reshape(6, 3), "coords": np.array(cells) * 32}
    kinds = (">f2", ">f4", ">f8", "<f8", "i1", "u1", ">i2", "u4", ">u8")
    slides = {"a": {}} | {f"{name} {k}": {name: k} for name in values for k in kinds}
    for slide_id, dtypes in slides.items():
        folder = write_trident(tmp_path, slide_id, 20, cells, patch_size=16, width=3)
        with h5py.File(folder / f"{slide_id}.h5", "a") as file:
            attributes = dict(file["coords"].attrs)
            del file["features"], file["coords"]
            for name, array in values.items():
                file.create_dataset(name, data=array.astype(dtypes.get(name, "f4")))
            file["coords"].attrs.update(attributes)
    assert run_import("trident", tmp_path / "BAGS", {"x20": folder}) == 0
    expected = bag_of(tmp_path / "BAGS", "a")
    for slide_id in slides:
        bag = bag_of(tmp_path / "BAGS", slide_id)
        assert torch.equal(bag.features["x20"].float(), expected.features["x20"]), slide_id
        assert torch.equal(bag.grid["x20"], expected.grid["x20"]), slide_id


NO_NUMBERS = [
    ("features", np.ones((48, 8), bool), "its features are of type bool"),
    ("features", np.ones((48, 8), complex), "its features are of type complex128"),
    ("features", np.full((48, 8), b"a"), "its features are of type |S1"),
    ("features", h5py.ExternalLink("other.h5", "features"), "is a link to another file"),
    ("features", h5py.SoftLink("nowhere"), "features cannot be read"),
    ("features", np.ones((47, 8)), "47 features for 48 coords"),
    ("coords", np.full((48, 2), np.nan), "some coords lie on no slide"),
    ("coords", np.full((48, 2), -256), "some coords lie on no slide"),
    ("coords", np.ones((48, 3)), "coords have the shape (48, 3)"),
]


def test_values_that_are_no_numbers_cost_one_slide_each(tmp_path):
    folder = write_trident(tmp_path, "sound", 20, CELLS)
    for number, (name, values, _) in enumerate(NO_NUMBERS):
        write_trident(tmp_path, f"s{number}", 20, CELLS)
        with h5py.File(folder / f"s{number}.h5", "a") as file:
            attributes = dict(file["coords"].attrs)
            del file[name]
            file[name] = values
            file["coords"].attrs.update(attributes)
    assert run_import("trident", tmp_path / "BAGS", {"x20": folder}) == 1
    rows = rows_by_slide(tmp_path / "BAGS" / "import.csv")
    assert rows.pop("sound")["state"] == "done"
    for number, (*_, words) in enumerate(NO_NUMBERS):
        row = rows[f"s{number}"]
        assert row["state"] == "failed" and words in row["message"], row


def test_features_that_float16_cannot_hold_are_refused(tmp_path, capsys):
    folders = trident_folders(tmp_path, scales=("x20",))
    with h5py.File(folders["x20"] / "s1.h5", "a") as file:
        file["features"][3, 3] = 70_000
    assert run_import("trident", tmp_path / "HALF", folders, "--dtype", "float16") == 1
    text = capsys.readouterr().out
    assert "s1.h5: some features are too large for float16; give --dtype keep or float32" in text
    assert run_import("trident", tmp_path / "HALF", folders) == 0


def test_features_that_were_too_large_for_their_file_are_explained(tmp_path, capsys):
    features = make_features(len(CELLS), 8).astype(np.float16)
    features[0, 0] = np.inf
    folder = write_trident(tmp_path, "s1", 20, CELLS, features=features)
    write_trident(tmp_path, "s2", 20, CELLS, dtype=np.float16)
    assert run_import("trident", tmp_path / "BAGS", {"x20": folder}) == 1
    assert "extract them again in float32 (float16 ends at 65,504)" in capsys.readouterr().out


def test_a_slide_without_tiles_is_legal(tmp_path):
    """It need not tell how wide its features are."""
    for slide_id, cells in (("s1", CELLS), ("s2", []), ("s3", CELLS)):
        folders = trident_folders(tmp_path, slide_id, cells=cells)
    with h5py.File(folders["x20"] / "s3.h5", "a") as file:
        attributes = dict(file["coords"].attrs)
        del file["features"], file["coords"]
        file["features"], file["coords"] = np.empty(0, np.float32), h5py.Empty("f8")
        file["coords"].attrs.update(attributes)
    assert run_import("trident", tmp_path / "BAGS", folders) == 0
    rows = rows_by_slide(tmp_path / "BAGS" / "import.csv")
    assert [row["state"] for row in rows.values()] == ["done", "empty", "done"]
    assert set(bag_of(tmp_path / "BAGS", "s2").num_tiles().values()) == {0}
    assert bag_of(tmp_path / "BAGS", "s3").features["x20"].shape == (0, 8)


@pytest.mark.parametrize("kind", ["trident", "stamp"])
def test_tables_of_dsmil_are_refused_with_the_reason(tmp_path, capsys, kind):
    folder = tmp_path / "tumor"
    folder.mkdir()
    (folder / "s1.csv").write_text("0,1,2\n0.1,0.2,0.3\n")
    assert run_import(kind, tmp_path / "BAGS", {"x20": folder}) == 2
    assert "which lack the coordinates of tiles" in capsys.readouterr().err
    (folder / "s1.csv").write_text("slide_id,status,seg_level\ns1,processed,2\n")  # CLAM's list
    assert run_import(kind, tmp_path / "BAGS", {"x20": folder}) == 2
    assert f"{folder}: no .h5 file in it" in capsys.readouterr().err


# the next run, and other processes


def test_the_next_run_does_what_is_left(tmp_path):
    for slide_id in ("s1", "s2"):
        folders = trident_folders(tmp_path, slide_id, scales=("x10", "x20"))
    broken = folders["x20"] / "s1.h5"
    content = broken.read_bytes()
    broken.write_bytes(content[:100])
    assert run_import("trident", tmp_path / "BAGS", folders) == 1
    done = bag_path(tmp_path / "BAGS", "s2")
    before = done.stat().st_mtime_ns
    broken.write_bytes(content)
    assert run_import("trident", tmp_path / "BAGS", folders) == 0
    assert done.stat().st_mtime_ns == before
    assert bag_of(tmp_path / "BAGS", "s1").num_tiles()["x20"] == len(CELLS)


def trident_command(root):
    for slide_id in ("a", "b"):
        folder = write_trident(root, slide_id, 20, CELLS)
    return ["trident", str(root / "BAGS"), "--features.x20", str(folder)]


def mil4wsi_command(root):
    for number, slide_id in enumerate("ab"):
        write_data(root, "test", number, make_data(blocks((0, 0)), slide_id))
    return ["mil4wsi-bags", str(root), str(root / "BAGS")]


@pytest.mark.parametrize("command", [trident_command, mil4wsi_command])
def test_two_imports_share_a_folder(tmp_path, monkeypatch, capsys, command):
    """The second one begins while the first holds slide a, and is left slide b alone."""
    arguments, bags = ["import", *command(tmp_path)], tmp_path / "BAGS"
    codes, written = [], []

    def write_late(path, bag):
        if not written:
            written.append(bag.slide_id)
            codes.append(main(arguments))
            assert rows_by_slide(bags / "import.csv")["a"]["state"] == "running"
            assert "1 done, 1 running, 0 failed" in capsys.readouterr().out
        else:
            written.append(bag.slide_id)
        write_bag(path, bag)

    monkeypatch.setattr(importer, "write_bag", write_late)
    assert main(arguments) == 0
    assert (codes, written) == ([1], ["a", "b"])
    assert {row["state"] for row in rows_by_slide(bags / "status.csv").values()} == {"done"}


def test_other_files_of_the_same_encoder_are_imported_again(tmp_path):
    """Also if they are older than the bags."""
    first, second = (
        {"x20": write_trident(tmp_path / name, "s1", 20, CELLS, dtype=np.float16)}
        for name in ("v1", "v2")
    )
    with h5py.File(second["x20"] / "s1.h5", "a") as file:
        file["features"][:] = 2 * file["features"][:]
    os.utime(second["x20"] / "s1.h5", (1e9, 1e9))
    times, sums = [], []
    for folders in (first, second, second):
        assert run_import("trident", tmp_path / "BAGS", folders) == 0
        times.append(bag_path(tmp_path / "BAGS", "s1").stat().st_mtime_ns)
        sums.append(bag_of(tmp_path / "BAGS").features["x20"].sum())
    assert sums[1] == sums[2] == 2 * sums[0]
    assert times[0] < times[1] == times[2]


def test_a_folder_holds_one_configuration_also_of_slides_not_imported_now(tmp_path, capsys):
    """Other scales and options of other slides are refused by what differs."""
    assert run_import("trident", tmp_path / "BAGS", trident_folders(tmp_path / "one", "s1")) == 0
    before = (tmp_path / "BAGS" / "cohort.csv").read_bytes()
    folders = trident_folders(tmp_path / "two", "s2")
    coarse = {scale: folders[scale] for scale in ("x5", "x10")}
    for given, options, words in (
        (coarse, [], "scales x5, x10, x20 instead of x5, x10"),
        (folders, ["--orphans", "drop"], "orphans keep → drop"),
    ):
        assert run_import("trident", tmp_path / "BAGS", given, *options) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / 'BAGS' / 's1.safetensors'}: the folder holds other bags" in error
        assert words in error
        assert (tmp_path / "BAGS" / "cohort.csv").read_bytes() == before
    write_bags(tmp_path / "OWN", {"s9": "normal"})
    assert run_import("trident", tmp_path / "OWN", folders) == 2
    assert "`embed` wrote it" in capsys.readouterr().err
    assert run_import("trident", tmp_path / "BAGS", folders) == 0


def test_encoders_never_mix(tmp_path):
    cards = []
    for name, encoder in (("one", "uni_v1"), ("two", "gigapath")):
        folders = trident_folders(tmp_path / name, scales=("x20",), encoder=encoder)
        assert run_import("trident", tmp_path / name / "BAGS", folders) == 0
        cards.append(header_of(tmp_path / name / "BAGS").extractors["x20"])
    assert cards[0].fingerprint != cards[1].fingerprint
    records = json.loads((tmp_path / "one" / "BAGS" / "extractors.json").read_text())
    assert records["x20"]["trained_on"] is None


# nesting


def test_orphans_are_counted_and_kept_or_dropped(tmp_path, capsys):
    coarse = [cell for cell in ancestors(CELLS, 2) if cell != (4, 2)] + [(20, 20)]
    folders = {
        "x10": write_trident(tmp_path, "s1", 10, coarse),
        "x20": write_trident(tmp_path, "s1", 20, CELLS),
    }
    assert run_import("trident", tmp_path / "BAGS", folders) == 0
    text = capsys.readouterr().out
    assert "orphans: 4 tiles lie in no coarser tile, 1 hold no finer one (rule: keep)" in text
    row = rows_by_slide(tmp_path / "BAGS" / "import.csv")["s1"]
    assert (row["orphans"], row["childless"], row["rule"]) == ("4", "1", "keep")
    kept = bag_of(tmp_path / "BAGS")
    assert (kept.parent["x20"] < 0).sum() == 4 and kept.num_tiles() == {"x10": 12, "x20": 48}
    assert run_import("trident", tmp_path / "BAGS", folders, "--orphans", "drop") == 0
    dropped = bag_of(tmp_path / "BAGS")  # other options: created again
    assert (dropped.parent["x20"] >= 0).all() and dropped.num_tiles() == {"x10": 11, "x20": 44}
    assert len(dropped.parent["x20"].unique()) == 11
    row = rows_by_slide(tmp_path / "BAGS" / "import.csv")["s1"]
    assert (row["orphans"], row["childless"], row["rule"]) == ("4", "1", "drop")


def test_dropping_goes_down_and_up_the_whole_pyramid(tmp_path):
    """A x10 tile without a x5 tile takes its x20 tiles along; a x5 tile left alone goes too."""
    folders = trident_folders(tmp_path)
    lonely = [cell for cell in ancestors(CELLS, 4) if cell != (2, 1)]
    folders["x5"] = write_trident(tmp_path, "s1", 5, lonely)
    assert run_import("trident", tmp_path / "BAGS", folders, "--orphans", "drop") == 0
    bag = bag_of(tmp_path / "BAGS")
    assert bag.num_tiles() == {"x5": 3, "x10": 8, "x20": 32}
    with h5py.File(folders["x20"] / "s1.h5") as file:
        features = dict(zip(map(tuple, file["coords"][:].tolist()), file["features"][:].tolist()))
    places = map(tuple, bag.boxes_px0("x20")[:, :2].tolist())
    assert bag.features["x20"].tolist() == [features[place] for place in places]


def test_tiles_that_overlap_are_refused(tmp_path, capsys):
    folder = write_trident(tmp_path, "s1", 20, [*CELLS, CELLS[0]])
    write_trident(tmp_path, "s2", 20, CELLS)
    assert run_import("trident", tmp_path / "BAGS", {"x20": folder}) == 1
    assert "overlap each other" in capsys.readouterr().out


# the recipe


def test_the_importer_of_the_contributing_page_works(tmp_path):
    page = (REPOSITORY / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(# dasmil/interop/.*?)```", page, re.DOTALL)
    module: dict = {}
    exec(code, module)
    folders = trident_folders(tmp_path)
    assert module["mytool"](tmp_path / "BAGS", folders) == 0
    assert run_import("trident", tmp_path / "TRIDENT", folders) == 0
    bag, expected = bag_of(tmp_path / "BAGS"), bag_of(tmp_path / "TRIDENT")
    for scale in expected.scales:
        assert torch.equal(bag.boxes_px0(scale), expected.boxes_px0(scale))
        assert torch.equal(bag.features[scale], expected.features[scale])
