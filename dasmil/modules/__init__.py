"""LightningModules: training and evaluation of any method, and self-supervision of extractors."""

from dasmil.modules.card import ModelCard
from dasmil.modules.dino import DINOModule
from dasmil.modules.mil import MILModule, SingleScaleModule
from dasmil.modules.options import EvaluationOptions, OptimizerOptions

__all__ = [
    "DINOModule",
    "EvaluationOptions",
    "MILModule",
    "ModelCard",
    "OptimizerOptions",
    "SingleScaleModule",
]
