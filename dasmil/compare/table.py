"""The table of a comparison, as Markdown and as CSV."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

from dasmil.compare.runs import Method
from dasmil.metrics.slide import LOWER_IS_BETTER

CSV_COLUMNS = (
    *("metric", "method", "folder", "scale", "runs", "test_sets", "mean", "sd", "low", "high"),
    *("difference", "difference_low", "difference_high", "p", "values"),
)


@dataclass(frozen=True)
class Result:
    """One figure of one method.

    Parameters
    ----------
    values: one a run.
    mean: over the test sets of the mean over the runs on each.
    interval: 95 %, of the mean.
    difference: to the first method, with its 95 % interval and p; None for the first itself.
    """

    values: tuple[float, ...]
    mean: float
    interval: tuple[float, float]
    difference: float | None
    difference_interval: tuple[float, float] | None
    p: float | None

    @property
    def sd(self) -> float | None:
        """Over the runs, of a sample (n − 1); None for a single run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` finds; ``results`` has for each metric one a method, in their order."""

    methods: tuple[Method, ...]
    results: Mapping[str, Sequence[Result]]
    num_slides: int
    num_patients: int
    draws: int
    seed: int


def direction(metric: str) -> str:
    """Which way is better, as it stands behind a metric's name."""
    name = metric.split("_at_")[0]
    return f"{metric} {'↓' if name in LOWER_IS_BETTER else '↑'}"


def markdown(comparison: Comparison) -> str:
    """One line a metric and method, and below it what the figures are."""
    methods = comparison.methods
    header = ["metric", "method", "scale", "runs", "mean ± sd", "95 % interval"]
    if len(methods) > 1:
        header += ["difference to the first", "95 % interval", "p"]
    lines = [header]
    for metric, results in comparison.results.items():
        for row, (method, result) in enumerate(zip(methods, results)):
            name = direction(metric) if row == 0 else ""
            line = [name, method.label.replace("|", "\\|"), method.scale, str(len(method.runs))]
            line += [_spread(result), _interval(result.interval)]
            if len(methods) > 1:
                line += _difference(result)
            lines.append(line)
    table = _aligned(lines)
    return f"# Comparison on {_slides(comparison)}\n\n{table}\n\n{_explanation(comparison)}\n"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _slides(comparison: Comparison) -> str:
    num_sets = len(comparison.methods[0].runs_of)
    sets = f" in {num_sets} test sets" if num_sets > 1 else ""
    return f"{comparison.num_slides} test slides of {comparison.num_patients} patients{sets}"


def _explanation(comparison: Comparison) -> str:
    methods = comparison.methods
    num_sets = len(methods[0].runs_of)
    over_sets = " over the test sets of the mean" if num_sets > 1 else ""
    sentences = [
        f"- mean: of the slides' figure,{over_sets} over the runs; sd: over the runs."
        if any(len(method.runs) > 1 for method in methods)
        else "- mean: of the slides' figure of a single run.",
        f"- 95 % interval: percentiles of {comparison.draws} bootstrap draws (seed "
        f"{comparison.seed}) of the test patients, each with all slides, stratified by "
        f"{'test set and ' if num_sets > 1 else ''}label. The models are given: it says what other "
        "patients might do, and sd what other seeds and training slides might.",
    ]
    if len(methods) > 1:
        sentences.append(
            f"- p: two-sided paired bootstrap test against {methods[0].label} on the same draws, "
            "(1 + 2 · min(draws with difference ≤ 0, draws with difference ≥ 0)) / (1 + draws), at "
            "most 1; not corrected for the number of comparisons."
        )
    if len({method.scale for method in methods}) > 1:
        sentences.append("- scale: each method is judged at its finest one; they are not the same.")
    if any(isnan(result.mean) for results in comparison.results.values() for result in results):
        sentences.append("- –: not defined, as a test set lacks a class.")
    return "\n".join(sentences)


def _spread(result: Result) -> str:
    if isnan(result.mean):
        return "–"
    return f"{result.mean:.3f}" + ("" if result.sd is None else f" ± {result.sd:.3f}")


def _interval(ends: tuple[float, float], sign: str = "") -> str:
    low, high = ends
    return "–" if isnan(low) else f"[{low:{sign}.3f}, {high:{sign}.3f}]"


def _difference(result: Result) -> list[str]:
    if result.difference is None or result.difference_interval is None or result.p is None:
        return ["", "", ""]
    if isnan(result.difference):
        return ["–", "–", "–"]
    p = f"{result.p:.3f}" if result.p >= 0.001 else "< 0.001"
    return [f"{result.difference:+.3f}", _interval(result.difference_interval, "+"), p]


def csv_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """One a metric and method; ``values`` are the runs' figures, a figure not defined is empty."""
    for metric, results in comparison.results.items():
        for method, result in zip(comparison.methods, results):
            difference_low, difference_high = result.difference_interval or (None, None)
            numbers = {
                "mean": result.mean,
                "sd": result.sd,
                "low": result.interval[0],
                "high": result.interval[1],
                "difference": result.difference,
                "difference_low": difference_low,
                "difference_high": difference_high,
                "p": result.p,
            }
            yield {
                "metric": metric,
                "method": method.label,
                "folder": method.folder,
                "scale": method.scale,
                "runs": len(method.runs),
                "test_sets": len(method.runs_of),
                **{k: None if v is None or isnan(v) else v for k, v in numbers.items()},
                "values": ";".join("" if isnan(v) else str(v) for v in result.values),
            }
