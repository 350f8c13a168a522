"""The figure of a sweep's table."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dasmil.experiments.sweep.runs import SweepRow
from dasmil.experiments.sweep.table import Cell
from dasmil.reports.shown import save_figure, show_first, show_name

ROW_INCHES = 0.34
PANEL_INCHES = 3.4
MAX_ROWS, MAX_COLUMNS = 60, 8
MAX_LABEL = 60  # characters


def draw(
    path: Path, title: str, rows: Sequence[SweepRow], cells: Sequence[Mapping[str, Cell]]
) -> None:
    """Draw one panel per column, one line per row: a dot per run, a bar at the mean, ◇ paper."""
    from matplotlib.figure import Figure

    has_paper = any(row.paper for row in rows)
    columns, fewer_columns = show_first(list(cells[0]), MAX_COLUMNS, "columns")
    rows, fewer_rows = show_first(rows, MAX_ROWS, "rows")
    height = 1.3 + ROW_INCHES * len(rows)
    figure = Figure((1.8 + PANEL_INCHES * len(columns), height), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for panel, column in zip(panels, columns):
        for y, (row, cells_of_row) in enumerate(zip(rows, cells)):
            cell = cells_of_row[column]
            panel.plot(cell.known, [y] * len(cell.known), "o", color="C0", alpha=0.5, mew=0)
            if cell.mean is not None:
                panel.plot(cell.mean, y, "|", color="C0", markersize=16, markeredgewidth=2)
            if column in row.paper:
                panel.plot(row.paper[column], y, "D", color="C1", markerfacecolor="none")
        panel.set_xlabel(column)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [show_name(row.label, MAX_LABEL) for row in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    paper = "; ◇ the paper, on its own data" if has_paper else ""
    left_out = ", ".join(filter(None, [fewer_rows, fewer_columns]))
    lines = [show_name(title, MAX_LABEL), f"● a run, | their mean{paper}", left_out]
    figure.suptitle("\n".join(filter(None, lines)), fontsize=10)
    save_figure(path, figure)
