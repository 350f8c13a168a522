"""The model of a checkpoint: its method, its options, and its card, which ``fit`` writes.

A checkpoint may come from anyone, so all of it is checked before memory is allocated.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from dasmil.embedding.record import STUDY
from dasmil.embedding.weights import refuse_other_keys
from dasmil.errors import InputError
from dasmil.modules.options import nested_options, option_types, plain_options, typed_options
from dasmil.plain import (
    NOTHING,
    SWITCH,
    TEXT,
    WORD,
    Kind,
    by_name,
    each_of,
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
MAX_CLASSES = MAX_VALUES = 10**4
METHOD, OPTIONS, CARD = "method", "hyper_parameters", "card"  # entries of a checkpoint
WEIGHTS = several(number(0, 1e9), 2, MAX_CLASSES)
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
OF_CARD = {
    "classes": several(TEXT, 2, MAX_CLASSES),
    "bag_format": named(
        {"tile_px": whole(1, 2**14), "scales": by_name(TEXT, SCALE, 1, MAX_SCALES)}, {}
    ),
    "split": STUDY,
    "val_part": one_of("val", "test"),
    "thresholds": either(NOTHING, by_name(TEXT, by_name(WORD, number(0, 1), 0, 16), 0, MAX_SCALES)),
    "class_weights": either(NOTHING, WEIGHTS),
    "seed": either(NOTHING, whole(0, 2**63)),
}
CLOSER = {  # closer limits than the options' types
    **{"attention_dropout": number(0, 1), "node_dropout": number(0, 1), "dropout": number(0, 1)},
    **{name: number(0, 1e6) for name in ("learning_rate", "min_learning_rate", "weight_decay")},
    "betas": several(number(0, 1), 2, 2),
    "class_weights": either(NOTHING, one_of("balanced"), WEIGHTS),
}
COUNT = re.compile(r".+_dim|num_.+|heads")  # names of options that are at least 1
PLAIN: dict[Any, Kind] = {  # type of an option → what it may be
    **{bool: SWITCH, int: whole(-MAX_WIDTH, MAX_WIDTH), float: number(-1e6, 1e6)},
    **{str: WORD, type(None): NOTHING},
}
DROPPED = ("gat_backend",)  # options of versions before 0.2 that changed nothing


@dataclass(frozen=True)
class ModelCard:
    """What a model needs beside its options and weights; ``fit`` determines it.

    D numbers: ``.github/docs/paper.md``.

    Parameters
    ----------
    classes: the labels in their order; of two, the second is the positive one.
    bag_format: scales, tile size and extractors of the bags, as
        :meth:`dasmil.bags.BagHeader.bag_format` returns them; only the scales that the model reads.
    split: one record per slide of the study, see :mod:`dasmil.slides.study`. Empty if it is not
        known which slides the weights were trained on.
    val_part: the split on which the checkpoint was chosen: val or test.
    thresholds: per scale and operating point the probability above which a slide is called
        positive; chosen on the validation slides (D18), unless they are the test slides.
    class_weights: weight of the label losses per class; None: all 1.
    seed: seed of the training; None if not known.
    """

    classes: tuple[str, ...]
    bag_format: Mapping[str, Any]
    split: Any = ()
    val_part: str = "val"
    thresholds: Mapping[str, Mapping[str, float]] | None = None
    class_weights: tuple[float, ...] | None = None
    seed: int | None = None

    @property
    def scales(self) -> tuple[str, ...]:
        """Names, coarse to fine."""
        return tuple(self.bag_format["scales"])


def describe_model(method: type, options: Mapping[str, Any], card: ModelCard) -> dict[str, Any]:
    """The entries of a checkpoint from which :func:`read_card` reads the model."""
    is_shipped = method.__module__.startswith("dasmil.methods.")
    name = method.__name__ if is_shipped else f"{method.__module__}.{method.__qualname__}"
    return {METHOD: name, OPTIONS: options, CARD: plain_options(vars(card))}


def method_name(checkpoint: Mapping[str, Any], where: object) -> str:
    """The name of the class of a checkpoint's model.

    Raises
    ------
    InputError
        if the checkpoint holds no model of bags.
    """
    options, name = checkpoint.get(OPTIONS), checkpoint.get(METHOD)
    if isinstance(options, Mapping) and options.get("bag_format") is not None:
        path = str(options.get("_class_path", "dasmil.modules.DASMILModule"))[:200]
        name = "DASMIL" if path.endswith(".DASMILModule") else path
    if not isinstance(name, str) or not isinstance(options, Mapping):
        raise InputError(f"{where}: holds no model of bags; give a checkpoint of its fit")
    return name


def read_card(
    checkpoint: Mapping[str, Any], where: object, method: type
) -> tuple[dict[str, Any], ModelCard]:
    """The options and the card of the model that a checkpoint holds.

    Parameters
    ----------
    checkpoint: its content.
    where: its file, for messages.
    method: the class of its model.

    Raises
    ------
    InputError
        if the checkpoint holds no model of that class, if an option or an entry of the card is
        unknown, missing or of another kind, or if the weights do not fit such a model. No memory
        is allocated before that.
    """
    name = method_name(checkpoint, where)
    if name.rsplit(".", 1)[-1] != method.__name__:
        raise InputError(f"{where}: its method is {name[:100]!r}, not {method.__name__}")
    added = ("_class_path", "_instantiator")  # by Lightning's CLI
    options = {key: value for key, value in checkpoint[OPTIONS].items() if key not in added}
    card: Any = checkpoint.get(CARD)
    if checkpoint.get(METHOD) is None:  # of a version before 0.2
        card = {key: options.pop(key) for key in list(options) if key in OF_CARD}
        options, card = _from_before(method, options, card)
    refuse_other_options(options, option_types(method), f"{where}: its options")
    refuse_other(card, OF_CARD, f"{where}: its card", ("classes", "bag_format"))
    try:
        _refuse_contradictions(card)
        model_card = ModelCard(**{**card, "classes": tuple(card["classes"])})
        with torch.device("meta"):  # no memory
            model = method(**typed_options(method, options))
            model.bind(model_card)
    # a ValueError is also an InputError; torch raises these for a width or a probability
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise InputError(f"{where}: {error}") from error
    refuse_other_keys(model, checkpoint.get("state_dict"), where)
    return options, model_card


def _from_before(
    method: type, options: dict[str, Any], card: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and card of a checkpoint of a version before 0.2, which mixed the two."""
    weights = card.pop("class_weights", None)
    options = {k: v for k, v in options.items() if k not in DROPPED}
    options["class_weights"] = weights
    card = {**card, "split": card.get("split") or []}
    return nested_options(method, options), card | {"class_weights": weights}


def _refuse_contradictions(card: Mapping[str, Any]) -> None:
    classes, scales = card["classes"], list(card["bag_format"]["scales"])
    if len(set(classes)) < len(classes):
        raise InputError("two of its classes have one name")
    if [scale.name for scale in parse_scales(scales)] != scales:
        raise InputError(f"its scales {', '.join(scales)} do not run from coarse to fine")
    if not (card.get("thresholds") or {}).keys() <= set(scales):
        raise InputError(f"its thresholds are not of the scales {', '.join(scales)}")
    weights = card.get("class_weights")
    if weights is not None and len(weights) != len(classes):
        raise InputError(f"it has {len(weights)} class_weights for {len(classes)} classes")


def refuse_other_options(options: Any, types: Mapping[str, Any], where: str) -> None:
    """Check options against their types, those of dataclasses field by field.

    Parameters
    ----------
    options: plain values, see :func:`dasmil.modules.options.plain_options`.
    types: of a method's options, see :func:`dasmil.modules.options.option_types`.
    where: whose options they are, as the beginning of a sentence.

    Raises
    ------
    InputError
        naming the first option that a checkpoint cannot hold.
    """
    kinds = {name: CLOSER.get(name) or _kind_of(hint, name) for name, hint in types.items()}
    refuse_other(options, kinds, where)
    for name, hint in types.items():
        if is_dataclass(hint) and name in options:
            refuse_other_options(options[name], get_type_hints(hint), f"{where}.{name}")


def _kind_of(hint: Any, name: str) -> Kind:
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        names = ", ".join(field.name for field in fields(hint))
        return Kind(f"a dictionary of {names}", lambda value: isinstance(value, dict))
    if origin is Literal:
        return one_of(*arguments)
    if origin in (Union, UnionType):
        return either(*(_kind_of(each, name) for each in arguments))
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return several(_kind_of(arguments[0], name), 0, MAX_VALUES)
    if origin is tuple:
        return each_of(*(_kind_of(each, name) for each in arguments))
    if hint is int and COUNT.fullmatch(name):
        return whole(1, MAX_WIDTH)
    if hint not in PLAIN:
        raise InputError(
            f"option {name}: a checkpoint cannot hold its type {hint}; use bool, int, float, str, "
            "Literal, list or tuple of them, or a dataclass"
        )
    return PLAIN[hint]
