"""The course of a training: ``history.csv``, one row an epoch, and its curves as a picture."""

import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.optim import Optimizer

from dasmil.errors import InputError
from dasmil.files import atomic_path, read_csv, write_csv
from dasmil.reports.figures import GREY, scale_colours
from dasmil.reports.shown import MAX_SCALES, say_left_out, show_name

TABLE, PICTURE = "history.csv", "curves.png"
FIRST_COLUMNS = ("epoch", "step", "learning_rate")
DRAW_SECONDS = 60  # between two pictures while training goes on
PARTS = {"train": "-", "val": "--"}  # line style
AUROC = "auroc"  # shown of the figures of the validation
PANELS_IN_A_ROW = 3
MAX_PANELS = 24
MAX_CURVES = 2 * MAX_SCALES  # in a panel: the last ones, which are of the finest scales
MAX_POINTS = 2000  # of a curve
MAX_TITLE = 40  # characters
FEW_EPOCHS = 30  # up to here a dot for each
DPI = 110


class History(Callback):
    """Writes ``history.csv`` after each epoch, and ``curves.png`` now and then and at the end.

    A row holds the epoch, the steps of the optimiser so far, the learning rate of the last one (of
    its first group of parameters), and all that was logged: means over the epoch where the model
    logs them, else the value of the last step; names that end in ``_step`` are left out. A cell of
    an epoch that was not validated is empty.

    The row stands before the checkpoint of its epoch is saved, so this callback comes before those
    that save; a training that goes on from a checkpoint keeps the rows up to it, and its table is
    in the end that of one that was never broken off. Nothing is written without a logger, which
    names the folder.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.rows: list[dict[str, Any]] = []
        self._broken_off: dict[int, dict[str, Any]] = {}
        self._learning_rate: float | None = None
        self._validated = False
        self._drawn = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder = run_folder(trainer)
        epoch = trainer.current_epoch
        earlier = [] if self.folder is None or epoch == 0 else _read_rows(self.folder / TABLE)
        self.rows = [row for row in earlier if row["epoch"] < epoch]
        self._broken_off = {row["epoch"]: row for row in earlier if row["epoch"] >= epoch}
        self._drawn = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The checks before the training were no epoch's validation."""
        self._validated, self._learning_rate = False, None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """At the end of an epoch the schedule has set the rate of the next one already."""
        self._learning_rate = float(optimizer.param_groups[0]["lr"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation of this epoch has been before; the checkpoint of it comes after."""
        logged = dict(trainer.callback_metrics)  # in every process: means are put together here
        if self.folder is None or not trainer.is_global_zero:
            return
        row: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        row["learning_rate"] = self._learning_rate
        row |= {
            name: float(value)
            for name, value in logged.items()
            if _kept(name, logged) and (self._validated or not name.startswith("val"))
        }
        if self._learning_rate is None:  # all its steps were made before the checkpoint was saved
            row = self._broken_off.get(trainer.current_epoch, row)
        self.rows.append(row)
        write_csv(self.folder / TABLE, _columns(self.rows), self.rows)
        if time.monotonic() - self._drawn > DRAW_SECONDS:
            self._draw()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._draw()

    def _draw(self) -> None:
        if self.folder is not None and self.rows:
            figure = curves_figure(self.rows)
            with atomic_path(self.folder / PICTURE) as temporary:
                figure.savefig(temporary, dpi=DPI)
        self._drawn = time.monotonic()


def run_folder(trainer: Trainer) -> Path | None:
    """The folder that the logger names; nothing is written without one.

    To be asked for in every process: it is broadcast.
    """
    folder = trainer.log_dir if trainer.loggers else None
    return None if folder is None else Path(folder)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a table with their epochs as numbers; none where there is no table yet."""
    if not path.is_file():
        return []
    _, rows = read_csv(path)
    try:
        return [{**row, "epoch": int(row["epoch"])} for row in rows]
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{path}: not the table of a training ({type(error).__name__}: {error}); move it away"
        ) from error


def _kept(name: str, logged: Mapping[str, Any]) -> bool:
    """Not what is of one step alone, nor Lightning's second name of a mean over the epoch."""
    second_name = name.endswith("_epoch") and name.removesuffix("_epoch") in logged
    return not name.endswith("_step") and not second_name


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of all rows, in an order that depends on the names alone: x5 before x10."""
    return [*FIRST_COLUMNS, *sorted(_with_values(rows) - set(FIRST_COLUMNS), key=_natural)]


def _with_values(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    return {name for row in rows for name, value in row.items() if value not in ("", None)}


def _natural(name: str) -> list[tuple[float, str]]:
    """Numbers in a name count as numbers."""
    pieces = re.findall(r"\d+(?:\.\d+)?|\D+", name)
    return [(float(piece), "") if piece[0].isdigit() else (-1.0, piece) for piece in pieces]


def curves_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel for each term of the objective, for the AUROC, and for what else was logged.

    Training solid, validation dashed, and a scale in its colour. Names that do not begin with
    ``train`` or ``val`` have a panel of their own.

    Parameters
    ----------
    rows: of ``history.csv``, one an epoch, by names such as ``train/bag/x20`` or ``val/x20/auroc``.
    """
    columns = sorted(_with_values(rows) - {"epoch", "step"}, key=_natural)
    every = _panels(columns)
    panels = dict(list(every.items())[:MAX_PANELS])
    left_out = say_left_out(len(every), MAX_PANELS, "terms")
    colours = scale_colours(sorted(filter(None, map(_scale, columns)), key=_natural)) | {"": GREY}
    num_columns = max(1, min(PANELS_IN_A_ROW, len(panels)))
    num_rows = max(1, -(-len(panels) // num_columns))
    figure = Figure((3.2 * num_columns, 2.5 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for panel, (title, curves) in zip(axes, panels.items()):
        for column in curves[-MAX_CURVES:]:
            part, scale = column.split("/")[0], _scale(column)
            label = " ".join(word for word in (part if part in PARTS else "", scale) if word)
            style = {"color": colours[scale], "linestyle": PARTS.get(part, "-"), "label": label}
            _plot(panel, rows, column, **style)
        name = "AUROC" if title == AUROC else show_name(title.replace("_", " "), MAX_TITLE)
        more = say_left_out(len(curves), MAX_CURVES, "curves")
        panel.set_title("\n".join(filter(None, [name, more])), fontsize=10)
        if title == AUROC:
            panel.set_ylim(-0.03, 1.03)
        panel.set_xlabel("epoch", fontsize=9)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            panel.legend(fontsize=7.5)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    if left_out:
        figure.suptitle(left_out, fontsize=10)
    return figure


def _panels(columns: Sequence[str]) -> dict[str, list[str]]:
    """By title the columns of each panel: the loss and its terms, AUROC, and what is no part's."""
    terms: dict[str, list[str]] = defaultdict(list)
    for column in columns:
        if column.split("/")[0] in PARTS:
            terms[_term(column)].append(column)
    trained = [term for term, found in terms.items() if any(c[:5] == "train" for c in found)]
    shown = sorted({*trained, "loss"} & set(terms), key=lambda term: (term != "loss", term))
    panels = {term: terms[term] for term in shown}
    if AUROC in terms:
        of_scales = [column for column in terms[AUROC] if _scale(column)]
        panels[AUROC] = of_scales or terms[AUROC]  # without a scale it is the finest one's again
    return panels | {column: [column] for column in columns if column.split("/")[0] not in PARTS}


def _scale(column: str) -> str:
    """x20 of val/x20/auroc; "" where the name has none."""
    return next((word for word in column.split("/") if re.fullmatch(r"x\d+(\.\d+)?", word)), "")


def _term(column: str) -> str:
    """``train/bag/x20`` → bag, ``val/x20/auroc`` → auroc."""
    scale = _scale(column)
    return "/".join(word for word in column.split("/")[1:] if word != scale)


def _plot(panel: Axes, rows: Sequence[Mapping[str, Any]], column: str, **style: Any) -> None:
    """Over the epochs that have a value; one that is not a number leaves a gap.

    Of very many epochs every second, third, … is drawn, and the last one.
    """
    known = [row for row in rows if row.get(column) not in (None, "")]
    known = known[:: -max(1, -(-len(known) // MAX_POINTS))][::-1]
    marker = "." if len(known) < FEW_EPOCHS else ""
    epochs, values = [int(row["epoch"]) for row in known], [float(row[column]) for row in known]
    panel.plot(epochs, values, marker=marker, linewidth=1.4, **style)
