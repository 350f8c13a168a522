"""Headers of tile tables and bags: read without the tensors behind them, and checked.

A file may be damaged, or of a stranger: whatever is wrong with it becomes one sentence, before
memory is taken for it.
"""

import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dasmil.errors import InputError
from dasmil.json_text import parse_json, unpack_metadata
from dasmil.names import name_fault
from dasmil.units import MAX_PX, Mpp, PyramidGrid, Scale, TilePx

FIRST_READ = 2**14  # bytes; most headers are shorter
MAX_HEADER = 2**20
MAX_REASON = 200  # characters
MAX_PARAMETERS = 2**16  # of tiling or import, as JSON
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2}
ITEM_BYTES |= {"F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Parameters
    ----------
    format: the version that this version of dasmil reads and writes.
    unreadable: sentence on a damaged file, with a place for the reason.
    other: sentence on a file of another version, with places for that and for ours.
    missing: what is said of a file that is not there.
    """

    format: str
    unreadable: str
    other: str
    missing: str


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor; its dtype by the name that safetensors gives it."""

    dtype: str
    shape: tuple[int, ...]


class Header:
    """The entries of a file's header; each is checked when it is asked for.

    All methods raise ``ValueError`` where an entry is missing or impossible; see :func:`refusing`.

    Parameters
    ----------
    entries: texts by name.
    tensors: of the file, by name.
    """

    def __init__(self, entries: Mapping[str, str], tensors: Mapping[str, TensorInfo]):
        self.entries = entries
        self.tensors = tensors

    def text(self, name: str, default: str | None = None) -> str:
        found = self.entries.get(name, default)
        if found is None:
            raise ValueError(f"{name} is missing")
        return found

    def json(self, name: str, default: str | None = None) -> Any:
        return parse_json(self.text(name, default))

    def whole(self, name: str, low: int, high: int, default: str | None = None) -> int:
        return _whole(int(self.text(name, default)), name, low, high)

    def number(self, name: str, low: float, high: float) -> float:
        found = float(self.text(name))
        if not low <= found <= high:
            raise ValueError(f"{name} is {found:g}")
        return found

    def flag(self, name: str, default: str) -> bool:
        found = self.json(name, default)
        if not isinstance(found, bool):
            raise ValueError(f"{name} is {found!r}")
        return found

    def pair(self, name: str, low: int, high: int, default: str | None = None) -> tuple[int, int]:
        found = self.json(name, default)
        if not isinstance(found, list) or len(found) != 2:
            raise ValueError(f"{name} is {found!r}")
        first, second = (_whole(value, name, low, high) for value in found)
        return first, second

    def slide_id(self) -> str:
        if fault := name_fault(found := self.text("slide_id")):
            raise ValueError(f"its slide_id {fault}")
        return found

    def size_px0(self) -> tuple[int, int]:
        """Width and height; older imports of a slide without tiles say that it has none."""
        width, height = self.pair("size_px0", 0, MAX_PX)
        return max(1, width), max(1, height)

    def bounds_px0(self) -> tuple[int, int]:
        return self.pair("bounds_px0", -MAX_PX, MAX_PX, "[0, 0]")

    def parameters(self) -> str:
        """Those of tiling or import, JSON; that of an object."""
        text = self.text("tiling")
        if len(text) > MAX_PARAMETERS or not isinstance(parse_json(text), dict):
            raise ValueError("its parameters are no object, or too many")
        return text

    def geometry(self, scales: Sequence[Scale]) -> PyramidGrid:
        """Where tiles of these scales lie in the slide."""
        tile_px, mpp = TilePx(self.whole("tile_px", 1, MAX_PX)), Mpp(float(self.text("slide_mpp")))
        return PyramidGrid(tuple(scales), tile_px, mpp)


def _whole(value: Any, name: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}")
    return value


def read_header_of(path: Path, kind: Kind) -> Header:
    """The header of a file of this kind; no tensor is read.

    Raises
    ------
    InputError
        if there is no such file, it is damaged, or of another version.
    """
    with refusing(path, kind):
        try:
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would wait for ever
        except FileNotFoundError:
            raise _Said(f"{path}: {kind.missing}") from None
        try:
            header = _parse(*_header_bytes(file))
        finally:
            os.close(file)
        if header.entries.get("format") != kind.format:
            found = header.entries.get("format")
            raise _Said(f"{path}: {kind.other.format(found and _short(found), kind.format)}")
        return header


class _Said(InputError):
    """A whole sentence, to which nothing is added."""


@contextmanager
def refusing(path: Path, kind: Kind) -> Iterator[None]:
    """Tell what is wrong with a file in one sentence, whatever went wrong with it."""
    try:
        yield
    except _Said as error:
        raise InputError(str(error)) from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: {kind.unreadable.format(_short(error))}") from error


def _short(text: object) -> str:
    """For a sentence, whatever a file holds."""
    words = " ".join(str(text).split())
    return words if len(words) <= MAX_REASON else f"{words[:MAX_REASON]}…"


def _header_bytes(file: int) -> tuple[bytes, int]:
    """The header of an open file, and how many bytes of tensors are behind it."""
    state = os.fstat(file)
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("it is no regular file")
    start = os.read(file, FIRST_READ)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 2 <= length <= min(MAX_HEADER, state.st_size - 8):
        raise ValueError("it is cut off, or of another kind")
    text = start[8 : 8 + length]
    while len(text) < length and (more := os.read(file, length - len(text))):
        text += more
    return text, state.st_size - 8 - length


def _parse(text: bytes, size: int) -> Header:
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError("its header is no object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not isinstance(metadata.get("dasmil", ""), str):
        raise ValueError("its header is no text")
    tensors, end = {}, 0
    for name, told in sorted(content.items(), key=lambda item: item[1]["data_offsets"]):
        shape = tuple(_whole(n, f"the shape of {name}", 0, 2**48) for n in told["shape"])
        start, stop = told["data_offsets"]
        if start != end or stop - start != math.prod(shape) * ITEM_BYTES[told["dtype"]]:
            raise ValueError(f"{name} is not where its header says")
        end = stop
        tensors[name] = TensorInfo(told["dtype"], shape)
    if end != size:
        raise ValueError(f"it has {size} bytes of tensors, not {end}")
    return Header(_entries(metadata.get("dasmil", "{}")), tensors)


def _entries(text: str) -> dict[str, str]:
    return unpack_metadata({"dasmil": text})
