"""Eq. 2: agreement of the instance scores of two scales.

Paper: Bontempo et al. 2023. D numbers: .github/docs/paper.md.
"""

from typing import Literal

import torch
from torch import Tensor

from dasmil.tensors import at_least_float32, bag_sums, first_max

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
    parent: (N_2,) row of each fine tile's parent, -1 for none; the others do not decrease.
    ptr: (B + 1,) boundaries of the bags in the coarse scale, on the CPU.
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
    # an orphan lies among the children of the parent before it, and counts for nothing
    rows = parent.cummax(0).values.clamp(min=0)
    starts = torch.searchsorted(rows, torch.arange(len(coarse) + 1, device=rows.device))
    num_children = _sums(has_parent.to(fine.dtype), starts)  # (N_1,)
    has_children = num_children > 0
    orphan = ~has_parent[:, None]
    if children_pooling == "max":
        pooled = first_max(fine.masked_fill(orphan, -torch.inf), rows, len(coarse))
        pooled = pooled.where(has_children[:, None], 0)
    else:
        sums = _sums(fine.masked_fill(orphan, 0), starts)  # (N_1, C)
        pooled = sums / num_children.clamp(min=1)[:, None]
    distance = (coarse - pooled).square().sum(1).where(has_children, 0)  # (N_1,)
    total = bag_sums(distance, ptr)
    if reduction == "sum":
        return total
    return total / bag_sums(has_children.to(distance.dtype), ptr).clamp(min=1)


def _sums(values: Tensor, starts: Tensor) -> Tensor:
    """(N_2, …) → (N_1, …) sums over the children of each coarse tile, in a fixed order."""
    return torch.segment_reduce(values, "sum", offsets=starts, axis=0)
