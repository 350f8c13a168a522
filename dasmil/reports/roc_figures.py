"""ROC and precision-recall figures, with their bands and the validation thresholds."""

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor
from torchmetrics.functional.classification import binary_precision_recall_curve, binary_roc

from dasmil.metrics import Evaluation
from dasmil.metrics.evaluated_slides import YOUDEN
from dasmil.metrics.intervals import (
    auroc_interval,
    average_precision_interval,
    precision_band,
    sensitivity_band,
)
from dasmil.metrics.score_intervals import Interval
from dasmil.metrics.slide import Array, BoolArray, IntArray, as_array, auroc, average_precision
from dasmil.reports.figure_parts import (
    GREY,
    OneVsRest,
    describe_point,
    draw_note,
    one_vs_rest,
    one_vs_rest_title,
    style_axes,
    thresholds_of,
)
from dasmil.reports.shown import show_name

GRID = np.linspace(0, 1, 201)  # where bands are computed
ROUNDING = 1e-6  # more than the last digit of torchmetrics' rates, less than one slide's share
LEGEND_WIDTH = 46  # characters
MAX_NOTE = 300  # characters of the legend's note
MAX_BANDS = 4  # with more curves, bands would hide each other; the legend is then below the axes


@dataclass(frozen=True)
class Curve:
    """A kind of curve over slides.

    Parameters
    ----------
    points: (n,) scores and (n,) 0 or 1 → x, rising, and y.
    band: (n,) scores, (n,) bool, (n,) patients, x and y → the 95 % band on the grid.
    area: under the curve, of (n,) scores and (n,) bool.
    interval: of the area, of (n,) scores, (n,) bool and (n,) patients.
    name: of the area.
    drawstyle: matplotlib's; the line drawn in this style has this area.
    """

    points: Callable[[Tensor, Tensor], tuple[Array, Array]]
    band: Callable[[Array, BoolArray, IntArray, Array, Array], Interval]
    area: Callable[[Array, BoolArray], Array]
    interval: Callable[[Array, BoolArray, IntArray], Interval]
    name: str
    drawstyle: str


def roc_figure(evaluation: Evaluation, split: str) -> Figure:
    """ROC with pointwise 95 % bands, and the operating points of the validation thresholds.

    Two classes: one curve per scale, of the positive class. More: one curve per class against the
    rest, at the finest scale.
    """
    figure, axes = _square(evaluation, split, "ROC")
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", zorder=0)
    _draw_curves(axes, evaluation, ROC)
    for subject, point, called in _operating_points(evaluation):
        shares = [float(called[subject.target == label].double().mean()) for label in (0, 1)]
        _draw_point(axes, shares[0], shares[1], subject, point)
    axes.set(xlabel="1 − specificity", ylabel="sensitivity")
    _draw_legend(axes, evaluation, "lower right")
    return figure


def precision_recall_figure(evaluation: Evaluation, split: str) -> Figure:
    """Precision at each recall with pointwise 95 % bands; curves as in :func:`roc_figure`.

    The area under the steps is the average precision. Dotted: the share of positive slides, which
    is the precision of guessing.
    """
    figure, axes = _square(evaluation, split, "precision-recall")
    for subject in one_vs_rest(evaluation):
        if not subject.why_undefined:
            colour = GREY if len(evaluation.classes) == 2 else subject.colour
            share = float(subject.target.double().mean())
            axes.axhline(share, color=colour, linestyle=":", linewidth=1, zorder=0)
    _draw_curves(axes, evaluation, PRECISION_RECALL)
    for subject, point, called in _operating_points(evaluation):
        hits = float((called & (subject.target == 1)).sum())
        if called.any():  # else there is no precision
            recall, precision = hits / float(subject.target.sum()), hits / float(called.sum())
            _draw_point(axes, recall, precision, subject, point)
    axes.set(xlabel="recall (sensitivity)", ylabel="precision")
    _draw_legend(axes, evaluation, "lower left")
    return figure


def _is_crowded(evaluation: Evaluation) -> bool:
    """Whether bands, and a legend inside the axes, would hide curves."""
    two = len(evaluation.classes) == 2
    return len(evaluation.scales if two else evaluation.classes) > MAX_BANDS


def _operating_points(evaluation: Evaluation) -> Iterator[tuple[OneVsRest, str, Tensor]]:
    """The curve, the operating point, and (n,) bool which slides its threshold calls positive.

    None if a class has no slide.
    """
    for subject in one_vs_rest(evaluation):
        if not subject.why_undefined:
            for point, threshold in thresholds_of(evaluation, subject.name).items():
                yield subject, point, subject.scores > threshold


def _roc_points(scores: Tensor, target: Tensor) -> tuple[Array, Array]:
    x, y, _ = binary_roc(scores, target, validate_args=False)
    return x.double().numpy(), y.double().numpy()


def _precision_recall_points(scores: Tensor, target: Tensor) -> tuple[Array, Array]:
    """At each recall the precision of the highest threshold that reaches it."""
    precision, recall, _ = binary_precision_recall_curve(scores, target, validate_args=False)
    x, first = np.unique(recall.double().numpy()[::-1], return_index=True)
    return x, precision.double().numpy()[::-1][first]


def _roc_band(
    scores: Array, positive: BoolArray, patients: IntArray, x: Array, y: Array
) -> Interval:
    sensitivity = np.interp(GRID + ROUNDING, x, y)  # the upper end if the line is vertical
    return sensitivity_band(scores, positive, patients, sensitivity, 1 - GRID)


def _precision_band(
    scores: Array, positive: BoolArray, patients: IntArray, x: Array, y: Array
) -> Interval:
    """The steps have the y of the first point that is not to the left of each x of the grid."""
    first = np.searchsorted(x, GRID - ROUNDING, side="left")
    precision = y[np.minimum(first, len(y) - 1)]
    called = GRID * positive.sum() / np.maximum(precision, ROUNDING)
    return precision_band(scores, positive, patients, precision, np.maximum(called, 1))


ROC = Curve(_roc_points, _roc_band, auroc, auroc_interval, "AUROC", "default")
PRECISION_RECALL = Curve(
    *(_precision_recall_points, _precision_band, average_precision, average_precision_interval),
    *("AP", "steps-pre"),
)


def _draw_curves(axes: Axes, evaluation: Evaluation, curve: Curve) -> None:
    """One curve per subject, with its pointwise 95 % band if there are enough patients."""
    patients = np.unique(evaluation.patients, return_inverse=True)[1]
    subjects = list(one_vs_rest(evaluation))
    is_crowded = _is_crowded(evaluation)
    undefined = []
    for number, subject in enumerate(subjects):
        if subject.why_undefined:
            undefined.append(f"{subject.shown}: not defined, {subject.why_undefined}")
            continue
        scores, positive = as_array(subject.scores), as_array(subject.target) == 1
        x, y = curve.points(subject.scores, subject.target)
        label = f"{subject.shown}: {curve.name} {float(curve.area(scores, positive)):.3f}"
        if not evaluation.why_no_interval:
            low, high = map(float, curve.interval(scores, positive, patients))
            label += f" [{low:.3f}, {high:.3f}]"
            if not is_crowded:
                band = curve.band(scores, positive, patients, x, y)
                axes.fill_between(GRID, *band, color=subject.colour, alpha=0.17, linewidth=0)
        # later curves are thinner, so that equal curves stay visible
        width = 1.6 + (0.2 if is_crowded else 0.9) * (len(subjects) - 1 - number)
        style: dict[str, Any] = {"color": subject.colour, "drawstyle": curve.drawstyle}
        axes.plot(x, y, linewidth=width, label=label, **style)
    if undefined:
        draw_note(axes, "\n".join(undefined))


def _draw_point(axes: Axes, x: float, y: float, subject: OneVsRest, point: str) -> None:
    """An operating point; its ``gid`` is the name of the curve and of the point."""
    above: dict[str, Any] = {"zorder": 4 if point == YOUDEN else 3, "clip_on": False}
    above["gid"] = f"{subject.name} {point}"
    axes.plot(x, y, color=subject.colour, markeredgecolor="white", **_marker(point), **above)


def _marker(point: str) -> dict[str, Any]:
    """If two points coincide, the round one is drawn inside the square one."""
    is_round = point == YOUDEN
    return {"marker": "o" if is_round else "s", "markersize": 8 if is_round else 11}


def _draw_legend(axes: Axes, evaluation: Evaluation, place: str) -> None:
    """The curves, what the bands are, and the shapes of the operating points."""
    if len(axes.lines) < 2:
        return
    handles, _ = axes.get_legend_handles_labels()
    is_crowded = _is_crowded(evaluation)
    if handles:
        bands = "95 % of the area in brackets" if is_crowded else "95 % at each point"
        label = evaluation.why_no_interval or "; ".join(filter(None, [bands, evaluation.warning]))
        label = textwrap.fill(show_name(label, MAX_NOTE), LEGEND_WIDTH)
        handles.append(Patch(color=GREY, alpha=0.3, label=label))
    for point in dict.fromkeys(point for _, point, _ in _operating_points(evaluation)):
        label = f"threshold of validation: {describe_point(point)}"
        handles += axes.plot([], [], " ", color=GREY, label=label, **_marker(point))
    style: dict[str, Any] = {"loc": place}
    if is_crowded:
        style = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1)}
    if handles:
        axes.legend(handles=handles, fontsize=8.5, framealpha=0.9, **style)


def _square(evaluation: Evaluation, split: str, what: str) -> tuple[Figure, Axes]:
    height = 9.6 if _is_crowded(evaluation) else 5.8  # with the legend below
    figure = Figure((5.6, height), layout="constrained")
    axes = figure.add_subplot(anchor="N")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set_title(one_vs_rest_title(evaluation, split, what), fontsize=10)
    style_axes(axes)
    return figure, axes
