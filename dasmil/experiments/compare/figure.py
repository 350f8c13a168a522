"""The figure of a comparison."""

import textwrap
from math import isnan
from pathlib import Path

from matplotlib.figure import Figure

from dasmil.experiments.compare.table import Comparison, direction
from dasmil.reports.shown import save_figure, show_first, show_name

ROW_INCHES = 0.42
PANEL_INCHES = 2.9
LABEL_WIDTH = 30  # characters of a method's label in one line
MAX_LABEL = 90  # characters of all its lines
MAX_METHODS, MAX_METRICS = 40, 8


def draw(path: Path, comparison: Comparison) -> None:
    """Draw one panel per metric, one line per method: value, 95 % interval, and a dot per run."""
    methods, fewer_methods = show_first(comparison.methods, MAX_METHODS, "methods")
    shown, fewer_metrics = show_first(list(comparison.results), MAX_METRICS, "metrics")
    height = 1.5 + ROW_INCHES * len(methods)
    width = 2.2 + PANEL_INCHES * len(shown)
    figure = Figure((width, height), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, metric in zip(panels, shown):
        results = comparison.results[metric][: len(methods)]
        for y, result in enumerate(results):
            colour = "0.25" if y == 0 else "C0"
            panel.plot(
                result.values, [y + 0.22] * len(result.values), "o", color="C1", alpha=0.6, mew=0
            )
            if not isnan(result.value):
                low, high = result.interval  # nan is not drawn
                panel.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
                panel.plot(result.value, y, "|", color=colour, markersize=15, markeredgewidth=2.5)
            else:
                panel.text(
                    0.5, y, "not defined", transform=panel.get_yaxis_transform(), ha="center"
                )
        if not isnan(results[0].value):
            panel.axvline(results[0].value, color="0.25", linestyle=":", linewidth=1, zorder=0)
        panel.set_xlabel(direction(metric))
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    several = len({method.scale for method in methods}) > 1
    names = [method.label + (f" at {method.scale}" if several else "") for method in methods]
    labels = [textwrap.fill(show_name(name, MAX_LABEL), LABEL_WIDTH) for name in names]
    panels[0].set_yticks(range(len(names)), labels)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    left_out = ", ".join(filter(None, [fewer_methods, fewer_metrics]))
    figure.suptitle(
        f"{comparison.num_slides} test slides of {comparison.num_patients} patients\n"
        "● a run, | the value with its 95 % interval, ┊ the first method's value"
        + (f"\n{left_out}" if left_out else ""),
        fontsize=10,
    )
    save_figure(path, figure)
