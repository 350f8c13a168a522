"""How the reading processes of a DataLoader begin, hand over tensors and fail.

torch hands tensors over in shared memory (``/dev/shm``), of which Docker gives a container 64 MB.
Where there is too little, the process that reads prints an error and lives on, and the one that
waits for its tensors waits for ever.
"""

import os
import shutil
import sys
from functools import cache
from multiprocessing.queues import Queue
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from dasmil.endings import leave_signals_to_parent

SHARED_MEMORY = Path("/dev/shm")
SMALL_BYTES = 2**30  # some chunks of pixels or views for each of several processes
LOST = "DataLoader worker"  # what torch says begins so, if a reading process has ended


def reader_options(num_workers: int) -> dict[str, Any]:
    """Arguments of a DataLoader that make it read in processes, and fail rather than wait.

    Tensors go through pipes instead of shared memory where there is little of it; the first call
    says so.
    """
    by_value = num_workers > 0 and _shared_bytes() < SMALL_BYTES
    if by_value:
        _say_small()
    begin = _begin_by_value if by_value else _begin
    return {"num_workers": num_workers, "worker_init_fn": begin}


def say_lost(error: RuntimeError) -> str:
    """The sentence for torch's error of a reading process that has ended; "" for other errors."""
    if LOST not in str(error):
        return ""
    return (
        f"a reading process has ended ({str(error).splitlines()[0]}); above may stand why, else "
        "there was too little memory: take fewer num_workers"
    )


def _shared_bytes() -> int:
    """Free shared memory; plenty where a system has it elsewhere."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else sys.maxsize


@cache
@rank_zero_only
def _say_small() -> None:
    print(
        f"{SHARED_MEMORY}: {_shared_bytes() / 2**20:.0f} MB of shared memory are free, so reading "
        "processes use pipes, which are slower; Docker gives more by --shm-size 2g",
        flush=True,
    )


def _begin(number: int) -> None:
    leave_signals_to_parent()
    # multiprocessing prints what cannot be handed over, and goes on without it
    Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]


def _begin_by_value(number: int) -> None:
    _begin(number)
    ForkingPickler.register(Tensor, _by_value)  # in the place of torch's, in this process alone


def _end(error: Exception, item: object) -> None:
    print(
        f"error: a reading process cannot hand over what it has read ({error}); it may be that "
        f"{SHARED_MEMORY} is full: make it larger (Docker: --shm-size 2g), or take fewer "
        "num_workers",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _by_value(tensor: Tensor) -> tuple[Any, ...]:
    """As bytes; its layout in memory is kept."""
    tensor = tensor.detach()
    size, stride = tuple(tensor.shape), tensor.stride()
    flat = tensor.as_strided((tensor.numel(),), (1,)) if _is_dense(tensor) else None
    if flat is None:
        tensor = tensor.contiguous()
        flat, stride = tensor.flatten(), tensor.stride()
    return _rebuilt, (flat.view(torch.uint8).numpy(), tensor.dtype, size, stride)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements lie side by side in memory, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return tensor.numel() > 0


def _rebuilt(
    data: Any, dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    return torch.from_numpy(data).view(dtype).as_strided(size, stride)
