"""What every process knows of, put together."""

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather_lists(items: list[T]) -> list[T]:
    """The items of all processes, in the order of their ranks; every process gets the same list."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    parts: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]
