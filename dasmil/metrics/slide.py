"""Slide-level figures from probabilities."""

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_auroc,
    binary_roc,
    multiclass_accuracy,
    multiclass_auroc,
)


def class_probabilities(logits: Tensor) -> Tensor:
    """(B, C) logits → (B, P) probabilities of the classes; one logit stands for two classes.

    In float64: in float32 all logits above 17 would have the same probability, and no order.
    """
    logits = logits.double()
    if logits.shape[1] == 1:
        positive = logits.sigmoid()
        return torch.cat([1 - positive, positive], dim=1)
    return logits.softmax(dim=1)


def slide_metrics(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """AUROC (macro one-vs-rest for P > 2) and accuracy (at 0.5, or of the most probable class).

    Parameters
    ----------
    probabilities: (n, P), all slides at once.
    labels: (n,) int64.

    Returns
    -------
    ``auroc`` is nan when a class has no slide: then it is not defined.
    """
    num_classes = probabilities.shape[1]
    defined = len(labels.unique()) == num_classes
    if num_classes == 2:
        positive = probabilities[:, 1]
        auroc = binary_auroc(positive, labels) if defined else torch.tensor(float("nan"))
        accuracy = binary_accuracy(positive, labels)
    else:
        multiclass = multiclass_auroc(probabilities, labels, num_classes) if defined else None
        auroc = torch.tensor(float("nan")) if multiclass is None else multiclass
        accuracy = multiclass_accuracy(probabilities, labels, num_classes, average="micro")
    return {"auroc": auroc.item(), "accuracy": accuracy.item()}


def youden_threshold(probabilities: Tensor, labels: Tensor) -> float:
    """The probability from which on a slide is called positive, by Youden's J (D18).

    Of the thresholds with the largest sensitivity + specificity the highest one is taken, halfway
    to the next lower probability. 0.5 where the slides do not hold both classes.

    Parameters
    ----------
    probabilities: (n,) of the positive class.
    labels: (n,) 0 or 1.
    """
    if len(labels.unique()) < 2:
        return 0.5
    false_positive_rate, true_positive_rate, thresholds = binary_roc(probabilities, labels)
    best = int((true_positive_rate - false_positive_rate).argmax())
    lowest_positive = thresholds[best].double()
    below = probabilities.double()[probabilities.double() < lowest_positive]
    next_lower = below.max() if len(below) else torch.zeros(())
    return float((lowest_positive + next_lower) / 2)
