"""Slide-level metrics from the probabilities of all slides at once, in float64.

Functions of arrays accept any number of leading axes, so that one call computes thousands of
variants of the same slides (the swaps of a paired test). D numbers: .github/docs/paper.md.
"""

from collections.abc import Callable, Collection
from math import ceil, nan
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import rankdata
from torch import Tensor
from torchmetrics.functional.classification import binary_roc

Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.integer]

CALIBRATION_BINS = 15
LOWER_IS_BETTER = frozenset(["brier", "calibration_error"])
OF_ANY_LABELS = frozenset(["accuracy", "brier", "calibration_error"])  # need not every class
OF_RANKS = ("auroc", "average_precision", "sensitivity_at_specificity")  # depend on the order alone


def class_probabilities(logits: Tensor) -> Tensor:
    """(B, C) logits → (B, P) probabilities of the classes; one logit means two classes.

    In float64: in float32 all logits above 17 would have the same probability, without an order.
    """
    logits = logits.double()
    if logits.shape[1] == 1:
        positive = logits.sigmoid()
        return torch.cat([1 - positive, positive], dim=1)
    return logits.softmax(dim=1)


def auroc(scores: Array, positive: BoolArray, folds: IntArray | None = None) -> Array:
    """Share of the pairs of a positive and a negative slide in the right order; a tie counts half.

    Computed from midranks, which are exact in float64: models with equal counts have equal values.

    Parameters
    ----------
    scores: (..., n).
    positive: (n,).
    folds: (n,) fold of each slide: only pairs of slides of the same fold count. None: every pair.

    Returns
    -------
    (...,); nan if there is no pair.
    """
    folds = np.zeros(len(positive), dtype=int) if folds is None else folds
    in_order, pairs = np.zeros(scores.shape[:-1]), 0
    for fold in np.unique(folds):
        here = folds == fold
        of_fold = positive[here]
        num_positive, num_negative = int(of_fold.sum()), int((~of_fold).sum())
        if num_positive and num_negative:
            ranks = rankdata(scores[..., here], axis=-1)[..., of_fold]
            in_order += ranks.sum(axis=-1) - num_positive * (num_positive + 1) / 2
            pairs += num_positive * num_negative
    return in_order / pairs if pairs else np.full(scores.shape[:-1], nan)


def average_precision(scores: Array, positive: BoolArray) -> Array:
    """Mean over the positive slides of the precision at each one's score.

    This is the area under the precision-recall steps. Slides with equal scores are called together.
    Shapes as in :func:`auroc`; nan without a positive slide.
    """
    if not positive.any():
        return np.full(scores.shape[:-1], nan)
    called = rankdata(-scores, method="max", axis=-1)[..., positive]
    hits = rankdata(-scores[..., positive], method="max", axis=-1)
    return np.sort(hits / called, axis=-1).mean(axis=-1)  # one order: equal terms, equal sums


def sensitivity_at_specificity(scores: Array, positive: BoolArray, specificity: float) -> Array:
    """The best sensitivity at which at least this share of the negative slides is called negative.

    Shapes as in :func:`auroc`; nan if a class has no slide.

    Parameters
    ----------
    specificity: above 0, at most 1.
    """
    if positive.all() or not positive.any():
        return np.full(scores.shape[:-1], nan)
    threshold = _highest_spared(scores[..., ~positive], specificity)
    return (scores[..., positive] > threshold[..., None]).mean(axis=-1)


def _highest_spared(negative: Array, specificity: float) -> Array:
    """(..., m) scores of negative slides → (...,) the highest that must not be called positive."""
    m = negative.shape[-1]
    num_spared = ceil(specificity * m - 1e-9)  # 0.9 · 10 is 9, whatever its last digit
    return np.partition(negative, num_spared - 1, axis=-1)[..., num_spared - 1]


def calibration_error(confidence: Array, is_true: Array) -> Array:
    """Expected calibration error in 15 bins of equal width (Guo et al., 2017).

    Parameters
    ----------
    confidence: (..., n) probabilities.
    is_true: (..., n) 0 or 1, whether the confident class is the label.
    """
    n = confidence.shape[-1]
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    rows = bins.reshape(-1, n) + CALIBRATION_BINS * np.arange(bins.size // n)[:, None]
    excess = np.bincount(
        rows.ravel(), (confidence - is_true).ravel(), rows.shape[0] * CALIBRATION_BINS
    )
    return np.abs(excess).reshape(*confidence.shape[:-1], CALIBRATION_BINS).sum(axis=-1) / n


def as_array(values: Tensor) -> npt.NDArray[Any]:
    """The tensor as a numpy array, floats in float64."""
    values = values.detach().cpu()
    return values.double().numpy() if values.is_floating_point() else values.numpy()


def slide_metrics(
    probabilities: Array,
    labels: IntArray,
    specificity: float = 0.9,
    names: Collection[str] | None = None,
    folds: IntArray | None = None,
) -> dict[str, Array]:
    """Metrics that need no threshold from elsewhere.

    Two classes: of the positive (second) class. More classes: AUROC, average precision, F1 and
    sensitivity at a specificity are plain means over the classes, each against the rest.

    Parameters
    ----------
    probabilities: (..., n, P), all slides at once.
    labels: (n,).
    specificity: at which the best sensitivity is read from the ROC of these very slides.
    names: only these metrics; all if None.
    folds: (n,) fold of each slide; adds ``auroc_same_fold``, over the pairs of one fold.

    Returns
    -------
    (...,) each; nan if a class that the metric needs has no slide, or if a probability is nan.

    ``auroc``: exact, a tie counts one half.
    ``average_precision``: area under the precision-recall steps.
    ``accuracy, balanced_accuracy, f1``: at 0.5; P > 2: of the most probable class.
    ``sensitivity_at_specificity_0.9``: see ``specificity``.
    ``brier``: mean of (p − y)²; P > 2: of its sum over the classes (Brier, 1950).
    ``calibration_error``: expected calibration error in 15 bins of equal width (Guo et al., 2017),
    of the positive class; P > 2: of the most probable class.
    """
    num_classes = probabilities.shape[-1]
    two = num_classes == 2
    calls = probabilities[..., 1] > 0.5 if two else probabilities.argmax(axis=-1)
    classes = [1] if two else range(num_classes)  # each against the rest
    positive = {number: labels == number for number in range(num_classes)}

    def over_classes(measure: Callable[[Array, BoolArray], Array]) -> Array:
        return np.mean([measure(probabilities[..., c], positive[c]) for c in classes], axis=0)

    def brier() -> Array:
        errors = np.square(probabilities - np.eye(num_classes)[labels])
        return (errors[..., 1] if two else errors.sum(axis=-1)).mean(axis=-1)

    measures: dict[str, Callable[[], Array]] = {
        "auroc": lambda: over_classes(auroc),
        "average_precision": lambda: over_classes(average_precision),
        "accuracy": lambda: (calls == labels).mean(axis=-1),
        "balanced_accuracy": lambda: np.mean(
            [share(calls == c, positive[c]) for c in range(num_classes)], axis=0
        ),
        "f1": lambda: np.mean([f1(calls == c, positive[c]) for c in classes], axis=0),
        f"sensitivity_at_specificity_{specificity:g}": lambda: over_classes(
            lambda scores, of_class: sensitivity_at_specificity(scores, of_class, specificity)
        ),
        "brier": brier,
        "calibration_error": lambda: calibration_error(*confidence(probabilities, labels)),
    }
    if folds is not None:
        measures["auroc_same_fold"] = lambda: over_classes(
            lambda scores, of_class: auroc(scores, of_class, folds)
        )
    whole = len(np.unique(labels)) == num_classes
    known = bool(np.isfinite(probabilities).all())
    undefined = np.full(probabilities.shape[:-2], nan)
    return {
        name: measure() if known and (whole or name in OF_ANY_LABELS) else undefined
        for name, measure in measures.items()
        if names is None or name in names
    }


def threshold_metrics(
    margin: Array, positive: BoolArray, names: Collection[str] | None = None
) -> dict[str, Array]:
    """Metrics of two classes if a slide above a threshold is called positive.

    Parameters
    ----------
    margin: (..., n) probabilities of the positive class less the threshold.
    positive: (n,).
    names: only these metrics; all if None.

    Returns
    -------
    ``accuracy, balanced_accuracy, f1, sensitivity, specificity``, (...,) each; nan if a class that
    the metric needs has no slide, or if a probability is nan.
    """
    called = margin > 0
    measures: dict[str, Callable[[], Array]] = {
        "accuracy": lambda: (called == positive).mean(axis=-1),
        "balanced_accuracy": lambda: (share(called, positive) + share(~called, ~positive)) / 2,
        "f1": lambda: f1(called, positive),
        "sensitivity": lambda: share(called, positive),
        "specificity": lambda: share(~called, ~positive),
    }
    known = bool(np.isfinite(margin).all())
    both = bool(positive.any() and not positive.all())  # F1 needs slides of both classes
    return {
        name: measure() if known and (both or name != "f1") else np.full(margin.shape[:-1], nan)
        for name, measure in measures.items()
        if names is None or name in names
    }


def share(called: BoolArray, of: BoolArray) -> Array:
    """Share of the slides ``of`` (n,) that are called (..., n) → (...,); nan if there is none."""
    return called[..., of].mean(axis=-1) if of.any() else np.full(called.shape[:-1], nan)


def f1(called: BoolArray, positive: BoolArray) -> Array:
    """F1 = 2 TP / (called + positive), of (..., n) called and (n,) positive → (...,)."""
    hits = (called & positive).sum(axis=-1)
    return 2 * hits / (called.sum(axis=-1) + positive.sum())


def confidence(probabilities: Array, labels: IntArray) -> tuple[Array, Array]:
    """The arguments of :func:`calibration_error`, (..., n) each."""
    if probabilities.shape[-1] == 2:
        positive = probabilities[..., 1]
        return positive, np.broadcast_to(labels.astype(float), positive.shape)
    is_true = probabilities.argmax(axis=-1) == labels
    return probabilities.max(axis=-1), is_true.astype(float)


def youden_threshold(positive: Tensor, labels: Tensor) -> float:
    """The probability above which a slide is called positive, by Youden's J (D18).

    Of the thresholds with the largest sensitivity + specificity it is the highest one, halfway to
    the next lower probability. 0.5 if one of the classes has no slide.

    Parameters
    ----------
    positive: (n,) probabilities of the positive class.
    labels: (n,) 0 or 1.
    """
    if len(labels.unique()) < 2:
        return 0.5
    false_positive_rate, true_positive_rate, thresholds = binary_roc(positive, labels)
    num_positive, num_negative = int(labels.sum()), int((1 - labels).sum())
    hits = (true_positive_rate.double() * num_positive).round()  # counts: equal J stay equal
    false_alarms = (false_positive_rate.double() * num_negative).round()
    best = int((hits * num_negative - false_alarms * num_positive).argmax())
    if best == 0:  # best to call no slide positive
        return _halfway(float(positive.max()), 1.0)
    lowest_called = float(thresholds[best])
    below = positive[positive < lowest_called]
    return _halfway(float(below.max()) if len(below) else 0.0, lowest_called)


def specificity_threshold(positive: Tensor, labels: Tensor, specificity: float) -> float:
    """The lowest threshold that keeps the wanted specificity.

    It is halfway between the highest probability that must not be called positive and the next
    higher one. 0.5 if one of the classes has no slide.

    Parameters
    ----------
    positive: (n,) probabilities of the positive class.
    labels: (n,) 0 or 1.
    specificity: at least this share of the negative slides is called negative; above 0, at most 1.
    """
    if len(labels.unique()) < 2:
        return 0.5
    highest_spared = float(_highest_spared(as_array(positive[labels == 0]), specificity))
    above = positive[positive > highest_spared]
    return _halfway(highest_spared, float(above.min()) if len(above) else 1.0)


def _halfway(lower: float, upper: float) -> float:
    """Between two probabilities; never the upper one, which must be called positive."""
    middle = (lower + upper) / 2
    return middle if middle < upper else lower
