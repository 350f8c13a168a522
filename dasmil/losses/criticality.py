"""Eq. 2: agreement of the instance scores of two scales.

Paper: Bontempo et al. 2023. D numbers: .github/docs/paper.md.
"""

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
    """L_CRIT = ‖z_1 − GraphPooling(z_2)‖² of Eq. 2, over the coarse tiles with children (D12).

    Parameters
    ----------
    coarse: (N_1, C) instance scores, z_1.
    fine: (N_2, C) instance scores of a finer scale, z_2.
    parent: (N_2,) row of each fine tile's parent, -1 for none.
    ptr: (B + 1,) boundaries of the bags in the coarse scale.
    children_pooling: GraphPooling: the ``mean`` over a tile's children as printed, or their ``max``
        as released, where the first of equal children gets the gradient (D9).
    reduction: ``sum`` over the tiles as printed, or their ``mean``, which does not grow with the
        bag (D8).
    detach_teacher: whether to stop gradients to the finer scale (D11).

    Returns
    -------
    (B,); zero for a bag without tiles.

    Examples
    --------
    One bag of two coarse tiles; the first has the children 0 and 4, the second the child 1:

    >>> coarse, fine = torch.tensor([[1.0], [4.0]]), torch.tensor([[0.0], [4.0], [1.0]])
    >>> criticality_loss(coarse, fine, torch.tensor([0, 0, 1]), torch.tensor([0, 2]))
    tensor([5.])
    """
    if detach_teacher:
        fine = fine.detach()
    # sums of many ones stall in half precision
    coarse, fine = at_least_float32(coarse), at_least_float32(fine)
    has_parent = parent >= 0
    parent = parent[has_parent]
    if children_pooling == "max":
        pooled = first_max(fine[has_parent], parent, len(coarse))  # (N_1, C)
    else:
        pooled = scatter(fine[has_parent], parent, dim_size=len(coarse), reduce="mean")
    has_children = torch.bincount(parent, minlength=len(coarse)) > 0
    distance = (coarse - pooled).square().sum(1) * has_children  # (N_1,)
    total = segment(distance, ptr)
    if reduction == "sum":
        return total
    return total / segment(has_children.to(distance.dtype), ptr).clamp(min=1)
