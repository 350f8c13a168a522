"""Operations on tensors whose rows belong to bags, for models and losses alike."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

MANY_ROWS = 2**17  # more rows are processed in blocks if no gradient is needed
BLOCK_ROWS = 2**15


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; other types are unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def precisely(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` in at least float32, also under autocast and with half-precision weights."""
    weights = {name: at_least_float32(weight) for name, weight in layer.named_parameters()}
    with torch.autocast(x.device.type, enabled=False):
        return functional_call(layer, weights, at_least_float32(x))


def is_in_blocks(x: Tensor) -> bool:
    """Whether to process rows in blocks: many rows, and no gradient is needed."""
    return len(x) > MANY_ROWS and not torch.is_grad_enabled()


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` of a function that acts on each row independently, (N, K) → (N, …).

    If :func:`is_in_blocks` holds, it runs in blocks, to save memory of intermediate results.
    """
    if not is_in_blocks(x):
        return function(x)
    result: Tensor | None = None
    for start in range(0, len(x), BLOCK_ROWS):
        block = function(x[start : start + BLOCK_ROWS])
        if result is None:
            result = block.new_empty(len(x), *block.shape[1:])
        result[start : start + BLOCK_ROWS] = block
    assert result is not None
    return result


def bag_rows(ptr: Tensor) -> Tensor:
    """(N,) number of each row's bag, from the (B + 1,) boundaries of the bags."""
    return torch.repeat_interleave(torch.arange(len(ptr) - 1, device=ptr.device), ptr.diff())


def first_argmax(z: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Row of the first largest value per group and column; NaN counts as the largest.

    Parameters
    ----------
    z: (N, C).
    group: (N,) int64, number of each row's group.
    num_groups: G.

    Returns
    -------
    (G, C) int64; N for a group without rows.
    """
    z = z.detach()
    index = group[:, None].expand_as(z)
    lowest = z.new_full((num_groups, z.shape[1]), -torch.inf)
    is_top = (z == lowest.scatter_reduce(0, index, z, "amax")[group]) | z.isnan()
    rows = torch.arange(len(z), device=z.device)[:, None]
    candidates = torch.where(is_top, rows, len(z))
    none = candidates.new_full((num_groups, z.shape[1]), len(z))
    return none.scatter_reduce(0, index, candidates, "amin")


def first_max(z: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Largest value per group and column; of equal values only the first gets the gradient.

    torch's ``segment_reduce`` and ``scatter_reduce`` divide the gradient among ties by different
    rules, and the former only if the gradient is positive.

    Parameters
    ----------
    z, group, num_groups: as for :func:`first_argmax`.

    Returns
    -------
    (G, C); zero for a group without rows.
    """
    padded = torch.cat([z, z.new_zeros(1, z.shape[1])])
    return padded.gather(0, first_argmax(z, group, num_groups))
