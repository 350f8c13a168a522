"""When weight decay acts: not before the bag heads have learned something (D16).

D numbers: ``.github/docs/paper.md``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dasmil.data.distributed import gather_lists


class BagLosses:
    """The bag loss of every training slide of an epoch, per scale.

    If the gradient is smaller than the L2 term, Adam turns the term into whole steps towards zero.
    In a bag head that has learned nothing yet the gradient is smaller, and the head never learns.
    """

    def __init__(self) -> None:
        self._steps: list[Tensor] = []

    def add(self, labels: Tensor, losses: Sequence[Tensor]) -> None:
        """Add the labels (B,) of a step and its bag losses per scale, (B,) each."""
        self._steps.append(torch.stack([labels.to(losses[0].dtype), *losses], dim=1).detach())

    def pop_worst(self) -> float:
        """The largest mean loss of a scale relative to chance, the entropy of the labels.

        Forgets the slides. Every process must call it after the same step; all get the same value.
        Infinity if all slides are of one class, because their entropy is 0.
        """
        slides = torch.cat(gather_lists([torch.cat(self._steps).cpu()])).double()
        self._steps.clear()
        shares = slides[:, 0].long().bincount() / len(slides)
        chance = -float(torch.xlogy(shares, shares).sum())
        worst = float(slides[:, 1:].mean(0).max())
        return worst / chance if chance > 0 else float("inf")
