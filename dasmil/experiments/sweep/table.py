"""The table of a sweep, with the paper's metrics beside ours."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dasmil.experiments.sweep.runs import SweepRow

CSV_COLUMNS = ("label", "column", "paper", "mean", "sd", "n", "values")


@dataclass(frozen=True)
class Cell:
    """A row's metrics in one column: one per run, None for a run without it."""

    values: tuple[float | None, ...]

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if value is not None]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.known) if self.known else None

    @property
    def sd(self) -> float | None:
        """Standard deviation of a sample (n - 1); None for a single value."""
        return statistics.stdev(self.known) if len(self.known) > 1 else None

    def __str__(self) -> str:
        if self.mean is None:
            return "–"
        spread = "" if self.sd is None else f" ± {self.sd:.3f}"
        num, num_all = len(self.known), len(self.values)
        return f"{self.mean:.3f}{spread}" + (f" ({num} of {num_all})" if num < num_all else "")


def describe_runs(seeds: Sequence[int], num_folds: int | None) -> str:
    """Describe the runs of a cell: ``mean ± sd over 5 folds × 1 seed (0)``."""
    numbers = ", ".join(str(seed) for seed in seeds)
    if num_folds is not None:
        num_seeds = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
        return f"mean ± sd over {num_folds} folds × {num_seeds} ({numbers})"
    return f"mean ± sd over seeds {numbers}" if len(seeds) > 1 else f"seed {numbers}"


def markdown(
    title: str,
    source: Path,
    runs: str,
    rows: Sequence[SweepRow],
    cells: Sequence[Mapping[str, Cell]],
) -> str:
    """The table in Markdown; the paper's values follow a column if there are any.

    Parameters
    ----------
    source: the bags, or the cohort from which they were created.
    runs: output of :func:`describe_runs`.
    """
    columns = list(cells[0])
    in_paper = [column for column in columns if any(column in row.paper for row in rows)]
    paper = "; paper: the paper's values on its own data, not comparable" if in_paper else ""

    header = [""]
    for column in columns:
        header += [column, "paper"] if column in in_paper else [column]
    lines = [header, ["---"] * len(header)]
    for row, cells_of_row in zip(rows, cells):
        line = [row.label.replace("|", "\\|")]
        for column in columns:
            line.append(str(cells_of_row[column]))
            if column in in_paper:
                line.append(f"{row.paper[column]:.3f}" if column in row.paper else "–")
        lines.append(line)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# {title}\n\ntest slides of {source}, {runs}{paper}\n\n{table}\n"


def csv_rows(
    rows: Sequence[SweepRow], cells: Sequence[Mapping[str, Cell]]
) -> Iterator[dict[str, Any]]:
    """One line per row and column; ``values`` are by fold and seed; a missing one is empty."""
    for row, cells_of_row in zip(rows, cells):
        for column, cell in cells_of_row.items():
            yield {
                "label": row.label,
                "column": column,
                "paper": row.paper.get(column),
                "mean": cell.mean,
                "sd": cell.sd,
                "n": len(cell.known),
                "values": ";".join("" if value is None else str(value) for value in cell.values),
            }
