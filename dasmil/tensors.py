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


def autocast_type(x: Tensor) -> Tensor:
    """Convert to the type in which autocast multiplies matrices, if it is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


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


def send(x: Tensor, device: torch.device) -> Tensor:
    """Copy what was made on the CPU to the device; the host does not wait for a GPU.

    torch keeps pinned memory until the copy is done, and knows no such thing for other devices.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def bag_sizes(ptr: Tensor) -> list[int]:
    """Number of rows per bag, from the (B + 1,) boundaries of the bags on the CPU."""
    sizes: list[int] = ptr.diff().tolist()
    return sizes


def bag_rows(ptr: Tensor, device: torch.device) -> Tensor:
    """(N,) int64 number of each row's bag, made on the device."""
    sizes = enumerate(bag_sizes(ptr))
    return torch.cat([torch.full((size,), bag, device=device) for bag, size in sizes])


def bag_sums(values: Tensor, ptr: Tensor) -> Tensor:
    """(N, …) → (B, …) sums over the rows of each bag; many threads share one bag."""
    return torch.stack([part.sum(0) for part in values.split(bag_sizes(ptr))])


def top_rows(z: Tensor, ptr: Tensor) -> Tensor:
    """Row of the first largest value per bag and column; NaN counts as the largest.

    Parameters
    ----------
    z: (N, C).
    ptr: (B + 1,) boundaries of the bags, on the CPU.

    Returns
    -------
    (B, C) int64; N for a bag without rows.
    """
    parts = zip(z.detach().split(bag_sizes(ptr)), ptr.tolist())
    none = torch.full((z.shape[1],), len(z), device=z.device)
    return torch.stack([part.argmax(0) + start if len(part) else none for part, start in parts])


def values_at(z: Tensor, rows: Tensor) -> Tensor:
    """The values (G, C) of z (N, C) in the rows (G, C); zero for the row N."""
    padded = torch.cat([z, z.new_zeros(1, z.shape[1])])
    return padded[rows, torch.arange(z.shape[1], device=z.device)]


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
    return values_at(z, first_argmax(z, group, num_groups))
