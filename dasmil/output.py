"""What every model says about a scale: the one type between models, losses and reports."""

from dataclasses import dataclass

from torch import Tensor


@dataclass  # not frozen: Lightning converts its fields under mixed precision
class ScaleOutput:
    """What a model says about one scale, for B bags with N tiles in all and C logits.

    Parameters
    ----------
    bag_logits: (B, C), y in the paper.
    instance_logits: (N, C), z in the paper.
    attention: (N, C); sums to one over the tiles of a bag.
    bag_index: (N,) the bag of each row.
    shown: (N,) bool, False for a tile that the head is not shown (D12); its attention is zero.
    """

    bag_logits: Tensor
    instance_logits: Tensor
    attention: Tensor
    bag_index: Tensor
    shown: Tensor
