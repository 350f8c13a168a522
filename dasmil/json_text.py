"""JSON of files that anyone may have written: parsed within bounds."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dasmil.errors import explaining, join_few
from dasmil.files import must_be_file

MAX_DEPTH = 64  # dasmil writes at most 5


def pack_metadata(entries: Mapping[str, str]) -> dict[str, str]:
    """Pack entries into one: safetensors writes several in random order, so files would differ."""
    return {"dasmil": json.dumps(dict(entries), sort_keys=True)}


def unpack_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """The inverse of :func:`pack_metadata`; an empty dict if dasmil did not write the file.

    Raises
    ------
    ValueError
        if the entry is damaged.
    """
    entries = parse_json((metadata or {}).get("dasmil", "{}"))
    if not isinstance(entries, dict) or not all(isinstance(v, str) for v in entries.values()):
        raise ValueError("its entries are no dictionary of texts")
    return entries


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises
    ------
    ValueError
        if it is damaged, nested more than :data:`MAX_DEPTH` times, or holds a number that is not
        finite.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        value = DECODER.decode(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if text.count("{") + text.count("[") > MAX_DEPTH:
        _refuse_deep(value, MAX_DEPTH)
    return value


def read_json_object(path: Path, advice: str) -> dict[str, Any]:
    """The object in a JSON file.

    Parameters
    ----------
    advice: what to do if the file cannot be read, the end of the message.

    Raises
    ------
    InputError
        if the file is missing, damaged, or holds another value.
    """
    must_be_file(path, advice)
    with explaining(f"{path}: cannot be read", advice, OSError, ValueError):
        value = parse_json(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
    return value


def _refuse_deep(value: Any, levels: int) -> None:
    if levels < 0:
        raise ValueError("its JSON is nested too deeply")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _refuse_deep(inner, levels - 1)


def _refuse_number(text: str) -> float:
    raise ValueError(f"its JSON holds the number {text}")


def _finite(text: str) -> float:
    number = float(text)
    return number if abs(number) < float("inf") else _refuse_number(text)


DECODER = json.JSONDecoder(parse_constant=_refuse_number, parse_float=_finite)


def describe_changes(old: str, new: str, also_new: bool = True) -> str:
    """The differences of two sets of parameters: ``tile_px 64 → 32, tissue.mpp 8 → 4``.

    Parameters
    ----------
    old, new: the sets, as JSON.
    also_new: whether to report parameters that ``old`` lacks, as an older version's set may.
    """
    a, b = (flatten(json.loads(text)) for text in (old, new))
    keys = [k for k in {**a, **b} if a.get(k) != b.get(k) and (also_new or k in a)]
    return join_few([f"{key} {_show(a, key)} → {_show(b, key)}" for key in keys])


def _show(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key, "unknown")
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values by names such as ``objective.temperature``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": each for key, each in flatten(value).items()}
        else:
            flat[name] = value
    return flat
