"""Slide-level figures."""

from dasmil.metrics.slide import accuracy_at, class_probabilities, slide_metrics, youden_threshold

__all__ = ["accuracy_at", "class_probabilities", "slide_metrics", "youden_threshold"]
