"""What watches a Trainer and writes."""

from dasmil.callbacks.best import BestCheckpoint

__all__ = ["BestCheckpoint"]
