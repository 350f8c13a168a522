"""The figures of an evaluation, and its calibration, confusion and score figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchmetrics.functional.classification import multiclass_confusion_matrix

from dasmil.metrics import Evaluation
from dasmil.metrics.evaluated_slides import YOUDEN
from dasmil.metrics.score_intervals import wilson_interval
from dasmil.metrics.slide import CALIBRATION_BINS, as_array, confidence
from dasmil.reports.figure_parts import (
    GREY,
    NOT_A_NUMBER,
    OneVsRest,
    describe_point,
    draw_note,
    most_frequent,
    one_vs_rest,
    one_vs_rest_title,
    scale_colours,
    style_axes,
    thresholds_of,
    title_of,
)
from dasmil.reports.roc_figures import precision_recall_figure, roc_figure
from dasmil.reports.shown import save_figure, show_finest, show_name

HISTOGRAM_BINS = 20
RARE = 20  # if the rest's bars are so many times higher, those of the class need a log axis
MAX_CELLS = 20  # classes in a row of a confusion matrix; the others are counted together
MAX_LEVEL_NAMES = 6  # with more classes their names are upright below a matrix


def evaluation_figures(evaluation: Evaluation, split: str) -> dict[str, Figure]:
    """All figures of an evaluation by name.

    Parameters
    ----------
    split: ``val`` or ``test``; the titles show it.
    """
    draw = {
        "roc": roc_figure,
        "precision_recall": precision_recall_figure,
        "calibration": calibration_figure,
        "confusion": confusion_figure,
        "scores": scores_figure,
    }
    return {name: function(evaluation, split) for name, function in draw.items()}


def write_figures(folder: Path, split: str, figures: Mapping[str, Figure]) -> None:
    """Write ``figures/<name>.png``, and the same pictures for TensorBoard as ``test/<name>``.

    TensorBoard lists the folder as a run. Event files of an earlier evaluation are replaced.
    """
    for earlier in folder.glob("events.out.tfevents.*"):
        earlier.unlink()
    with SummaryWriter(str(folder)) as writer:
        for name, figure in figures.items():
            path = folder / "figures" / f"{name}.png"
            save_figure(path, figure)
            pixels = np.asarray(Image.open(path).convert("RGB"))
            writer.add_image(f"{split}/{name}", pixels, dataformats="HWC")


def calibration_figure(evaluation: Evaluation, split: str) -> Figure:
    """Reliability diagram of each scale, over the bins of ``calibration_error``.

    One point per bin: x is the mean probability of its slides, y the share of them that is of the
    class, with its 95 % interval (Wilson, 1927). Below: the number of slides per bin. More than two
    classes: of the most probable class.
    """
    scales, left_out = show_finest(evaluation.scales)
    figure = Figure((max(4.6, 3.2 * len(scales)), 4.9), layout="constrained")
    panels = figure.subplots(
        2, len(scales), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1]
    )
    for (above, below), (scale, colour) in zip(panels.T, scale_colours(scales).items()):
        _draw_calibration(above, below, evaluation, scale, colour)
    if len(evaluation.classes) == 2:
        of = show_name(evaluation.classes[1])
        share_of = f"share that is {of}"
    else:
        of, share_of = "the most probable class", "share of slides of that class"
    panels[0, 0].set_ylabel(share_of)
    panels[1, 0].set_ylabel("slides")
    figure.supxlabel(f"probability of {of}", fontsize=10)
    figure.suptitle(title_of(evaluation, split, "calibration", left_out), fontsize=10)
    return figure


def confusion_figure(evaluation: Evaluation, split: str) -> Figure:
    """Slides by label and by called class, one row per scale; per cent of the label's slides.

    Two classes: at 0.5 and at each validation threshold. More: the most probable class. Of more
    than :data:`MAX_CELLS` classes, all but the most frequent ones share one row and one column.
    """
    names, cell_of = _grouped_classes(evaluation)
    scales, left_out = show_finest(evaluation.scales)
    calls = {scale: _called_classes(evaluation, scale) for scale in scales}
    num_columns = max(map(len, calls.values()))
    side = 1.5 + 0.45 * len(names)
    size = max(4.6, (side + 0.3) * num_columns + 0.5), side * len(calls) + 0.8
    figure = Figure(size, layout="constrained")
    panels = figure.subplots(len(calls), num_columns, squeeze=False)
    ticks = range(len(names))
    upright = len(names) > MAX_LEVEL_NAMES  # names beside each other would overlap
    for row, (scale, called) in enumerate(calls.items()):
        for panel in panels[row, len(called) :]:
            panel.set_visible(False)
        for panel, (how, classes) in zip(panels[row], called.items()):
            panel.set_title(f"{scale}, {how}", fontsize=9)
            panel.set_xticks(ticks, names, rotation=90 if upright else 0)
            panel.set_yticks(ticks, names, rotation=0 if upright else 90, va="center")
            panel.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5))
            if not evaluation.probabilities[scale].isfinite().all():
                draw_note(panel, f"not defined:\n{NOT_A_NUMBER}")
                continue
            counts = multiclass_confusion_matrix(
                cell_of[classes], cell_of[evaluation.labels], len(names)
            )
            _draw_counts(panel, counts.numpy())
        panels[row, 0].set_ylabel("label")
    for panel in panels[-1]:
        panel.set_xlabel("called")
    figure.suptitle(title_of(evaluation, split, "confusion", left_out), fontsize=10)
    return figure


def scores_figure(evaluation: Evaluation, split: str) -> Figure:
    """Histogram of the scores: slides of the class upwards, the others downwards.

    Two classes: one panel per scale, of the positive class. More: one panel per class, at the
    finest scale.
    """
    subjects = list(one_vs_rest(evaluation))
    figure = Figure((6.4, 1.75 * len(subjects) + 1), layout="constrained")
    panels = figure.subplots(len(subjects), 1, squeeze=False, sharex=True)[:, 0]
    for panel, subject in zip(panels, subjects):
        _draw_histogram(panel, subject, thresholds_of(evaluation, subject.name))
    two = len(evaluation.classes) == 2
    of = show_name(evaluation.classes[1]) if two else "the class"
    panels[-1].set_xlabel(f"probability of {of}")
    figure.suptitle(one_vs_rest_title(evaluation, split, "scores by label"), fontsize=10)
    return figure


def _draw_calibration(
    above: Axes, below: Axes, evaluation: Evaluation, scale: str, colour: str
) -> None:
    """The reliability diagram of one scale, and the number of slides per bin."""
    style_axes(above)
    style_axes(below)
    above.plot([0, 1], [0, 1], color=GREY, linestyle=":", zorder=0)
    above.set(title=scale, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    probabilities = as_array(evaluation.probabilities[scale])
    if not np.isfinite(probabilities).all():
        draw_note(above, f"not defined:\n{NOT_A_NUMBER}")
        return
    metrics = evaluation.metrics(scale, ["brier", "calibration_error"])
    title = f"{scale}: Brier {metrics['brier']:.3f}, ECE {metrics['calibration_error']:.3f}"
    above.set_title(title, fontsize=10)
    scores, hits = confidence(probabilities, as_array(evaluation.labels))
    bins = np.minimum((scores * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    count = np.bincount(bins, minlength=CALIBRATION_BINS)
    used = count > 0
    mean = np.bincount(bins, scores, CALIBRATION_BINS)[used] / count[used]
    share = np.bincount(bins, hits, CALIBRATION_BINS)[used] / count[used]
    low, high = wilson_interval(share, count[used])
    bars = np.stack([share - low, high - share]).clip(min=0)
    above.errorbar(mean, share, bars, fmt="o-", color=colour, linewidth=1, label=scale)
    middle = (np.arange(CALIBRATION_BINS) + 0.5) / CALIBRATION_BINS
    below.bar(middle, count, 0.9 / CALIBRATION_BINS, color=colour)


def _grouped_classes(evaluation: Evaluation) -> tuple[list[str], Tensor]:
    """Names of the rows of a confusion matrix, and (P,) the row of each class."""
    num_classes = len(evaluation.classes)
    chosen = most_frequent(evaluation, MAX_CELLS)
    names = [show_name(evaluation.classes[number]) for number in chosen]
    if num_classes > len(chosen):
        names.append(f"{num_classes - len(chosen)} others")
    cell_of = torch.full((num_classes,), len(chosen))
    cell_of[torch.tensor(chosen)] = torch.arange(len(chosen))
    return names, cell_of


def _called_classes(evaluation: Evaluation, scale: str) -> dict[str, Tensor]:
    """Per rule of calling, (n,) the class that each slide is called."""
    probabilities = evaluation.probabilities[scale]
    if len(evaluation.classes) > 2:
        return {"most probable class": probabilities.argmax(dim=1)}
    thresholds = {"above 0.5": 0.5}
    for point, threshold in thresholds_of(evaluation, scale).items():
        thresholds[f"above {threshold:.3g}\n(validation, {describe_point(point)})"] = threshold
    return {how: (probabilities[:, 1] > value).long() for how, value in thresholds.items()}


def _draw_counts(panel: Axes, counts: npt.NDArray[np.integer]) -> None:
    """(P, P) counts, one row per label; dark: most of the label's slides."""
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


def _draw_histogram(panel: Axes, subject: OneVsRest, thresholds: Mapping[str, float]) -> None:
    style_axes(panel)
    panel.set_xlim(-0.01, 1.01)
    if not subject.scores.isfinite().all():
        panel.set_title(subject.shown, fontsize=9, loc="left")
        draw_note(panel, f"not defined: {NOT_A_NUMBER}")
        return
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    scores, positive = subject.scores.numpy(), (subject.target == 1).numpy()
    up, down = (np.histogram(scores[chosen], edges)[0] for chosen in (positive, ~positive))
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
    panel.text(1.015, 1, f"↑ {positive.sum()}\n{subject.positive}", va="top", **beside)
    panel.text(1.015, 0, f"↓ {(~positive).sum()}\n{subject.negative}", va="bottom", **beside)
    words = [subject.shown]
    for point, threshold in thresholds.items():
        line, style_name = ("--", "dashed") if point == YOUDEN else (":", "dotted")
        panel.axvline(threshold, color="black", linestyle=line, linewidth=1.3, label=point)
        words.append(f"{style_name}: {describe_point(point)}, {threshold:.3g}")
    panel.set_title("   ".join(words), fontsize=9, loc="left")
