"""What a DAS-MIL checkpoint says of its model; it may come from anyone, so it is checked."""

from collections.abc import Mapping
from inspect import signature
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from dasmil.embedding.record import STUDY
from dasmil.embedding.weights import refuse_other_keys
from dasmil.errors import InputError
from dasmil.plain import (
    NOTHING,
    SWITCH,
    TEXT,
    WORD,
    Kind,
    by_name,
    either,
    named,
    number,
    one_of,
    refuse_other,
    several,
    whole,
)
from dasmil.units import parse_scales

MAX_WIDTH = 2**16
MAX_SCALES = 16
MAX_CLASSES = 10**4
RGB = several(number(-1e3, 1e3), 3, 3)
EXTRACTOR = named(
    {"feature_dim": whole(1, MAX_WIDTH), "fingerprint": TEXT, "name": TEXT},
    {
        **{"mean": RGB, "std": RGB, "image_size": whole(0, 2**14), "precision": TEXT},
        **{"pooling": TEXT, "interpolation": TEXT},
        "options": by_name(TEXT, Kind("an option of a network", lambda _: True), 0, 64),
    },
)
SCALE = named({"mpp": number(1e-3, 1e3), "extractor": EXTRACTOR}, {})
CLOSER = {  # than what the signature says
    **{"attention_dropout": number(0, 1), "node_dropout": number(0, 1)},
    "classes": several(TEXT, 2, MAX_CLASSES),
    "bag_format": named(
        {"tile_px": whole(1, 2**14), "scales": by_name(TEXT, SCALE, 1, MAX_SCALES)}, {}
    ),
    "split": STUDY,
    "val_part": one_of("val", "test"),
    "thresholds": either(NOTHING, by_name(TEXT, by_name(WORD, number(0, 1), 0, 16), 0, MAX_SCALES)),
    "betas": several(number(0, 1), 2, 2),
    "class_weights": either(NOTHING, one_of("balanced"), several(number(0, 1e9), 2, MAX_CLASSES)),
}


def read_card(
    checkpoint: Mapping[str, Any], where: object, module: type[nn.Module]
) -> dict[str, Any]:
    """The hyperparameters of a checkpoint, without what Lightning's CLI adds.

    Parameters
    ----------
    checkpoint: its content.
    where: its file, for messages.
    module: the class that it must be of; the hyperparameters are its parameters.

    Raises
    ------
    InputError
        if the checkpoint is none of DAS-MIL, a hyperparameter is unknown, missing or of another
        kind, or the weights are not numbers for such a model. No memory is taken before that.
    """
    hparams = checkpoint.get("hyper_parameters")
    if not isinstance(hparams, Mapping) or hparams.get("bag_format") is None:
        raise InputError(f"{where}: holds no DAS-MIL model; give a checkpoint of its fit")
    paths = (f"dasmil.modules.{module.__name__}", f"{module.__module__}.{module.__qualname__}")
    added = {"_class_path": one_of(*dict.fromkeys(paths)), "_instantiator": TEXT}
    kinds = {**_options(module), **CLOSER, **added}
    required = ("classes", "bag_format")
    refuse_other(hparams, kinds, f"{where}: its hyperparameters", required)
    found = {key: value for key, value in hparams.items() if key not in added}
    try:
        _refuse_contradictions(found)
        with torch.device("meta"):  # shapes alone
            model = module(**found)
    except ValueError as error:  # InputError is one, and torch raises it for a width or a share
        raise InputError(f"{where}: {error}") from error
    refuse_other_keys(model, checkpoint.get("state_dict"), where)
    return found


def _refuse_contradictions(hparams: Mapping[str, Any]) -> None:
    classes, scales = hparams["classes"], list(hparams["bag_format"]["scales"])
    if len(set(classes)) < len(classes):
        raise InputError("two of its classes have one name")
    if [scale.name for scale in parse_scales(scales)] != scales:
        raise InputError(f"its scales {', '.join(scales)} do not run from coarse to fine")
    if not (hparams.get("thresholds") or {}).keys() <= set(scales):
        raise InputError(f"its thresholds are not of the scales {', '.join(scales)}")
    weights = hparams.get("class_weights")
    if isinstance(weights, list) and len(weights) != len(classes):
        raise InputError(f"it has {len(weights)} class_weights for {len(classes)} classes")


def _options(module: type[nn.Module]) -> dict[str, Kind]:
    """The kind of each option of the model, as its signature says it."""
    hints = get_type_hints(module.__init__)
    names = [name for name in signature(module).parameters if name not in CLOSER]
    return {name: _kind_of(hints[name]) for name in names}


def _kind_of(hint: Any) -> Kind:
    if get_origin(hint) is Literal:
        return one_of(*get_args(hint))
    if get_origin(hint) is Union or len(get_args(hint)) > 1:
        return either(*map(_kind_of, get_args(hint)))
    return {
        bool: SWITCH,
        int: whole(1, MAX_WIDTH),
        float: number(-1e6, 1e6),
        type(None): NOTHING,
    }[hint]
