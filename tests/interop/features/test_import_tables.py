"""Folders of feature files, and the table with the labels."""

import pytest
from feature_files import (
    CELLS,
    ancestors,
    clam_folders,
    header_of,
    rows_by_slide,
    run_clam,
    run_import,
    trident_folders,
    write_stamp,
    write_trident,
)
from road import CONF, CONFIGS

from dasmil.bags import bag_path
from dasmil.cli import main


def test_labels_come_from_clams_table_and_slides_it_lacks_are_named(tmp_path, capsys):
    for slide_id in ("s1", "s2", "extra"):
        folders = trident_folders(tmp_path, slide_id, scales=("x20",))
    table = tmp_path / "dataset.csv"
    table.write_text("case_id,slide_id,label\np1,s1.svs,tumour\np1,s2,normal\np2,s3,normal\n")
    assert run_import("trident", tmp_path / "BAGS", folders, "--cohort", table) == 1
    text = capsys.readouterr().out
    assert "left out: 1 slide(s) with features are not in the table: extra" in text
    rows = rows_by_slide(tmp_path / "BAGS" / "cohort.csv")
    assert [(r["slide_id"], r["label"], r["patient_id"]) for r in rows.values()] == [
        ("s1", "tumour", "p1"),
        ("s2", "normal", "p1"),
        ("s3", "normal", "p2"),
    ]
    rows = rows_by_slide(tmp_path / "BAGS" / "import.csv")
    assert "no features at x20" in rows["s3"]["message"]


def test_a_table_with_a_slide_twice_is_refused(tmp_path, capsys):
    folders = trident_folders(tmp_path, scales=("x20",))
    table = tmp_path / "dataset.csv"
    table.write_text("slide_id,label\ns1,a\ns1.svs,a\n")
    assert run_import("trident", tmp_path / "BAGS", folders, "--cohort", table) == 2
    assert "slide_id 's1' occurs twice" in capsys.readouterr().err
    assert not (tmp_path / "BAGS" / "cohort.csv").exists()


@pytest.mark.parametrize(
    ("columns", "text"),
    [("slide_id,path,mpp", "?"), ("slide_id,label,mpp", "0"), ("slide_id,path,mpp", "nan")],
)
def test_an_mpp_that_is_no_number_costs_a_slide_of_stamp_but_not_of_trident(
    tmp_path, columns, text
):
    """STAMP's places need the mpp; TRIDENT's files hold their own."""
    table = tmp_path / "cohort.csv"
    table.write_text(f"{columns}\ns1,a,0.25\ns2,a,{text}\n")
    for slide_id in ("s1", "s2"):
        trident = trident_folders(tmp_path, slide_id, scales=("x20",))
        stamp = {"x20": write_stamp(tmp_path / "stamp", slide_id, CELLS, tile_um=128.0)}
    assert run_import("trident", tmp_path / "TRIDENT", trident, "--cohort", table) == 0
    assert run_import("stamp", tmp_path / "BAGS", stamp) == 0  # the bag of this run is removed
    assert run_import("stamp", tmp_path / "BAGS", stamp, "--cohort", table) == 1
    rows = rows_by_slide(tmp_path / "BAGS" / "status.csv")
    assert (rows["s1"]["state"], rows["s2"]["state"]) == ("done", "failed")
    assert f"cohort.csv line 3: mpp {text!r} is no positive number" in rows["s2"]["message"]
    assert not bag_path(tmp_path / "BAGS", "s2").exists()
    assert header_of(tmp_path / "BAGS", "s1").extent.mpp == 0.25


def test_features_in_linked_folders_and_under_names_with_blanks_are_found(tmp_path):
    stamp = write_stamp(tmp_path / "far", "s1", CELLS, tile_um=128.0)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "linked").symlink_to(stamp)
    assert run_import("stamp", tmp_path / "BAGS", {"x20": tmp_path / "here"}) == 0
    features, patches = clam_folders(tmp_path / "clam")
    for folder in (*features.values(), *patches.values()):
        for path in folder.rglob("s1.h5"):
            path.rename(path.with_name(" s1 .h5"))
    assert run_clam(tmp_path / "CLAM", features, patches) == 0
    assert rows_by_slide(tmp_path / "CLAM" / "import.csv")["s1"]["state"] == "done"


@pytest.mark.slow
def test_fit_and_predict_run_on_imported_bags_of_two_widths(tmp_path):
    lines = ["slide_id,path,label,split"]
    for number in range(8):
        cells = CELLS[number:]
        x10 = write_trident(tmp_path, f"s{number}", 10, ancestors(cells, 2), width=5)
        x20 = write_trident(tmp_path, f"s{number}", 20, cells, width=9, encoder="b")
        split = ("train", "train", "val", "test")[number // 2]
        lines.append(f"s{number},s{number}.svs,{('normal', 'tumour')[number % 2]},{split}")
    (tmp_path / "cohort.csv").write_text("\n".join(lines))
    bags, table = tmp_path / "BAGS", ["--cohort", tmp_path / "cohort.csv"]
    assert run_import("trident", bags, {"x10": x10, "x20": x20}, *table) == 0
    fit = ["fit", "--config", str(CONFIGS / "mil.yaml"), "--config", str(CONF / "dasmil.yaml")]
    fit += ["--data.bags", str(bags), "--trainer.max_epochs", "1"]
    assert main([*fit, "--output", str(tmp_path / "run")]) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    command = ["--ckpt_path", str(checkpoint), "--bags", str(bags), "--output", str(tmp_path / "P")]
    assert main(["predict", *command]) == 0
    assert len(rows_by_slide(tmp_path / "P" / "predictions.csv")) == 8
