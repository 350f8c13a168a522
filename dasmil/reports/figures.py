"""An evaluation as pictures: ROC, precision-recall, calibration, confusion, scores.

A scale has the same colour in all of them, and in the curves of its training. Of many classes the
most frequent ones are drawn (:mod:`dasmil.reports.shown`).
"""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchmetrics.functional.classification import (
    binary_precision_recall_curve,
    binary_roc,
    multiclass_confusion_matrix,
)

from dasmil.files import atomic_path
from dasmil.metrics import Evaluation
from dasmil.metrics.evaluated_slides import YOUDEN
from dasmil.metrics.intervals import (
    Interval,
    auroc_interval,
    average_precision_interval,
    precision_band,
    sensitivity_band,
    wilson_interval,
)
from dasmil.metrics.slide import (
    CALIBRATION_BINS,
    Array,
    BoolArray,
    IntArray,
    as_array,
    auroc,
    average_precision,
    confidence,
)
from dasmil.reports.shown import say_left_out, show_finest, show_name

# Okabe and Ito (2008): also the colour-blind tell them apart
SCALE_COLOURS = {"x20": "#0072B2", "x10": "#D55E00", "x5": "#009E73", "x40": "#000000"}
OTHER_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9")
CLASS_COLOURS = (
    *("#E69F00", "#56B4E9", "#CC79A7", "#000000", "#F0E442"),
    *("#0072B2", "#D55E00", "#009E73"),
)
GREY = "#8C8C8C"

GRID = np.linspace(0, 1, 201)  # where bands are computed
ROUNDING = 1e-6  # more than the last digit of torchmetrics' rates, less than one slide's share
HISTOGRAM_BINS = 20
RARE = 20  # so many times higher bars of the rest would hide those of a class
LEGEND_WIDTH = 46  # characters
MAX_NOTE = 300  # characters of the legend's note
TITLE_WIDTH = 62
MAX_CURVES = len(CLASS_COLOURS)  # classes that are drawn against the rest
MAX_BANDS = 4  # with more curves, bands would hide each other; the legend stands below
MAX_CELLS = 20  # classes in a row of a confusion matrix; the others are counted together
MAX_LEVEL_NAMES = 6  # up to here the names of classes lie level below a matrix
MAX_COUNTED = 4  # classes whose slides the title counts
DPI = 130

Place = Literal["lower left", "lower right"]


@dataclass(frozen=True)
class Curve:
    """A kind of curve over slides.

    Parameters
    ----------
    points: (n,) scores and (n,) 0 or 1 → x, rising, and y.
    on_grid: x and y → the curve's y at each x of the grid.
    band: (n,) scores, (n,) bool, (n,) patients, and the curve's y on the grid → its 95 % band.
    area: under the curve, of (n,) scores and (n,) bool.
    interval: of the area, of (n,) scores, (n,) bool and (n,) patients.
    name: of the area.
    drawstyle: matplotlib's, by which the drawn line has this area.
    """

    points: Callable[[Tensor, Tensor], tuple[Array, Array]]
    on_grid: Callable[[Array, Array], Array]
    band: Callable[[Array, BoolArray, IntArray, Array], Interval]
    area: Callable[[Array, BoolArray], Array]
    interval: Callable[[Array, BoolArray, IntArray], Interval]
    name: str
    drawstyle: str


@dataclass(frozen=True)
class Subject:
    """One of two sides that is told from the other.

    Parameters
    ----------
    name: of the scale, or of the class that is told from the rest.
    positive: the class that ``scores`` are of.
    negative: the other class, or ``rest``.
    scores: (n,) probabilities of ``positive``.
    target: (n,) 1 for a slide of ``positive``, else 0.
    """

    name: str
    colour: str
    positive: str
    negative: str
    scores: Tensor
    target: Tensor

    @property
    def shown(self) -> str:
        return show_name(self.name)

    @property
    def why_undefined(self) -> str:
        """Why there is no curve; "" where there is one."""
        if not self.scores.isfinite().all():
            return "a probability is not a number"
        if len(self.target.unique()) < 2:
            return f"{'every' if self.target[0] else 'no'} slide is {self.positive}"
        return ""


def evaluation_figures(evaluation: Evaluation, part: str) -> dict[str, Figure]:
    """All pictures of an evaluation by name.

    Parameters
    ----------
    part: as it stands in the titles: ``val`` or ``test``.
    """
    return {
        "roc": roc_figure(evaluation, part),
        "precision_recall": precision_recall_figure(evaluation, part),
        "calibration": calibration_figure(evaluation, part),
        "confusion": confusion_figure(evaluation, part),
        "scores": scores_figure(evaluation, part),
    }


def save_figures(folder: Path, figures: Mapping[str, Figure]) -> None:
    """``<folder>/<name>.png`` each."""
    for name, figure in figures.items():
        with atomic_path(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=DPI)


def show_in_tensorboard(folder: Path, part: str, figures: Mapping[str, Figure]) -> None:
    """The pictures as ``test/roc``, ...: TensorBoard lists the folder as a run of its own.

    Those of an earlier evaluation are replaced.
    """
    for earlier in folder.glob("events.out.tfevents.*"):
        earlier.unlink()
    with SummaryWriter(str(folder)) as writer:
        for name, figure in figures.items():
            writer.add_figure(f"{part}/{name}", figure, close=False)


def scale_colours(scales: Iterable[str]) -> dict[str, str]:
    """A colour for each scale; x20, x10, x5 and x40 have the same one in every picture."""
    others = cycle(OTHER_COLOURS)
    return {scale: SCALE_COLOURS.get(scale) or next(others) for scale in scales}


def roc_figure(evaluation: Evaluation, part: str) -> Figure:
    """ROC with pointwise 95 % bands, and where the thresholds of validation lie on it.

    Two classes: of the positive one, a curve a scale. More: at the finest scale, each against the
    rest.
    """
    figure, axes = _square(evaluation, part, "ROC")
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", zorder=0)
    _draw_curves(axes, evaluation, ROC)
    for scale, colour, point, called in _operating_points(evaluation):
        share = {label: called[evaluation.labels == label].double().mean() for label in (0, 1)}
        _mark(axes, float(share[0]), float(share[1]), colour, f"{scale} {point}", point)
    axes.set(xlabel="1 − specificity", ylabel="sensitivity")
    _legend(axes, evaluation, "lower right")
    return figure


def precision_recall_figure(evaluation: Evaluation, part: str) -> Figure:
    """Precision at each recall with pointwise 95 % bands; see :func:`roc_figure`.

    The area under the steps is the average precision. Dotted: the share of positive slides, which
    is the precision of a guess.
    """
    figure, axes = _square(evaluation, part, "precision-recall")
    for subject in _subjects(evaluation):
        if not subject.why_undefined:
            colour = GREY if len(evaluation.classes) == 2 else subject.colour
            share = float(subject.target.double().mean())
            axes.axhline(share, color=colour, linestyle=":", linewidth=1, zorder=0)
    _draw_curves(axes, evaluation, PRECISION_RECALL)
    for scale, colour, point, called in _operating_points(evaluation):
        hits = float((called & (evaluation.labels == 1)).sum())
        if called.any():  # else there is no precision
            recall, precision = hits / float(evaluation.labels.sum()), hits / float(called.sum())
            _mark(axes, recall, precision, colour, f"{scale} {point}", point)
    axes.set(xlabel="recall (sensitivity)", ylabel="precision")
    _legend(axes, evaluation, "lower left")
    return figure


def calibration_figure(evaluation: Evaluation, part: str) -> Figure:
    """Reliability diagram of each scale, over the bins of ``calibration_error``.

    A point is a bin: the mean probability of its slides, and the share of them that is of the class
    with its 95 % interval (Wilson, 1927); below, the number of its slides. For more than two
    classes, of the most probable class.
    """
    scales, left_out = show_finest(evaluation.scales)
    figure = Figure((max(4.6, 3.2 * len(scales)), 4.9), layout="constrained")
    panels = figure.subplots(
        2, len(scales), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1]
    )
    for (axes, below), (scale, colour) in zip(panels.T, scale_colours(scales).items()):
        probabilities = evaluation.probabilities[scale]
        for panel in (axes, below):
            _plain(panel)
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", zorder=0)
        axes.set(title=scale, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        if not probabilities.isfinite().all():
            _say(axes, "not defined:\na probability is not a number")
            continue
        figures = evaluation.metrics(scale, ["brier", "calibration_error"])
        axes.set_title(
            f"{scale}: Brier {figures['brier']:.3f}, ECE {figures['calibration_error']:.3f}",
            fontsize=10,
        )
        scores, hits = confidence(as_array(probabilities), as_array(evaluation.labels))
        which = np.minimum((scores * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        count = np.bincount(which, minlength=CALIBRATION_BINS)
        held = count > 0
        mean = np.bincount(which, scores, CALIBRATION_BINS)[held] / count[held]
        share = np.bincount(which, hits, CALIBRATION_BINS)[held] / count[held]
        low, high = wilson_interval(share, count[held])
        bars = np.stack([share - low, high - share]).clip(min=0)
        axes.errorbar(mean, share, bars, fmt="o-", color=colour, linewidth=1, label=scale)
        middle = (np.arange(CALIBRATION_BINS) + 0.5) / CALIBRATION_BINS
        below.bar(middle, count, 0.9 / CALIBRATION_BINS, color=colour)
    if len(evaluation.classes) == 2:
        of = show_name(evaluation.classes[1])
        share_of = f"share that is {of}"
    else:
        of, share_of = "the most probable class", "share of slides of that class"
    panels[0, 0].set_ylabel(share_of)
    panels[1, 0].set_ylabel("slides")
    figure.supxlabel(f"probability of {of}", fontsize=10)
    figure.suptitle(_title(evaluation, part, "calibration", left_out), fontsize=10)
    return figure


def confusion_figure(evaluation: Evaluation, part: str) -> Figure:
    """Slides by label and by what they are called, one row a scale; per cent of the label's slides.

    Two classes: at 0.5 and at each threshold of validation. More: the most probable class. Of more
    than :data:`MAX_CELLS` classes, all but the most frequent ones are one row and one column.
    """
    names, number_of = _grouped_classes(evaluation)
    scales, left_out = show_finest(evaluation.scales)
    calls = {scale: _calls(evaluation, scale) for scale in scales}
    num_columns = max(map(len, calls.values()))
    side = 1.5 + 0.45 * len(names)
    figure = Figure(
        (max(4.6, (side + 0.3) * num_columns + 0.5), side * len(calls) + 0.8),
        layout="constrained",
    )
    panels = figure.subplots(len(calls), num_columns, squeeze=False)
    ticks = range(len(names))
    upright = len(names) > MAX_LEVEL_NAMES  # names beside each other would overlap
    for row, (scale, called) in enumerate(calls.items()):
        for panel in panels[row, len(called) :]:
            panel.set_visible(False)
        for panel, (how, predicted) in zip(panels[row], called.items()):
            panel.set_title(f"{scale}, {how}", fontsize=9)
            panel.set_xticks(ticks, names, rotation=90 if upright else 0)
            panel.set_yticks(ticks, names, rotation=0 if upright else 90, va="center")
            panel.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5))
            if not evaluation.probabilities[scale].isfinite().all():
                _say(panel, "not defined:\na probability\nis not a number")
                continue
            counts = multiclass_confusion_matrix(
                number_of[predicted], number_of[evaluation.labels], len(names)
            )
            _draw_counts(panel, counts.numpy())
        panels[row, 0].set_ylabel("label")
    for column in range(num_columns):
        panels[-1, column].set_xlabel("called")
    figure.suptitle(_title(evaluation, part, "confusion", left_out), fontsize=10)
    return figure


def scores_figure(evaluation: Evaluation, part: str) -> Figure:
    """Histogram of the scores: the class's slides upwards, the others downwards.

    Two classes: of the positive one, a panel a scale. More: at the finest scale, a panel a class.
    """
    subjects = list(_subjects(evaluation))
    figure = Figure((6.4, 1.75 * len(subjects) + 1), layout="constrained")
    panels = figure.subplots(len(subjects), 1, squeeze=False, sharex=True)[:, 0]
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    for panel, subject in zip(panels, subjects):
        _plain(panel)
        panel.set_xlim(-0.01, 1.01)
        if not subject.scores.isfinite().all():
            panel.set_title(subject.shown, fontsize=9, loc="left")
            _say(panel, "not defined: a probability is not a number")
            continue
        scores, held = subject.scores.numpy(), (subject.target == 1).numpy()
        up, down = (np.histogram(scores[chosen], edges)[0] for chosen in (held, ~held))
        style: dict[str, Any] = {"width": 0.92 / HISTOGRAM_BINS, "align": "center"}
        middle = (edges[:-1] + edges[1:]) / 2
        panel.bar(middle, up, color=subject.colour, label=subject.positive, **style)
        panel.bar(middle, -down, color=GREY, label=subject.negative, **style)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_ylim(-1.08 * max(1, *down), 1.08 * max(1, *up))
        if max(down) > RARE * max(1, *up):
            panel.set_yscale("symlog", linthresh=1)
            panel.set_ylabel("slides (log)", fontsize=9)
        else:
            panel.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            panel.set_ylabel("slides", fontsize=9)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
        beside: dict[str, Any] = {"transform": panel.transAxes, "fontsize": 9}
        panel.text(1.015, 1, f"↑ {held.sum()}\n{subject.positive}", va="top", **beside)
        panel.text(1.015, 0, f"↓ {(~held).sum()}\n{subject.negative}", va="bottom", **beside)
        words = [subject.shown]
        for point, threshold in (evaluation.thresholds or {}).get(subject.name, {}).items():
            line, called = ("--", "dashed") if point == YOUDEN else (":", "dotted")
            panel.axvline(threshold, color="black", linestyle=line, linewidth=1.3, label=point)
            words.append(f"{called}: {_words(point)}, {threshold:.3g}")
        panel.set_title("   ".join(words), fontsize=9, loc="left")
    two = len(evaluation.classes) == 2
    of = show_name(evaluation.classes[1]) if two else "the class"
    panels[-1].set_xlabel(f"probability of {of}")
    figure.suptitle(_title_of_subjects(evaluation, part, "scores by label"), fontsize=10)
    return figure


def _subjects(evaluation: Evaluation) -> Iterator[Subject]:
    """Two classes: the positive one at each scale. More: the most frequent at the finest scale."""
    if len(evaluation.classes) == 2:
        negative, positive = map(show_name, evaluation.classes)
        scales, _ = show_finest(evaluation.scales)
        for scale, colour in scale_colours(scales).items():
            scores = evaluation.probabilities[scale][:, 1].contiguous()
            yield Subject(scale, colour, positive, negative, scores, evaluation.labels)
        return
    probabilities = evaluation.probabilities[evaluation.scales[-1]]
    for number, colour in zip(_most_frequent(evaluation, MAX_CURVES), cycle(CLASS_COLOURS)):
        name, scores = evaluation.classes[number], probabilities[:, number].contiguous()
        target = (evaluation.labels == number).long()
        yield Subject(name, colour, show_name(name), "rest", scores, target)


def _is_crowded(evaluation: Evaluation) -> bool:
    """Whether there are so many subjects that bands and a legend inside would hide curves."""
    two = len(evaluation.classes) == 2
    return len(evaluation.scales if two else evaluation.classes) > MAX_BANDS


def _most_frequent(evaluation: Evaluation, most: int) -> list[int]:
    """The classes with most slides, in the order of the classes."""
    counts = torch.bincount(evaluation.labels, minlength=len(evaluation.classes))
    return sorted(counts.argsort(descending=True, stable=True)[:most].tolist())


def _grouped_classes(evaluation: Evaluation) -> tuple[list[str], Tensor]:
    """Names of the rows of a confusion matrix, and (P,) the row of each class."""
    num_classes = len(evaluation.classes)
    chosen = _most_frequent(evaluation, MAX_CELLS)
    names = [show_name(evaluation.classes[number]) for number in chosen]
    if num_classes > len(chosen):
        names.append(f"{num_classes - len(chosen)} others")
    number_of = torch.full((num_classes,), len(chosen))
    number_of[torch.tensor(chosen)] = torch.arange(len(chosen))
    return names, number_of


def _operating_points(evaluation: Evaluation) -> Iterator[tuple[str, str, str, Tensor]]:
    """Scale, colour, the threshold's name, and (n,) bool which slides it calls positive.

    None where a class has no slide.
    """
    for subject in _subjects(evaluation):
        thresholds = (evaluation.thresholds or {}).get(subject.name, {})
        for point, threshold in {} if subject.why_undefined else thresholds.items():
            yield subject.name, subject.colour, point, subject.scores > threshold


def _roc_points(scores: Tensor, target: Tensor) -> tuple[Array, Array]:
    x, y, _ = binary_roc(scores, target, validate_args=False)
    return x.double().numpy(), y.double().numpy()


def _precision_recall_points(scores: Tensor, target: Tensor) -> tuple[Array, Array]:
    """At each recall the precision of the highest threshold that reaches it."""
    precision, recall, _ = binary_precision_recall_curve(scores, target, validate_args=False)
    x, first = np.unique(recall.double().numpy()[::-1], return_index=True)
    return x, precision.double().numpy()[::-1][first]


def _on_line(x: Array, y: Array) -> Array:
    """The upper end where the line is vertical."""
    return np.interp(GRID + ROUNDING, x, y)


def _on_steps(x: Array, y: Array) -> Array:
    """The y of the first point that is not to the left of each x of the grid."""
    first = np.searchsorted(x, GRID - ROUNDING, side="left")
    return y[np.minimum(first, len(y) - 1)]


def _roc_band(
    scores: Array, positive: BoolArray, patients: IntArray, sensitivity: Array
) -> Interval:
    return sensitivity_band(scores, positive, patients, sensitivity, 1 - GRID)


def _precision_band(
    scores: Array, positive: BoolArray, patients: IntArray, precision: Array
) -> Interval:
    called = GRID * positive.sum() / np.maximum(precision, ROUNDING)
    return precision_band(scores, positive, patients, precision, np.maximum(called, 1))


ROC = Curve(_roc_points, _on_line, _roc_band, auroc, auroc_interval, "AUROC", "default")
PRECISION_RECALL = Curve(
    _precision_recall_points,
    _on_steps,
    _precision_band,
    average_precision,
    average_precision_interval,
    "AP",
    "steps-pre",
)


def _draw_curves(axes: Axes, evaluation: Evaluation, curve: Curve) -> None:
    """Each subject's curve, with its pointwise 95 % band if there are patients enough."""
    patients = np.unique(evaluation.patients, return_inverse=True)[1]
    subjects = list(_subjects(evaluation))
    undefined = []
    for number, subject in enumerate(subjects):
        scores, target = subject.scores, subject.target
        if subject.why_undefined:
            undefined.append(f"{subject.shown}: not defined, {subject.why_undefined}")
            continue
        of_slides = as_array(scores), as_array(target) == 1
        label = f"{subject.shown}: {curve.name} {float(curve.area(*of_slides)):.3f}"
        if not evaluation.why_no_interval:
            low, high = map(float, curve.interval(*of_slides, patients))
            label += f" [{low:.3f}, {high:.3f}]"
            if not _is_crowded(evaluation):
                middle = curve.on_grid(*curve.points(scores, target))
                band = curve.band(*of_slides, patients, middle)
                axes.fill_between(GRID, *band, color=subject.colour, alpha=0.17, linewidth=0)
        x, y = curve.points(scores, target)
        style: dict[str, Any] = {
            "color": subject.colour,
            "drawstyle": curve.drawstyle,
            "label": label,
        }
        # the later the thinner: equal curves are seen to be several
        step = 0.2 if _is_crowded(evaluation) else 0.9
        axes.plot(x, y, linewidth=1.6 + step * (len(subjects) - 1 - number), **style)
    if undefined:
        _say(axes, "\n".join(undefined))


def _mark(axes: Axes, x: float, y: float, colour: str, name: str, point: str) -> None:
    """An operating point; its ``gid`` is its name."""
    above: dict[str, Any] = {"zorder": 4 if point == YOUDEN else 3, "clip_on": False, "gid": name}
    axes.plot(x, y, color=colour, markeredgecolor="white", **_marker(point), **above)


def _marker(point: str) -> dict[str, Any]:
    """Where two points coincide, the round one lies in the square one."""
    round_one = point == YOUDEN
    return {"marker": "o" if round_one else "s", "markersize": 8 if round_one else 11}


def _words(point: str) -> str:
    """``youden``, ``specificity_0.9`` → as it stands in a legend."""
    return "Youden's" if point == YOUDEN else point.replace("_", " ")


def _legend(axes: Axes, evaluation: Evaluation, place: Place) -> None:
    """The curves, what the bands are, and the shapes of the operating points."""
    if len(axes.lines) < 2:
        return
    handles, _ = axes.get_legend_handles_labels()
    below = _is_crowded(evaluation)
    if handles:
        note = evaluation.why_no_interval or evaluation.warning
        bands = "95 % of the area in brackets" if below else "95 % at each point"
        label = evaluation.why_no_interval or "; ".join(filter(None, [bands, note]))
        label = textwrap.fill(show_name(label, MAX_NOTE), LEGEND_WIDTH)
        handles.append(Patch(color=GREY, alpha=0.3, label=label))
    for point in dict.fromkeys(point for _, _, point, _ in _operating_points(evaluation)):
        label = f"threshold of validation: {_words(point)}"
        handles += axes.plot([], [], " ", color=GREY, label=label, **_marker(point))
    style: dict[str, Any] = {"loc": place}
    if below:
        style = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1)}
    if handles:
        axes.legend(handles=handles, fontsize=8.5, framealpha=0.9, **style)


def _calls(evaluation: Evaluation, scale: str) -> dict[str, Tensor]:
    """By way of calling, (n,) the class that each slide is called."""
    probabilities = evaluation.probabilities[scale]
    if len(evaluation.classes) > 2:
        return {"most probable class": probabilities.argmax(dim=1)}
    thresholds: dict[str, float | Tensor] = {"above 0.5": 0.5}
    for point, threshold in (evaluation.thresholds or {}).get(scale, {}).items():
        thresholds[f"above {threshold:.3g}\n(validation, {_words(point)})"] = threshold
    return {how: (probabilities[:, 1] > value).long() for how, value in thresholds.items()}


def _draw_counts(panel: Axes, counts: npt.NDArray[np.integer]) -> None:
    """(P, P) counts, row: label; dark: most of the label's slides."""
    of_label = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(of_label, 1)
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*counts.shape):
        share = shares[row, column]
        if len(counts) > MAX_LEVEL_NAMES and counts[row, column] == 0 and column != row:
            continue
        text = f"{counts[row, column]}\n{share:.0%}" if of_label[row, 0] else "no slide"
        colour = "white" if share > 0.55 else "black"
        panel.text(column, row, text, ha="center", va="center", color=colour, fontsize=10)


def _square(evaluation: Evaluation, part: str, what: str) -> tuple[Figure, Axes]:
    height = 9.6 if _is_crowded(evaluation) else 5.8  # with the legend below
    figure = Figure((5.6, height), layout="constrained")
    axes = figure.add_subplot(anchor="N")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set_title(_title_of_subjects(evaluation, part, what), fontsize=10)
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def _say(axes: Axes, text: str) -> None:
    """In the middle of a picture, what there is instead of a curve."""
    place: dict[str, Any] = {
        "transform": axes.transAxes,
        "ha": "center",
        "va": "center",
        "wrap": True,
    }
    axes.text(0.5, 0.5, text, **place, bbox={"facecolor": "white", "edgecolor": GREY, "pad": 6})


def _title_of_subjects(evaluation: Evaluation, part: str, what: str) -> str:
    """Says the scale if only one is shown, and how many scales or classes are left out."""
    if len(evaluation.classes) == 2:
        return _title(evaluation, part, what, show_finest(evaluation.scales)[1])
    left_out = say_left_out(len(evaluation.classes), MAX_CURVES, "classes")
    return _title(evaluation, part, f"{what} at {evaluation.scales[-1]}", left_out)


def _title(evaluation: Evaluation, part: str, what: str, left_out: str = "") -> str:
    slides, patients = len(evaluation.slide_ids), len(set(evaluation.patients))
    counts = torch.bincount(evaluation.labels, minlength=len(evaluation.classes)).tolist()
    chosen = _most_frequent(evaluation, MAX_COUNTED)
    words = [f"{counts[number]} {show_name(evaluation.classes[number])}" for number in chosen]
    if len(chosen) < len(counts):
        others = sum(counts) - sum(counts[number] for number in chosen)
        words.append(f"{others} of {len(counts) - len(chosen)} other classes")
    lines = textwrap.wrap(
        f"{slides} slides of {patients} patients ({', '.join(words)})", TITLE_WIDTH
    )
    return "\n".join([f"{part}: {what}", *lines, *filter(None, [left_out])])
