"""Slide-level figures from the probabilities of all slides at once."""

from collections.abc import Callable, Collection
from functools import partial
from math import ceil, nan
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_auroc,
    binary_average_precision,
    binary_calibration_error,
    binary_f1_score,
    binary_recall,
    binary_roc,
    binary_sensitivity_at_specificity,
    binary_specificity,
    multiclass_accuracy,
    multiclass_auroc,
    multiclass_average_precision,
    multiclass_calibration_error,
    multiclass_f1_score,
    multiclass_sensitivity_at_specificity,
)

Measure = Callable[[Tensor, Tensor], Tensor]  # (n,) or (n, P) probabilities, (n,) labels → figure

CALIBRATION_BINS = 15
LOWER_IS_BETTER = frozenset(["brier", "calibration_error"])
OF_ANY_LABELS = frozenset(["accuracy", "brier", "calibration_error"])  # need not all the classes


def class_probabilities(logits: Tensor) -> Tensor:
    """(B, C) logits → (B, P) probabilities of the classes; one logit stands for two classes.

    In float64: in float32 all logits above 17 would have the same probability, and no order.
    """
    logits = logits.double()
    if logits.shape[1] == 1:
        positive = logits.sigmoid()
        return torch.cat([1 - positive, positive], dim=1)
    return logits.softmax(dim=1)


def slide_metrics(
    probabilities: Tensor,
    labels: Tensor,
    specificity: float = 0.9,
    names: Collection[str] | None = None,
) -> dict[str, float]:
    """Figures that need no threshold from elsewhere.

    Two classes: of the positive (second) class. More classes: AUROC, average precision, F1 and
    sensitivity at a specificity are plain means over the classes, each against the rest.

    Parameters
    ----------
    probabilities: (n, P), all slides at once.
    labels: (n,) int64.
    specificity: at which the best sensitivity is read from the ROC of these very slides.
    names: only these figures; all where None.

    Returns
    -------
    ``auroc``: exact, a tie counts one half.
    ``average_precision``: area under the precision-recall steps.
    ``accuracy, balanced_accuracy, f1``: at 0.5; P > 2: of the most probable class.
    ``sensitivity_at_specificity_0.9``: see ``specificity``.
    ``brier``: mean of (p − y)²; P > 2: of its sum over the classes (Brier, 1950).
    ``calibration_error``: expected calibration error in 15 bins of equal width (Guo et al., 2017),
    of the positive class; P > 2: of the most probable class.

    A figure is nan where a class that it needs has no slide, or where a probability is nan.
    """
    num_classes = probabilities.shape[1]
    if num_classes == 2:
        measures, scores = _two_class_measures(specificity), probabilities[:, 1].contiguous()
    else:
        measures, scores = _multiclass_measures(num_classes, specificity), probabilities
    whole = len(labels.unique()) == num_classes
    known = bool(probabilities.isfinite().all())
    return {
        name: float(measure(scores, labels)) if known and (whole or name in OF_ANY_LABELS) else nan
        for name, measure in measures.items()
        if names is None or name in names
    }


def threshold_metrics(
    positive: Tensor, labels: Tensor, threshold: float, names: Collection[str] | None = None
) -> dict[str, float]:
    """Figures of two classes when a slide above a threshold is called positive.

    Parameters
    ----------
    positive: (n,) probabilities of the positive class.
    labels: (n,) 0 or 1.
    threshold: a probability.
    names: only these figures; all where None.

    Returns
    -------
    ``accuracy, balanced_accuracy, f1, sensitivity, specificity``; nan where a class that the figure
    needs has no slide, or where a probability is nan.
    """
    classes = set(labels.unique().tolist())
    known = bool(positive.isfinite().all())
    return {
        name: float(measure(positive, labels)) if known and needed <= classes else nan
        for name, (measure, needed) in _threshold_measures(threshold).items()
        if names is None or name in names
    }


def _two_class_measures(specificity: float) -> dict[str, Measure]:
    """Of (n,) probabilities of the positive class."""
    at_half = {name: measure for name, (measure, _) in _threshold_measures(0.5).items()}

    def at_specificity(positive: Tensor, labels: Tensor) -> Tensor:
        sensitivity, _ = binary_sensitivity_at_specificity(
            positive, labels, specificity, validate_args=False
        )
        return sensitivity

    return {
        "auroc": partial(binary_auroc, validate_args=False),
        "average_precision": partial(binary_average_precision, validate_args=False),
        **{name: at_half[name] for name in ("accuracy", "balanced_accuracy", "f1")},
        f"sensitivity_at_specificity_{specificity:g}": at_specificity,
        "brier": lambda p, y: (p - y).square().mean(),
        "calibration_error": partial(
            binary_calibration_error, n_bins=CALIBRATION_BINS, validate_args=False
        ),
    }


def _multiclass_measures(num_classes: int, specificity: float) -> dict[str, Measure]:
    """Of (n, P) probabilities."""
    of: dict[str, Any] = {"num_classes": num_classes, "validate_args": False}

    def at_specificity(probabilities: Tensor, labels: Tensor) -> Tensor:
        each, _ = multiclass_sensitivity_at_specificity(
            probabilities, labels, min_specificity=specificity, **of
        )
        return each.mean()

    return {
        "auroc": partial(multiclass_auroc, average="macro", **of),
        "average_precision": partial(multiclass_average_precision, average="macro", **of),
        "accuracy": partial(multiclass_accuracy, average="micro", **of),
        "balanced_accuracy": partial(multiclass_accuracy, average="macro", **of),
        "f1": partial(multiclass_f1_score, average="macro", **of),
        f"sensitivity_at_specificity_{specificity:g}": at_specificity,
        "brier": lambda p, y: (p - torch.eye(num_classes)[y]).square().sum(dim=1).mean(),
        "calibration_error": partial(multiclass_calibration_error, n_bins=CALIBRATION_BINS, **of),
    }


def _threshold_measures(threshold: float) -> dict[str, tuple[Measure, set[int]]]:
    """Each of (n,) probabilities of the positive class, with the classes that it needs."""
    at: dict[str, Any] = {"threshold": threshold, "validate_args": False}

    def balanced_accuracy(positive: Tensor, labels: Tensor) -> Tensor:
        called = (positive > threshold).long()
        return multiclass_accuracy(called, labels, 2, average="macro", validate_args=False)

    return {
        "accuracy": (partial(binary_accuracy, **at), set()),
        "balanced_accuracy": (balanced_accuracy, {0, 1}),
        "f1": (partial(binary_f1_score, **at), {0, 1}),
        "sensitivity": (partial(binary_recall, **at), {1}),
        "specificity": (partial(binary_specificity, **at), {0}),
    }


def youden_threshold(positive: Tensor, labels: Tensor) -> float:
    """The probability above which a slide is called positive, by Youden's J (D18).

    Of the thresholds with the largest sensitivity + specificity the highest one is taken, halfway
    to the next lower probability. 0.5 where the slides do not hold both classes.

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
    """The lowest probability above which calling slides positive keeps the wanted specificity.

    It lies halfway between the highest probability that must not be called positive and the next
    higher one. 0.5 where the slides do not hold both classes.

    Parameters
    ----------
    positive: (n,) probabilities of the positive class.
    labels: (n,) 0 or 1.
    specificity: at least this share of the negative slides is called negative; above 0, at most 1.
    """
    if len(labels.unique()) < 2:
        return 0.5
    negative = positive[labels == 0].sort().values
    num_spared = ceil(specificity * len(negative) - 1e-9)  # 0.9 · 10 is 9, whatever its last digit
    highest_spared = float(negative[num_spared - 1])
    above = positive[positive > highest_spared]
    return _halfway(highest_spared, float(above.min()) if len(above) else 1.0)


def _halfway(lower: float, upper: float) -> float:
    """Between two probabilities; never the upper one, which is to be called positive."""
    middle = (lower + upper) / 2
    return middle if middle < upper else lower
