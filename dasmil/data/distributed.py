"""Gather Python objects from all processes."""

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def gather_lists(items: list[T]) -> list[T]:
    """The items of all processes in the order of their ranks, the same list in every process."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    parts: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def is_true_anywhere(flag: Tensor) -> bool:
    """Whether a bool scalar is True in any process, the same answer in every process."""
    if dist.is_available() and dist.is_initialized():
        flag = flag.int()
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
