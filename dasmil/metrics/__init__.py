"""Slide-level figures."""

from dasmil.metrics.bootstrap import interval, paired_p_value, resamples
from dasmil.metrics.evaluation import Evaluation
from dasmil.metrics.slide import (
    class_probabilities,
    slide_metrics,
    specificity_threshold,
    threshold_metrics,
    youden_threshold,
)

__all__ = [
    "Evaluation",
    "class_probabilities",
    "interval",
    "paired_p_value",
    "resamples",
    "slide_metrics",
    "specificity_threshold",
    "threshold_metrics",
    "youden_threshold",
]
