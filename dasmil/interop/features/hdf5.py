"""HDF5 files of other tools: opened in one way, which follows nothing out of the file.

HDF5 reads other files by external links, external storage and virtual datasets: a file that holds
one of these is refused. What is compressed is told from its file before memory is taken for it.
"""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import psutil

from dasmil.errors import InputError
from dasmil.files import must_be_file

FAR = 2**31  # level-0 px, or µm; a bag counts tiles in 32 bits
MAX_LINKS = 1000  # in a file; tools write three
MAX_ATTRIBUTE = 16  # values
SMALL = 2**26  # bytes that may be taken unseen
MAX_RATIO = 100  # of a larger dataset to what it takes in its file; features hardly compress
GZIP = 1  # number of HDF5's filter
DAMAGED = (OSError, LookupError, RuntimeError, TypeError, ValueError, zlib.error)


def open_h5(path: Path) -> h5py.File:
    """An HDF5 file for reading.

    Raises
    ------
    InputError
        if it is none, is damaged, or would have other files read.
    """
    must_be_file(path, "extract it again")
    with _said(path, "not a readable HDF5 file"):
        file = h5py.File(path, "r")
    try:
        with _said(path, "not a readable HDF5 file"):
            _refuse_other_files(path, file)
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def _said(path: Path | str, what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(f"{path}: {what} ({error}); extract it again") from error


def _refuse_other_files(path: Path, file: h5py.File) -> None:
    """Look at every link and object; soft links are not followed for it."""
    links = 0

    def of_link(name: str, link: Any) -> str | None:
        nonlocal links
        links += 1
        if links > MAX_LINKS:
            return f"it holds more than {MAX_LINKS} things; is it of features?"
        if isinstance(link, h5py.HardLink | h5py.SoftLink):
            return None
        return f"{name} is a link to another file; extract it again"

    def of_object(name: str, found: Any) -> str | None:
        if isinstance(found, h5py.Dataset) and (found.is_virtual or found.external):
            return f"{name} is no dataset that lies in this file; extract it again"
        return None

    # what is returned ends the look; h5py cannot hand an exception through
    if fault := file.visititems_links(of_link) or file.visititems(of_object):
        raise InputError(f"{path}: {fault}")


def read_features(file: h5py.File, *names: str) -> npt.NDArray[Any]:
    """(N, D) numbers of the first dataset of these names; a leading axis of one slide is taken off.

    They are floats of 16, 32 or 64 bits, or integers, in this machine's byte order.
    """
    return as_features(Path(file.filename), _read_dataset(file, "features", *names))


def as_features(path: Path, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(N, D) in a type that torch knows; refused by name if they are no real numbers."""
    _refuse_kind(path, "features", values.dtype)
    if values.size == 0:
        values = values.reshape(0, values.shape[-1] if values.ndim > 1 else 0)
    if values.ndim != 2:
        raise InputError(f"{path}: features of the shape {values.shape}, not (tiles, numbers)")
    if values.dtype.kind in "iu" or values.dtype.itemsize > 8:  # unsigned, or a long double
        values = values.astype(np.float64)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def read_places(file: h5py.File) -> npt.NDArray[np.float64]:
    """(N, 2) x, y of the dataset ``coords``, whatever kind of number holds them."""
    values = _read_dataset(file, "coords", "coords")
    places = values.reshape(0, 2) if values.size == 0 else values
    if places.ndim != 2 or places.shape[1] != 2:
        raise InputError(f"{file.filename}: coords of the shape {values.shape}, not (tiles, 2)")
    places = places.astype(np.float64)
    if not (
        np.isfinite(places).all() and places.min(initial=0) >= 0 and places.max(initial=0) < FAR
    ):
        raise InputError(
            f"{file.filename}: some coords lie on no slide ({places.min():g} to {places.max():g}); "
            "extract it again"
        )
    return places


def _read_dataset(file: h5py.File, what: str, *names: str) -> npt.NDArray[Any]:
    """All values of the first dataset of these names."""
    path = Path(file.filename)
    with _said(path, f"its {what} cannot be read"):
        name = next((name for name in names if file.get(name, getlink=True) is not None), None)
        if name is None:
            raise InputError(
                f"{path}: no dataset {' or '.join(names)} in it, only {', '.join(file)}"
            )
        found = file[name]
        if not isinstance(found, h5py.Dataset):
            raise InputError(f"{path}: {name} is no dataset; extract it again")
        _refuse_kind(path, what, found.dtype)
        if found.shape is None:
            return np.empty(0)
        _refuse_bomb(path, name, found)
        values = np.asarray(found)
    return values[0] if values.ndim == 3 and len(values) == 1 else values


def _refuse_kind(path: Path, what: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "fiu":
        raise InputError(
            f"{path}: its {what} are of type {dtype}, not real numbers; extract it again"
        )


def _refuse_bomb(path: Path, name: str, found: h5py.Dataset) -> None:
    """Refuse what takes more memory than there is, or far more than there is in the file of it."""
    size, stored = math.prod(found.shape) * found.dtype.itemsize, found.id.get_storage_size()
    chunk = math.prod(found.chunks or (0,)) * found.dtype.itemsize
    if max(size, chunk) > psutil.virtual_memory().available / 2:
        raise InputError(
            f"{path}: {name} takes {max(size, chunk) / 1e9:,.0f} GB, more than there is memory; is "
            "it damaged?"
        )
    if max(size, chunk) > max(SMALL, MAX_RATIO * stored):
        raise InputError(
            f"{path}: {name} claims {max(size, chunk) / 1e6:,.0f} MB, of which the file holds "
            f"{stored / 1e6:,.0f} MB; is it damaged?"
        )
    filters = found.id.get_create_plist()
    kinds = [filters.get_filter(number)[0] for number in range(filters.get_nfilters())]
    if found.chunks is None or GZIP not in kinds:
        return
    for number in range(found.id.get_num_chunks()):  # zlib would unpack on, whatever is claimed
        info = found.id.get_chunk_info(number)
        if info.size * 1032 > SMALL and _unpacks_to_more(found, info, chunk):
            raise InputError(
                f"{path}: a part of {name} unpacks to more than it claims; is it damaged?"
            )


def _unpacks_to_more(found: h5py.Dataset, info: Any, chunk: int) -> bool:
    _, data = found.id.read_direct_chunk(info.chunk_offset)
    unpacked, most, left = 0, 2 * chunk + 1024, data
    stream = zlib.decompressobj()
    while left and not stream.eof and unpacked <= most:
        unpacked += len(stream.decompress(left, SMALL))
        left = stream.unconsumed_tail
    return unpacked > most


def attribute(source: h5py.Dataset | h5py.File, name: str) -> Any:
    """An attribute as a plain value."""
    where = source.file.filename
    with _said(where, f"its attribute {name} cannot be read"):
        if name not in source.attrs:
            raise InputError(f"{where}: its attribute {name} is missing; is it of another tool?")
        if math.prod(source.attrs.get_id(name).shape) > MAX_ATTRIBUTE:
            raise InputError(f"{where}: its attribute {name} is too large; is it of another tool?")
        value = source.attrs[name]
        return value.item() if isinstance(value, np.generic) else value


def number(source: h5py.Dataset | h5py.File, name: str) -> float:
    """An attribute that must be a positive number."""
    value = attribute(source, name)
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not 0 < found < float("inf"):
        raise InputError(
            f"{source.file.filename}: its attribute {name} is {value!r}, not a positive number; "
            "extract it again"
        )
    return found


def whole(source: h5py.Dataset | h5py.File, name: str) -> int:
    """An attribute that must be a positive whole number, of pixels."""
    found = number(source, name)
    if found != round(found) or found >= FAR:
        raise InputError(
            f"{source.file.filename}: its attribute {name} is {found:g}, not a whole number of "
            "pixels; extract it again"
        )
    return round(found)
