"""One process and two, of one thread each, give the same figures to the last digit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bag_factory import write_bags
from processes import run_in_two
from road import CONF, CONFIGS

from dasmil.cli import main
from dasmil.slides.cohort import read_cohort

# 5 training slides, 3 for validation and 7 for the test: no part divides by two
PARTS = {"train": 5, "val": 3, "test": 7}


@pytest.fixture(scope="module")
def bags(tmp_path_factory) -> Path:
    names = [(f"{part}{number}", part) for part, count in PARTS.items() for number in range(count)]
    labels = {name: ["normal", "tumour"][number % 2] for number, (name, _) in enumerate(names)}
    patients = {"test0": "p", "test2": "p"}  # two slides of a patient
    return write_bags(tmp_path_factory.mktemp("exact") / "bags", labels, dict(names), patients)


def fit(bags: Path, runs: Path, name: str, config: str = "dasmil.yaml") -> list[str]:
    configs = ["--config", str(CONFIGS / "mil.yaml"), "--config", str(CONF / config)]
    return ["fit", *configs, "--data.bags", str(bags), "--output", str(runs / name)]


@pytest.fixture(scope="module")
def checkpoint(bags) -> Path:
    """Of one process that accumulates the gradients of two slides."""
    runs = bags.parent / "runs"
    assert main([*fit(bags, runs, "one"), "--trainer.accumulate_grad_batches", "2"]) == 0
    return runs / "one" / "checkpoints" / "best.ckpt"


def assert_same_weights(runs: Path, num_steps: int) -> None:
    one, two = (
        torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("one", "two")
    )
    assert one["global_step"] == two["global_step"] == num_steps
    for name, weights in one["state_dict"].items():
        torch.testing.assert_close(weights, two["state_dict"][name], atol=1e-6, rtol=1e-5)


def test_two_processes_learn_what_one_learns_from_two_slides_per_step(bags, checkpoint):
    """The same slides in the same steps, the same dropout, and the last step is full in both."""
    runs = checkpoint.parents[2]
    run_in_two(fit(bags, runs, "two"), forked=True)
    assert_same_weights(runs, 2 * 3)  # 2 epochs of 5 slides, in pairs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options", "num_steps"),
    [
        ("CLAM", ["--trainer.accumulate_grad_batches", "2"], 4),  # dropout, and unused weights
        ("DTFD", ["--trainer.accumulate_grad_batches", "2"], 4),  # four gradients are clipped
    ],
)
def test_two_processes_learn_the_same_with_other_methods(tmp_path, method, options, num_steps):
    """Two epochs of four slides, in pairs."""
    labels = {f"s{number}": ["normal", "tumour"][number % 2] for number in range(6)}
    split = {name: "val" if name in ("s4", "s5") else "train" for name in labels}
    bags = write_bags(tmp_path / "bags", labels, split)
    both = ["--model.class_path", method, "--trainer.max_epochs", "2"]
    assert main([*fit(bags, tmp_path, "one", "bags.yaml"), *both, *options]) == 0
    run_in_two([*fit(bags, tmp_path, "two", "bags.yaml"), *both])
    assert_same_weights(tmp_path, num_steps)


@pytest.mark.slow
def test_metrics_are_the_same_to_the_last_digit(bags, checkpoint, tmp_path):
    arguments = ["test", "--ckpt_path", str(checkpoint), "--bags", str(bags)]
    assert main([*arguments, "--data.batch_size", "4", "--output", str(tmp_path / "one")]) == 0
    run_in_two([*arguments, "--output", str(tmp_path / "two")])
    for name in ("test_metrics.json", "test_metrics.csv", "test_slides.csv"):
        one, two = ((tmp_path / part / name).read_text() for part in ("one", "two"))
        assert one == two
    assert (tmp_path / "one" / "test_slides.csv").read_text().count("\n") == 1 + PARTS["test"]


@pytest.mark.slow
def test_fewer_slides_than_processes(bags, checkpoint, tmp_path):
    """One test slide: one of two processes has nothing of its own to do."""
    few = tmp_path / "bags"
    shutil.copytree(bags, few)
    for row in read_cohort(bags / "cohort.csv"):
        if row.split == "test" and row.slide_id != "test3":
            (few / f"{row.slide_id}.safetensors").unlink()
    arguments = ["test", "--ckpt_path", str(checkpoint), "--bags", str(few)]
    with pytest.warns(UserWarning, match=r"6 slide\(s\) of cohort.csv have no bag file"):
        assert main([*arguments, "--output", str(tmp_path / "one")]) == 0
    run_in_two([*arguments, "--output", str(tmp_path / "two")])
    one, two = (
        json.loads((tmp_path / part / "test_metrics.json").read_text()) for part in ("one", "two")
    )
    assert one == two
    assert one["test/auroc"] is None  # one class alone
    assert one["test/accuracy"] in (0.0, 1.0)

    output = tmp_path / "predictions"
    run_in_two(["predict", "--ckpt_path", checkpoint, "--bags", few, "--output", output])
    table = (output / "predictions.csv").read_text().splitlines()
    assert len(table) == 1 + PARTS["train"] + PARTS["val"] + 1


@pytest.mark.slow
def test_other_slides_do_not_take_the_place_of_a_run_s_own_figures(checkpoint, bags, capsys):
    """Without --output the figures go to the run's folder; those of another cohort do not."""
    arguments = ["test", "--ckpt_path", str(checkpoint), "--bags"]
    assert main([*arguments, str(bags)]) == 0
    written = checkpoint.parents[1] / "test" / "test_slides.csv"
    before = written.read_text()
    assert before.count("\n") == 1 + PARTS["test"]
    other = write_bags(bags.parent / "other", {"new0": "normal", "new1": "tumour"})
    assert main([*arguments, str(other)]) == 2
    assert "holds the metrics of other test slides" in capsys.readouterr().err
    assert written.read_text() == before
    assert main([*arguments, str(other), "--output", str(bags.parent / "external")]) == 0
