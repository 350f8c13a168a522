"""Bag files: safetensors, written whole or not at all, never unpickled."""

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dasmil.bag_folder import BAG
from dasmil.bags.bag import Bag
from dasmil.bags.header import BagHeader
from dasmil.errors import InputError
from dasmil.files import atomic_path
from dasmil.headers import Header, read_header_of, refusing, tile_arrays
from dasmil.json_text import pack_metadata

ITEM_BYTES = {"F16": 2, "F32": 4}
TILE_BYTES = 264  # of a graph, beside a tile's features: neighbours, parent and children
# of DAS-MIL's training step in float32, beside a tile's features in float32; with these the
# default model takes 16.7 kB per tile of any scale at 384 numbers and 21.3 kB at 1536, as
# extra_memory of tests/benchmarks/cases.py counts them. One kB is for what a GPU cannot use.
STEP_TILE_BYTES = 16_200


def write_bag(path: Path, bag: Bag) -> None:
    """Validate and write ``features/<scale>``, ``grid/<scale>``, ``parent/<scale>``.

    Raises
    ------
    InputError
        if a promise of the format does not hold: what could not be read again is not written.
    """
    bag.validate()
    try:
        entries = bag.header.pack()
        BagHeader.unpack(Header(entries, {}))
    except ValueError as error:
        raise InputError(f"bag {bag.slide_id}: {error}; it cannot be written") from error
    tensors = {f"features/{n}": t.contiguous() for n, t in bag.features.items()}
    tensors |= {name: torch.from_numpy(rows) for name, rows in tile_arrays(bag.tiles).items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, pack_metadata(entries))


def read_header(path: Path) -> BagHeader:
    """The header of a bag file; no tensor is read.

    Raises
    ------
    InputError
        if the file is missing, damaged, or of another format version.
    """
    header = read_header_of(path, BAG)
    with refusing(path, BAG):
        return BagHeader.unpack(header)


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

    Tensors are memory-mapped: read on access, and shared between processes. Replacing the file does
    not affect bags that were read before.

    Parameters
    ----------
    scales: names of those to read, as by :meth:`Bag.select`; features of the others are not read.
        None for all.

    Raises
    ------
    InputError
        if the file is missing, damaged, of another format version, or breaks a promise.
    """
    header = read_header(path)
    with refusing(path, BAG), safe_open(path, framework="pt") as file:
        kinds = ("features/", "grid/", "parent/")
        tensors = {n: file.get_tensor(n) for n in file.keys() if n.startswith(kinds)}  # noqa: SIM118

    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    bag = Bag.from_header(header, under("features/"), under("grid/"), under("parent/"))
    bag.validate_structure()
    if bag.header.num_tiles != header.num_tiles:
        raise InputError(
            f"bag {bag.slide_id}: it has {bag.header.num_tiles} tiles, its header says "
            f"{header.num_tiles}; embed the slide again"
        )
    if scales is not None:
        bag = bag.select(scales)
    bag.validate_features()
    return bag


def graph_bytes(path: Path, scales: Collection[str] | None = None) -> int:
    """Memory that the graph of a bag takes at most, from the file's header."""
    return sum(
        num_tiles * (width * ITEM_BYTES[dtype] + TILE_BYTES)
        for num_tiles, width, dtype in _feature_shapes(path, scales)
    )


def step_bytes(path: Path, scales: Collection[str] | None = None) -> int:
    """Memory of a training step on a bag beside its graph, from the file's header."""
    return sum(
        num_tiles * (width * ITEM_BYTES["F32"] + STEP_TILE_BYTES)
        for num_tiles, width, _ in _feature_shapes(path, scales)
    )


def _feature_shapes(path: Path, scales: Collection[str] | None) -> list[tuple[int, int, str]]:
    """Number of tiles, width of the features and their type per scale that is read."""
    header = read_header_of(path, BAG)
    with refusing(path, BAG):
        names = [scale.name for scale in BagHeader.unpack(header).scales]
        names = [name for name in names if scales is None or name in scales]
        features = [header.tensors[f"features/{name}"] for name in names]
        return [(tensor.shape[0], tensor.shape[1], tensor.dtype) for tensor in features]
