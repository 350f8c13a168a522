"""The verb ``compare``: methods on the same test slides."""

import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import isnan, lcm, nan
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dasmil.errors import InputError
from dasmil.experiments.compare.figure import draw
from dasmil.experiments.compare.runs import Method, Run, read_methods
from dasmil.experiments.compare.table import (
    CSV_COLUMNS,
    POOLED,
    SAME_FOLD,
    Comparison,
    Result,
    csv_rows,
    markdown,
)
from dasmil.files import write_text
from dasmil.metrics import pool, swap_test
from dasmil.metrics.evaluated_slides import Inputs
from dasmil.metrics.intervals import MIN_PATIENTS
from dasmil.metrics.score_intervals import combined_interval
from dasmil.progress import progress
from dasmil.tables import write_csv


def compare(
    run_dirs: tuple[Path, ...],
    metrics: tuple[str, ...] = ("auroc", "average_precision", "balanced_accuracy", "brier"),
    scale: str | None = None,
    labels: tuple[str, ...] | None = None,
    output: Path = Path("compare"),
    draws: int = 2000,
    seed: int = 0,
) -> int:
    """Compare tested methods: metrics with 95 % intervals, and paired tests against the first.

    A method's value covers all its test slides: the test sets of a cross-validation are pooled.
    With several runs (seeds) per test set it is the mean over the runs. The paired test swaps the
    predictions of whole patients. Only methods with the same test slides, labels, patients and
    classes are compared. Everything is computed from ``test_slides.csv``, so old runs need no new
    test.

    Parameters
    ----------
    run_dirs:
        one folder per method: a fit that was tested, the output folder of test, or a folder that
        contains such folders (the seeds and folds of a sweep's row). The others are compared with
        the first.
    metrics:
        slide metrics, named as in test_metrics.csv. For a cross-validation, ``auroc`` gives two
        rows: over all pairs of test slides, and over the pairs within a fold.
    scale:
        scale at which all methods are evaluated; if not given, the finest one of each method.
    labels:
        names of the methods; if not given, the names of their folders.
    output:
        folder for compare.md, compare.csv and compare.png.
    draws:
        number of random swaps in the paired test; if fewer swaps exist, each is made once.
    seed:
        seed of the swaps.

    Returns
    -------
    The exit code, 0.

    Raises
    ------
    InputError
        if a run is not tested yet, or the methods cannot be compared.
    """
    if not run_dirs or not metrics or draws < 1:
        raise InputError("compare: give at least one folder, one metric and one draw")
    methods = read_methods(run_dirs, labels, scale)
    metrics = tuple(dict.fromkeys(metrics))
    _refuse_unknown(metrics, methods)
    comparison = compare_methods(methods, metrics, draws, seed)
    text = markdown(comparison)
    table, picture = output / "compare.md", output / "compare.png"
    write_text(table, text)
    write_csv(output / "compare.csv", CSV_COLUMNS, csv_rows(comparison))
    draw(picture, comparison)
    print(f"\n{text}\ntable {table}, picture {picture}", flush=True)
    return 0


def _refuse_unknown(metrics: Sequence[str], methods: Sequence[Method]) -> None:
    for method in methods:
        for run in method.runs:
            known = run.evaluation.metrics(method.scale)
            unknown = [name for name in metrics if name not in known]
            if unknown:
                raise InputError(
                    f"--metrics: {run.folder} has no {', '.join(unknown)}; "
                    f"it has {', '.join(known)}"
                )


def compare_methods(
    methods: Sequence[Method], metrics: Sequence[str], draws: int, seed: int
) -> Comparison:
    """Each method's values, their intervals, and the paired differences to the first method."""
    judged = [_Judged(method, _with_same_fold(metrics, methods[0])) for method in methods]
    first, others = judged[0], judged[1:]
    results = {name: [first.result(name)] for name in first.metrics}
    for other in progress(others, "compare", leave=False):
        pairs = _side_by_side(other, first)
        p_values = swap_test(*pairs, other.patients, other.metrics, draws, seed)
        for name in first.metrics:
            results[name].append(other.result(name, first, p_values[name]))
    evaluation = first.runs[0]
    named = {"auroc": POOLED} if len(methods[0].runs_of) > 1 else {}
    return Comparison(
        methods=tuple(methods),
        results={named.get(name, name): found for name, found in results.items()},
        num_slides=len(set(evaluation.slide_ids)),
        num_patients=len(set(evaluation.patients)),
        draws=draws,
        seed=seed,
        notes=tuple(
            filter(None, (evaluation.why_no_interval, _why_no_same_fold(first), evaluation.warning))
        ),
    )


def _with_same_fold(metrics: Sequence[str], method: Method) -> tuple[str, ...]:
    """Add the AUROC within folds after ``auroc`` if the method is a cross-validation."""
    added = ["auroc", SAME_FOLD] if len(method.runs_of) > 1 else ["auroc"]
    return tuple(each for name in metrics for each in (added if name == "auroc" else [name]))


def _why_no_same_fold(judged: "_Judged") -> str:
    """Why only ``auroc_same_fold`` has no interval; "" if it has one, or if no metric has."""
    missing = SAME_FOLD in judged.metrics and isnan(judged.intervals[SAME_FOLD][0])
    if not missing or judged.runs[0].why_no_interval:
        return ""
    return (
        f"{SAME_FOLD}: too few patients for an interval or a p: a class has fewer than "
        f"{MIN_PATIENTS} in the folds that have slides of another class too"
    )


class _Judged:
    """A method's runs on all test slides and their metrics.

    Parameters
    ----------
    method: its runs.
    metrics: of :meth:`Evaluation.metrics` of the pooled test sets.
    """

    def __init__(self, method: Method, metrics: Sequence[str]):
        self.method, self.metrics = method, metrics
        # the k-th run on each test set, so in most cases the runs of one seed
        each = [sorted(runs, key=_seed) for runs in method.runs_of.values()]
        rounds = lcm(*map(len, each))
        self.runs = [
            pool([runs[k % len(runs)].evaluation for runs in each], method.scale)
            for k in range(rounds)
        ]
        self.inputs = [run.inputs(method.scale) for run in self.runs]
        self.patients = np.unique(self.runs[0].patients, return_inverse=True)[1]
        self.values = _means([run.metrics(method.scale, metrics) for run in self.runs])
        intervals = [run.intervals(method.scale) for run in self.runs]
        self.intervals: dict[str, tuple[float, float]] = {}
        for name in metrics:
            low, high = zip(*(each[name] for each in intervals))
            self.intervals[name] = statistics.fmean(low), statistics.fmean(high)

    @cached_property
    def without(self) -> dict[str, npt.NDArray[np.float64]]:
        """Per metric (patients,) its mean over the runs without each patient."""
        left_out = []
        for patient in range(self.patients.max() + 1):
            selected = [inputs.select(self.patients != patient) for inputs in self.inputs]
            left_out.append(_means([inputs.metrics(self.metrics) for inputs in selected]))
        return {name: np.array([each[name] for each in left_out]) for name in self.metrics}

    def same_predictions(self, other: "_Judged") -> bool:
        """Whether the predictions of both methods are identical."""
        return all(
            np.array_equal(ours.probabilities, theirs.probabilities)
            and all(
                np.array_equal(margin, theirs.margins.get(point, ()))
                for point, margin in ours.margins.items()
            )
            for ours, theirs in zip(*_side_by_side(self, other))
        )

    def result(self, name: str, first: "_Judged | None" = None, p: float | None = None) -> Result:
        """The result of one metric, compared with the first method if that is given."""
        value, interval = self.values[name], self.intervals[name]
        of_run = name if name != SAME_FOLD else "auroc"
        values = tuple(
            run.evaluation.metrics(self.method.scale, [of_run])[of_run] for run in self.method.runs
        )
        if first is None:
            return Result(values, value, interval, None, None, None)
        difference = value - first.values[name]
        between = (0.0, 0.0)
        if not self.same_predictions(first):
            between = combined_interval(
                [value, first.values[name]],
                [interval, first.intervals[name]],
                [1, -1],
                _correlation(self.without[name], first.without[name]),
            )
        return Result(
            values, value, interval, difference, between, nan if isnan(interval[0]) else p
        )


def _side_by_side(ours: _Judged, first: _Judged) -> tuple[list[Inputs], list[Inputs]]:
    """Pair the runs of two methods; each run is used equally often."""
    rounds = range(lcm(len(ours.runs), len(first.runs)))
    return (
        [ours.inputs[k % len(ours.runs)] for k in rounds],
        [first.inputs[k % len(first.runs)] for k in rounds],
    )


def _seed(run: Run) -> tuple[bool, int, Path]:
    return run.seed is None, run.seed or 0, run.folder


def _means(each: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {name: statistics.fmean(values[name] for values in each) for name in each[0]}


def _correlation(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """Correlation of two methods' leave-one-patient-out values; 0 if one of them is constant."""
    if not np.isfinite([*one, *other]).all() or np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])
