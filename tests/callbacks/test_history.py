"""The table and the curves of a training."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from dasmil.callbacks.history import History, curves_figure
from dasmil.errors import InputError
from dasmil.reports.figure_parts import scale_colours
from dasmil.tables import read_csv


class Counting(LightningModule):
    """Logs numbers whose mean over an epoch is known."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        epoch = float(self.current_epoch)
        self.log("train/bag/x20", epoch + batch_idx, on_step=False, on_epoch=True)
        self.log("train/both", epoch + batch_idx, on_step=True, on_epoch=True)
        self.log("train/loss_step", 1.0)
        return self.weight.sum()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("schedule/place", 10.0 * self.current_epoch + batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val/x20/auroc", float(self.current_epoch) / 4)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.25)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def train(folder, max_epochs, ckpt_path=None, **options):
    data = DataLoader([0.0, 1.0, 2.0])
    options = {"logger": CSVLogger(folder, "run", ""), "num_sanity_val_steps": 0, **options}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        callbacks=[History(), ModelCheckpoint(folder / "kept", "last")],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(Counting(), data, data, ckpt_path=ckpt_path)
    return folder / "run"


@pytest.mark.draws
def test_one_row_per_epoch_with_every_metric(tmp_path):
    run = train(tmp_path, 3)
    columns, rows = read_csv(run / "history.csv")
    first = ["epoch", "step", "learning_rate"]
    logged = ["schedule/place", "train/bag/x20", "train/both", "val/x20/auroc"]
    assert columns == first + logged
    values = [[float(row[name]) for name in columns] for row in rows]
    assert values == [
        [0, 3, 0.25, 2, 1, 1, 0],  # of what is logged for steps alone, the last one
        [1, 6, 0.125, 12, 2, 2, 0.25],
        [2, 9, 0.0625, 22, 3, 3, 0.5],
    ]
    assert (run / "curves.png").stat().st_size > 1000


def test_an_epoch_that_was_not_validated_has_empty_cells(tmp_path):
    """Every second epoch; the checks before the training are no epoch's."""
    run = train(tmp_path, 4, check_val_every_n_epoch=2, num_sanity_val_steps=1)
    _, rows = read_csv(run / "history.csv")
    assert [row["val/x20/auroc"] for row in rows] == ["", "0.25", "", "0.75"]
    assert [float(row["train/bag/x20"]) for row in rows] == [1, 2, 3, 4]


def test_without_a_logger_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "run", 1, logger=False)
    assert not list(tmp_path.rglob("history.csv")) and not list(tmp_path.rglob("curves.png"))


def test_an_evaluation_after_the_training_adds_nothing(tmp_path):
    """``fit`` evaluates its best checkpoint with the same trainer."""
    history, data = History(), DataLoader([0.0])
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=CSVLogger(tmp_path, "run", ""),
        callbacks=[history],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Counting()
    trainer.fit(model, data, data)
    before = (tmp_path / "run" / "history.csv").read_text()
    trainer.validate(model, data, verbose=False)
    assert (tmp_path / "run" / "history.csv").read_text() == before


def test_a_resumed_training_keeps_the_rows_up_to_its_checkpoint(tmp_path):
    """The checkpoint is saved after the validation, before the epoch has ended."""
    whole = train(tmp_path / "whole", 4, check_val_every_n_epoch=2) / "history.csv"
    folder = tmp_path / "broken"
    table = train(folder, 2, check_val_every_n_epoch=2) / "history.csv"
    text = table.read_text()
    table.write_text(text + text.splitlines()[-1].replace("1,", "2,", 1) + "\n")  # was not saved
    train(folder, 4, folder / "kept" / "last.ckpt", check_val_every_n_epoch=2)
    assert table.read_text() == whole.read_text()


def test_a_table_of_another_program_is_refused(tmp_path):
    table = train(tmp_path, 1) / "history.csv"
    table.write_text("name\nsomething\n")
    with pytest.raises(InputError, match=r"history.csv: not the table of a training"):
        train(tmp_path, 2, tmp_path / "kept" / "last.ckpt")


def test_a_new_training_begins_a_new_table(tmp_path):
    train(tmp_path, 3)
    _, rows = read_csv(train(tmp_path, 1) / "history.csv")
    assert [row["epoch"] for row in rows] == ["0"]


def test_each_term_has_a_panel_with_a_line_for_each_scale_and_part():
    rows = [
        {
            "epoch": epoch,
            "step": epoch,
            "learning_rate": 0.1,
            "train/bag/x10": 1.0 - epoch,
            "train/bag/x20": 0.0,
            "val/bag/x20": 2.0,
            "train/distillation/x10": 3.0,
            "val/x10/auroc": 0.0,
            "val/x20/auroc": "" if epoch == 0 else "0.5",
            "val/auroc": 0.5,
        }
        for epoch in range(2)
    ]
    panels = {axes.get_title(): axes for axes in curves_figure(rows).axes if axes.get_visible()}
    assert set(panels) == {"learning rate", "bag", "distillation", "AUROC"}
    lines = {item.get_label(): item for item in panels["bag"].lines}
    assert set(lines) == {"train x10", "train x20", "val x20"}
    assert list(lines["train x10"].get_ydata()) == [1, 0]
    assert list(lines["train x20"].get_ydata()) == [0, 0]  # a zero is a value
    assert lines["train x20"].get_color() == lines["val x20"].get_color()
    assert lines["train x20"].get_linestyle() != lines["val x20"].get_linestyle()
    coarse, fine = panels["AUROC"].lines  # and not the finest one a second time, without a scale
    assert (coarse.get_label(), fine.get_label()) == ("val x10", "val x20")
    assert (list(fine.get_xdata()), list(fine.get_ydata())) == ([1], [0.5])


def test_a_loss_that_is_no_number_leaves_a_gap():
    rows = [{"epoch": n, "train/loss": value} for n, value in enumerate(["1.0", "nan", "2.0"])]
    (curve,) = curves_figure(rows).axes[0].lines
    assert np.array_equal(curve.get_ydata(), [1, np.nan, 2], equal_nan=True)


def test_a_scale_has_the_colour_that_it_has_in_the_figures():
    figure = curves_figure([{"epoch": 0, "train/bag/x5": 1.0, "train/bag/x10": 1.0}])
    colours = [curve.get_color() for curve in figure.axes[0].lines]
    assert colours == [scale_colours([scale])[scale] for scale in ("x5", "x10")]


@pytest.mark.parametrize("name", ["schedule/weight_decay", "something"])
def test_names_that_it_does_not_know_have_a_panel_of_their_own(name):
    figure = curves_figure([{"epoch": 0, "step": 1, name: 1.0}])
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == [
        name.replace("_", " ")
    ]


def test_a_model_that_logs_nothing_has_an_empty_picture():
    assert not any(axes.get_visible() for axes in curves_figure([{"epoch": 0, "step": 1}]).axes)


@pytest.mark.draws
def test_very_many_terms_scales_and_epochs_make_no_larger_picture():
    """24 panels, 12 curves in each, 2,000 points of a curve; the last epoch is among them."""
    rows = [
        {"epoch": epoch, "step": epoch}
        | {f"train/term{number}$_/x{scale}": 1.0 for number in range(40) for scale in range(1, 3)}
        | {f"train/loss/x{scale}": 1.0 for scale in range(1, 30)}
        for epoch in range(9)
    ]
    figure = curves_figure(rows)
    assert max(figure.get_size_inches()) <= 20
    assert figure.get_suptitle() == "17 more terms are left out"
    assert len(figure.axes[0].lines) == 12
    assert figure.axes[0].get_title() == "loss\n17 more curves are left out"
    assert figure.axes[1].get_title() == r"term0\$"  # matplotlib would draw a formula
    long = curves_figure([{"epoch": epoch, "train/loss": 1.0} for epoch in range(5001)])
    x = long.axes[0].lines[0].get_xdata()
    assert len(x) <= 2000 and x[-1] == 5000
