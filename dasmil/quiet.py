"""Keeps notices of other libraries, which ask nothing of a user of ours, off the screen."""

import logging
import warnings

NOTICES = (
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning, about torch
    r".*torch\.jit\.script.*",  # PyG, about torch
    r".*weight_norm.*is deprecated.*",  # lightly, about torch
    r".*when using `ckpt_path`, callbacks used to create the checkpoint.*",  # evaluation needs none
    r".*does not have many workers.*",
)


def hush() -> None:
    """Only these notices; every other warning is heard."""
    for message in NOTICES:
        warnings.filterwarnings("ignore", message)
    rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if _no_advertisement not in rank_zero.filters:
        rank_zero.addFilter(_no_advertisement)


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in record.getMessage()
