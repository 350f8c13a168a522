"""Headers of tile tables and bags: one codec for both, which reads no tensor.

A file may be damaged, or come from anyone. Whatever is wrong with it becomes one sentence, before
memory is taken for it.
"""

import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from dasmil.errors import InputError
from dasmil.geometry import Extent, Tiles, TilesHeader
from dasmil.json_text import parse_json, unpack_metadata
from dasmil.names import name_fault
from dasmil.plain import SWITCH, Kind, describe_fault, number, several, whole
from dasmil.units import MAX_PX, MPPS, Mpp, Scale, TilePx

MAX_HEADER = 2**20  # bytes
MAX_REASON = 200  # characters
MAX_PARAMETERS = 2**16  # characters, of tiling or import

TEXT = Kind("a text", lambda value: isinstance(value, str))
FILE_NAME = Kind("a name that a file can have", lambda value: not name_fault(value))


@lru_cache(maxsize=16)  # all files of a folder have the same text
def _is_parameters(text: str) -> bool:
    return len(text) <= MAX_PARAMETERS and isinstance(parse_json(text), dict)


PARAMETERS = Kind(f"an object of at most {MAX_PARAMETERS} characters", _is_parameters)


@dataclass(frozen=True)
class Entry:
    """One entry of a header.

    Parameters
    ----------
    kind: which values it can have.
    default: its text in older files, which lack it; None if every file has it.
    is_text: whether the text is the value; else it is the value's JSON.
    """

    kind: Kind
    default: str | None = None
    is_text: bool = False


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a header describes it; its dtype has the name that safetensors gives it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """The header of a file, not yet checked.

    Parameters
    ----------
    entries: texts by name.
    tensors: of the file, by name.
    """

    entries: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True)
class FileKind:
    """A kind of file, and the codec of its header.

    Parameters
    ----------
    format: the version that this version of dasmil reads and writes.
    unreadable: sentence on a damaged file, with a place for the reason.
    other: sentence on a file of another version, with places for that and for ours.
    missing: sentence on a file that does not exist.
    entries: of the header, by name.
    """

    format: str
    unreadable: str
    other: str
    missing: str
    entries: Mapping[str, Entry]

    def pack(self, values: Mapping[str, Any]) -> dict[str, str]:
        """The entries of these values, with the format; ``ValueError`` if one is impossible."""
        self._check(values, required=self.entries)
        return {"format": self.format} | {
            name: values[name] if entry.is_text else json.dumps(values[name])
            for name, entry in self.entries.items()
        }

    def unpack(self, header: Header, names: Collection[str] = ()) -> dict[str, Any]:
        """The values of a header; ``ValueError`` if one is missing or impossible.

        Parameters
        ----------
        names: of the entries that are needed; all if empty.
        """
        values = {}
        for name in names or self.entries:
            entry = self.entries[name]
            text = header.entries.get(name, entry.default)
            if text is not None:
                values[name] = text if entry.is_text else parse_json(text)
        self._check(values, required=names or self.entries)
        return values

    def _check(self, values: Mapping[str, Any], required: Collection[str]) -> None:
        kinds = {name: entry.kind for name, entry in self.entries.items()}
        if fault := describe_fault(values, kinds, required):
            raise ValueError(fault)


#: Entries that tile tables and bags share, see :class:`dasmil.geometry.TilesHeader`.
SHARED = {
    "slide_id": Entry(FILE_NAME, is_text=True),
    "slide_mpp": Entry(number(*MPPS)),
    "size_px0": Entry(several(whole(0, MAX_PX), 2, 2)),
    "tile_px": Entry(whole(1, MAX_PX)),
    "tiling": Entry(PARAMETERS, is_text=True),
    "bounds_px0": Entry(several(whole(-MAX_PX, MAX_PX), 2, 2), "[0, 0]"),
    "slide_digest": Entry(TEXT, "", is_text=True),
}
#: Entries of bags alone: only imported slides lack a size or a resolution.
KNOWN = {"size_is_extent": Entry(SWITCH, "false"), "mpp_is_known": Entry(SWITCH, "true")}


def values_of(header: TilesHeader) -> dict[str, Any]:
    """The values of the shared entries."""
    extent = header.extent
    return {
        "slide_id": header.slide_id,
        "slide_mpp": float(extent.mpp),
        "size_px0": extent.size_px0,
        "tile_px": int(header.tile_px),
        "tiling": header.tiling,
        "bounds_px0": extent.bounds_px0,
        "slide_digest": header.slide_digest,
    }


def fields_of(values: Mapping[str, Any], scales: Sequence[Scale]) -> dict[str, Any]:
    """The inverse of :func:`values_of`: the fields of a :class:`TilesHeader`.

    Raises
    ------
    InputError
        if there can be no such grid of tiles.
    """
    width, height = (max(1, side) for side in values["size_px0"])  # older imports without tiles: 0
    left, top = values["bounds_px0"]
    header = TilesHeader(
        slide_id=values["slide_id"],
        extent=Extent(
            size_px0=(width, height),
            mpp=Mpp(float(values["slide_mpp"])),
            bounds_px0=(left, top),
            size_is_known=not values.get("size_is_extent", False),
            mpp_is_known=values.get("mpp_is_known", True),
        ),
        scales=tuple(scales),
        tile_px=TilePx(values["tile_px"]),
        tiling=values["tiling"],
        slide_digest=values["slide_digest"],
    )
    header.geometry  # noqa: B018 - refuses an impossible one
    return header.header_fields()


def tile_arrays(tiles: Tiles) -> dict[str, npt.NDArray[np.int32]]:
    """The arrays of both kinds of file: ``grid/<scale>`` and ``parent/<scale>``."""
    return {
        f"{kind}/{scale}": np.ascontiguousarray(rows)
        for kind, per_scale in (("grid", tiles.grid), ("parent", tiles.parent))
        for scale, rows in per_scale.items()
    }


def read_header_of(path: Path, kind: FileKind) -> Header:
    """The header of a file of this kind.

    Raises
    ------
    InputError
        if there is no such file, it is damaged, or of another version.
    """
    with refusing(path, kind):
        _refuse_odd_file(path)
        with safe_open(path, framework="numpy") as file:
            entries = unpack_metadata(file.metadata())
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    if (version := entries.get("format")) != kind.format:
        raise InputError(f"{path}: {kind.other.format(version and _short(version), kind.format)}")
    return Header(
        entries, {n: TensorInfo(s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    )


def _refuse_odd_file(path: Path) -> None:
    """Refuse what safetensors would read without end or limit: FIFOs, and huge headers."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would wait for ever
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ValueError("it is no regular file")
        if int.from_bytes(os.read(file, 8), "little") > MAX_HEADER:
            raise ValueError("it is cut off, or of another kind")
    finally:
        os.close(file)


@contextmanager
def refusing(path: Path, kind: FileKind) -> Iterator[None]:
    """Turn every error that a damaged file can cause into one sentence."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: {kind.missing}") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: {kind.unreadable.format(_short(error))}") from error


def _short(text: object) -> str:
    """For a sentence, whatever a file holds."""
    words = " ".join(str(text).split())
    return words if len(words) <= MAX_REASON else f"{words[:MAX_REASON]}…"
