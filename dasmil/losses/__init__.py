"""Pure functions, one equation each; every loss returns one value a bag."""

from dasmil.losses.classification import bag_loss, max_instance_loss
from dasmil.losses.criticality import criticality_loss
from dasmil.losses.distillation import distillation_loss
from dasmil.losses.objective import ObjectiveOptions, balanced_weights, objective

__all__ = [
    "ObjectiveOptions",
    "bag_loss",
    "balanced_weights",
    "criticality_loss",
    "distillation_loss",
    "max_instance_loss",
    "objective",
]
