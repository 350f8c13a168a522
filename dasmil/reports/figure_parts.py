"""What the figures of an evaluation share: colours, one-vs-rest scores, titles and notes.

A scale has the same colour in every figure, the training curves included. Of many classes the most
frequent ones are drawn (:mod:`dasmil.reports.shown`).
"""

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from dasmil.metrics import Evaluation
from dasmil.metrics.evaluated_slides import YOUDEN
from dasmil.reports.shown import describe_left_out, show_finest, show_name

# Okabe and Ito (2008), distinguishable with colour blindness
SCALE_COLOURS = {"x20": "#0072B2", "x10": "#D55E00", "x5": "#009E73", "x40": "#000000"}
OTHER_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9")
CLASS_COLOURS = (
    *("#E69F00", "#56B4E9", "#CC79A7", "#000000", "#F0E442"),
    *("#0072B2", "#D55E00", "#009E73"),
)
GREY = "#8C8C8C"
MAX_CURVES = len(CLASS_COLOURS)  # classes that are drawn against the rest
MAX_COUNTED = 4  # classes whose slides the title counts
TITLE_WIDTH = 62  # characters
NOT_A_NUMBER = "a probability is not a number"


@dataclass(frozen=True)
class OneVsRest:
    """Scores of one class against the other classes.

    Parameters
    ----------
    name: of the scale (two classes) or of the class (more).
    colour: of its curve and bars.
    positive: name of the class that ``scores`` belong to.
    negative: name of the other class, or ``rest``.
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
        """Why there is no curve; "" if there is one."""
        if not self.scores.isfinite().all():
            return NOT_A_NUMBER
        if len(self.target.unique()) < 2:
            return f"{'every' if self.target[0] else 'no'} slide is {self.positive}"
        return ""


def scale_colours(scales: Iterable[str]) -> dict[str, str]:
    """One colour per scale; x20, x10, x5 and x40 have the same one in every figure."""
    others = cycle(OTHER_COLOURS)
    return {scale: SCALE_COLOURS.get(scale) or next(others) for scale in scales}


def one_vs_rest(evaluation: Evaluation) -> Iterator[OneVsRest]:
    """What is drawn: the positive of two classes at each scale, else each class at the finest."""
    if len(evaluation.classes) == 2:
        negative, positive = map(show_name, evaluation.classes)
        scales, _ = show_finest(evaluation.scales)
        for scale, colour in scale_colours(scales).items():
            scores = evaluation.probabilities[scale][:, 1].contiguous()
            yield OneVsRest(scale, colour, positive, negative, scores, evaluation.labels)
        return
    probabilities = evaluation.probabilities[evaluation.scales[-1]]
    for number, colour in zip(most_frequent(evaluation, MAX_CURVES), cycle(CLASS_COLOURS)):
        name, scores = evaluation.classes[number], probabilities[:, number].contiguous()
        target = (evaluation.labels == number).long()
        yield OneVsRest(name, colour, show_name(name), "rest", scores, target)


def most_frequent(evaluation: Evaluation, most: int) -> list[int]:
    """Indices of the classes with most slides, in the order of the classes."""
    counts = torch.bincount(evaluation.labels, minlength=len(evaluation.classes))
    return sorted(counts.argsort(descending=True, stable=True)[:most].tolist())


def thresholds_of(evaluation: Evaluation, scale: str) -> dict[str, Any]:
    """The validation thresholds of a scale by operating point; empty if there are none."""
    return dict((evaluation.thresholds or {}).get(scale, {}))


def describe_point(point: str) -> str:
    """``youden`` or ``specificity_0.9`` as a legend shows it."""
    return "Youden's" if point == YOUDEN else point.replace("_", " ")


def style_axes(axes: Axes) -> None:
    """Draw a light grid, without the upper and right border."""
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def draw_note(axes: Axes, text: str) -> None:
    """Write in the middle of the axes why a curve is missing."""
    place: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "center"}
    box = {"facecolor": "white", "edgecolor": GREY, "pad": 6}
    axes.text(0.5, 0.5, text, wrap=True, bbox=box, **place)


def title_of(evaluation: Evaluation, split: str, what: str, left_out: str = "") -> str:
    """What the figure shows, the number of slides and patients, and what is left out."""
    slides, patients = len(evaluation.slide_ids), len(set(evaluation.patients))
    counts = torch.bincount(evaluation.labels, minlength=len(evaluation.classes)).tolist()
    chosen = most_frequent(evaluation, MAX_COUNTED)
    words = [f"{counts[number]} {show_name(evaluation.classes[number])}" for number in chosen]
    if len(chosen) < len(counts):
        others = sum(counts) - sum(counts[number] for number in chosen)
        words.append(f"{others} of {len(counts) - len(chosen)} other classes")
    lines = textwrap.wrap(
        f"{slides} slides of {patients} patients ({', '.join(words)})", TITLE_WIDTH
    )
    return "\n".join([f"{split}: {what}", *lines, *filter(None, [left_out])])


def one_vs_rest_title(evaluation: Evaluation, split: str, what: str) -> str:
    """:func:`title_of` a figure of :func:`one_vs_rest`, with the scale if only one is shown."""
    if len(evaluation.classes) == 2:
        return title_of(evaluation, split, what, show_finest(evaluation.scales)[1])
    left_out = describe_left_out(len(evaluation.classes), MAX_CURVES, "classes")
    return title_of(evaluation, split, f"{what} at {evaluation.scales[-1]}", left_out)
