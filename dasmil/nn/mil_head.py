"""The attention MIL head: DSMIL's dual stream.

Paper: Li et al., CVPR 2021; Bontempo et al. 2023, section 3, use one head per scale. D numbers:
.github/docs/paper.md.
"""

from functools import partial
from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from dasmil.bags.output import ScaleOutput
from dasmil.tensors import (
    at_least_float32,
    bag_rows,
    by_rows,
    first_argmax,
    is_in_blocks,
    precisely,
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
        ptr: (B + 1,) boundaries of the bags.
        shown: (N,) bool; tiles that are not shown have an instance logit, but no attention, and
            cannot be critical (D12). None: all are shown.
        """
        with torch.autocast(h.device.type, enabled=False):
            h = h.to(self.value.weight.dtype)
            return self._forward(h, ptr) if shown is None else self._forward_shown(h, ptr, shown)

    def _forward(self, h: Tensor, ptr: Tensor) -> ScaleOutput:
        sizes = ptr.diff().tolist()
        bag_index = bag_rows(ptr)

        z = by_rows(partial(precisely, self.instance_classifier), h)  # (N, C)
        if is_in_blocks(h):  # computing f twice saves its memory, which is that of h
            q, v = (
                by_rows(partial(self._of_transformed, to), h) for to in (self.query, self.value)
            )
        else:
            f = self.transform(h)  # (N, K)
            q = at_least_float32(self.query(f))  # (N, Q)
            v = at_least_float32(self.value(f))  # (N, K)

        critical = first_argmax(z, bag_index, len(sizes))  # (B, C)
        q_critical = torch.cat([q, q.new_zeros(1, q.shape[1])])[critical]  # (B, C, Q)
        attention, embedding = [], []
        for q_bag, v_bag, q_top in zip(q.split(sizes), v.split(sizes), q_critical, strict=True):
            # not a matmul: its rounding error in the query's small gradients is ten times larger
            score = by_rows(partial(_similarity, q_top), q_bag)  # (N_b, C)
            a = score.softmax(0)
            attention.append(a)
            embedding.append(a.T @ v_bag)  # (C, K)
        bag_logits = precisely(self.bag_classifier, torch.stack(embedding)).squeeze(2)  # (B, C)
        shown = torch.ones_like(bag_index, dtype=torch.bool)
        return ScaleOutput(bag_logits, z, torch.cat(attention), bag_index, shown)

    def _of_transformed(self, layer: nn.Module, h: Tensor) -> Tensor:
        return at_least_float32(layer(self.transform(h)))

    def _forward_shown(self, h: Tensor, ptr: Tensor, shown: Tensor) -> ScaleOutput:
        before = torch.cat([shown.new_zeros(1, dtype=torch.int64), shown.cumsum(0)])
        part = self._forward(h[shown], before[ptr])
        assert part.attention is not None
        logits = by_rows(partial(precisely, self.instance_classifier), h)  # (N, C)
        attention = torch.zeros_like(logits)
        attention[shown] = part.attention
        return ScaleOutput(part.bag_logits, logits, attention, bag_rows(ptr), shown)


def _similarity(critical: Tensor, q: Tensor) -> Tensor:
    """⟨q_n, q_m⟩ / √Q of the critical (C, Q) and all (n, Q) queries → (n, C)."""
    return (q[:, None] * critical).sum(2) / sqrt(q.shape[1])
