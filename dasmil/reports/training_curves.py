"""The training curves: losses and metrics per epoch."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dasmil.reports.figure_parts import GREY, scale_colours, style_axes
from dasmil.reports.shown import MAX_SCALES, describe_left_out, show_name

LINE_STYLES = {"train": "-", "val": "--"}
AUROC = "auroc"  # the validation metric that is drawn
PANELS_IN_A_ROW = 3
MAX_PANELS = 24
MAX_CURVES = 2 * MAX_SCALES  # per panel: the last ones, which belong to the finest scales
MAX_POINTS = 2000  # per curve
MAX_TITLE = 40  # characters
FEW_EPOCHS = 30  # with fewer epochs each one is a dot


def curves_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel per term of the objective, one for the AUROC, and one per other logged value.

    Training is solid, validation dashed, and each scale has its colour. Names that do not begin
    with ``train`` or ``val`` have their own panel.

    Parameters
    ----------
    rows: of ``history.csv``, one per epoch, with names such as ``train/bag/x20`` or
        ``val/x20/auroc``.
    """
    columns = sorted(columns_with_values(rows) - {"epoch", "step"}, key=natural_order)
    every = _panels(columns)
    panels = dict(list(every.items())[:MAX_PANELS])
    left_out = describe_left_out(len(every), MAX_PANELS, "terms")
    colours = scale_colours(sorted(filter(None, map(_scale, columns)), key=natural_order)) | {
        "": GREY
    }
    num_columns = max(1, min(PANELS_IN_A_ROW, len(panels)))
    num_rows = max(1, -(-len(panels) // num_columns))
    figure = Figure((3.2 * num_columns, 2.5 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for panel, (title, curves) in zip(axes, panels.items()):
        for column in curves[-MAX_CURVES:]:
            split, scale = column.split("/")[0], _scale(column)
            label = " ".join(filter(None, [split if split in LINE_STYLES else "", scale]))
            line = LINE_STYLES.get(split, "-")
            style = {"color": colours[scale], "linestyle": line, "label": label}
            _plot(panel, rows, column, **style)
        name = "AUROC" if title == AUROC else show_name(title.replace("_", " "), MAX_TITLE)
        more = describe_left_out(len(curves), MAX_CURVES, "curves")
        panel.set_title("\n".join(filter(None, [name, more])), fontsize=10)
        if title == AUROC:
            panel.set_ylim(-0.03, 1.03)
        panel.set_xlabel("epoch", fontsize=9)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
        panel.tick_params(labelsize=8)
        style_axes(panel)
        if len(curves) > 1:
            panel.legend(fontsize=7.5)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    if left_out:
        figure.suptitle(left_out, fontsize=10)
    return figure


def _panels(columns: Sequence[str]) -> dict[str, list[str]]:
    """Columns per panel title: the loss and its terms, AUROC, and columns of no split."""
    terms: dict[str, list[str]] = defaultdict(list)
    for column in columns:
        if column.split("/")[0] in LINE_STYLES:
            terms[_term(column)].append(column)
    trained = [term for term, names in terms.items() if any(n[:5] == "train" for n in names)]
    shown = sorted({*trained, "loss"} & set(terms), key=lambda term: (term != "loss", term))
    panels = {term: terms[term] for term in shown}
    if AUROC in terms:
        of_scales = [column for column in terms[AUROC] if _scale(column)]
        panels[AUROC] = of_scales or terms[AUROC]  # without a scale it repeats the finest
    others = [column for column in columns if column.split("/")[0] not in LINE_STYLES]
    return panels | {column: [column] for column in others}


def _scale(column: str) -> str:
    """``val/x20/auroc`` → x20; "" if the name has no scale."""
    return next((word for word in column.split("/") if re.fullmatch(r"x\d+(\.\d+)?", word)), "")


def _term(column: str) -> str:
    """``train/bag/x20`` → bag, ``val/x20/auroc`` → auroc."""
    scale = _scale(column)
    return "/".join(word for word in column.split("/")[1:] if word != scale)


def _plot(panel: Axes, rows: Sequence[Mapping[str, Any]], column: str, **style: Any) -> None:
    """Draw the epochs that have a value; a value that is not a number leaves a gap.

    Of very many epochs only every second, third, … is drawn, and always the last one.
    """
    known = [row for row in rows if row.get(column) not in (None, "")]
    known = known[:: -max(1, -(-len(known) // MAX_POINTS))][::-1]
    marker = "." if len(known) < FEW_EPOCHS else ""
    epochs, values = [int(row["epoch"]) for row in known], [float(row[column]) for row in known]
    panel.plot(epochs, values, marker=marker, linewidth=1.4, **style)


def columns_with_values(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """The columns with at least one value."""
    return {name for row in rows for name, value in row.items() if value not in ("", None)}


def natural_order(name: str) -> list[tuple[float, str]]:
    """Sort key that compares the numbers in a name as numbers."""
    pieces = re.findall(r"\d+(?:\.\d+)?|\D+", name)
    return [(float(piece), "") if piece[0].isdigit() else (-1.0, piece) for piece in pieces]
