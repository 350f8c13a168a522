"""STAMP's feature files become bags."""

import math

import pytest
import torch
from feature_files import (
    CELLS,
    ancestors,
    bag_of,
    corners,
    header_of,
    rows_by_slide,
    run_import,
    write_stamp,
)

BLOCK = [(c, r) for r in range(60, 88) for c in range(100, 128)]


def write_table(path, mpp):
    path.write_text(f"slide_id,path,mpp\ns1,s1.svs,{mpp}\n")
    return path


@pytest.mark.parametrize("mpp", [0.25, 0.2277, 0.2485, 0.5021])
def test_micrometres_become_pixels_of_the_slide(tmp_path, mpp):
    folders = {"x20": write_stamp(tmp_path, "s1", BLOCK, tile_um=128.0, mpp=mpp)}
    table = write_table(tmp_path / "cohort.csv", mpp)
    assert run_import("stamp", tmp_path / "BAGS", folders, "--cohort", table) == 0
    bag = bag_of(tmp_path / "BAGS")
    assert bag.features["x20"].dtype == torch.float16
    assert bag.header.scales[0].mpp == pytest.approx(128 / 224)
    side = math.ceil(128 / mpp)
    assert corners(bag, "x20") == sorted((c * side, r * side) for c, r in BLOCK)
    assert bag.header.extent.mpp == pytest.approx(mpp, rel=1 / side)
    assert rows_by_slide(tmp_path / "BAGS" / "import.csv")["s1"]["moved"] == "0"
    assert bag.header.extent.mpp_is_known and not bag.header.extent.size_is_known

    assert run_import("stamp", tmp_path / "PLAIN", folders) == 0
    plain = bag_of(tmp_path / "PLAIN")
    assert torch.equal(plain.grid["x20"], bag.grid["x20"])
    assert torch.equal(plain.features["x20"], bag.features["x20"])
    assert not plain.header.extent.mpp_is_known and not plain.header.extent.size_is_known


@pytest.mark.parametrize(
    ("mpp", "nests"), [(0.25, True), (0.5, True), (0.2526, True), (0.2277, False)]
)
def test_magnifications_nest_if_their_pixels_do(tmp_path, capsys, mpp, nests):
    """256 and 128 µm are 1,014 and 507 px at 0.2526 µm/px, but 1,125 and 563 at 0.2277."""
    folders = {
        "x10": write_stamp(tmp_path, "s1", ancestors(BLOCK, 2), tile_um=256.0, mpp=mpp, width=5),
        "x20": write_stamp(tmp_path, "s1", BLOCK, tile_um=128.0, mpp=mpp),
    }
    table = write_table(tmp_path / "cohort.csv", mpp)
    assert run_import("stamp", tmp_path / "BAGS", folders, "--cohort", table) == 2 * (not nests)
    if nests:
        bag = bag_of(tmp_path / "BAGS")
        assert bag.num_tiles() == {"x10": 196, "x20": 784}
        assert (bag.parent["x20"] >= 0).all()
    else:
        words = "on this slide x10 1125 px, x20 563 px, so the grids do not nest"
        assert words in capsys.readouterr().err
    is_exact = mpp in (0.25, 0.5)  # then tiles are not rounded
    assert run_import("stamp", tmp_path / "PLAIN", folders) == 2 * (not is_exact)
    if is_exact:
        assert "the mpp of 1 of 1 slides is not known, so their places" in capsys.readouterr().out
    else:
        assert "nest depends on the slide's mpp; give --cohort" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mpp", "wrong"), [(0.2485, 0.5021), (0.25, 0.2485), (0.25, 0.2277), (0.5, 0.49)]
)
def test_a_wrong_mpp_contradicts_the_places(tmp_path, capsys, mpp, wrong):
    folders = {"x20": write_stamp(tmp_path, "s1", BLOCK, tile_um=128.0, mpp=mpp)}
    table = write_table(tmp_path / "cohort.csv", wrong)
    assert run_import("stamp", tmp_path / "BAGS", folders, "--cohort", table) == 2
    assert f"on a slide of {wrong:g} µm/px; correct the mpp" in capsys.readouterr().err


@pytest.mark.parametrize(("mpp", "written"), [(0.22774, 0.2277), (0.25203, 0.252)])
def test_an_mpp_that_a_table_rounds_is_exact_enough(tmp_path, mpp, written):
    folders = {"x20": write_stamp(tmp_path, "s1", BLOCK, tile_um=128.0, mpp=mpp)}
    table = write_table(tmp_path / "cohort.csv", written)
    assert run_import("stamp", tmp_path / "BAGS", folders, "--cohort", table) == 0
    side = math.ceil(128 / mpp)
    bag = bag_of(tmp_path / "BAGS")
    assert corners(bag, "x20") == sorted((c * side, r * side) for c, r in BLOCK)


def test_subfolders_are_searched(tmp_path, capsys):
    for slide_id in ("gdc-1/s1", "gdc-2/s2", "s3"):
        folders = {"x20": write_stamp(tmp_path, slide_id, CELLS, tile_um=128.0)}
    assert run_import("stamp", tmp_path / "BAGS", folders) == 0
    assert set(rows_by_slide(tmp_path / "BAGS" / "import.csv")) == {"s1", "s2", "s3"}
    write_stamp(tmp_path, "gdc-4/s3", CELLS, tile_um=128.0)
    assert run_import("stamp", tmp_path / "OTHER", folders) == 2
    assert "are of the same slide; keep one of them" in capsys.readouterr().err


def test_slides_without_a_known_mpp_are_counted(tmp_path, capsys):
    for slide_id in ("s1", "s2", "s3"):
        folders = {"x20": write_stamp(tmp_path, slide_id, CELLS, tile_um=128.0)}
    table = tmp_path / "cohort.csv"
    for mpp, words in (("", "the mpp of 2 of 3 slides is not known"), ("0.25", "")):
        table.write_text(f"slide_id,path,mpp\ns1,s1.svs,0.25\ns2,s2.svs,{mpp}\ns3,s3.svs,{mpp}\n")
        assert run_import("stamp", tmp_path / "BAGS", folders, "--cohort", table) == 0
        printed = capsys.readouterr().out
        assert words in printed and ("import stamp: the mpp" in printed) == bool(words)


def test_other_units_and_magnifications_are_refused(tmp_path, capsys):
    folder = write_stamp(tmp_path, "s1", CELLS, tile_um=128.0, unit="px")
    assert run_import("stamp", tmp_path / "BAGS", {"x20": folder}) == 2
    assert "its coords are in 'px'" in capsys.readouterr().err
    folder = write_stamp(tmp_path, "s1", CELLS, tile_um=256.0)
    assert run_import("stamp", tmp_path / "BAGS", {"x20": folder}) == 2
    assert "its tiles have 1.14 µm/px, x20 is 0.5" in capsys.readouterr().err


def test_a_bag_is_created_again_if_the_mpp_has_changed(tmp_path):
    folders = {"x20": write_stamp(tmp_path, "s1", CELLS, tile_um=128.0)}
    assert run_import("stamp", tmp_path / "BAGS", folders) == 0
    table = write_table(tmp_path / "cohort.csv", 0.25)
    assert run_import("stamp", tmp_path / "BAGS", folders, "--cohort", table) == 0
    assert header_of(tmp_path / "BAGS").extent.mpp == pytest.approx(0.25)


def test_slides_keep_the_dots_of_their_names(tmp_path):
    """Slides 16 and 16.1 are two, each with its own mpp; only suffixes of slides are left out."""
    for slide_id, mpp in (("16", 0.25), ("16.1", 0.5), ("17", 0.25)):
        folder = write_stamp(tmp_path, slide_id, CELLS, tile_um=128.0, mpp=mpp)
    table = tmp_path / "cohort.csv"
    table.write_text("slide_id,path,mpp\n16,16.svs,0.25\n16.1,16.1.svs,0.5\n17.SVS,17.SVS,0.25\n")
    assert run_import("stamp", tmp_path / "BAGS", {"x20": folder}, "--cohort", table) == 0
    mpps = {s: header_of(tmp_path / "BAGS", s).extent.mpp for s in ("16", "16.1", "17")}
    assert mpps == {"16": 0.25, "16.1": 0.5, "17": 0.25}
