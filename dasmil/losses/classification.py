"""The label losses: L_CE of Eq. 3, and the max-instance loss of the released code."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dasmil.tensors import at_least_float32, bag_rows, first_max


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
    bag_logits = at_least_float32(bag_logits)
    if bag_logits.shape[1] == 1:
        target = labels.to(bag_logits.dtype)
        return F.binary_cross_entropy_with_logits(bag_logits[:, 0], target, reduction="none")
    return F.cross_entropy(bag_logits, labels, reduction="none")


def max_instance_loss(
    instance_logits: Tensor, ptr: Tensor, labels: Tensor, shown: Tensor | None = None
) -> Tensor:
    """The label loss of each bag's largest instance logit per class (D7; not in the paper).

    Only the first of equal ones learns.

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
    top = first_max(instance_logits, bag_rows(ptr), len(ptr) - 1)  # (B, C)
    return torch.where(ptr.diff() > 0, bag_loss(top, labels), 0)


def balanced_weights(counts: Sequence[int]) -> list[float]:
    """n / (P · n_c) for each of P classes of n_c slides: as if all were equally frequent."""
    return [sum(counts) / (len(counts) * count) for count in counts]
