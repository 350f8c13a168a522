"""The weighted sum over neighbours of a graph attention layer, without one feature row per edge.

Paper: Veličković et al. 2018, Eq. 3 and 6, as ``torch_geometric.nn.GATConv`` computes them. GATConv
writes the projected features of every edge's source to memory, (E, heads, channels); here only the
coefficients have one row per edge, and ``embedding_bag`` gathers, weighs and sums. The neighbour
relation is symmetric, so the backward pass is a gather too: nothing is scattered, and gradients are
the same in every run.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from dasmil.bags.neighbours import Neighbours

NEGATIVE_SLOPE = 0.2


def neighbour_attention(
    projected: Tensor,
    source_score: Tensor,
    target_score: Tensor,
    neighbours: Neighbours,
    dropout: float = 0.0,
) -> Tensor:
    """h_i = mean over heads of Σ_j α_ij W x_j, over the nodes j that i sees.

    Parameters
    ----------
    projected: (N, H, C), W x of each of H heads.
    source_score, target_score: (N, H), a_src·W x and a_dst·W x.
    neighbours: which nodes each node sees, E entries.
    dropout: probability of dropping a coefficient α_ij.

    Returns
    -------
    (N, C)
    """
    precise = torch.promote_types(source_score.dtype, torch.float32)
    scores = (source_score.to(precise), target_score.to(precise))
    alpha = Coefficients.apply(*scores, neighbours)  # (E, H)
    alpha = F.dropout(alpha, dropout) / projected.shape[1]
    return weighted_sum(projected, alpha.to(projected.dtype), neighbours)


class Coefficients(Function):
    """α_ij = softmax_j(LeakyReLU_0.2(a_src·W x_j + a_dst·W x_i)), (E, H)."""

    @staticmethod
    def forward(
        ctx: Any, source_score: Tensor, target_score: Tensor, neighbours: Neighbours
    ) -> Tensor:
        seers = neighbours.seers()
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


def weighted_sum(projected: Tensor, alpha: Tensor, neighbours: Neighbours) -> Tensor:
    """Σ over heads and neighbours j of α_ij W x_j; (N, H, C), (E, H) → (N, C)."""
    heads = projected.shape[1]
    rows = neighbours.index[:, None] * heads + _numbers(heads, like=neighbours.index)  # (E, H)
    summed = F.embedding_bag(
        rows.view(-1),
        projected.detach().flatten(0, 1),  # GatheredGradient has its gradient
        neighbours.ptr * heads,
        mode="sum",
        per_sample_weights=alpha.reshape(-1),
        include_last_offset=True,
    )
    return GatheredGradient.apply(summed, projected, alpha.detach(), neighbours)


class GatheredGradient(Function):
    """Identity of ``summed``; the backward pass computes the gradient of W x.

    The gradient of W x_j in head h is Σ_i α_ij · grad_i over the nodes i that see j, which are the
    nodes that j sees.
    """

    @staticmethod
    def forward(
        ctx: Any, summed: Tensor, projected: Tensor, alpha: Tensor, neighbours: Neighbours
    ) -> Tensor:
        ctx.save_for_backward(alpha)
        ctx.neighbours = neighbours
        return summed.view_as(summed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (alpha,) = ctx.saved_tensors
        neighbours: Neighbours = ctx.neighbours
        heads = alpha.shape[1]
        # one sum per node and head: each node's entries are repeated per head, head after head
        node = neighbours.seers().repeat_interleave(heads)  # (E H,) of each place
        count = neighbours.ptr.diff().index_select(0, node)
        place = _numbers(len(node), like=node)
        place -= neighbours.ptr.index_select(0, node) * heads  # among the node's own places
        head = place.div(count, rounding_mode="floor")
        entry = neighbours.ptr.index_select(0, node) + place - head * count
        weight = neighbours.reverse.index_select(0, entry) * heads + head
        counts = neighbours.ptr.diff()[:, None]
        starts = neighbours.ptr[:-1, None] * heads + counts * _numbers(heads, like=counts)
        starts = torch.cat([starts.view(-1), neighbours.ptr[-1:] * heads])
        gradient = F.embedding_bag(
            neighbours.index.index_select(0, entry),
            grad.contiguous(),
            starts,
            mode="sum",
            per_sample_weights=alpha.view(-1).index_select(0, weight),
            include_last_offset=True,
        )
        return grad, gradient.view(-1, heads, grad.shape[1]), None, None


def _numbers(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=like.dtype, device=like.device)
