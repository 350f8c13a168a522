"""A trained model from its checkpoint alone."""

from pathlib import Path
from typing import Any

from torch import Tensor

from dasmil.embedding.weights import load_checkpoint, refuse_other_keys
from dasmil.errors import InputError
from dasmil.modules.mil import DASMILModule


def load(checkpoint: str | Path) -> DASMILModule:
    """The DAS-MIL model of a checkpoint, in eval mode on the CPU.

    It knows its ``scales``, ``classes``, ``tile_px`` and, under ``hparams["bag_format"]``, the
    extractors whose features it reads.

    Raises
    ------
    InputError
        when the file is missing, holds no DAS-MIL model, or would have to be unpickled.
    """
    state, hparams = read_checkpoint(Path(checkpoint))
    model = DASMILModule(**hparams)
    refuse_other_keys(model, state, checkpoint)
    model.load_state_dict(state)
    return model.eval()


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and hyperparameters of a DAS-MIL checkpoint, without what Lightning's CLI adds."""
    content = load_checkpoint(path)
    hparams = dict(content.get("hyper_parameters", {}))
    if hparams.get("bag_format") is None:
        raise InputError(f"{path}: holds no DAS-MIL model; give a checkpoint of its fit")
    for added in ("_class_path", "_instantiator"):
        hparams.pop(added, None)
    return content["state_dict"], hparams
