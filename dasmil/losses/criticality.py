"""Eq. 2: agreement of the instance scores of two scales."""

import torch
from torch import Tensor
from torch_geometric.utils import scatter, segment


def criticality_loss(coarse: Tensor, fine: Tensor, parent: Tensor, ptr: Tensor) -> Tensor:
    """L_CRIT of Eq. 2: squared distance between a tile's score and the mean of its children's.

    ‖z_1 − GraphPooling(z_2)‖², averaged over the coarse tiles that have children, so that it does
    not grow with the bag (D8, D12). The scores are instance logits (D10), the pooling is the mean
    of the children as printed (D9), and no gradient reaches the finer scale (D11).

    Parameters
    ----------
    coarse: (N_1, C) instance logits.
    fine: (N_2, C) instance logits of the next finer scale.
    parent: (N_2,) row of each fine tile's parent.
    ptr: (B + 1,) boundaries of the bags in the coarse scale.

    Returns
    -------
    (B,); zero for a bag without tiles.
    """
    pooled = scatter(fine.detach(), parent, dim_size=len(coarse), reduce="mean")  # (N_1, C)
    has_children = torch.bincount(parent, minlength=len(coarse)) > 0
    distance = (coarse - pooled).square().sum(1) * has_children  # (N_1,)
    count = segment(has_children.to(distance.dtype), ptr)
    return segment(distance, ptr) / count.clamp(min=1)
