"""Silence notices of other libraries that users of dasmil can do nothing about."""

import logging
import re
import warnings

WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning, about torch
    r".*torch\.jit\.script.*",  # PyG, about torch
    r".*weight_norm.*is deprecated.*",  # lightly, about torch
    r".*when using `ckpt_path`, callbacks used to create the checkpoint.*",  # evaluation needs none
    r".*does not have many workers.*",
    r".*is smaller than the logging interval.*",  # history.csv has a row per epoch
)
NOTICES = re.compile(  # Lightning's; that a GPU is there and not used is a warning
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


def hush() -> None:
    """Silence these notices; every other warning is heard."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if _is_worth_reading not in logger.filters:
            logger.addFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return NOTICES.match(record.getMessage().strip()) is None
