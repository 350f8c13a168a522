"""The coefficients of a graph attention layer.

Paper: Veličković et al. 2018, Eq. 3, as ``torch_geometric.nn.GATConv`` computes them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from dasmil.bags.neighbours import Neighbours

NEGATIVE_SLOPE = 0.2


def coefficients(
    source_score: Tensor, target_score: Tensor, neighbours: Neighbours, dropout: float = 0.0
) -> Tensor:
    """α_ij of each entry "i sees j" and head, (E, H), in at least float32.

    Parameters
    ----------
    source_score: (M, H), a_src·W x.
    target_score: (N, H), a_dst·W x.
    neighbours: which of M nodes each of N nodes sees, E entries.
    dropout: probability of dropping a coefficient.
    """
    precise = torch.promote_types(source_score.dtype, torch.float32)
    scores = (source_score.to(precise), target_score.to(precise))
    return F.dropout(Coefficients.apply(*scores, neighbours), dropout)


class Coefficients(Function):
    """α_ij = softmax_j(LeakyReLU_0.2(a_src·W x_j + a_dst·W x_i)), (E, H)."""

    @staticmethod
    def forward(
        ctx: Any, source_score: Tensor, target_score: Tensor, neighbours: Neighbours
    ) -> Tensor:
        seers = neighbours.seers
        score = source_score.index_select(0, neighbours.index)  # (E, H)
        score += target_score.index_select(0, seers)
        rises = score > 0
        score = F.leaky_relu_(score, NEGATIVE_SLOPE)
        score -= _of_nodes(score, neighbours, "max").index_select(0, seers)
        alpha = score.exp_()
        alpha /= _of_nodes(alpha, neighbours, "sum").index_select(0, seers)
        ctx.save_for_backward(alpha, rises, seers)
        ctx.neighbours = neighbours
        return alpha

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        alpha, rises, seers = ctx.saved_tensors
        neighbours: Neighbours = ctx.neighbours
        weighted = alpha * grad
        grad = weighted - alpha * _of_nodes(weighted, neighbours, "sum").index_select(0, seers)
        grad = torch.where(rises, grad, NEGATIVE_SLOPE * grad)  # of the scores, (E, H)
        mirrored = grad.index_select(0, neighbours.reverse)
        return _of_nodes(mirrored, neighbours, "sum"), _of_nodes(grad, neighbours, "sum"), None


def _of_nodes(values: Tensor, neighbours: Neighbours, reduce: str) -> Tensor:
    """Reduce (E, H) over the entries of each node → (N, H)."""
    return torch.segment_reduce(values, reduce, offsets=neighbours.ptr, axis=0)
