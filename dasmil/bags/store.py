"""Bag files: safetensors on disk, written whole or not at all, never unpickled."""

from collections.abc import Collection
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dasmil.bag_folder import BAG
from dasmil.bags.bag import Bag, BagHeader, header_from_metadata, header_to_metadata
from dasmil.errors import InputError
from dasmil.files import atomic_path
from dasmil.headers import ITEM_BYTES, Header, read_header_of, refusing
from dasmil.json_text import pack_metadata

TILE_BYTES = 184  # of a graph, beside a tile's features: neighbours, parent and children


def write_bag(path: Path, bag: Bag) -> None:
    """Validate and write ``features/<scale>``, ``grid/<scale>``, ``parent/<scale>``.

    Raises
    ------
    InputError
        if a promise of the format does not hold: what could not be read again is not written.
    """
    entries = {"format": BAG.format, **header_to_metadata(bag.header)}
    try:
        header_from_metadata(Header(entries, {}))
    except ValueError as error:
        raise InputError(f"bag {bag.slide_id}: {error}; it cannot be written") from error
    bag.validate()
    tensors = {f"features/{n}": t.contiguous() for n, t in bag.features.items()}
    tensors |= {f"grid/{n}": t.contiguous() for n, t in bag.grid.items()}
    tensors |= {f"parent/{n}": t.contiguous() for n, t in bag.parent.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, pack_metadata(entries))


def read_header(path: Path) -> BagHeader:
    """The header alone; no tensor is read."""
    header = read_header_of(path, BAG)
    with refusing(path, BAG):
        return header_from_metadata(header)


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
    header = read_header(path)
    with refusing(path, BAG), safe_open(path, framework="pt") as file:
        kinds = ("features/", "grid/", "parent/")
        tensors = {n: file.get_tensor(n) for n in file.keys() if n.startswith(kinds)}  # noqa: SIM118

    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    bag = Bag(header, under("features/"), under("grid/"), under("parent/"))
    bag.validate_structure()
    if scales is not None:
        bag = bag.select(scales)
    bag.validate_features()
    return bag


def graph_bytes(path: Path, scales: Collection[str] | None = None) -> int:
    """Memory that the graph of a bag takes at most; from the file's header, no tensor is read."""
    header = read_header_of(path, BAG)
    total = 0
    with refusing(path, BAG):
        for scale in header_from_metadata(header).scales:
            if scales is None or scale.name in scales:
                features = header.tensors[f"features/{scale.name}"]
                num_tiles, width = features.shape
                total += num_tiles * (width * ITEM_BYTES[features.dtype] + TILE_BYTES)
    return total
