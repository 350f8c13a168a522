"""Commands that are ended by a signal to all of their processes, as schedulers and terminals do."""

import csv
import os
import signal
import time

import psutil
import pytest
import torch
from feature_files import CELLS, write_trident
from road import embed_command, fit_dasmil, fit_dino, tile_command

from dasmil.callbacks.history import History
from dasmil.callbacks.predictions import PredictionWriter
from dasmil.cli import main
from dasmil.demo import run as demo
from dasmil.embedding.writer import BagWriter
from dasmil.interop.features import importer
from dasmil.modules import MILModule
from dasmil.slides import tile

BY = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


@pytest.fixture(params=BY, ids=BY.values())
def ending(request, monkeypatch):
    """``ending(owner, name)``: a signal to all processes when a function is called a second time.

    The children get it first, and have died of it, if they do, when this process gets it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    monkeypatch.setattr("dasmil.endings.ENDING_S", 0.0)  # as if the last test were long ago

    def ending(owner, name):
        function, calls = getattr(owner, name), []

        def ended(*args, **kwargs):
            calls.append(name)
            if len(calls) == 2:
                for child in psutil.Process().children(recursive=True):
                    child.send_signal(request.param)
                time.sleep(0.5)
                os.kill(os.getpid(), request.param)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, ended)
        return request.param

    yield ending
    signal.signal(signal.SIGINT, before)


def states(folder):
    with open(folder / "status.csv", newline="") as file:
        return {row["state"] for row in csv.DictReader(file)}


def assert_said(number, capsys, verb, advice):
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"{verb} was ended by {BY[number]}; {advice}"


def test_tile(road, tmp_path, ending, capsys):
    number = ending(tile, "_result")
    assert main(tile_command(road.cohort, tmp_path)) == 128 + number
    assert_said(number, capsys, "tile", "run the same command again, what is done is kept")
    assert states(tmp_path) == {"done", "waiting"}


def test_embed(road, tmp_path, ending, capsys):
    number = ending(BagWriter, "on_predict_batch_end")
    command = embed_command(road.tiles, tmp_path, road.dino)
    command[command.index("--num_workers") + 1] = "1"
    assert main(command) == 128 + number
    assert_said(number, capsys, "embed", "run the same command again, what is done is kept")
    assert states(tmp_path) <= {"done", "waiting"}


@pytest.mark.parametrize(
    ("ending", "name"),
    [
        (signal.SIGTERM, "dasmil"),
        *(
            pytest.param(number, name, marks=pytest.mark.slow)
            for number, name in [(signal.SIGINT, "dasmil"), *((n, "dino_x20") for n in BY)]
        ),
    ],
    indirect=["ending"],
)
def test_fit(road, tmp_path, ending, capsys, name):
    command = fit_dino(road.tiles, "x20", tmp_path)
    command = fit_dasmil(road.bags, tmp_path) if name == "dasmil" else command
    command += ["--trainer.max_epochs", "3", "--data.num_workers", "1"]
    number = ending(History, "on_train_epoch_end")
    assert main(command) == 128 + number
    run = tmp_path / name
    assert_said(number, capsys, "fit", f"go on with: python -m dasmil fit --resume {run}")
    assert main(["fit", "--resume", str(run)]) == 0
    with open(run / "history.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]


REFUSED = {
    "unknown label": ["--data.classes", "[normal,other]"],
    "no slide of a class": ["--data.split.num_folds", "11", "--data.split.fold", "0"],
    "no epochs": ["--trainer.max_epochs", "-1"],
    "no validation slide": ["--data.split.val_fraction", "0", "--data.split.table", "none.csv"],
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_a_refused_fit_leaves_nothing_behind(road, tmp_path, capsys, options):
    assert main([*fit_dasmil(road.bags, tmp_path / "runs"), *options]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "runs").exists()


def test_a_fit_that_is_refused_after_its_checkpoint_was_read_leaves_nothing_behind(
    road, tmp_path, capsys
):
    content = torch.load(road.dino["x20"], weights_only=True)
    content["steps"], content["settings"]["trainer.max_epochs"] = 80, 2
    torch.save(content, tmp_path / "other.ckpt")
    command = [*fit_dino(road.tiles, "x20", tmp_path / "runs"), "--trainer.max_epochs", "2"]
    assert main([*command, "--ckpt_path", str(tmp_path / "other.ckpt")]) == 2
    assert "made for 80 steps, its tiles would now make 8" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_refused_fit_leaves_the_folder_of_a_run_as_it_is(road, tmp_path):
    assert main([*fit_dasmil(road.bags, tmp_path), "--trainer.max_epochs", "1"]) == 0
    run = tmp_path / "dasmil"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "-1"]) == 2
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_predict(road, tmp_path, ending, capsys):
    assert main([*fit_dasmil(road.bags, tmp_path), "--trainer.max_epochs", "1"]) == 0
    number = ending(PredictionWriter, "on_predict_batch_end")
    checkpoint = tmp_path / "dasmil" / "checkpoints" / "best.ckpt"
    command = ["predict", "--ckpt_path", str(checkpoint), "--bags", str(road.bags)]
    command += ["--data.num_workers", "1", "--output", str(tmp_path / "out")]
    assert main(command) == 128 + number
    assert_said(number, capsys, "predict", "run the same command again")


@pytest.mark.slow
def test_test(road, tmp_path, ending, capsys):
    assert main([*fit_dasmil(road.bags, tmp_path), "--trainer.max_epochs", "1"]) == 0
    number = ending(MILModule, "test_step")
    checkpoint = tmp_path / "dasmil" / "checkpoints" / "best.ckpt"
    command = ["test", "--ckpt_path", str(checkpoint), "--bags", str(road.bags)]
    command += ["--data.num_workers", "1", "--output", str(tmp_path / "out")]
    assert main(command) == 128 + number
    assert_said(number, capsys, "test", "run the same command again")
    assert not list(tmp_path.glob("out/test_*"))
    assert main(command) == 0


def test_import(tmp_path, ending, capsys):
    for slide_id in ("s1", "s2", "s3"):
        features = write_trident(tmp_path, slide_id, 20, CELLS)
    number = ending(importer, "write_bag")
    command = ["import", "trident", str(tmp_path / "bags"), "--features.x20", str(features)]
    assert main(command) == 128 + number
    assert_said(
        number, capsys, "import trident", "run the same command again, what is done is kept"
    )
    assert states(tmp_path / "bags") == {"done", "waiting"}
    assert main(command) == 0
    assert states(tmp_path / "bags") == {"done"}


@pytest.mark.slow
def test_demo(road, tmp_path, ending, capsys, monkeypatch):
    """Ended in a fit, which names ``fit --resume`` if it is called by itself."""
    fit = [*fit_dasmil(road.bags, tmp_path / "runs"), "--trainer.max_epochs", "3"]
    steps = [tile_command(road.cohort, tmp_path / "tiles"), [*fit, "--data.num_workers", "1"]]
    monkeypatch.setattr(demo, "write_cohort", lambda *_, **__: road.cohort)
    monkeypatch.setattr(demo, "demo_commands", lambda *_: iter(steps))
    monkeypatch.setattr(demo, "print_summary", lambda *_: None)
    number = ending(History, "on_train_epoch_end")
    assert main(["demo", "--output", str(tmp_path)]) == 128 + number
    assert_said(number, capsys, "demo", "run the same command again, what is done is kept")
    assert main(["demo", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("(done before)") == 1
    with open(tmp_path / "runs" / "dasmil" / "history.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]


def test_a_process_that_works_for_another_one_gets_no_signal_while_it_starts():
    from dasmil.work.process import ChildProcess

    child = ChildProcess(abs)
    psutil.Process(child.process.pid).send_signal(signal.SIGTERM)
    child.begin(-3)
    assert child.result() == 3
    child.kill()
