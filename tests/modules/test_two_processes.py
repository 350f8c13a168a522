"""Two processes on the CPU (gloo), started as a user starts them unless they are forked.

Each command has a port of its own: another test may take one that Lightning finds free.
"""

import csv
import re
import shutil

import pytest
import torch
from processes import run_in_two
from road import embed_command, fit_dasmil, fit_dino

from dasmil.bags import bag_path, read_bag
from dasmil.slides.cohort import read_cohort


@pytest.fixture(scope="module")
def checkpoint(road):
    """DAS-MIL after one step of each of two processes, with the statistics of one."""
    runs = road.root / "runs_ddp"
    run_in_two(
        [
            *fit_dasmil(road.bags, runs),
            "--trainer.max_epochs",
            "1",
            "--trainer.limit_train_batches",
            "1",
            "--model.standardize",
            "true",
        ]
    )
    return runs / "dasmil" / "checkpoints" / "best.ckpt"


@pytest.mark.slow
def test_dasmil_fits_one_step(checkpoint):
    state = torch.load(checkpoint, weights_only=True)
    assert state["global_step"] == 1
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())


@pytest.mark.slow
def test_an_error_of_both_processes_is_said_once(road, tmp_path):
    fast = ["--model.optimizer.learning_rate", "1e6", "--trainer.max_epochs", "9"]
    said = run_in_two([*fit_dasmil(road.bags, tmp_path), *fast], code=2)
    assert len(re.findall(r"error: fit: the loss of step \d+ is not finite", said)) == 1


@pytest.mark.slow
def test_dino_fits_one_step(road):
    runs = road.root / "runs_ddp"
    run_in_two([*fit_dino(road.tiles, "x20", runs), "--trainer.limit_train_batches", "1"])
    state = torch.load(runs / "dino_x20" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 1
    assert state["extractor"]["scale"] == "x20"


@pytest.mark.slow
def test_embed_gives_the_same_bags(road):
    bags = road.root / "bags_ddp"
    printed = run_in_two(embed_command(road.tiles, bags, road.dino))
    rows = read_cohort(road.cohort)
    assert f"embed: {len(rows)} done" in printed
    for row in rows:
        one, two = (read_bag(bag_path(folder, row.slide_id)) for folder in (road.bags, bags))
        assert one.header == two.header
        for scale in one.scales:
            assert torch.allclose(one.features[scale], two.features[scale], atol=2e-3)


@pytest.mark.slow
def test_embed_with_one_slide_left_for_two_processes(road):
    bags = road.root / "bags_one_left"
    shutil.copytree(road.bags, bags)
    left = bag_path(bags, read_cohort(road.cohort)[0].slide_id)
    left.unlink()
    assert "0 failed" in run_in_two(embed_command(road.tiles, bags, road.dino), forked=True)
    assert left.exists()


@pytest.mark.slow
def test_predict_writes_every_slide_once(road, checkpoint):
    output = road.root / "predictions_ddp"
    run_in_two(["predict", "--ckpt_path", checkpoint, "--bags", road.bags, "--output", output])
    with open(output / "predictions.csv", newline="") as file:
        predicted = [row["slide_id"] for row in csv.DictReader(file)]
    assert predicted == [row.slide_id for row in read_cohort(road.cohort)]
