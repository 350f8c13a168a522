"""The history of a training: ``history.csv`` with one row per epoch, and a picture of curves."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from dasmil.callbacks.run_folder import logger_folder
from dasmil.errors import InputError
from dasmil.reports.shown import save_figure
from dasmil.reports.training_curves import columns_with_values, curves_figure, natural_order
from dasmil.tables import read_csv, write_csv

TABLE, PICTURE = "history.csv", "curves.png"
FIRST_COLUMNS = ("epoch", "step", "learning_rate")
DRAW_SECONDS = 60  # between two pictures during the training


class History(Callback):
    """Writes ``history.csv`` after each epoch, and ``curves.png`` now and then and at the end.

    A row holds the epoch, the optimiser's steps so far, the learning rate of the last step (of the
    first group of parameters), and all that was logged: the mean over the epoch if the model logs
    it, else the value of the last step. Names that end in ``_step`` are skipped. Cells of ``val``
    are empty for an epoch without validation.

    A row is written before the checkpoint of its epoch is saved, so this callback comes before
    those that save. A resumed training keeps the rows up to its checkpoint, so its table ends as
    that of an uninterrupted training. The logger names the folder; without one, nothing is written.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.rows: list[dict[str, Any]] = []
        self._interrupted: dict[int, dict[str, Any]] = {}  # rows of epochs that are trained again
        self._learning_rate: float | None = None
        self._validated = False
        self._drawn = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder = logger_folder(trainer)
        epoch = trainer.current_epoch
        earlier = [] if self.folder is None or epoch == 0 else _read_rows(self.folder / TABLE)
        self.rows = [row for row in earlier if row["epoch"] < epoch]
        self._interrupted = {row["epoch"]: row for row in earlier if row["epoch"] >= epoch}
        self._drawn = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ignore Lightning's sanity check, which runs before the first epoch."""
        self._validated, self._learning_rate = False, None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Read the rate here: at the end of an epoch the schedule has set the next one."""
        self._learning_rate = float(optimizer.param_groups[0]["lr"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the row after the validation of the epoch, and before its checkpoint."""
        logged = dict(trainer.callback_metrics)  # in every process: means are reduced here
        if self.folder is None or not trainer.is_global_zero:
            return
        row: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        row["learning_rate"] = self._learning_rate
        row |= {
            name: float(value)
            for name, value in logged.items()
            if _is_kept(name, logged) and (self._validated or not name.startswith("val"))
        }
        if self._learning_rate is None:  # its steps were made before the checkpoint was saved
            row = self._interrupted.get(trainer.current_epoch, row)
        self.rows.append(row)
        write_csv(self.folder / TABLE, _columns(self.rows), self.rows)
        if time.monotonic() - self._drawn > DRAW_SECONDS:
            self._draw()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._draw()

    def _draw(self) -> None:
        if self.folder is not None and self.rows:
            save_figure(self.folder / PICTURE, curves_figure(self.rows), dpi=110)
        self._drawn = time.monotonic()


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a table with their epochs as numbers; [] if there is no table yet."""
    if not path.is_file():
        return []
    _, rows = read_csv(path)
    try:
        return [{**row, "epoch": int(row["epoch"])} for row in rows]
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{path}: not the table of a training ({type(error).__name__}: {error}); move it away"
        ) from error


def _is_kept(name: str, logged: Mapping[str, Any]) -> bool:
    """Skip values of single steps and Lightning's duplicate ``*_epoch`` names."""
    second_name = name.endswith("_epoch") and name.removesuffix("_epoch") in logged
    return not name.endswith("_step") and not second_name


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns of all rows, in an order that depends on the names alone: x5 before x10."""
    others = columns_with_values(rows) - set(FIRST_COLUMNS)
    return [*FIRST_COLUMNS, *sorted(others, key=natural_order)]
