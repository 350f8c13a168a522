"""Loss functions: pure, one equation each, one value per bag.

D numbers: .github/docs/paper.md.
"""

from dasmil.losses.classification import bag_loss, balanced_weights, max_instance_loss
from dasmil.losses.criticality import criticality_loss
from dasmil.losses.distillation import distillation_loss

__all__ = [
    "bag_loss",
    "balanced_weights",
    "criticality_loss",
    "distillation_loss",
    "max_instance_loss",
]
