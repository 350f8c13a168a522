"""Eq. 3: the training objective.

Paper: Bontempo et al. 2023, section 3, "Overall Objective".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dasmil.bags import ancestor_rows
from dasmil.errors import InputError
from dasmil.losses.classification import bag_loss, max_instance_loss
from dasmil.losses.criticality import ChildrenPooling, Reduction, criticality_loss
from dasmil.losses.distillation import ClassDistribution, Direction, distillation_loss
from dasmil.output import ScaleOutput


@dataclass(frozen=True)
class ObjectiveOptions:
    """The scalars of Eq. 3, and a switch for each way in which paper and released code differ.

    The scalars' defaults are the paper's (section 4, "Optimization"); ``.github/paper.md`` says why
    each switch stands as it does.

    Parameters
    ----------
    distillation: λ, weight of L_KD; (1 − λ) discounts label losses.
    criticality: β, weight of L_CRIT.
    instance: weight of the max-instance label loss, which is never discounted (D7).
    temperature: τ of L_KD.
    discounted: the bag losses that (1 − λ) discounts: of the ``coarse`` scales, or of the finest,
        ``fine``, as printed (D6).
    distillation_pairs: who teaches a scale when M > 2: the next finer one (``neighbours``), or the
        ``finest``.
    kl_direction, squared_temperature, class_distribution, epsilon: of Eq. 1, see
        :func:`distillation_loss` (D1, D2, D3, D5).
    criticality_scores: what Eq. 2 compares: instance ``logits``, or the ``attention`` (D10).
    children_pooling, criticality_reduction: of Eq. 2, see :func:`criticality_loss` (D9, D8).
    detach_teacher: no gradient reaches the finer scale from Eq. 1 and Eq. 2 (D11).
    """

    distillation: float = 1.0
    criticality: float = 1.0
    instance: float = 1.0
    temperature: float = 1.5
    discounted: Literal["coarse", "fine"] = "coarse"
    distillation_pairs: Literal["neighbours", "finest"] = "neighbours"
    kl_direction: Direction = "teacher_student"
    squared_temperature: bool = True
    class_distribution: ClassDistribution = "softmax"
    epsilon: bool = False
    criticality_scores: Literal["logits", "attention"] = "logits"
    children_pooling: ChildrenPooling = "mean"
    criticality_reduction: Reduction = "mean"
    detach_teacher: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.distillation <= 1:
            raise InputError(f"distillation: λ = {self.distillation} is not between 0 and 1")
        if min(self.criticality, self.instance) < 0:
            raise InputError("criticality, instance: a weight of a loss cannot be negative")
        if self.temperature <= 0:
            raise InputError(f"temperature: τ = {self.temperature} is not positive")


def objective(
    output: Mapping[str, ScaleOutput],
    parent: Mapping[str, Tensor],
    ptr: Mapping[str, Tensor],
    labels: Tensor,
    options: ObjectiveOptions,
    class_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 3 for M scales, each but the finest taught by a finer one.

    Σ_taught (1 − λ) L_CE(y) + L_CE(y_finest) + λ Σ L_KD + β Σ L_CRIT + instance Σ L_max

    Parameters
    ----------
    output: what the model says of each scale, coarse to fine.
    parent: per scale but the coarsest (N_s,) row in the next coarser scale, -1 for none.
    ptr: per scale (B + 1,) boundaries of the bags.
    labels: (B,) int64 class index.
    options: weights and switches.
    class_weights: (P,) by which the label losses of a slide of each class count in the total; 1
        where None. What a scale is taught by another needs no label and is not weighted.

    Returns
    -------
    The total (B,), and every unweighted term (B,) by name: ``bag/<scale>``, ``instance/<scale>``,
    and for each taught scale ``distillation/<scale>`` and ``criticality/<scale>``.
    """
    scales = list(output)
    finest = scales[-1]
    terms: dict[str, Tensor] = {}
    total = torch.zeros_like(labels, dtype=output[finest].bag_logits.dtype)
    weight = 1.0 if class_weights is None else class_weights[labels]  # (B,)
    for scale in scales:
        says = output[scale]
        is_discounted = (scale == finest) == (options.discounted == "fine") and len(scales) > 1
        discount = 1.0 - options.distillation if is_discounted else 1.0
        label_loss = bag_loss(says.bag_logits, labels)
        top_loss = max_instance_loss(says.instance_logits, ptr[scale], labels, says.shown)
        terms[f"bag/{scale}"], terms[f"instance/{scale}"] = label_loss, top_loss
        total = total + weight * (discount * label_loss + options.instance * top_loss)

    for number, coarse in enumerate(scales[:-1]):
        fine = finest if options.distillation_pairs == "finest" else scales[number + 1]
        between = scales[number + 1 : scales.index(fine) + 1]
        rows = ancestor_rows([parent[scale] for scale in between])
        kd, crit = _teach(output[coarse], output[fine], rows, ptr[coarse], options)
        terms[f"distillation/{coarse}"], terms[f"criticality/{coarse}"] = kd, crit
        total = total + options.distillation * kd + options.criticality * crit
    return total, terms


def balanced_weights(counts: Sequence[int]) -> list[float]:
    """n / (P · n_c) for each of P classes of n_c slides: as if all were equally frequent."""
    return [sum(counts) / (len(counts) * count) for count in counts]


def _teach(
    student: ScaleOutput,
    teacher: ScaleOutput,
    parent: Tensor,
    ptr: Tensor,
    options: ObjectiveOptions,
) -> tuple[Tensor, Tensor]:
    """L_KD and L_CRIT (B,) of a coarse scale that a finer one teaches."""
    kd = distillation_loss(
        student.bag_logits,
        teacher.bag_logits,
        options.temperature,
        direction=options.kl_direction,
        squared_temperature=options.squared_temperature,
        class_distribution=options.class_distribution,
        epsilon=options.epsilon,
        detach_teacher=options.detach_teacher,
    )
    by_attention = options.criticality_scores == "attention"
    crit = criticality_loss(
        student.attention if by_attention else student.instance_logits,
        teacher.attention if by_attention else teacher.instance_logits,
        parent,
        ptr,
        children_pooling=options.children_pooling,
        reduction=options.criticality_reduction,
        detach_teacher=options.detach_teacher,
    )
    return kd, crit
