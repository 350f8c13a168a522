"""``compare``: methods on the same test slides, by bootstrap over patients."""

import statistics
from collections.abc import Sequence
from math import nan
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from dasmil.compare.figure import draw
from dasmil.compare.runs import Method, TestSet, read_methods
from dasmil.compare.table import CSV_COLUMNS, Comparison, Result, csv_rows, markdown
from dasmil.errors import InputError
from dasmil.files import write_csv, write_text
from dasmil.metrics import interval, paired_p_value, resamples


def compare(
    run_dirs: tuple[Path, ...],
    metrics: tuple[str, ...] = ("auroc", "average_precision", "balanced_accuracy", "brier"),
    scale: str | None = None,
    labels: tuple[str, ...] | None = None,
    output: Path = Path("compare"),
    draws: int = 2000,
    seed: int = 0,
) -> int:
    """One table of tested methods: figures with 95 % intervals, and paired tests against the first.

    A method's figure is the mean over its test sets (folds) of the mean over its runs (seeds) on
    each. Intervals and tests are a bootstrap over patients: the same draws for all methods.
    Nothing is compared that has not the same test slides, labels, patients and classes.

    Parameters
    ----------
    run_dirs:
        one a method: the folder of a fit that was tested, the output folder of test, or a folder
        with such folders anywhere in it (the seeds and folds of a sweep's row). The first is what
        the others are compared with.
    metrics:
        of slides, as in test_metrics.csv.
    scale:
        that all methods are judged at; each at its finest one where it is not given.
    labels:
        of the methods; their folders' names where they are not given.
    output:
        path of the table without its suffix: compare.md, compare.csv and compare.png are written.
    draws:
        of the bootstrap.
    seed:
        of the draws.

    Returns
    -------
    The exit code, 0.
    """
    if not run_dirs or not metrics or draws < 1:
        raise InputError("compare: it needs at least one folder, one metric and one draw")
    methods = read_methods(run_dirs, labels, scale)
    _refuse_unknown(metrics, methods)
    comparison = compare_methods(methods, metrics, draws, seed)
    text = markdown(comparison)
    stem = output / "compare" if output.is_dir() else output
    table, picture = (stem.with_name(f"{stem.name}.{kind}") for kind in ("md", "png"))
    write_text(table, text)
    write_csv(stem.with_name(f"{stem.name}.csv"), CSV_COLUMNS, csv_rows(comparison))
    draw(picture, comparison)
    print(f"\n{text}\ntable {table}, picture {picture}", flush=True)
    return 0


def _refuse_unknown(metrics: Sequence[str], methods: Sequence[Method]) -> None:
    for method in methods:
        for run in method.runs:
            known = run.evaluation.figures(method.scale)
            unknown = [name for name in metrics if name not in known]
            if unknown:
                raise InputError(
                    f"--metrics: {run.folder} has no {', '.join(unknown)}; "
                    f"it has {', '.join(known)}"
                )


def compare_methods(
    methods: Sequence[Method], metrics: Sequence[str], draws: int, seed: int
) -> Comparison:
    """Each method's figures, their intervals, and the paired differences to the first method."""
    cohort = _Cohort(methods[0])
    points = np.stack([_statistic(method, metrics, cohort.all_slides) for method in methods])
    drawn = np.full((draws, len(methods), len(metrics)), nan)
    for number, index in enumerate(
        tqdm(cohort.draws(draws, seed), desc="bootstrap", disable=None, leave=False)
    ):
        by_test_set = cohort.split(index)
        for row, method in enumerate(methods):
            drawn[number, row] = _statistic(method, metrics, by_test_set)
    results = {
        metric: [
            _result(method, metric, points[:, column], drawn[:, :, column], row)
            for row, method in enumerate(methods)
        ]
        for column, metric in enumerate(metrics)
    }
    return Comparison(
        methods=tuple(methods),
        results=results,
        num_slides=len(set(cohort.slide_ids)),
        num_patients=len(set(cohort.patients)),
        draws=draws,
        seed=seed,
    )


def _result(
    method: Method,
    metric: str,
    points: npt.NDArray[np.float64],
    drawn: npt.NDArray[np.float64],
    row: int,
) -> Result:
    """Of one method and metric.

    Parameters
    ----------
    points: (methods,).
    drawn: (draws, methods).
    """
    differences = drawn[:, row] - drawn[:, 0]
    compared = row > 0
    return Result(
        values=tuple(run.evaluation.figures(method.scale, [metric])[metric] for run in method.runs),
        mean=float(points[row]),
        interval=interval(drawn[:, row].tolist()),
        difference=float(points[row] - points[0]) if compared else None,
        difference_interval=interval(differences.tolist()) if compared else None,
        p=paired_p_value(differences.tolist()) if compared else None,
    )


def _statistic(
    method: Method, metrics: Sequence[str], index: dict[TestSet, Tensor]
) -> npt.NDArray[np.float64]:
    """(metrics,): the mean over the test sets of the mean over the runs on each.

    Parameters
    ----------
    index: of the slides that count, for each test set.
    """
    of_test_sets = []
    for test_set, runs in method.runs_of.items():
        figures = [run.evaluation.figures(method.scale, metrics, index[test_set]) for run in runs]
        of_test_sets.append([statistics.fmean(f[name] for f in figures) for name in metrics])
    return np.mean(of_test_sets, axis=0)


class _Cohort:
    """The slides of all test sets in one line; a slide of two test sets stands in it twice."""

    def __init__(self, method: Method):
        self.slide_ids: list[str] = []
        self.patients: list[str] = []
        self.strata: list[tuple[int, int]] = []
        self.all_slides: dict[TestSet, Tensor] = {}
        self.places: dict[TestSet, tuple[int, int]] = {}
        for number, (test_set, runs) in enumerate(method.runs_of.items()):
            evaluation = runs[0].evaluation
            start = len(self.slide_ids)
            self.slide_ids += evaluation.slide_ids
            self.patients += evaluation.patients
            self.strata += [(number, label) for label in evaluation.labels.tolist()]
            self.places[test_set] = (start, len(self.slide_ids))
            self.all_slides[test_set] = torch.arange(len(evaluation.slide_ids))

    def draws(self, num: int, seed: int) -> list[Tensor]:
        """Patients drawn among those of the same test sets and labels, with all their slides."""
        return resamples(self.patients, self.strata, num, seed)

    def split(self, index: Tensor) -> dict[TestSet, Tensor]:
        """A draw's slides as indices into each test set."""
        return {
            test_set: index[(index >= start) & (index < end)] - start
            for test_set, (start, end) in self.places.items()
        }
