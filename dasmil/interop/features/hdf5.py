"""Read HDF5 files of other tools safely.

HDF5 can read other files by external links, external storage and virtual datasets: a file with one
of these is refused. The size of compressed data is checked before memory is taken for it.
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

from dasmil.errors import InputError, explaining
from dasmil.files import must_be_file

FAR = 2**31  # level-0 px, or µm; a bag counts tiles in 32 bits
MAX_LINKS = 1000  # per file; tools write three
MAX_ATTRIBUTE = 16  # values
SMALL = 2**26  # bytes that are unpacked without a look at the compressed size
MAX_RATIO = 100  # of a larger dataset to its size in the file; features hardly compress
GZIP = 1  # number of HDF5's filter
AGAIN = "extract the features again"
DAMAGED = (OSError, LookupError, RuntimeError, TypeError, ValueError, zlib.error)


@contextmanager
def open_h5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading.

    Raises
    ------
    InputError
        if it is no HDF5 file, is damaged, or refers to other files.
    """
    must_be_file(path, AGAIN)
    with explaining(f"{path}: not a readable HDF5 file", AGAIN, *DAMAGED):
        file = h5py.File(path, "r")
    with file:
        with explaining(f"{path}: not a readable HDF5 file", AGAIN, *DAMAGED):
            _refuse_other_files(path, file)
        yield file


def _refuse_other_files(path: Path, file: h5py.File) -> None:
    """Look at every link and object; soft links are not followed."""
    links = 0

    def fault_of_link(name: str, link: Any) -> str | None:
        nonlocal links
        links += 1
        if links > MAX_LINKS:
            return f"it holds more than {MAX_LINKS} objects; is it a file of features?"
        if isinstance(link, h5py.HardLink | h5py.SoftLink):
            return None
        return f"{name} is a link to another file; {AGAIN}"

    def fault_of_object(name: str, item: Any) -> str | None:
        if isinstance(item, h5py.Dataset) and (item.is_virtual or item.external):
            return f"{name} is stored in another file; {AGAIN}"
        return None

    # a returned value ends the visit; h5py cannot pass an exception through
    fault = file.visititems_links(fault_of_link) or file.visititems(fault_of_object)
    if fault:
        raise InputError(f"{path}: {fault}")


def _unfit(path: Path | str, fault: str) -> InputError:
    return InputError(f"{path}: {fault}; {AGAIN}")


def read_tiles(file: h5py.File, *names: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """(N, D) features and (N, 2) places of the same tiles; see the two functions below."""
    features, places = read_features(file, *names), read_places(file)
    if len(features) != len(places):
        raise _unfit(file.filename, f"{len(features)} features for {len(places)} coords")
    return features, places


def read_features(file: h5py.File, *names: str) -> npt.NDArray[Any]:
    """(N, D) numbers of the first dataset with one of these names, as :func:`to_features`.

    A leading axis of length 1 is removed.
    """
    return to_features(Path(file.filename), _read_dataset(file, "features", *names))


def to_features(path: Path, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(N, D) floats of 16, 32 or 64 bits, in this machine's byte order.

    Raises
    ------
    InputError
        if they are not real numbers of this shape.
    """
    _require_numbers(path, "features", values.dtype)
    if values.size == 0:
        values = values.reshape(0, values.shape[-1] if values.ndim > 1 else 0)
    if values.ndim != 2:
        raise _unfit(path, f"its features have the shape {values.shape}, not (tiles, numbers)")
    if values.dtype.kind in "iu" or values.dtype.itemsize > 8:  # unsigned, or a long double
        values = values.astype(np.float64)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def read_places(file: h5py.File) -> npt.NDArray[np.float64]:
    """(N, 2) x, y of the dataset ``coords``, whatever kind of number holds them."""
    values = _read_dataset(file, "coords", "coords")
    places = values.reshape(0, 2) if values.size == 0 else values
    if places.ndim != 2 or places.shape[1] != 2:
        raise _unfit(file.filename, f"its coords have the shape {values.shape}, not (tiles, 2)")
    places = places.astype(np.float64)
    low, high = places.min(initial=0), places.max(initial=0)
    if not (np.isfinite(places).all() and low >= 0 and high < FAR):
        raise _unfit(file.filename, f"some coords lie on no slide ({low:g} to {high:g})")
    return places


def _read_dataset(file: h5py.File, what: str, *names: str) -> npt.NDArray[Any]:
    """All values of the first dataset with one of these names."""
    path = Path(file.filename)
    with explaining(f"{path}: its {what} cannot be read", AGAIN, *DAMAGED):
        name = next((name for name in names if file.get(name, getlink=True) is not None), None)
        if name is None:
            raise InputError(
                f"{path}: it has no dataset {' or '.join(names)}, only {', '.join(file)}; is it "
                "from another tool?"
            )
        dataset = file[name]
        if not isinstance(dataset, h5py.Dataset):
            raise _unfit(path, f"{name} is not a dataset")
        _require_numbers(path, what, dataset.dtype)
        if dataset.shape is None:
            return np.empty(0)
        _refuse_bomb(path, name, dataset)
        values = np.asarray(dataset)
    return values[0] if values.ndim == 3 and len(values) == 1 else values


def _require_numbers(path: Path, what: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "fiu":
        raise _unfit(path, f"its {what} are of type {dtype}, not real numbers")


def _refuse_bomb(path: Path, name: str, dataset: h5py.Dataset) -> None:
    """Refuse a dataset larger than memory, or far larger than its compressed data."""
    size = math.prod(dataset.shape) * dataset.dtype.itemsize
    chunk = math.prod(dataset.chunks or (0,)) * dataset.dtype.itemsize
    largest, stored = max(size, chunk), dataset.id.get_storage_size()
    if largest > psutil.virtual_memory().available / 2:
        raise InputError(f"{path}: {name} needs {largest / 1e9:,.0f} GB of memory; is it damaged?")
    if largest > max(SMALL, MAX_RATIO * stored):
        raise InputError(
            f"{path}: {name} claims {largest / 1e6:,.0f} MB, of which the file holds "
            f"{stored / 1e6:,.0f} MB; is it damaged?"
        )
    filters = dataset.id.get_create_plist()
    kinds = [filters.get_filter(number)[0] for number in range(filters.get_nfilters())]
    if dataset.chunks is None or GZIP not in kinds:
        return
    for number in range(dataset.id.get_num_chunks()):  # zlib unpacks on, whatever size is claimed
        info = dataset.id.get_chunk_info(number)
        if info.size * 1032 > SMALL and _unpacks_to_more(dataset, info, chunk):
            raise InputError(f"{path}: {name} unpacks to more than it claims; is it damaged?")


def _unpacks_to_more(dataset: h5py.Dataset, info: Any, chunk: int) -> bool:
    _, data = dataset.id.read_direct_chunk(info.chunk_offset)
    unpacked, most, left = 0, 2 * chunk + 1024, data
    stream = zlib.decompressobj()
    while left and not stream.eof and unpacked <= most:
        unpacked += len(stream.decompress(left, SMALL))
        left = stream.unconsumed_tail
    return unpacked > most


def read_attribute(source: h5py.Dataset | h5py.File, name: str) -> Any:
    """An attribute as a plain value."""
    path = source.file.filename
    with explaining(f"{path}: its attribute {name} cannot be read", AGAIN, *DAMAGED):
        if name not in source.attrs:
            raise InputError(f"{path}: its attribute {name} is missing; is it from another tool?")
        if math.prod(source.attrs.get_id(name).shape) > MAX_ATTRIBUTE:
            raise InputError(f"{path}: its attribute {name} is too large; is it from another tool?")
        value = source.attrs[name]
        return value.item() if isinstance(value, np.generic) else value


def read_text(source: h5py.Dataset | h5py.File, name: str) -> str:
    """An attribute as text."""
    value = read_attribute(source, name)
    return value.decode() if isinstance(value, bytes) else str(value)


def read_positive(source: h5py.Dataset | h5py.File, name: str) -> float:
    """An attribute that must be a positive number."""
    value = read_attribute(source, name)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 < number < float("inf"):
        fault = f"its attribute {name} is {value!r}, not a positive number"
        raise _unfit(source.file.filename, fault)
    return number


def read_pixels(source: h5py.Dataset | h5py.File, name: str) -> int:
    """An attribute that must be a positive whole number of pixels."""
    number = read_positive(source, name)
    if number != round(number) or number >= FAR:
        fault = f"its attribute {name} is {number:g}, not whole pixels"
        raise _unfit(source.file.filename, fault)
    return round(number)
