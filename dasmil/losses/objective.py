"""Eq. 3: the training objective.

Paper: Bontempo et al. 2023, section 3, "Overall Objective".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dasmil.losses.classification import bag_loss, max_instance_loss
from dasmil.losses.criticality import criticality_loss
from dasmil.losses.distillation import distillation_loss


@dataclass(frozen=True)
class ObjectiveWeights:
    """The scalars of Eq. 3; the defaults are the paper's (section 4, "Optimization").

    Parameters
    ----------
    distillation: λ, weight of L_KD; (1 − λ) discounts the label loss of the taught scales (D6).
    criticality: β, weight of L_CRIT.
    instance: weight of the max-instance label loss, which is never discounted (D7).
    temperature: τ of L_KD.
    """

    distillation: float = 1.0
    criticality: float = 1.0
    instance: float = 1.0
    temperature: float = 1.5


def objective(
    bag_logits: Mapping[str, Tensor],
    instance_logits: Mapping[str, Tensor],
    parent: Mapping[str, Tensor],
    ptr: Mapping[str, Tensor],
    labels: Tensor,
    weights: ObjectiveWeights,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 3 for M scales, each but the finest taught by the next finer one.

    Σ_taught (1 − λ) L_CE(y) + L_CE(y_finest) + λ Σ L_KD + β Σ L_CRIT + instance Σ L_max

    Parameters
    ----------
    bag_logits: per scale (B, C), coarse to fine.
    instance_logits: per scale (N_s, C).
    parent: per scale but the coarsest (N_s,) row in the next coarser scale.
    ptr: per scale (B + 1,) boundaries of the bags.
    labels: (B,) int64 class index.

    Returns
    -------
    The total (B,), and every unweighted term (B,) by name: ``bag/<scale>``, ``instance/<scale>``,
    and for each taught scale ``distillation/<scale>`` and ``criticality/<scale>``.
    """
    scales = list(bag_logits)
    terms: dict[str, Tensor] = {}
    total = torch.zeros_like(labels, dtype=bag_logits[scales[0]].dtype)
    for scale in scales:
        discount = 1.0 if scale == scales[-1] else 1.0 - weights.distillation
        terms[f"bag/{scale}"] = bag_loss(bag_logits[scale], labels)
        terms[f"instance/{scale}"] = max_instance_loss(instance_logits[scale], ptr[scale], labels)
        total = total + discount * terms[f"bag/{scale}"]
        total = total + weights.instance * terms[f"instance/{scale}"]

    for coarse, fine in pairwise(scales):
        kd = distillation_loss(bag_logits[coarse], bag_logits[fine], weights.temperature)
        crit = criticality_loss(
            instance_logits[coarse], instance_logits[fine], parent[fine], ptr[coarse]
        )
        terms[f"distillation/{coarse}"] = kd
        terms[f"criticality/{coarse}"] = crit
        total = total + weights.distillation * kd + weights.criticality * crit
    return total, terms
