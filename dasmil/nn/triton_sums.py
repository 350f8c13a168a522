"""The three sums of :mod:`dasmil.nn.neighbour_sums` as Triton kernels, compiled when first used."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dasmil.bags.neighbours import Neighbours

MAX_BLOCK = 512  # columns that a program holds at once


class TritonSums:
    """One program per node; each row is read once for all heads, and sums are in float32."""

    @staticmethod
    def of_neighbours(x: Tensor, alpha: Tensor, lists: Neighbours) -> Tensor:
        result = x.new_empty(len(lists), alpha.shape[1], x.shape[1])
        _run(sum_neighbours, result, x, alpha, lists.ptr, lists.index, result)
        return result

    @staticmethod
    def of_features(grad: Tensor, x: Tensor, lists: Neighbours) -> Tensor:
        result = grad.new_empty(len(lists.index), grad.shape[1], dtype=torch.float32)
        _run(dot_features, grad, grad, x, lists.ptr, lists.index, result)
        return result

    @staticmethod
    def of_seers(grad: Tensor, alpha: Tensor, lists: Neighbours) -> Tensor:
        result = grad.new_empty(len(lists), grad.shape[2])
        _run(sum_seers, grad, grad, alpha, lists.ptr, lists.index, lists.reverse, result)
        return result


def _run(kernel: Any, of_heads: Tensor, *tensors: Tensor) -> None:
    """Run a kernel of N programs for ``of_heads`` (N, H, K); the last of the tensors is written."""
    num_nodes, heads, width = of_heads.shape
    if num_nodes:
        kernel[(num_nodes,)](
            *(tensor.contiguous() for tensor in tensors),
            WIDTH=width,
            HEADS=heads,
            ROWS=triton.next_power_of_2(heads),
            BLOCK=min(triton.next_power_of_2(width), MAX_BLOCK),
        )


@triton.jit
def sum_neighbours(  # type: ignore[no-untyped-def]
    x,
    alpha,
    ptr,
    index,
    result,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    node = tl.program_id(0).to(tl.int64)
    first = tl.load(ptr + node).to(tl.int64)
    last = tl.load(ptr + node + 1).to(tl.int64)
    heads = tl.arange(0, ROWS)
    for start in tl.static_range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for entry in range(first, last):
            seen = tl.load(index + entry).to(tl.int64)
            row = tl.load(x + seen * WIDTH + columns, columns < WIDTH, 0).to(tl.float32)
            place = entry * HEADS + heads
            weight = tl.load(alpha + place, heads < HEADS, 0).to(tl.float32)
            total += weight[:, None] * row[None, :]
        place = (node * HEADS + heads)[:, None] * WIDTH + columns[None, :]
        inside = (heads < HEADS)[:, None] & (columns < WIDTH)[None, :]
        tl.store(result + place, total.to(result.dtype.element_ty), inside)


@triton.jit
def dot_features(  # type: ignore[no-untyped-def]
    grad,
    x,
    ptr,
    index,
    result,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    node = tl.program_id(0).to(tl.int64)
    first = tl.load(ptr + node).to(tl.int64)
    last = tl.load(ptr + node + 1).to(tl.int64)
    heads = tl.arange(0, ROWS)
    for entry in range(first, last):
        seen = tl.load(index + entry).to(tl.int64)
        total = tl.zeros((ROWS,), tl.float32)
        for start in tl.static_range(0, WIDTH, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            row = tl.load(x + seen * WIDTH + columns, columns < WIDTH, 0).to(tl.float32)
            place = (node * HEADS + heads)[:, None] * WIDTH + columns[None, :]
            inside = (heads < HEADS)[:, None] & (columns < WIDTH)[None, :]
            own = tl.load(grad + place, inside, 0).to(tl.float32)
            total += tl.sum(own * row[None, :], axis=1)
        tl.store(result + entry * HEADS + heads, total, heads < HEADS)


@triton.jit
def sum_seers(  # type: ignore[no-untyped-def]
    grad,
    alpha,
    ptr,
    index,
    reverse,
    result,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    node = tl.program_id(0).to(tl.int64)
    first = tl.load(ptr + node).to(tl.int64)
    last = tl.load(ptr + node + 1).to(tl.int64)
    heads = tl.arange(0, ROWS)
    for start in tl.static_range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for entry in range(first, last):
            seer = tl.load(index + entry).to(tl.int64)
            mirrored = tl.load(reverse + entry).to(tl.int64)
            weight = tl.load(alpha + mirrored * HEADS + heads, heads < HEADS, 0).to(tl.float32)
            place = (seer * HEADS + heads)[:, None] * WIDTH + columns[None, :]
            inside = (heads < HEADS)[:, None] & (columns < WIDTH)[None, :]
            theirs = tl.load(grad + place, inside, 0).to(tl.float32)
            total += tl.sum(weight[:, None] * theirs, axis=0)
        tl.store(
            result + node * WIDTH + columns, total.to(result.dtype.element_ty), columns < WIDTH
        )
