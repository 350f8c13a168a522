"""The label losses: L_CE of Eq. 3, and the max-instance loss of the released code."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.utils import segment


def bag_loss(bag_logits: Tensor, labels: Tensor) -> Tensor:
    """L_CE(y; label) of Eq. 3: binary cross-entropy for one logit, cross-entropy for C > 1 (D4).

    Parameters
    ----------
    bag_logits: (B, C).
    labels: (B,) int64 class index.

    Returns
    -------
    (B,)
    """
    if bag_logits.shape[1] == 1:
        target = labels.to(bag_logits.dtype)
        return F.binary_cross_entropy_with_logits(bag_logits[:, 0], target, reduction="none")
    return F.cross_entropy(bag_logits, labels, reduction="none")


def max_instance_loss(
    instance_logits: Tensor, ptr: Tensor, labels: Tensor, shown: Tensor | None = None
) -> Tensor:
    """The label loss of each bag's largest instance logit per class (D7; not in the paper).

    Parameters
    ----------
    instance_logits: (N, C).
    ptr: (B + 1,) boundaries of the bags.
    labels: (B,) int64 class index.
    shown: (N,) bool, the tiles that count; all where None (D12).

    Returns
    -------
    (B,); zero for a bag without tiles.
    """
    if shown is not None:
        before = torch.cat([shown.new_zeros(1, dtype=torch.int64), shown.cumsum(0)])
        instance_logits, ptr = instance_logits[shown], before[ptr]
    top = segment(instance_logits, ptr, reduce="max")  # (B, C)
    return torch.where(ptr.diff() > 0, bag_loss(top, labels), 0)
