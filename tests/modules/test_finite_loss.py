"""What is not a number is no class, and no training."""

import csv
from dataclasses import replace

import pytest
import torch
from bag_factory import CLASSES, write_bags
from lightning.pytorch.callbacks import ModelCheckpoint
from models import make_module
from modules.test_dino_module import SMALL as SMALL_DINO
from modules.test_dino_module import small_data
from modules.test_mil_module import SMALL, quiet_trainer
from road import fit_dasmil

from dasmil.bags import bag_path, read_bag, write_bag
from dasmil.cli import main
from dasmil.data import BagDataModule
from dasmil.data.tiles import TileDataset
from dasmil.errors import InputError
from dasmil.methods import DASMIL
from dasmil.modules import DINOModule, finite_loss

PARTS = ("train", "train", "train", "train", "val", "val", "test", "test", "test", "test")


def make_bags(folder, large=()):
    """Features of the slides ``large`` overflow in float16."""
    labels = {f"s{n}": CLASSES[n % 2] for n in range(len(PARTS))}
    write_bags(folder, labels, dict(zip(labels, PARTS)))
    for slide_id in large:
        path = bag_path(folder, slide_id)
        bag = read_bag(path)
        features = {scale: x.clone().fill_(6e4) for scale, x in bag.features.items()}
        write_bag(path, replace(bag, features=features))
    return folder


class BreaksAt(DASMIL):
    """The loss of a slide is not finite from an epoch on."""

    slide_id, epoch = "s1", 1

    def objective(self, output, graph):
        total, terms = super().objective(output, graph)
        broken = self.slide_id in graph.slide_ids and self.current_epoch >= self.epoch
        return total * (float("nan") if broken else 1.0), terms


@pytest.mark.parametrize("together", [1, 10])
def test_a_training_whose_loss_is_not_finite_stops_and_names_the_slide(
    tmp_path, monkeypatch, together
):
    """Whether it is noticed in the middle of the epoch, or at its end."""
    monkeypatch.setattr(finite_loss, "CHECKED_STEPS", together)
    data = BagDataModule(make_bags(tmp_path), CLASSES, num_workers=0)
    keepers = [ModelCheckpoint(tmp_path / "kept", name, monitor=m) for name, m in
               (("best", "val/loss"), ("last", None))]  # fmt: skip
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=keepers)
    with pytest.raises(
        InputError, match=r"the loss of step [4-7] is not finite; its slides are s1;"
    ):
        trainer.fit(make_module(BreaksAt, **SMALL), datamodule=data)
    for name in ("best", "last"):
        kept = torch.load(tmp_path / "kept" / f"{name}.ckpt", weights_only=True)
        assert kept["epoch"] == 0
        assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_a_validation_that_is_not_finite_stops_fit_and_names_the_slide(tmp_path):
    data = BagDataModule(make_bags(tmp_path), CLASSES, num_workers=0)
    module = make_module(BreaksAt, **SMALL)
    module.slide_id = "s5"
    keeper = ModelCheckpoint(tmp_path / "kept", "best", monitor="val/auroc", mode="max")
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[keeper])
    with pytest.raises(InputError, match=r"not finite for 1 validation slide\(s\): s5"):
        trainer.fit(module, datamodule=data)
    assert torch.load(keeper.best_model_path, weights_only=True)["epoch"] == 0


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class BadLastStep(DASMIL):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.network.heads["x20"].value.bias.data[0] = torch.nan

        def validation_step(self, graph, batch_idx):
            pass

        def on_validation_epoch_end(self):
            pass

    data = BagDataModule(make_bags(tmp_path), CLASSES, num_workers=0)
    keeper = ModelCheckpoint(tmp_path / "kept", "last")
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1, callbacks=[keeper])
    with pytest.raises(InputError, match="weights are not finite after the last step"):
        trainer.fit(make_module(BadLastStep, **SMALL), datamodule=data)
    assert not (tmp_path / "kept" / "last.ckpt").exists()


def test_dino_stops_and_names_the_slides_of_the_tiles_of_the_step(road, tmp_path, monkeypatch):
    class Breaks(DINOModule):
        def _loss(self, teacher_out, student_out):
            bad = self.global_step >= 2
            return super()._loss(teacher_out, student_out) * (torch.inf if bad else 1.0)

    read, get = [], TileDataset.__getitem__
    monkeypatch.setattr(TileDataset, "__getitem__", lambda *a: read.append(a[1]) or get(*a))
    data = small_data(road)
    keeper = ModelCheckpoint(tmp_path / "kept", "last")
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[keeper])
    module = Breaks(**SMALL_DINO)
    with pytest.raises(
        InputError, match="the loss of step 2 is not finite; its slides are"
    ) as found:
        trainer.fit(module, datamodule=data)
    names = sorted({data.rows[number].slide_id for number, _, _ in read[8:12]})
    assert f"its slides are {', '.join(names)};" in str(found.value)
    assert not keeper.best_model_path


def test_the_first_step_of_all_processes_is_named(monkeypatch):
    monkeypatch.setattr(finite_loss, "is_true_anywhere", lambda flag: True)
    monkeypatch.setattr(finite_loss, "gather_lists", lambda mine: [*mine, (3, ["other"])])
    guard = finite_loss.FiniteLoss()
    guard.watch(3, torch.tensor(1.0), lambda: ["a"])
    with pytest.raises(InputError, match="the loss of step 3 is not finite; its slides are other;"):
        guard.check()
    guard = finite_loss.FiniteLoss()
    guard.watch(2, torch.tensor(float("nan")), lambda: ["b"])
    guard.watch(3, torch.tensor(1.0), lambda: ["a"])
    with pytest.raises(InputError, match="the loss of step 2 is not finite; its slides are b;"):
        guard.check()


def read_rows(path):
    with open(path, newline="") as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def test_a_slide_whose_output_is_not_finite_fails_by_name_and_has_no_class(tmp_path, capsys):
    bags = make_bags(tmp_path / "bags", large=["s6", "s9"])
    assert main([*fit_dasmil(bags, tmp_path, "run"), "--trainer.max_epochs", "1"]) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    options = ["--ckpt_path", str(checkpoint), "--bags", str(bags)]
    half = ["--trainer.precision", "16-true", "--output", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(["predict", *options, *half]) == 1
    words = r"the output is not finite for 2 slide(s), which have no class: s6, s9"
    assert words in capsys.readouterr().err
    rows = read_rows(tmp_path / "out" / "predictions.csv")
    for slide_id, row in rows.items():
        of_output = [
            value for name, value in row.items() if name.startswith(("logit", "prob", "cal"))
        ]
        failed = slide_id in ("s6", "s9")
        assert (row["state"], any(of_output)) == (("failed", False) if failed else ("done", True))
        assert (tmp_path / "out" / "instances" / f"{slide_id}.csv").exists() is not failed

    assert main(["test", *options, *half]) == 1
    assert words in capsys.readouterr().err
    rows = read_rows(tmp_path / "out" / "test_slides.csv")
    assert [bool(rows[name]["prob/x20/tumour"]) for name in ("s6", "s7", "s8", "s9")] == [
        False,
        True,
        True,
        False,
    ]
    assert not (tmp_path / "out" / "test_metrics.csv").exists()
    assert not (tmp_path / "out" / "test_evaluation.json").exists()
