"""A trained model from its checkpoint alone."""

from pathlib import Path

from dasmil.embedding.extractor import load_checkpoint
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
    path = Path(checkpoint)
    content = load_checkpoint(path)
    hparams = dict(content.get("hyper_parameters", {}))
    if hparams.get("bag_format") is None:
        raise InputError(f"{path}: holds no DAS-MIL model; give a checkpoint of its fit")
    hparams.pop("_class_path", None)
    hparams.pop("_instantiator", None)
    model = DASMILModule(**hparams)
    model.load_state_dict(content["state_dict"])
    return model.eval()
