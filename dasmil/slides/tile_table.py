"""Tile tables: the files that ``tile`` writes, one per slide."""

from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save_file

from dasmil.errors import InputError
from dasmil.files import atomic_path
from dasmil.geometry import Tiles, Tissue
from dasmil.headers import (
    SHARED,
    TEXT,
    Entry,
    FileKind,
    fields_of,
    read_header_of,
    refusing,
    tile_arrays,
    values_of,
)
from dasmil.json_text import pack_metadata
from dasmil.names import path_inside
from dasmil.plain import by_name, number, several
from dasmil.slides.digest import file_state, sample_digest
from dasmil.units import MAX_PX, parse_scales

TABLE = FileKind(
    format="dasmil-tiles-3",
    unreadable="no readable tile table ({}); run tile again",
    other="a tile table of another version ({}, this one reads {}); run tile again",
    missing="no readable tile table (there is no such file); run tile again",
    entries={
        "slide_id": SHARED["slide_id"],
        "scales": Entry(several(TEXT, 1, 64)),
        **{name: SHARED[name] for name in ("tile_px", "slide_mpp", "size_px0", "tiling")},
        "tissue_mm2": Entry(number(0, MAX_PX)),
        "covered": Entry(number(0, 1 + 1e-6)),  # rounding may add to a share of all
        "excluded": Entry(by_name(TEXT, number(0, 1), 0, 64)),
        "bounds_px0": SHARED["bounds_px0"],
        "slide_digest": Entry(TEXT, is_text=True),
        "slide_state": Entry(TEXT, is_text=True),
    },
)


def slide_changed(path: Path, tiles: Tiles) -> bool:
    """Whether a slide's file has changed since it was tiled; a new time alone is no change.

    Raises
    ------
    InputError
        if the file does not exist, or cannot be read.
    """
    if not tiles.slide_digest or file_state(path) == tiles.slide_state:
        return False
    return sample_digest(path) != tiles.slide_digest


def tiles_path(folder: Path, slide_id: str) -> Path:
    return path_inside(folder / "tiles", f"{slide_id}.safetensors")


def write_tiles(path: Path, tiles: Tiles) -> None:
    """Write ``grid/<scale>`` and ``parent/<scale>`` as safetensors, all else in the header.

    Raises
    ------
    InputError
        if a value is impossible: what could not be read again is not written.
    """
    own = {
        "scales": tiles.scale_names,
        "tissue_mm2": tiles.tissue.mm2,
        "covered": tiles.tissue.covered,
        "excluded": dict(tiles.tissue.excluded),
        "slide_state": tiles.slide_state,
    }
    try:
        entries = TABLE.pack(values_of(tiles) | own)
    except ValueError as error:
        raise InputError(f"{path}: {error}; the tiles cannot be written") from error
    with atomic_path(path) as temporary:
        save_file(tile_arrays(tiles), temporary, pack_metadata(entries))


def read_parameters(path: Path) -> str:
    """The parameters of a tile table, as JSON, from its header.

    Raises
    ------
    InputError
        if the file is missing, damaged, or of another version.
    """
    header = read_header_of(path, TABLE)
    with refusing(path, TABLE):
        return str(TABLE.unpack(header, ["tiling"])["tiling"])


def read_tiles(path: Path) -> Tiles:
    """Read and check what :func:`write_tiles` wrote.

    Raises
    ------
    InputError
        if the file is missing, damaged, or of another version.
    """
    header = read_header_of(path, TABLE)
    with refusing(path, TABLE), safe_open(path, framework="numpy") as file:
        values = TABLE.unpack(header)
        if values["slide_id"] != path.name.removesuffix(path.suffix):
            raise ValueError(f"it is that of {values['slide_id']}")
        scales = parse_scales(values["scales"])
        names = [scale.name for scale in scales]
        tissue = (values[name] for name in ("tissue_mm2", "covered", "excluded"))
        tiles = Tiles(
            **fields_of(values, scales),
            grid={name: file.get_tensor(f"grid/{name}") for name in names},
            parent={name: file.get_tensor(f"parent/{name}") for name in names[1:]},
            tissue=Tissue(*tissue),
            slide_state=values["slide_state"],
        )
        if fault := tiles.fault(complete=True):
            raise ValueError(fault)
        return tiles
