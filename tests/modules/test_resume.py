"""A training that is killed and goes on ends as one that was not."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from modules.test_dino_module import SMALL, small_data
from modules.test_mil_module import quiet_trainer
from road import fit_dasmil, fit_dino

from dasmil.cli import main
from dasmil.errors import InputError
from dasmil.modules import DINOModule
from dasmil.modules.dino import ScheduleOptions

TESTS = Path(__file__).parents[1]


def fit_until_killed(arguments, marker, **when):
    """The fit in a process of its own, which must end by SIGKILL."""
    kill = ["--trainer.callbacks+=kill.KillOnce", f"--trainer.callbacks.marker={marker}"]
    kill += [f"--trainer.callbacks.{name}={value}" for name, value in when.items()]
    command = [sys.executable, "-m", "dasmil", *map(str, arguments), *kill]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert marker.exists()


def assert_same(one, two):
    """Equal to the last bit, whatever they are made of."""
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for first, second in zip(one, two):
            assert_same(first, second)
    else:
        assert one == two


def assert_same_end(whole, resumed, names):
    """Weights, the optimiser's state and the schedule of two runs."""
    for name in names:
        one, two = (
            torch.load(run / "checkpoints" / name, weights_only=True) for run in (whole, resumed)
        )
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
            assert_same(one[part], two[part])
    assert (whole / "history.csv").read_text() == (resumed / "history.csv").read_text()


@pytest.fixture(autouse=True)
def tests_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS))


@pytest.mark.slow
def test_dasmil_killed_three_times_ends_as_if_never_killed(road, tmp_path):
    """Before the first checkpoint, in the middle of an epoch, and while it is validated.

    With dropout of edges and attention, shuffled slides, and a process that reads them.
    """
    options = ["--trainer.max_epochs", "4", "--data.num_workers", "1"]
    assert main([*fit_dasmil(road.bags, tmp_path, "whole"), *options]) == 0

    run = tmp_path / "killed"  # 6 training slides: 6 steps an epoch
    fit = [*fit_dasmil(road.bags, tmp_path, "killed"), *options]
    fit_until_killed(fit, tmp_path / "first", step=4)
    assert not list(run.glob("checkpoints/*.ckpt"))
    fit_until_killed(["fit", "--resume", run], tmp_path / "second", step=9)
    fit_until_killed(["fit", "--resume", run], tmp_path / "third", validation_epoch=2)
    assert main(["fit", "--resume", str(run)]) == 0
    assert_same_end(tmp_path / "whole", run, ["last.ckpt", "best.ckpt"])

    starts = json.loads((run / "provenance.json").read_text())
    assert [start["seed"] for start in starts] == [0] * 4
    assert starts[0]["command"].startswith("python -m dasmil fit --config ")
    assert starts[-1]["command"] == f"python -m dasmil fit --resume {run}"
    for name in ("config.yaml", "split.csv", "history.csv", "curves.png", "val/val_metrics.csv"):
        assert (run / name).is_file()


@pytest.mark.slow
def test_a_killed_dino_training_resumes_with_the_same_crops(road, tmp_path):
    options = ["--trainer.max_epochs", "3", "--data.num_workers", "1"]
    options += ["--model.drop_path", "0.3"]
    assert main([*fit_dino(road.tiles, "x20", tmp_path / "whole"), *options]) == 0
    run = tmp_path / "killed" / "dino_x20"  # 16 tiles an epoch: 4 steps
    fit = [*fit_dino(road.tiles, "x20", tmp_path / "killed"), *options]
    fit_until_killed(fit, tmp_path / "once", step=6)
    assert main(["fit", "--resume", str(run)]) == 0
    assert_same_end(tmp_path / "whole" / "dino_x20", run, ["last.ckpt"])


@pytest.mark.slow
def test_a_run_that_was_moved_knows_its_best_checkpoint(road, tmp_path):
    """Lightning goes by the folder's name, and would overwrite best.ckpt with any later epoch."""
    options = ["--trainer.max_epochs", "3", "--trainer.max_steps", "12"]  # 6 steps an epoch
    options += ["--model.optimizer.learning_rate", "0"]
    options += ["--model.optimizer.min_learning_rate", "0"]
    assert main([*fit_dasmil(road.bags, tmp_path, "run"), *options]) == 0
    best = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert main(["fit", "--resume", str(moved), "--trainer.max_steps", "-1"]) == 0
    last = torch.load(moved / "checkpoints/last.ckpt", weights_only=True)
    (keeper,) = (
        state for key, state in last["callbacks"].items() if "'monitor': 'val/auroc'" in key
    )
    assert Path(keeper["best_model_path"]) == moved / "checkpoints/best.ckpt"
    assert last["epoch"] == 2
    again = torch.load(moved / "checkpoints/best.ckpt", weights_only=True)
    assert_same(best["state_dict"], again["state_dict"])
    assert not (tmp_path / "run").exists()


def test_a_training_resumes_with_its_own_settings_or_not_at_all(road, tmp_path, capsys):
    """What is refused changes nothing in the folder: config.yaml says what was used."""
    options = ["--trainer.max_epochs", "3", "--trainer.max_steps", "6"]
    assert main([*fit_dasmil(road.bags, tmp_path, "run"), *options]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"best.ckpt: epoch 0 \(last: 0\), chosen by val/auroc [\d.]+ of 2 val slides "
        r"\(1 normal, 1 tumour\)",
        said,
    )
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    changed = {
        "model.optimizer.learning_rate": (0.1, 0.0002),
        "model.optimizer.betas": ([0.9, 0.99], [0.5, 0.9]),
        "data.batch_size": (2, 1),
        "trainer.max_epochs": (4, 3),
        "seed_everything": (1, 0),
    }
    options = [text for name, (now, _) in changed.items() for text in (f"--{name}", f"{now}")]
    assert main(["fit", "--resume", str(run), *options]) == 2
    said = capsys.readouterr().err
    assert all(f"{name} {now} instead of {then}" in said for name, (now, then) in changed.items())
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    more = ["--trainer.max_steps", "-1", "--data.cache", "ram"]
    more += ["--model.evaluation.specificity", "0.8"]
    assert main(["fit", "--resume", str(run), *more]) == 0
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 2
    assert "nothing left to train" not in capsys.readouterr().out
    assert main(["fit", "--resume", str(run)]) == 0
    assert "last.ckpt is of the last epoch; there is nothing left to train" in (
        capsys.readouterr().out
    )


@pytest.mark.slow
def test_a_best_epoch_that_is_no_better_than_chance_is_named(road, tmp_path, capsys):
    """Without learning, the other order of the classes turns the AUROC round."""
    still = ["--model.optimizer.learning_rate", "0", "--trainer.max_epochs", "1"]
    found = []
    for name, classes in (("one", "[normal,tumour]"), ("other", "[tumour,normal]")):
        command = [*fit_dasmil(road.bags, tmp_path, name), "--data.classes", classes, *still]
        assert main(command) == 0
        said = capsys.readouterr().out
        auroc = float(re.search(r"chosen by val/auroc ([\d.]+)", said)[1])
        assert ("0.5 is chance" in said) == (auroc <= 0.5)
        found.append(auroc)
    assert found == [1 - found[1], 1 - found[0]]


def test_dino_resumes_with_its_own_schedule_or_not_at_all(road, tmp_path):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    def fit(*callbacks, tiles=16, ckpt_path=None, max_steps=-1, **options):
        keeper = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
        trainer = quiet_trainer(
            tmp_path, max_epochs=2, max_steps=max_steps, callbacks=[*callbacks, keeper]
        )
        data = small_data(road, tiles_per_epoch=tiles)
        trainer.fit(DINOModule(**{**SMALL, **options}), datamodule=data, ckpt_path=ckpt_path)
        return keeper.best_model_path

    path = fit(Stop())
    for options, words in (
        ({"optimizer": ScheduleOptions(1.0)}, "model.optimizer.learning_rate 1.0 instead of 0.0"),
        (
            {"optimizer": ScheduleOptions(weight_decay=(0.0, 0.0))},
            r"model.optimizer.weight_decay \[0.0, 0.0\] instead of \[0.04, 0.4\]",
        ),
        ({"max_steps": 6}, "trainer.max_steps 6 instead of -1"),
        ({"tiles": 8}, "data.tiles_per_epoch 8 instead of 16"),
    ):
        with pytest.raises(InputError, match=words):
            fit(ckpt_path=path, **options)
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "steps": 80}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="made for 80 steps, its tiles would now make 8"):
        fit(ckpt_path=tmp_path / "other.ckpt")
    assert torch.load(fit(ckpt_path=path), weights_only=True)["global_step"] == 8


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(road, tmp_path):
    for name, seed in (("one", "3"), ("two", "3"), ("other", "4")):
        options = ["--seed_everything", seed, "--trainer.max_epochs", "1"]
        assert main([*fit_dasmil(road.bags, tmp_path, name), *options]) == 0
    one, two, other = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("one", "two", "other")
    )
    assert_same(one, two)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda folder: None, "holds no config.yaml"),
        (
            lambda folder: (folder / "config.yaml").write_text("trainer: {logger: false}"),
            "not the config of a fit",
        ),
    ],
)
def test_a_folder_that_is_no_run_cannot_be_resumed(tmp_path, capsys, prepare, words):
    prepare(tmp_path)
    assert main(["fit", "--resume", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
