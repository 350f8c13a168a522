"""Bag files: safetensors on disk, written whole or not at all, never unpickled."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dasmil.bags.bag import Bag, BagHeader, header_from_metadata, header_to_metadata
from dasmil.errors import InputError
from dasmil.files import atomic_path, pack_metadata, unpack_metadata

FORMAT = "dasmil-bag-1"


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
    try:
        with safe_open(path, framework="pt") as file:
            return _header(path, file.metadata())
    except FileNotFoundError:
        raise InputError(f"{path}: no such bag file") from None
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def read_bag(path: Path) -> Bag:
    """Read and validate a bag file.

    Raises
    ------
    InputError
        when the file is missing, truncated, of another format version, or breaks a promise.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{path}: no such bag file") from None
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error

    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    bag = Bag(header, under("features/"), under("grid/"), under("parent/"))
    bag.validate()
    return bag


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
