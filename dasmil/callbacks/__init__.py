"""Callbacks that watch a Trainer and write its files."""

from dasmil.callbacks.best import BestCheckpoint
from dasmil.callbacks.evaluation_writer import EvaluationWriter
from dasmil.callbacks.history import History
from dasmil.callbacks.hparams import HyperParameters
from dasmil.callbacks.instance_truth import InstanceTruth
from dasmil.callbacks.log_lines import LogLines
from dasmil.callbacks.predictions import PredictionWriter
from dasmil.callbacks.run_folder import RunFolder

__all__ = [
    "BestCheckpoint",
    "EvaluationWriter",
    "History",
    "HyperParameters",
    "InstanceTruth",
    "LogLines",
    "PredictionWriter",
    "RunFolder",
]
