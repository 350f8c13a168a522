"""A model of some of the bags' scales by command: trained, evaluated and refused."""

import csv
import json
from pathlib import Path

import pytest
import torch
from bag_factory import CLASSES, write_bags
from road import CONF, CONFIGS, fit_dasmil

import dasmil
from dasmil.bags import Bag, bag_graph, bag_path, read_bag, write_bag
from dasmil.cli import main

SPLIT = {
    f"{letter}{number}": part
    for number, part in enumerate(("train", "train", "val", "test", "test"))
    for letter in "nt"
}
QUIET = ["--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]


def write_folder(folder: Path, scales: tuple[str, ...]) -> Path:
    labels = {s: CLASSES[s[0] == "t"] for s in SPLIT}
    return write_bags(folder, labels, SPLIT, scales=scales, dims={s: 5 for s in scales})


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("scales") / "bags", ("x5", "x10", "x20"))


@pytest.fixture(scope="module")
def trained(bags: Path) -> Path:
    """Checkpoint of a model that reads x5 and x20 of bags that hold x10 too."""
    runs = bags.parent / "runs"
    switches = ["--model.network.concatenate_parents", "true"]
    switches += ["--model.network.coarse_instances", "parents"]
    assert main([*fit_dasmil(bags, runs), "--data.scales", "[x5,x20]", *switches]) == 0
    return runs / "dasmil" / "checkpoints" / "best.ckpt"


def logits_by_hand(checkpoint: Path, bags: Path, slide_id: str) -> dict[str, float]:
    model = dasmil.load(checkpoint)
    bag: Bag = read_bag(bag_path(bags, slide_id)).select(model.scales)
    with torch.inference_mode():
        return {scale: out.bag_logits.item() for scale, out in model(bag_graph(bag)).items()}


def test_the_checkpoint_knows_the_scales_and_the_switches(trained: Path) -> None:
    model = dasmil.load(trained)
    assert model.scales == ("x5", "x20")
    assert model.network.heads["x20"].instance_classifier.in_features == 16 + 16
    assert model.network.coarse_instances == "parents"


def test_it_is_tested_on_bags_that_hold_more(trained: Path, bags: Path, tmp_path: Path) -> None:
    command = ["test", "--ckpt_path", str(trained), "--bags", str(bags), *QUIET]
    assert main([*command, "--output", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "test_metrics.json").read_text())
    assert {name.split("/")[1] for name in metrics if name.endswith("/auroc")} >= {"x5", "x20"}
    assert not any("x10" in name for name in metrics)
    tested = [s for s, part in SPLIT.items() if part == "test"]
    logits = {s: logits_by_hand(trained, bags, s) for s in tested}
    for scale in ("x5", "x20"):
        right = sum((logits[s][scale] > 0) == (s[0] == "t") for s in tested)
        assert metrics[f"test/{scale}/accuracy"] == pytest.approx(right / len(tested))


def test_it_predicts_its_own_scales_only(trained: Path, bags: Path, tmp_path: Path) -> None:
    command = ["predict", "--ckpt_path", str(trained), "--bags", str(bags), *QUIET]
    assert main([*command, "--output", str(tmp_path)]) == 0
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(SPLIT)
    for slide_id, row in rows.items():
        expected = logits_by_hand(trained, bags, slide_id)
        found = {s: float(row[f"logit/{s}/tumour"]) for s in ("x5", "x20")}
        assert found == pytest.approx(expected, abs=1e-5)
        assert not any("x10" in column for column in row)
    with open(tmp_path / "instances" / "n0.csv", newline="") as file:
        assert {row["scale"] for row in csv.DictReader(file)} == {"x5", "x20"}


@pytest.mark.slow
def test_bags_of_just_its_scales_will_do_too(trained: Path, bags: Path, tmp_path: Path) -> None:
    """The same features without x10 in the files give the same figures."""
    folder = tmp_path / "bags"
    folder.mkdir()
    (folder / "cohort.csv").write_text((bags / "cohort.csv").read_text())
    for slide_id in SPLIT:
        bag = read_bag(bag_path(bags, slide_id)).select(("x5", "x20"))
        write_bag(bag_path(folder, slide_id), bag)
    figures = []
    for source in (bags, folder):
        output = tmp_path / source.parent.name
        command = ["test", "--ckpt_path", str(trained), "--bags", str(source), *QUIET]
        assert main([*command, "--output", str(output)]) == 0
        figures.append(json.loads((output / "test_metrics.json").read_text()))
    assert figures[0] == pytest.approx(figures[1], abs=1e-6)


def test_bags_without_one_of_its_scales_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path, ("x10", "x20"))
    assert main(["test", "--ckpt_path", str(trained), "--bags", str(folder), *QUIET]) == 2
    assert "data.scales asks for x5, its bags hold x10, x20" in capsys.readouterr().err


def test_a_scale_that_no_bag_holds_is_refused_by_fit(
    bags: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*fit_dasmil(bags, tmp_path), "--data.scales", "[x10,x40]"]
    assert main(command) == 2
    assert "data.scales asks for x40, its bags hold x5, x10, x20" in capsys.readouterr().err


def test_a_word_that_is_no_choice_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    configs = ["--config", str(CONFIGS / "mil.yaml"), "--config", str(CONF / "dasmil.yaml")]
    command = ["fit", *configs, "--data.bags", "B", "--output", "R"]
    assert main([*command, "--model.objective.kl_direction", "x"]) == 2
    assert "kl_direction" in capsys.readouterr().err
