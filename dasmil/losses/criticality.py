"""Eq. 2: agreement of the instance scores of two scales."""

from typing import Literal

import torch
from torch import Tensor
from torch_geometric.utils import scatter, segment

from dasmil.tensors import at_least_float32, first_max

ChildrenPooling = Literal["mean", "max"]
Reduction = Literal["mean", "sum"]


def criticality_loss(
    coarse: Tensor,
    fine: Tensor,
    parent: Tensor,
    ptr: Tensor,
    *,
    children_pooling: ChildrenPooling = "mean",
    reduction: Reduction = "mean",
    detach_teacher: bool = True,
) -> Tensor:
    """L_CRIT of Eq. 2: ‖z_1 − GraphPooling(z_2)‖² over the coarse tiles that have children (D12).

    Parameters
    ----------
    coarse: (N_1, C) instance scores.
    fine: (N_2, C) instance scores of a finer scale.
    parent: (N_2,) row of each fine tile's parent, -1 for none.
    ptr: (B + 1,) boundaries of the bags in the coarse scale.
    children_pooling: GraphPooling: the ``mean`` of a tile's children as printed, or their ``max``
        as released, of which the first of equal ones learns (D9).
    reduction: ``sum`` over the tiles as printed, or their ``mean``, which does not grow with the
        bag (D8).
    detach_teacher: no gradient reaches the finer scale (D11).

    Returns
    -------
    (B,); zero for a bag without tiles.
    """
    if detach_teacher:
        fine = fine.detach()
    coarse, fine = at_least_float32(coarse), at_least_float32(fine)  # half ones cannot count tiles
    held = parent >= 0
    parent = parent[held]
    if children_pooling == "max":
        pooled = first_max(fine[held], parent, len(coarse))  # (N_1, C)
    else:
        pooled = scatter(fine[held], parent, dim_size=len(coarse), reduce="mean")
    has_children = torch.bincount(parent, minlength=len(coarse)) > 0
    distance = (coarse - pooled).square().sum(1) * has_children  # (N_1,)
    total = segment(distance, ptr)
    if reduction == "sum":
        return total
    return total / segment(has_children.to(distance.dtype), ptr).clamp(min=1)
