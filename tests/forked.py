"""Runs a command of dasmil in two processes, as torchrun starts them but with one import of torch.

``python forked.py COMMAND...``, with the variables MASTER_ADDR and MASTER_PORT. It forks after the
imports, which take longer than what the tests do. It exits with the first code that is not 0.
"""

import os
import sys

import torch
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from torch.utils import tensorboard  # noqa: F401  # here, else each process would import it

import dasmil.embedding.embed
import dasmil.lightning_cli
import dasmil.methods  # noqa: F401
from dasmil.cli import main

torch.set_num_threads(1)


def start(rank: int) -> int:
    """Fork a process that runs the command; returns its id."""
    pid = os.fork()
    if pid == 0:
        of_all = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ.update(of_all, RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0")
        rank_zero_only.rank = rank  # Lightning has set it at its import, which was too early
        code = main(sys.argv[1:])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return pid


if __name__ == "__main__":
    Figure.draw = lambda self, renderer: None  # as in conftest.py
    ended = [os.waitpid(pid, 0)[1] for pid in (start(0), start(1))]
    sys.exit(next(filter(None, map(os.waitstatus_to_exitcode, ended)), 0))
