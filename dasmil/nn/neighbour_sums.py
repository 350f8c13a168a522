"""The sum over neighbours of a graph attention layer, without one feature row per edge.

GATConv writes the projected features of every edge's source to memory, (E, heads, channels). Here
only the coefficients have one row per edge. Either the projected rows are summed, as the CPU does
it, or the rows before the projection, Σ_j α_ij W x_j = W Σ_j α_ij x_j, as CUDA GPUs do it: that is
one matrix product more, and each row is read once for all heads. The neighbour relation is
symmetric, so the backward passes are such sums too: nothing is scattered, and gradients are the
same in every run.
"""

import warnings
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from dasmil.bags.neighbours import Neighbours


class ProjectedSum(Function):
    """Σ over heads and neighbours j of α_ij W x_j; (M, H, C), (E, H) → (N, C)."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, alpha: Tensor, lists: Neighbours) -> Tensor:
        ctx.save_for_backward(projected, alpha)
        ctx.lists = lists
        return _sum_of_heads(projected, alpha, lists)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        projected, alpha = ctx.saved_tensors
        lists, grad = ctx.lists, grad.contiguous()
        heads = alpha.shape[1]
        index, ptr = _of_heads(lists, heads)
        seers = lists.seers.repeat_interleave(heads)
        of_alpha = _dots(grad, projected.flatten(0, 1), index, ptr, seers)
        mirrored = alpha.index_select(0, lists.reverse)
        of_projected = torch.empty_like(projected)
        for of_head, weights in zip(of_projected.unbind(1), mirrored.unbind(1), strict=True):
            of_head.copy_(_gather(grad, weights, lists.index, lists.ptr))
        return of_projected, of_alpha.view_as(alpha).to(alpha.dtype), None


class AttendedSum(Function):
    """Σ_j α_ij x_j per head; (M, K), (E, H) → (N, H, K)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, lists: Neighbours) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.lists = lists
        return way_for(x).of_neighbours(x, alpha, lists)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, alpha = ctx.saved_tensors
        way, grad = way_for(x), grad.contiguous()
        of_x = way.of_seers(grad, alpha, ctx.lists) if ctx.needs_input_grad[0] else None
        return of_x, way.of_features(grad, x, ctx.lists).to(alpha.dtype), None


class Way(Protocol):
    """The sums of :class:`AttendedSum`, for lists of N nodes with E entries and H heads."""

    @staticmethod
    def of_neighbours(x: Tensor, alpha: Tensor, lists: Neighbours) -> Tensor:
        """Σ_j α_ij x_j, (N, H, K)."""

    @staticmethod
    def of_features(grad: Tensor, x: Tensor, lists: Neighbours) -> Tensor:
        """⟨grad_i, x_j⟩ of each entry "i sees j", (E, H): the gradient of α."""

    @staticmethod
    def of_seers(grad: Tensor, alpha: Tensor, lists: Neighbours) -> Tensor:
        """Σ_i Σ_h α_ij grad_i over the nodes i that see j, (N, K): the gradient of x."""


class EmbeddingBags:
    """By torch's ``embedding_bag``, head after head."""

    @staticmethod
    def of_neighbours(x: Tensor, alpha: Tensor, lists: Neighbours) -> Tensor:
        entries = lists.index, lists.ptr
        return torch.stack([_gather(x, of_head, *entries) for of_head in alpha.unbind(1)], 1)

    @staticmethod
    def of_features(grad: Tensor, x: Tensor, lists: Neighbours) -> Tensor:
        entries = lists.index, lists.ptr, lists.seers
        return torch.stack([_dots(of_head, x, *entries) for of_head in grad.unbind(1)], 1)

    @staticmethod
    def of_seers(grad: Tensor, alpha: Tensor, lists: Neighbours) -> Tensor:
        return _sum_of_heads(grad, alpha.index_select(0, lists.reverse), lists)


def way_for(x: Tensor) -> type[Way]:
    """Triton's kernels for a CUDA GPU that runs them, else torch's."""
    if type(x) is not Tensor or not x.is_cuda or x.dtype == torch.float64:
        return EmbeddingBags
    return _triton_or_torch(x.get_device())


@cache
def _triton_or_torch(device: int) -> type[Way]:
    """Try the kernels, once per GPU."""
    try:
        from dasmil.nn.triton_sums import TritonSums

        nodes = torch.arange(2, dtype=torch.int32, device=f"cuda:{device}")
        lists = Neighbours(nodes, nodes[:1], nodes[:1])  # one node, which sees itself
        one = torch.ones(1, 1, device=nodes.device)
        TritonSums.of_neighbours(one, one, lists)
        TritonSums.of_features(one[None], one, lists)
        TritonSums.of_seers(one[None], one, lists)
    except Exception as error:  # no compiler, an old GPU or driver: there are many reasons
        warnings.warn(
            f"Triton's kernels cannot be used ({type(error).__name__}: {error}); torch's own give "
            "the same and are slower",
            stacklevel=2,
        )
        return EmbeddingBags
    return TritonSums


def _sum_of_heads(rows: Tensor, alpha: Tensor, lists: Neighbours) -> Tensor:
    """Σ over heads and neighbours of α_ij times a row of its head; (M, H, K), (E, H) → (N, K)."""
    index, ptr = _of_heads(lists, alpha.shape[1])
    return _gather(rows.flatten(0, 1), alpha.reshape(-1), index, ptr)


def _of_heads(lists: Neighbours, heads: int) -> tuple[Tensor, Tensor]:
    """Index and ptr with H entries in place of one, into the rows of a flat (M, H) table."""
    numbers = torch.arange(heads, dtype=lists.index.dtype, device=lists.index.device)
    return (lists.index[:, None] * heads + numbers).view(-1), lists.ptr * heads


def _gather(x: Tensor, weights: Tensor, index: Tensor, ptr: Tensor) -> Tensor:
    """(M, K), (E,) → (N, K) weighted sums of rows, from ptr[i] to ptr[i + 1] of the entries."""
    return F.embedding_bag(
        *(index, x, ptr),
        mode="sum",
        per_sample_weights=weights.contiguous(),
        include_last_offset=True,
    )


def _dots(grad: Tensor, x: Tensor, index: Tensor, ptr: Tensor, seers: Tensor) -> Tensor:
    """⟨grad_i, x_j⟩ of each entry "i sees j"; (N, K), (M, K) → (E,)."""
    if x.is_cuda and x.dtype == torch.bfloat16:  # no such kernel until pytorch #185889
        grad, x = grad.float(), x.float()
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(grad, x, index, ptr, seers, 0)
