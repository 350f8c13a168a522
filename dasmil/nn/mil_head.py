"""The attention MIL head: DSMIL's dual stream.

Paper: Li et al., CVPR 2021; Bontempo et al. 2023, section 3, use one head per scale. D numbers:
.github/docs/paper.md.
"""

from functools import partial
from math import sqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dasmil.bags.output import ScaleOutput
from dasmil.tensors import (
    at_least_float32,
    bag_rows,
    bag_sizes,
    by_rows,
    is_in_blocks,
    precisely,
    top_rows,
)


class MILHead(nn.Module):
    """Instance logits, and a bag embedding that attends to tiles similar to the critical instance.

    z_n = W h_n are the instance logits and m = argmax_n z_n is the critical instance, per logit.
    a_n = softmax_n(⟨q_n, q_m⟩ / √Q) is the attention, and the bag logits are a convolution over the
    embeddings Σ_n a_n v_n, with q_n = tanh(W_q f_n), v_n = W_v f_n and f_n = ReLU(W_f h_n).

    In any precision, logits and attention are computed in at least float32: tiles are ranked by
    them, and many would be equal in half precision.

    Parameters
    ----------
    in_dim: width K of the tile features.
    num_logits: C; 1 for a binary task with one logit.
    query_dim: width Q of the queries.
    bag_classifier_init: ``lecun`` draws the weights with variance 1 / (C K), so that the bag logits
        have the mean square of the bag embedding; ``torch`` with a third of that, as released
        (D16).
    """

    def __init__(
        self,
        in_dim: int,
        num_logits: int,
        query_dim: int = 128,
        bag_classifier_init: Literal["lecun", "torch"] = "lecun",
    ):
        super().__init__()
        self.instance_classifier = nn.Linear(in_dim, num_logits)
        self.transform = nn.Sequential(nn.Linear(in_dim, in_dim), nn.ReLU())
        self.query = nn.Sequential(nn.Linear(in_dim, query_dim), nn.Tanh())
        self.value = nn.Linear(in_dim, in_dim)
        self.bag_classifier = nn.Conv1d(num_logits, num_logits, kernel_size=in_dim)
        if bag_classifier_init == "lecun":
            with torch.no_grad():  # torch draws uniformly with variance 1 / (3 C K)
                self.bag_classifier.weight.mul_(sqrt(3))

    def forward(self, h: Tensor, ptr: Tensor, shown: Tensor | None = None) -> ScaleOutput:
        """Score B bags; a bag without tiles gets the bias of the bag classifier.

        Parameters
        ----------
        h: (N, K) features of the tiles.
        ptr: (B + 1,) boundaries of the bags, on the CPU.
        shown: (N,) bool; tiles that are not shown have an instance logit, but no attention, and
            cannot be critical (D12). None: all are shown.
        """
        with torch.autocast(h.device.type, enabled=False):
            return self._forward(h.to(self.value.weight.dtype), ptr, shown)

    def _forward(self, h: Tensor, ptr: Tensor, shown: Tensor | None) -> ScaleOutput:
        z = by_rows(partial(precisely, self.instance_classifier), h)  # (N, C)
        if is_in_blocks(h):  # computing f twice saves its memory, which is that of h
            q, v = (
                by_rows(partial(self._of_transformed, to), h) for to in (self.query, self.value)
            )
        else:
            f = self.transform(h)  # (N, K)
            q = at_least_float32(self.query(f))  # (N, Q)
            v = at_least_float32(self.value(f))  # (N, K)

        hidden = None if shown is None else ~shown[:, None]
        critical = top_rows(z if hidden is None else z.masked_fill(hidden, -torch.inf), ptr)
        q_critical = torch.cat([q, q.new_zeros(1, q.shape[1])])[critical]  # (B, C, Q)
        sizes = bag_sizes(ptr)
        attention, embedding = [], []
        for bag, (q_bag, v_bag) in enumerate(zip(q.split(sizes), v.split(sizes), strict=True)):
            # not a matmul: its rounding error in the query's small gradients is ten times larger
            score = by_rows(partial(_similarity, q_critical[bag]), q_bag)  # (N_b, C)
            if hidden is None:
                a = score.softmax(0)
            else:  # the lowest number, not -inf, whose softmax is NaN if no tile is shown
                of_bag = hidden[ptr[bag] : ptr[bag + 1]]
                lowest = torch.finfo(score.dtype).min
                a = score.masked_fill(of_bag, lowest).softmax(0).masked_fill(of_bag, 0)
            attention.append(a)
            embedding.append(a.T @ v_bag)  # (C, K)
        # a linear layer, because TF32 may round a convolution although the precision is 32-true
        weight = at_least_float32(self.bag_classifier.weight).flatten(1)  # (C, C K)
        bias = self.bag_classifier.bias
        bias = None if bias is None else at_least_float32(bias)
        bag_logits = F.linear(torch.stack(embedding).flatten(1), weight, bias)  # (B, C)
        if shown is None:
            shown = torch.ones(len(z), dtype=torch.bool, device=z.device)
        return ScaleOutput(bag_logits, z, torch.cat(attention), bag_rows(ptr, z.device), shown)

    def _of_transformed(self, layer: nn.Module, h: Tensor) -> Tensor:
        return at_least_float32(layer(self.transform(h)))


def _similarity(critical: Tensor, q: Tensor) -> Tensor:
    """⟨q_n, q_m⟩ / √Q of the critical (C, Q) and all (n, Q) queries → (n, C)."""
    return (q[:, None] * critical).sum(2) / sqrt(q.shape[1])
