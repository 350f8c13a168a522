"""Load a trained model from its checkpoint."""

from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from dasmil.embedding.restricted import load_checkpoint
from dasmil.errors import InputError
from dasmil.modules.card import ModelCard, method_name, read_card
from dasmil.modules.mil import MILModule
from dasmil.modules.options import typed_options


def load(checkpoint: str | Path, method: type[MILModule] | None = None) -> MILModule:
    """The model of a checkpoint, in eval mode on the CPU.

    Its attributes are ``scales``, ``classes``, ``tile_px`` and ``card``, which describes the
    extractors whose features it reads.

    Parameters
    ----------
    checkpoint: file that ``fit`` wrote.
    method: class of the model, if it is none of :mod:`dasmil.methods`.

    Raises
    ------
    InputError
        if the file is missing, holds no model of bags, or would need unpickling.
    """
    state, cls, options, card = read_checkpoint(Path(checkpoint), method)
    model = cls(**typed_options(cls, options)).bind(card)
    model.load_state_dict(state)
    return model.eval()


def read_checkpoint(
    path: Path, method: type[MILModule] | None = None
) -> tuple[dict[str, Tensor], type[MILModule], dict[str, Any], ModelCard]:
    """State dict, class, plain options and card of a checkpoint, checked against each other.

    Raises
    ------
    InputError
        as :func:`load`.
    """
    content = load_checkpoint(path)
    cls = method or find_method(content, path)
    options, card = read_card(content, path, cls)  # also checks the weights
    return content["state_dict"], cls, options, card


def find_method(checkpoint: dict[str, Any], path: Path) -> type[MILModule]:
    """The class that a checkpoint names; a file can only name one of :mod:`dasmil.methods`.

    Raises
    ------
    InputError
        if it names none of them.
    """
    name = method_name(checkpoint, path)
    known = known_methods()
    if name not in known:
        raise InputError(
            f"{path}: its method {name[:100]!r} is none of {', '.join(known)}; a method of your "
            "own is named by --model.class_path, or in dasmil.load by method="
        )
    return known[name]


def known_methods() -> dict[str, type[MILModule]]:
    """The classes of :mod:`dasmil.methods` by name."""
    exported = vars(import_module("dasmil.methods"))  # which imports this module
    classes = (value for value in exported.values() if isinstance(value, type))
    return {cls.__name__: cls for cls in classes if issubclass(cls, MILModule)}
