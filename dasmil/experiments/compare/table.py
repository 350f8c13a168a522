"""The table of a comparison, as Markdown and as CSV."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

from dasmil.experiments.compare.runs import Method
from dasmil.metrics.slide import LOWER_IS_BETTER

CSV_COLUMNS = (
    *("metric", "method", "folder", "scale", "runs", "test_sets", "value", "low", "high"),
    *("difference", "difference_low", "difference_high", "p", "mean", "sd", "values"),
    *("checkpoints", "note"),
)
POOLED, SAME_FOLD = "auroc_pooled", "auroc_same_fold"


@dataclass(frozen=True)
class Result:
    """One metric of one method; undefined values are nan.

    Parameters
    ----------
    values: one per run, of its own test slides.
    value: of all test slides; the mean over the runs if there are several on each.
    interval: 95 %, of ``value``.
    difference: to the first method, with its 95 % interval and p; None for the first itself.
    """

    values: tuple[float, ...]
    value: float
    interval: tuple[float, float]
    difference: float | None
    difference_interval: tuple[float, float] | None
    p: float | None

    @property
    def defined(self) -> tuple[float, ...]:
        """The values of runs whose own test slides hold the classes that the metric needs."""
        return tuple(value for value in self.values if not isnan(value))

    @property
    def sd(self) -> float | None:
        """Over the runs, of a sample (n − 1); None for a single run."""
        return statistics.stdev(self.defined) if len(self.defined) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """The result of ``compare``.

    Parameters
    ----------
    methods: in the order of the table.
    results: per metric, one result per method.
    num_slides, num_patients: of the test set.
    draws, seed: of the paired test.
    notes: metrics that are undefined or imprecise because there are few patients.
    """

    methods: tuple[Method, ...]
    results: Mapping[str, Sequence[Result]]
    num_slides: int
    num_patients: int
    draws: int
    seed: int
    notes: tuple[str, ...] = ()


def direction(metric: str) -> str:
    """The metric's name with an arrow: ↓ if lower is better, else ↑."""
    name = metric.split("_at_")[0]
    return f"{metric} {'↓' if name in LOWER_IS_BETTER else '↑'}"


def markdown(comparison: Comparison) -> str:
    """The table in Markdown, one line per metric and method, with explanations below."""
    methods = comparison.methods
    several = any(len(method.runs) > 1 for method in methods)
    header = ["metric", "method", "scale", "runs", "value", "95 % interval"]
    header += ["difference to the first", "95 % interval", "p"] if len(methods) > 1 else []
    header += ["mean ± sd of the runs"] if several else []
    lines = [header]
    for metric, results in comparison.results.items():
        for row, (method, result) in enumerate(zip(methods, results)):
            name = direction(metric) if row == 0 else ""
            line = [name, method.label.replace("|", "\\|"), method.scale, str(len(method.runs))]
            line += [_number(result.value), _interval(result.interval)]
            line += _difference(result) if len(methods) > 1 else []
            line += [_spread(result)] if several else []
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
    values = [result for results in comparison.results.values() for result in results]
    several = any(len(runs) > 1 for method in methods for runs in method.runs_of.values())
    sentences = [f"- **{note}.**" for note in comparison.notes]
    sentences.append(
        "- value: of all test slides together"
        + (f", so the {num_sets} test sets are pooled" if num_sets > 1 else "")
        + ("; mean over the runs on each slide." if several else ".")
    )
    if POOLED in comparison.results:
        sentences += [
            f"- {POOLED}: over all pairs of test slides; it compares scores of the models of "
            "different folds, so it is lower if their scales differ.",
            f"- {SAME_FOLD}: over the pairs of slides of the same fold, each judged by one model; "
            "a fold whose slides are all of one class has none.",
        ]
    sentences.append(
        "- 95 % interval: score interval with the patient as the unit (AUROC: Newcombe's method 5 "
        "for two normal distributions; proportions: Wilson's; with the effective number of slides "
        "and Student's t). Models are fixed: the interval reflects variation among patients, "
        "sd variation among seeds and training slides."
    )
    if len(methods) > 1:
        sentences.append(
            f"- p: two-sided paired test against {methods[0].label}: the predictions of whole "
            f"patients are swapped between the two, in at most {comparison.draws} ways (seed "
            f"{comparison.seed}); p is the share of swaps with at least this difference, and – if "
            "it could not be 0.05 or less; not corrected for the number of comparisons."
        )
    if any(len(method.runs) > 1 for method in methods):
        sentences.append("- mean ± sd of the runs: each on its own test slides.")
    if len({method.scale for method in methods}) > 1:
        sentences.append("- scale: each method is judged at its finest one; they are not the same.")
    if any(isnan(result.value) for result in values):
        sentences.append("- – as a value: not defined, as the test slides lack a class.")
    if any(isnan(value) for result in values for value in result.values):
        sentences.append(
            "- A run whose own test slides lack a class has no value; it counts in the pooled one."
        )
    sentences += [
        f"- checkpoints of {method.label}: "
        + ", ".join(f"{run.folder} ({run.model or 'not known'})" for run in method.runs)
        for method in methods
    ]
    return "\n".join(sentences)


def _number(value: float) -> str:
    return "–" if isnan(value) else f"{value:.3f}"


def _spread(result: Result) -> str:
    if not result.defined:
        return "–"
    mean = f"{statistics.fmean(result.defined):.3f}"
    return mean if result.sd is None else f"{mean} ± {result.sd:.3f}"


def _interval(ends: tuple[float, float], sign: str = "") -> str:
    low, high = ends
    return "–" if isnan(low) else f"[{low:{sign}.3f}, {high:{sign}.3f}]"


def _difference(result: Result) -> list[str]:
    if result.difference is None or result.difference_interval is None or result.p is None:
        return ["", "", ""]
    if isnan(result.difference):
        return ["–", "–", "–"]
    p = "–" if isnan(result.p) else f"{result.p:.3f}" if result.p >= 0.001 else "< 0.001"
    return [f"{result.difference:+.3f}", _interval(result.difference_interval, "+"), p]


def csv_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """One row per metric and method; ``values`` are per run, and undefined values are empty."""
    for metric, results in comparison.results.items():
        for method, result in zip(comparison.methods, results):
            mean = statistics.fmean(result.defined) if result.defined else None
            numbers = [result.value, *result.interval, result.difference]
            numbers += [*(result.difference_interval or (None, None)), result.p, mean, result.sd]
            cells = [
                *(metric, method.label, method.folder, method.scale),
                *(len(method.runs), len(method.runs_of)),
                *(None if number is None or isnan(number) else number for number in numbers),
                ";".join("" if isnan(value) else str(value) for value in result.values),
                ";".join(run.model for run in method.runs),
                "; ".join(comparison.notes),
            ]
            yield dict(zip(CSV_COLUMNS, cells, strict=True))
