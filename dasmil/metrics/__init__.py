"""Metrics of slides, instances and lesions, their intervals, and a paired test."""

from dasmil.metrics.evaluated_slides import Evaluation, pool
from dasmil.metrics.paired import swap_test
from dasmil.metrics.slide import class_probabilities, slide_metrics

__all__ = ["Evaluation", "class_probabilities", "pool", "slide_metrics", "swap_test"]
