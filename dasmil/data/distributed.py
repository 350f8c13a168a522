"""The processes of a training, and Python objects of all of them."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

from dasmil.errors import InputError

T = TypeVar("T")

LONGEST_WAIT = timedelta(hours=6)


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


def compute_once(compute: Callable[[], T]) -> T:
    """Call a function in the first process only; all processes return what it returns.

    Raises
    ------
    InputError
        in all processes, if the function raises it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return compute()
    # the default group gives up after half an hour, and a large cohort may take longer; gloo's
    # processes meet on the CPU, where the result is
    group: Any = dist.new_group(timeout=LONGEST_WAIT, backend="gloo")
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            result = [compute()]
        except InputError as error:
            result = [error]
    dist.broadcast_object_list(result, src=0, group=group)
    dist.destroy_process_group(group)
    sent: T | InputError = result[0]
    if isinstance(sent, InputError):
        raise sent
    return sent


def is_true_anywhere(flag: Tensor) -> bool:
    """Whether a bool scalar is True in any process, the same answer in every process."""
    if dist.is_available() and dist.is_initialized():
        flag = flag.int()
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
