"""Options of a module: typed parameters, some of which are small dataclasses."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from inspect import Parameter, signature
from typing import Any, Literal, get_type_hints

from dasmil.errors import InputError


@dataclass(frozen=True)
class OptimizerOptions:
    """Adam and a cosine schedule over the epochs (paper, section 4, "Optimization").

    The paper gives the first learning rate only; ``.github/docs/paper.md`` (D16) explains the
    other defaults.

    Parameters
    ----------
    learning_rate:
        learning rate of the first epoch.
    min_learning_rate:
        end of the cosine schedule.
    betas:
        the two decay rates of Adam.
    weight_decay:
        weight decay of Adam, as an L2 term.
    decay_below:
        weight decay acts after epochs in which the mean bag loss of every scale over the training
        slides was below this share of chance, the entropy of their labels; null: always.
    """

    learning_rate: float = 2e-4
    min_learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.5, 0.9)
    weight_decay: float = 5e-3
    decay_below: float | None = 0.9


@dataclass(frozen=True)
class EvaluationOptions:
    """How slides are evaluated; nothing here changes the weights.

    Parameters
    ----------
    specificity:
        specificity for which a second threshold is chosen on the validation slides.
    patient_pooling:
        mean or max of the slides' probabilities if a patient has several slides.
    """

    specificity: float = 0.9
    patient_pooling: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        if not 0 < self.specificity < 1:
            raise InputError(f"specificity: {self.specificity} is not between 0 and 1")


def option_types(method: type) -> dict[str, Any]:
    """The type of each option of a module, those of its base classes included."""
    types: dict[str, Any] = {}
    for cls in method.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = signature(cls.__init__).parameters  # type: ignore[misc]
        hints = get_type_hints(cls.__init__)  # type: ignore[misc]
        types = {name: hints[name] for name in parameters if name in hints} | types
        if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
            break  # base classes get no further options
    return {name: hint for name, hint in types.items() if name not in ("return", "options")}


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as dictionaries, lists and scalars, as a checkpoint holds them."""
    return {name: _plain(value) for name, value in options.items() if name[0] != "_"}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return list(map(_plain, value)) if isinstance(value, tuple | list) else value


def typed_options(method: type, plain: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`plain_options`: arguments of a module.

    Raises
    ------
    InputError
        if a dataclass refuses its values.
    """
    types = option_types(method)
    return {
        name: types[name](**value) if is_dataclass(types.get(name)) else value
        for name, value in plain.items()
    }


def nested_options(method: type, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Put flat options, as versions before 0.2 had them, into today's groups.

    Names of no group are kept.
    """
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        group = group_of(method, name)
        if group:
            nested.setdefault(group, {})[name] = value
        else:
            nested[name] = value
    return nested


def group_of(method: type, name: str) -> str:
    """The group of options that has a field of this name; "" if none has."""
    for option, hint in option_types(method).items():
        if is_dataclass(hint) and name in {field.name for field in fields(hint)}:
            return option
    return ""
