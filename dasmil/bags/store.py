"""Bag files: safetensors on disk, written whole or not at all, never unpickled."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dasmil.bags.bag import Bag, BagHeader, header_from_metadata, header_to_metadata
from dasmil.errors import InputError
from dasmil.files import atomic_path, pack_metadata, unpack_metadata

FORMAT = "dasmil-bag-2"
ITEM_BYTES = {"F16": 2, "F32": 4}
TILE_BYTES = 184  # of a graph, beside a tile's features: neighbours, parent and children


def bag_path(folder: Path, slide_id: str) -> Path:
    return folder / f"{slide_id}.safetensors"


def write_bag(path: Path, bag: Bag) -> None:
    """Validate and write ``features/<scale>``, ``grid/<scale>``, ``parent/<scale>``."""
    bag.validate()
    tensors = {f"features/{n}": t.contiguous() for n, t in bag.features.items()}
    tensors |= {f"grid/{n}": t.contiguous() for n, t in bag.grid.items()}
    tensors |= {f"parent/{n}": t.contiguous() for n, t in bag.parent.items()}
    with atomic_path(path) as temporary:
        entries = {"format": FORMAT, **header_to_metadata(bag.header)}
        save_file(tensors, temporary, pack_metadata(entries))


def read_header(path: Path) -> BagHeader:
    """The header alone; no tensor is read."""
    with _opened(path) as (header, _):
        return header


def read_headers(folder: Path) -> dict[str, BagHeader | InputError]:
    """The header of each bag in a folder by slide, or why it cannot be read."""
    headers: dict[str, BagHeader | InputError] = {}
    for path in sorted(folder.glob("[!.]*.safetensors")):
        slide_id = path.name.removesuffix(path.suffix)
        try:
            headers[slide_id] = read_header(path)
        except InputError as error:
            headers[slide_id] = error
    return headers


def read_bag(path: Path, scales: Collection[str] | None = None) -> Bag:
    """Read and validate a bag file.

    Its tensors lie in the file and are read where they are looked at, by all processes from the
    same pages of memory; a file that is replaced meanwhile stays what it was for who has read it.

    Parameters
    ----------
    scales: those wanted, as by :meth:`Bag.select`; features of the others are not looked at. All
        where None.

    Raises
    ------
    InputError
        when the file is missing, truncated, of another format version, or breaks a promise.
    """
    with _opened(path) as (header, file):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    bag = Bag(header, under("features/"), under("grid/"), under("parent/"))
    bag.validate_structure()
    if scales is not None:
        bag = bag.select(scales)
    bag.validate_features()
    return bag


def read_num_tiles(path: Path) -> dict[str, int]:
    """Tiles per scale; from the file's header, no tensor is read."""
    with _opened(path) as (header, file):
        return {s.name: file.get_slice(f"grid/{s.name}").get_shape()[0] for s in header.scales}


def graph_bytes(path: Path, scales: Collection[str] | None = None) -> int:
    """Memory that the graph of a bag takes at most; from the file's header, no tensor is read."""
    with _opened(path) as (header, file):
        total = 0
        for scale in header.scales:
            if scales is None or scale.name in scales:
                features = file.get_slice(f"features/{scale.name}")
                num_tiles, width = features.get_shape()
                total += num_tiles * (width * ITEM_BYTES.get(features.get_dtype(), 4) + TILE_BYTES)
        return total


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BagHeader, Any]]:
    """The header, and the file to read tensors from."""
    try:
        with safe_open(path, framework="pt") as file:
            yield _header(path, file.metadata()), file
    except FileNotFoundError:
        raise InputError(f"{path}: no such bag file") from None
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _header(path: Path, metadata: dict[str, str] | None) -> BagHeader:
    try:
        entries = unpack_metadata(metadata)
    except ValueError as error:
        raise _unreadable(path, error) from error
    found = entries.get("format")
    if found != FORMAT:
        raise InputError(
            f"{path}: its format is {found!r}, this version reads {FORMAT!r}; embed the slide again"
        )
    try:
        return header_from_metadata(entries)
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: cannot be read as a bag ({error}); delete it and embed again")
