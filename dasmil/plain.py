"""Kinds of plain values, to check the contents of a file before they are used."""

import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dasmil.errors import InputError, near

MAX_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Parameters
    ----------
    words: for messages, such as ``a whole number from 1 to 9``.
    holds: whether a value is of the kind.
    """

    words: str
    holds: Callable[[Any], bool]


SWITCH = Kind("true or false", lambda value: type(value) is bool)
NOTHING = Kind("null", lambda value: value is None)


def matching(pattern: str, words: str) -> Kind:
    """Text that matches a regular expression as a whole."""
    compiled = re.compile(pattern)
    return Kind(words, lambda value: isinstance(value, str) and bool(compiled.fullmatch(value)))


TEXT = matching(r"[^\x00-\x1f\x7f-\x9f]{1,1000}", "a line of text")
WORD = matching(r"[\w.+-]{0,64}", "a word")


def whole(low: int, high: int) -> Kind:
    """A whole number in a closed interval."""
    words = f"a whole number from {low} to {high}"
    return Kind(words, lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Kind:
    """A number in a closed interval; never NaN."""
    words = f"a number from {low:g} to {high:g}"
    return Kind(words, lambda value: type(value) in (int, float) and low <= value <= high)


def one_of(*values: Any) -> Kind:
    """One of a few values."""
    words = f"one of {', '.join(map(str, values))}"
    return Kind(words, lambda value: any(type(value) is type(v) and value == v for v in values))


def _is_list(value: Any, low: int, high: int) -> bool:
    return isinstance(value, list | tuple) and low <= len(value) <= high


def several(kind: Kind, low: int, high: int) -> Kind:
    """A list of ``low`` to ``high`` values of one kind."""
    return Kind(
        f"{low if low == high else f'{low} to {high}'} values in a list, each {kind.words}",
        lambda value: _is_list(value, low, high) and all(map(kind.holds, value)),
    )


def each_of(*kinds: Kind) -> Kind:
    """A list of as many values as there are kinds, each of its own kind."""
    return Kind(
        f"{len(kinds)} values in a list: {', '.join(kind.words for kind in kinds)}",
        lambda value: (
            _is_list(value, len(kinds), len(kinds))
            and all(kind.holds(each) for kind, each in zip(kinds, value))
        ),
    )


def by_name(name: Kind, kind: Kind, low: int, high: int) -> Kind:
    """A dictionary of ``low`` to ``high`` entries, with kinds of names and values."""
    return Kind(
        f"a dictionary of {low} to {high} values, each {kind.words}",
        lambda value: (
            isinstance(value, dict)
            and low <= len(value) <= high
            and all(name.holds(key) and kind.holds(each) for key, each in value.items())
        ),
    )


def either(*kinds: Kind) -> Kind:
    """A value of one of several kinds."""
    words = " or ".join(kind.words for kind in kinds)
    return Kind(words, lambda value: any(kind.holds(value) for kind in kinds))


def named(required: Mapping[str, Kind], optional: Mapping[str, Kind]) -> Kind:
    """A dictionary of named values, each of its own kind."""
    kinds = {**required, **optional}
    return Kind(
        f"a dictionary of {', '.join(kinds)}",
        lambda value: (
            isinstance(value, dict)
            and required.keys() <= value.keys() <= kinds.keys()
            and all(kinds[key].holds(each) for key, each in value.items())
        ),
    )


def refuse_other(
    values: Any, kinds: Mapping[str, Kind], where: object, required: Collection[str] = ()
) -> None:
    """Check named values of a file.

    Parameters
    ----------
    values, kinds, required: as for :func:`describe_fault`.
    where: the file and the part of it, as the beginning of a sentence.

    Raises
    ------
    InputError
        naming the first value that is missing, unknown or of another kind.
    """
    if fault := describe_fault(values, kinds, required):
        raise InputError(f"{where}: {fault}")


def describe_fault(values: Any, kinds: Mapping[str, Kind], required: Collection[str] = ()) -> str:
    """The first value that is missing, unknown or of another kind; "" if none is.

    Parameters
    ----------
    values: what should be a dictionary.
    kinds: of each value that is allowed.
    required: names of values that must be there.

    Returns
    -------
    The end of a sentence.
    """
    if not isinstance(values, Mapping):
        return f"{_show(values)} is no dictionary of {', '.join(kinds)}"
    for name, value in values.items():
        if name not in kinds:
            return f"{_show(name)} cannot be set{near(str(name), kinds)}"
        if not kinds[name].holds(value):
            return f"{name} {_show(value)} is not {kinds[name].words}"
    missing = [name for name in required if name not in values]
    return f"{', '.join(missing)} is missing" if missing else ""


def _show(value: Any) -> str:
    """The beginning of a value, however large or deep it is."""
    text = reprlib.repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
