"""The plain MIL heads that serve as baselines: the mean or the largest instance logit.

Paper: Ilse et al., ICML 2018, section 2.2 and Table 1 ("Instance+mean", "Instance+max").
"""

from typing import Literal

import torch
from torch import Tensor, nn

from dasmil.bags.output import ScaleOutput
from dasmil.tensors import bag_rows, bag_sums, by_rows, precisely, top_rows


class PoolingHead(nn.Module):
    """z_n = W ReLU(V h_n) per tile; the bag logits are mean_n z_n or max_n z_n.

    Logits are computed in at least float32, as in :class:`dasmil.nn.MILHead`.

    Parameters
    ----------
    in_dim: width K of the tile features.
    num_logits: C; 1 for a binary task with one logit.
    pooling: of the instance logits over the tiles of a bag.
    """

    def __init__(self, in_dim: int, num_logits: int, pooling: Literal["mean", "max"]):
        super().__init__()
        self.pooling = pooling
        self.transform = nn.Sequential(nn.Linear(in_dim, in_dim), nn.ReLU())
        self.instance_classifier = nn.Linear(in_dim, num_logits)

    def forward(self, h: Tensor, ptr: Tensor, shown: Tensor | None = None) -> ScaleOutput:
        """Score B bags; a bag without tiles has logits of 0.

        The attention is each tile's share in the bag logit: equal for all tiles, or one for the
        tile with the largest logit and zero for the others.

        Parameters
        ----------
        h: (N, K) features of the tiles.
        ptr: (B + 1,) boundaries of the bags, on the CPU.
        shown: (N,) bool; tiles that are not shown have an instance logit, but no attention. None:
            all are shown.
        """
        bag_index = bag_rows(ptr, h.device)
        if shown is None:
            shown = torch.ones_like(bag_index, dtype=torch.bool)
        z = by_rows(self._logits, h)  # (N, C)
        if self.pooling == "mean":
            counted = shown[:, None].to(z.dtype)
            count = bag_sums(counted, ptr).clamp(min=1)  # (B, 1)
            attention = (counted / count[bag_index]).expand_as(z)
        else:
            seen = z.masked_fill(~shown[:, None], -torch.inf)
            top = top_rows(seen, ptr)  # (B, C)
            rows = torch.arange(len(z), device=z.device)[:, None]
            attention = ((top[bag_index] == rows) & shown[:, None]).to(z.dtype)  # (N, C)
        bag_logits = bag_sums(attention * z, ptr)  # (B, C)
        return ScaleOutput(bag_logits, z, attention, bag_index, shown)

    def _logits(self, h: Tensor) -> Tensor:
        return precisely(self.instance_classifier, precisely(self.transform, h))
