"""LightningModules: training and evaluation of any method, and self-supervision of extractors."""

from dasmil.modules.card import ModelCard
from dasmil.modules.dino import DINOModule
from dasmil.modules.mil import MILModule
from dasmil.modules.options import EvaluationOptions, OptimizerOptions
from dasmil.modules.single_scale import SingleScaleModule

__all__ = [
    "DINOModule",
    "EvaluationOptions",
    "MILModule",
    "ModelCard",
    "OptimizerOptions",
    "SingleScaleModule",
]
