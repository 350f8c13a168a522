"""How the reading processes of a DataLoader start, hand over tensors and fail.

torch hands tensors over in shared memory (``/dev/shm``), of which Docker gives a container 64 MB.
If there is too little, torch's reading process prints an error and does not end, and the process
that waits for its tensors waits for ever.
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
LOST = "DataLoader worker"  # start of torch's message if a reading process has ended


def reader_options(num_workers: int) -> dict[str, Any]:
    """Arguments of a DataLoader whose reading processes end with an error rather than hang.

    If there is little shared memory, tensors go through pipes; the first call prints that.
    """
    by_value = num_workers > 0 and _shared_bytes() < SMALL_BYTES
    if by_value:
        _print_small_memory()
    start = _start_by_value if by_value else _start
    return {"num_workers": num_workers, "worker_init_fn": start}


def describe_lost_reader(error: RuntimeError) -> str:
    """A sentence for torch's error about a reading process that has ended; "" for other errors."""
    if LOST not in str(error):
        return ""
    return (
        f"a reading process has ended ({str(error).splitlines()[0]}); the lines above may say "
        "why, else there was too little memory: use fewer num_workers"
    )


def _shared_bytes() -> int:
    """Free shared memory; plenty if the system has no /dev/shm."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else sys.maxsize


@cache
@rank_zero_only
def _print_small_memory() -> None:
    print(
        f"{SHARED_MEMORY}: {_shared_bytes() / 2**20:.0f} MB of shared memory are free, so reading "
        "processes use pipes, which are slower; Docker gives more by --shm-size 2g",
        flush=True,
    )


def _start(number: int) -> None:
    leave_signals_to_parent()
    # multiprocessing only prints what cannot be handed over, and continues without it
    Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]


def _start_by_value(number: int) -> None:
    _start(number)
    ForkingPickler.register(Tensor, _reduce_by_value)  # replaces torch's in this process


def _end(error: Exception, item: object) -> None:
    print(
        f"error: a reading process cannot hand over what it has read ({error}); "
        f"{SHARED_MEMORY} may be full: make it larger (Docker: --shm-size 2g), or use fewer "
        "num_workers",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _reduce_by_value(tensor: Tensor) -> tuple[Any, ...]:
    """Pickle a tensor as bytes; its memory layout is kept."""
    dense = tensor.detach().clone()
    flat = dense.as_strided((dense.numel(),), (1,))
    values = flat.view(torch.uint8).numpy()
    return _rebuild, (values, dense.dtype, tuple(dense.shape), dense.stride())


def _rebuild(
    data: Any, dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    return torch.from_numpy(data).view(dtype).as_strided(size, stride)
