"""Slide-level figures."""

from dasmil.metrics.slide import class_probabilities, slide_metrics, youden_threshold

__all__ = ["class_probabilities", "slide_metrics", "youden_threshold"]
