"""The metrics of instances, by a model whose tile scores are known: each tile's first feature."""

import csv
import json

import numpy as np
import pytest
from bag_factory import CLASSES
from callbacks.judged_bags import box_xml, geojson, run, tile_rows
from lightning.pytorch import Trainer
from models import make_module, save_untrained
from PIL import Image
from road import CONFIGS

from dasmil.bags import bag_path, read_bag
from dasmil.callbacks import instance_truth
from dasmil.callbacks.instance_truth import InstanceTruth
from dasmil.callbacks.predictions import PredictionWriter
from dasmil.cli import main
from dasmil.data import BagDataModule
from dasmil.errors import InputError
from dasmil.files import write_text
from dasmil.metrics.froc import FALSE_POSITIVES
from dasmil.tables import read_csv


def test_metrics_of_areas(bags, tmp_path):
    """x20: 16 tiles of the lesion against 48 in t1 and t2, and 64 negative ones in n1.

    Of the 32 x 160 pairs are not in order: t2's corner beats all 32; the normal slide's 1.5 beats
    t2's 16 of logit 1.
    """
    callback = InstanceTruth(tmp_path / "truth", output=tmp_path / "out")
    logged = run(bags, callback)
    wrong = 32 + 16
    assert logged["test/x20/instance_auroc"] == pytest.approx(1 - wrong / (32 * 160))
    assert logged["test/x20/instance_auroc_per_slide"] == pytest.approx((1 + 47 / 48) / 2)
    # 4 tiles of the lesion against 12
    assert logged["test/x10/instance_auroc"] == pytest.approx(1 - (8 + 4) / (8 * 40))
    assert logged["test/x10/instance_auroc_per_slide"] == pytest.approx((1 + 11 / 12) / 2)
    assert logged == pytest.approx({f"test/{name}": v for name, v in callback.metrics.items()})


@pytest.mark.draws
def test_froc_of_areas(bags, tmp_path):
    """Scores in order: 3 false (t2), 2 hit (t1), 1.5 false (n1), 1 hit (t2), and many of -1 false.

    False positives of three slides: both lesions are found at 2/3 a slide, one at 1/3.
    """
    callback = InstanceTruth(tmp_path / "truth", output=tmp_path / "out")
    logged = run(bags, callback)
    at = callback.curves["x20"].at
    assert at[0.25] == 0 and at[0.5] == 0.5 and at[1] == 1 and at[8] == 1
    assert logged["test/x20/froc"] == pytest.approx((0 + 0.5 + 4) / 6)
    with open(tmp_path / "out" / "froc.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    written = {
        float(row["false_positives_per_slide"]): float(row["sensitivity"])
        for row in rows
        if row["scale"] == "x20"
    }
    assert written == at and len(rows) == 2 * len(FALSE_POSITIVES)
    assert Image.open(tmp_path / "out" / "froc.png").size == (825, 750)


def test_detections_are_written_as_the_challenge_reads_them(bags, tmp_path):
    """No header; confidence, x and y of the tile's centre, best first."""
    run(bags, InstanceTruth(tmp_path / "truth", output=tmp_path / "out"))
    folder = tmp_path / "out" / "detections"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.csv")) == [
        f"{scale}/{slide_id}.csv" for scale in ("x10", "x20") for slide_id in ("n1", "t1", "t2")
    ]
    lines = (folder / "x20" / "t2.csv").read_text().splitlines()
    confidence, x, y = lines[0].split(",")
    assert float(confidence) == pytest.approx(1 / (1 + np.exp(-3)), abs=1e-12)
    assert (int(x), int(y)) == (7 * 512 + 256, 7 * 512 + 256)
    confidences = [float(line.split(",")[0]) for line in lines]
    assert confidences == sorted(confidences, reverse=True)
    # 187 µm are 748 px0: side and corner neighbours (724 px0) of a detection are none
    places = np.array([[int(value) for value in line.split(",")[1:]] for line in lines])
    apart = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1))
    assert apart[apart > 0].min() >= 1024


def test_every_tile_is_written_with_its_overlap(bags, tmp_path):
    """The lesion of t1 ends in the middle of the tiles of row 3: half of each, a quarter at x10.

    t2's is a triangle over a square of 4 x 4 tiles: half of the tiles on its diagonal.
    """
    (tmp_path / "truth" / "t1.xml").write_text(box_xml(0, 0, 2048, 1024 + 256))
    (tmp_path / "truth" / "t2.xml").unlink()
    corners = [[0, 0], [2048, 0], [0, 2048], [0, 0]]
    geometry = {"type": "Polygon", "coordinates": [corners]}
    properties = {"objectType": "annotation", "classification": {"name": "Tumor"}}
    lesion = {"type": "Feature", "geometry": geometry, "properties": properties}
    (tmp_path / "truth" / "t2.geojson").write_text(json.dumps(lesion))
    run(bags, InstanceTruth(tmp_path / "truth", output=tmp_path / "out"))

    rows = tile_rows(tmp_path, "t1")
    places = ["scale", "row", "col", "x0_px0", "y0_px0", "size_px0"]
    assert list(rows[0]) == ["slide_id", *places, "overlap", "positive", "prob/tumour"]
    found = {(r["scale"], int(r["row"]), int(r["col"])): r for r in rows}
    assert len(rows) == len(found) == 16 + 64
    for (scale, row, col), tile in found.items():
        side = {"x10": 1024, "x20": 512}[scale]
        assert [int(tile[name]) for name in places[3:]] == [col * side, row * side, side]
        height = min(max(1280 - row * side, 0), side)
        overlap = height / side * (col * side < 2048)
        assert float(tile["overlap"]) == pytest.approx(overlap, abs=1e-12)
        assert tile["positive"] == str(int(overlap >= 0.5))
        score = 2 if row * side < 2048 and col * side < 2048 else -1
        assert float(tile["prob/tumour"]) == pytest.approx(1 / (1 + np.exp(-score)))
        assert tile["slide_id"] == "t1"
    diagonal = [r for r in tile_rows(tmp_path, "t2") if r["scale"] == "x20"]
    for tile in diagonal:
        far = int(tile["row"]) + int(tile["col"])
        overlap = 1 if far < 3 else 0.5 if far == 3 else 0
        assert float(tile["overlap"]) == pytest.approx(overlap, abs=1 / 512)
    assert {r["overlap"] for r in tile_rows(tmp_path, "n1")} == {"0.0"}


def test_the_columns_of_a_tile_are_those_of_predict(bags, tmp_path):
    data = BagDataModule(bags, CLASSES, num_workers=0)
    data.setup("predict")
    module = make_module(hidden_dim=8, out_dim=8, classes=CLASSES, bag_format=data.bag_format)
    run(bags, InstanceTruth(tmp_path / "truth", output=tmp_path / "out"))
    writer = PredictionWriter(tmp_path / "out")
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[writer],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.predict(module, datamodule=data, return_predictions=False)
    with open(tmp_path / "out" / "instances" / "t1.csv", newline="") as file:
        predicted = list(csv.DictReader(file))
    judged = tile_rows(tmp_path, "t1")
    places = list(predicted[0])[:6]
    assert places == list(judged[0])[1:7]
    assert [[r[name] for name in places] for r in predicted] == [
        [r[name] for name in places] for r in judged
    ]


@pytest.mark.parametrize("option", ["truth", "truth_classes"])
def test_fit_has_no_option_for_annotations(option, tmp_path, capsys):
    config = ["--config", str(CONFIGS / "mil.yaml"), "--data.bags", "B"]
    assert main(["fit", *config, "--data.classes", "[a,b]", f"--{option}", "[T]"]) == 2
    assert f"--{option}" in capsys.readouterr().err


@pytest.mark.slow
def test_by_command(bags, tmp_path, capsys):
    """The upper half of every tumour slide, of a class that only the command knows."""
    bag_format = read_bag(bag_path(bags, "t1")).header.bag_format()
    save_untrained(tmp_path / "model.ckpt", bag_format=bag_format)
    text = geojson(0, 0, 4096, 2048).replace("Tumor", "Gland")
    for name in ("t1", "t2"):
        (tmp_path / "truth" / f"{name}.xml").unlink()
        write_text(tmp_path / "truth" / f"{name}.geojson", text)
    command = ["test", "--ckpt_path", str(tmp_path / "model.ckpt"), "--bags", str(bags)]
    command += ["--output", str(tmp_path / "out"), "--trainer.enable_progress_bar", "false"]
    command += ["--data.num_workers", "0"]
    truth, classes = ["--truth", str(tmp_path / "truth")], ["--truth_classes", "[Gland]"]
    assert main([*command, *classes]) == 2
    assert "--truth_classes needs --truth" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, *classes, *truth]) == 0
    for slide_id in ("t1", "t2", "n1"):
        for tile in tile_rows(tmp_path, slide_id):
            is_upper = int(tile["y0_px0"]) < 2048
            assert float(tile["overlap"]) == (is_upper and slide_id != "n1")
    metrics = (tmp_path / "out" / "test_metrics.csv").read_text()
    assert "x20,instance,instance_auroc," in metrics

    before = read_csv(tmp_path / "out" / "test_slides.csv")[1]
    write_text(tmp_path / "truth" / "n1.xml", "<no xml")
    assert main([*command, *classes, *truth]) == 1
    rows = read_csv(tmp_path / "out" / "test_slides.csv")[1]
    reasons = {row["slide_id"]: row.pop("annotation_refused") for row in rows}
    assert [slide_id for slide_id, reason in reasons.items() if reason] == ["n1"]
    assert "n1.xml: " in reasons["n1"]
    assert rows == before
    metrics = read_csv(tmp_path / "out" / "test_metrics.csv")[1]
    notes = {row["note"] for row in metrics if row["level"] == "instance"}
    assert notes == {"without 1 slide(s) whose annotation is refused: n1"}


def test_validation_and_nothing_written_without_an_output(bags, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    logged = run(bags, InstanceTruth(tmp_path / "truth"), "validate")
    assert logged["val/x20/instance_auroc"] == pytest.approx(1 - 48 / (32 * 160))
    assert logged["val/x20/froc"] == pytest.approx(0.75)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_slide_that_comes_twice_counts_once(bags, tmp_path, monkeypatch):
    """As a sampler repeats slides for several processes, whatever rank has them."""
    once = InstanceTruth(tmp_path / "truth")
    run(bags, once)
    monkeypatch.setattr(instance_truth, "gather_lists", lambda items: [*items[::-1], *items[:1]])
    twice = InstanceTruth(tmp_path / "truth")
    run(bags, twice, batch_size=3)
    assert twice.metrics == once.metrics and len(once.metrics) == 6


def test_froc_can_be_left_out(bags, tmp_path):
    logged = run(bags, InstanceTruth(tmp_path / "truth", output=tmp_path / "out", froc=False))
    assert "test/x20/instance_auroc" in logged and "test/x20/froc" not in logged
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["instance_truth"]


def test_min_share_decides_which_tiles_are_positive(bags, tmp_path):
    """The lesion of t1 now covers half of a column of tiles more; of t2 nothing changes."""
    (tmp_path / "truth" / "t1.xml").write_text(box_xml(0, 0, 2048 + 256, 2048))
    half, more = InstanceTruth(tmp_path / "truth"), InstanceTruth(tmp_path / "truth", min_share=0.6)
    run(bags, half)
    run(bags, more)
    name = "x20/instance_auroc_per_slide"
    # half: 4 of 20 positive tiles score as the 44 negative ones
    assert half.metrics[name] == pytest.approx((16 / 20 + 4 / 20 / 2 + 47 / 48) / 2)
    assert more.metrics[name] == pytest.approx((1 + 47 / 48) / 2)


def test_more_than_two_classes_are_refused(bags, tmp_path):
    with pytest.raises(InputError, match="need two classes, the model has 3"):
        run(bags, InstanceTruth(tmp_path / "truth"), classes=[*CLASSES, "other"])


def test_min_share_is_a_share(tmp_path):
    with pytest.raises(InputError, match="min_share: 0 is outside"):
        InstanceTruth(tmp_path, min_share=0)


def test_froc_is_undefined_if_all_lesions_are_isolated_tumour_cells(bags, tmp_path):
    """512 px of 0.25 µm: 128 µm. There is no curve then, and no file of one."""
    for name in ("t1", "t2"):
        (tmp_path / "truth" / f"{name}.xml").write_text(box_xml(0, 0, 512, 512))
    callback = InstanceTruth(tmp_path / "truth", output=tmp_path / "out")
    with pytest.warns(UserWarning, match=r"FROC is not defined: .* \(200 µm\)"):
        logged = run(bags, callback)
    assert np.isnan(logged["test/x20/froc"]) and not np.isnan(logged["test/x20/instance_auroc"])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["detections", "instance_truth"]
