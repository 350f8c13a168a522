"""Silence third-party warnings that dasmil's users can do nothing about."""

import logging
import os
import re
import warnings
from pathlib import Path

from dasmil.errors import escape_controls

WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning, about torch
    r".*torch\.jit\.script.*",  # PyG, about torch
    r".*weight_norm.*is deprecated.*",  # lightly, about torch
    r".*transform `ToTensor\(\)` is deprecated.*",  # lightly, about torchvision
    r".*To copy construct from a tensor.*",  # torchmetrics, about torch
    r".*when using `ckpt_path`, callbacks used to create the checkpoint.*",  # evaluation needs none
    r".*does not have many workers.*",
    r".*is smaller than the logging interval.*",  # history.csv has a row per epoch
)
NOTICES = re.compile(  # of Lightning; an unused GPU is a warning and not among them
    r"(GPU|TPU|HPU) available|.*Tip: |(\[rank: \d+\] )?Seed set to|Detected KeyboardInterrupt|"
    r"Restoring states from|Loaded model weights|"
    r"`Trainer.fit` stopped|LOCAL_RANK: |Initializing distributed|-{20,}\s+distributed_backend",
    re.DOTALL,
)
LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.fabric.utilities.distributed",
    "lightning.pytorch.accelerators.cuda",
)
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # of torchrun, Lightning and SLURM


def hush() -> None:
    """Silence these notices, and print every other warning as one sentence.

    Call it again after importing Lightning, which sets its own format.
    """
    warnings.formatwarning = _format_warning
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if _is_worth_reading not in logger.filters:
            logger.addFilter(_is_worth_reading)


def is_first_process() -> bool:
    """Whether this is the first of several processes of one run, or the only one."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Format a warning for users; one for programmers names its file and line.

    Warnings of dasmil are about the whole study, so only the first process prints them.
    """
    if Path(filename).is_relative_to(Path(__file__).parent) and not is_first_process():
        return ""
    where = "" if issubclass(category, UserWarning) else f"{filename}:{lineno}: "
    return escape_controls(f"warning: {where}{message}\n")


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return NOTICES.match(record.getMessage().strip()) is None
