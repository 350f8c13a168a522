"""The label losses: L_CE of Eq. 3, and the max-instance loss of the released code.

Paper: Bontempo et al. 2023. D numbers: .github/docs/paper.md.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dasmil.tensors import at_least_float32, bag_sizes, top_rows, values_at


def bag_loss(bag_logits: Tensor, labels: Tensor) -> Tensor:
    """L_CE(y; label) of Eq. 3: the negative log-probability of the label.

    One logit: −log σ(y) for label 1, −log σ(−y) for label 0. More: −log softmax(y)_label (D4).

    Parameters
    ----------
    bag_logits: (B, C), y in the paper.
    labels: (B,) int64 class index.

    Returns
    -------
    (B,)

    Examples
    --------
    >>> bag_loss(torch.tensor([[0.0], [2.0]]), torch.tensor([1, 1]))
    tensor([0.6931, 0.1269])
    """
    bag_logits = at_least_float32(bag_logits)
    if bag_logits.shape[1] == 1:
        target = labels.to(bag_logits.dtype)
        return F.binary_cross_entropy_with_logits(bag_logits[:, 0], target, reduction="none")
    return F.cross_entropy(bag_logits, labels, reduction="none")


def max_instance_loss(
    instance_logits: Tensor, ptr: Tensor, labels: Tensor, shown: Tensor | None = None
) -> Tensor:
    """L_CE(max_n z_n; label): :func:`bag_loss` of each bag's largest instance logit per class.

    It is in the released code, not in the paper (D7). Of equal logits only the first gets a
    gradient.

    Parameters
    ----------
    instance_logits: (N, C), z in the paper.
    ptr: (B + 1,) boundaries of the bags, on the CPU.
    labels: (B,) int64 class index.
    shown: (N,) bool, the tiles that count; None: all (D12).

    Returns
    -------
    (B,); zero for a bag without tiles.

    Examples
    --------
    Two bags, of two tiles and of one:

    >>> z = torch.tensor([[-3.0], [2.0], [0.0]])
    >>> max_instance_loss(z, torch.tensor([0, 2, 3]), torch.tensor([1, 0]))
    tensor([0.1269, 0.6931])
    """
    if shown is None:
        shown = torch.ones(len(instance_logits), dtype=torch.bool, device=labels.device)
    seen = instance_logits.masked_fill(~shown[:, None], -torch.inf)
    loss = bag_loss(values_at(instance_logits, top_rows(seen, ptr)), labels)
    has_tiles = torch.stack([part.any() for part in shown.split(bag_sizes(ptr))])
    return torch.where(has_tiles, loss, 0)


def balanced_weights(counts: Sequence[int]) -> list[float]:
    """Weights w_c = n / (P · n_c), with which P classes of n_c slides contribute equally.

    Examples
    --------
    >>> balanced_weights([2, 6])
    [2.0, 0.6666666666666666]
    """
    return [sum(counts) / (len(counts) * count) for count in counts]
