"""The processes of a training, and Python objects of all of them."""

from typing import TypeVar

import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

T = TypeVar("T")


def processes(trainer: Trainer | None) -> tuple[int, int]:
    """Number of processes, and rank of this one; without a Trainer there is one."""
    return (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)


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
