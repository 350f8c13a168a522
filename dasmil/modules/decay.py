"""When weight decay acts: not before the bag heads have learned something (D16)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dasmil.distributed import gather_lists


class BagLosses:
    """The bag loss of every training slide of an epoch, per scale.

    Adam turns an L2 term into whole steps towards zero if the gradient is smaller than the term. It
    is smaller in a bag head that has learned nothing yet, and then the head stays as it is.
    """

    def __init__(self) -> None:
        self._steps: list[Tensor] = []

    def note(self, labels: Tensor, losses: Sequence[Tensor]) -> None:
        """Keep the labels (B,) of a step, and the bag losses (B,) per scale."""
        self._steps.append(torch.stack([labels.to(losses[0].dtype), *losses], dim=1).detach())

    def take(self) -> float:
        """The largest mean loss of a scale as part of chance, the entropy of the labels.

        Forgets the slides. Every process must call it after the same step; all get the same value.
        With slides of one class alone there is no chance to compare with: infinity.
        """
        slides = torch.cat(gather_lists([torch.cat(self._steps).cpu()])).double()
        self._steps.clear()
        shares = slides[:, 0].long().bincount() / len(slides)
        chance = -float(torch.xlogy(shares, shares).sum())
        worst = float(slides[:, 1:].mean(0).max())
        return worst / chance if chance > 0 else float("inf")
