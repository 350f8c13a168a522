"""Mask + scales → aligned tile pyramid, and its file. Pure integers; no pixel is read here."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from dasmil.errors import InputError
from dasmil.files import atomic_path
from dasmil.headers import Kind, read_header_of, refusing
from dasmil.json_text import pack_metadata
from dasmil.names import path_inside
from dasmil.slides.artefacts import ArtefactParameters
from dasmil.slides.digest import file_state, sample_digest
from dasmil.slides.tissue import MaskArray, TissueParameters, tissue_fraction
from dasmil.units import MAX_PX, Mpp, PyramidGrid, Scale, TilePx, parse_scales

TABLE = Kind(
    format="dasmil-tiles-3",
    unreadable="no readable tile table ({}); run tile again",
    other="a tile table of another version ({}, this one reads {}); run tile again",
    missing="no readable tile table (there is no such file); run tile again",
)
MAX_COVERED = 1 + 1e-6  # rounding may add to a share of all


@dataclass(frozen=True)
class TilingParameters:
    """What decides which tiles a slide has; a folder of tiles holds one set of them.

    Parameters
    ----------
    scales: names, for example ``[x5, x10, x20]``.
    tile_px: side of a tile, the same at every scale.
    min_tissue: share of a finest tile that must be tissue.
    max_upsampling: how much finer than the slide a scale may be; a 0.55 µm/px slide still serves
        x20 (0.5) at 1.15.
    tissue: how tissue is found.
    artefacts: what is left out of it.
    """

    scales: tuple[str, ...]
    tile_px: int = 256
    min_tissue: float = 0.25
    max_upsampling: float = 1.15
    tissue: TissueParameters = field(default_factory=TissueParameters)
    artefacts: ArtefactParameters = field(default_factory=ArtefactParameters)

    def __post_init__(self) -> None:
        parse_scales(self.scales)
        if self.tile_px < 1:
            raise InputError(f"tile_px: {self.tile_px} is not a positive number of pixels")
        if not 0 < self.min_tissue <= 1:
            raise InputError(f"min_tissue: {self.min_tissue} is outside 0..1 (0 excluded)")

    def as_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class TilePyramid:
    """The tiles of one slide, coarse to fine, every child inside a parent and no parent childless.

    Parameters
    ----------
    grid: per scale (N_s, 2) int32 row, col, in the order of the parents.
    parent: per scale but the coarsest (N_s,) int32, row in the next coarser scale's grid.
    size_px0: width and height of the slide.
    tiling: the parameters, as JSON.
    tissue_mm2: area of the tissue, without pen and black; blurred tiles still count.
    covered: the share of it that lies in tiles of the finest scale, in 0..1; 0 without tissue.
    excluded: what the rules that were on left out: ``pen`` and ``black`` as shares of the slide's
        area, ``blur`` as a share of the finest tiles.
    bounds_px0: left and top of what was scanned (``openslide.bounds-x, -y``), from which QuPath
        counts; 0, 0 where the slide does not say.
    slide_digest: of the slide file that was tiled (:func:`dasmil.slides.digest.sample_digest`).
    slide_state: its size and time then (:func:`dasmil.slides.digest.file_state`).
    """

    slide_id: str
    scales: tuple[Scale, ...]
    tile_px: TilePx
    slide_mpp: Mpp
    size_px0: tuple[int, int]
    grid: Mapping[str, npt.NDArray[np.int32]]
    parent: Mapping[str, npt.NDArray[np.int32]]
    tiling: str = "{}"
    tissue_mm2: float = 0.0
    covered: float = 0.0
    excluded: Mapping[str, float] = field(default_factory=dict)
    bounds_px0: tuple[int, int] = (0, 0)
    slide_digest: str = ""
    slide_state: str = ""

    @property
    def geometry(self) -> PyramidGrid:
        return PyramidGrid(self.scales, self.tile_px, self.slide_mpp)

    def boxes_px0(self, scale: str) -> npt.NDArray[np.int64]:
        """(N_s, 4) left, top, right, bottom of the tiles of a scale."""
        names = [s.name for s in self.scales]
        return self.geometry.boxes_px0(names.index(scale), self.grid[scale])

    def num_tiles(self) -> dict[str, int]:
        return {scale.name: len(self.grid[scale.name]) for scale in self.scales}


def tile_pyramid(
    slide_id: str,
    mask: MaskArray,
    size_px0: tuple[int, int],
    slide_mpp: Mpp,
    parameters: TilingParameters,
    artefacts: Mapping[str, MaskArray] | None = None,
    bounds_px0: tuple[int, int] = (0, 0),
) -> TilePyramid:
    """Keep a finest tile when enough of it is tissue, a coarser one when a child of it is kept.

    What of a tile lies outside the slide is no tissue.

    Parameters
    ----------
    mask: (H, W) bool over the whole slide, at any resolution.
    artefacts: name → (h, w) bool over the whole slide, all of one resolution. A finest tile is left
        out where they cover more than ``max_share`` of it.
    bounds_px0: of the slide, as in :class:`TilePyramid`.

    Raises
    ------
    InputError
        when a scale is finer than the slide holds.
    """
    artefacts = artefacts or {}
    scales = parse_scales(parameters.scales)
    for scale in scales:
        if slide_mpp > scale.mpp * parameters.max_upsampling:
            raise InputError(
                f"slide {slide_id}: it holds {slide_mpp:g} µm/px, too coarse for {scale.name} "
                f"({scale.mpp:g} µm/px, of which max_upsampling {parameters.max_upsampling:g} is "
                "tolerated); leave that scale out, or correct the column mpp"
            )
    geometry = PyramidGrid(scales, TilePx(parameters.tile_px), slide_mpp)
    # rounding must not cost a tile that is all tissue, or just as much artefact as it may be
    kept = _share(mask, geometry, size_px0) >= parameters.min_tissue - 1e-6
    if artefacts:
        share = _share(np.any(list(artefacts.values()), axis=0), geometry, size_px0)
        kept &= share <= parameters.artefacts.max_share + 1e-6
    grid, parent = _grids(geometry, np.argwhere(kept))
    return TilePyramid(
        slide_id,
        scales,
        TilePx(parameters.tile_px),
        slide_mpp,
        size_px0,
        grid,
        parent,
        parameters.as_json(),
        tissue_mm2=float(mask.mean() * np.prod(size_px0) * slide_mpp**2 / 1e6),
        excluded={name: float(found.mean()) for name, found in artefacts.items()},
        bounds_px0=bounds_px0,
    )


def kept_rows(
    tiles: TilePyramid, left_out: Mapping[str, npt.NDArray[np.bool_]]
) -> dict[str, npt.NDArray[np.bool_]]:
    """Per scale (N_s,) bool: the tiles that stay when some are left out.

    What lies inside a tile that is left out goes with it, and so does a tile that then holds no
    other.

    Parameters
    ----------
    left_out: (N_s,) bool over the tiles of some scales.
    """
    names = [scale.name for scale in tiles.scales]
    kept = {n: ~left_out.get(n, np.zeros(len(tiles.grid[n]), bool)) for n in names}
    for coarse, fine in pairwise(names):
        kept[fine] &= kept[coarse][tiles.parent[fine]]
    for coarse, fine in reversed(list(pairwise(names))):
        with_child = np.zeros(len(kept[coarse]), bool)
        with_child[tiles.parent[fine][kept[fine]]] = True
        kept[coarse] = with_child
    return kept


def select_rows(tiles: TilePyramid, kept: Mapping[str, npt.NDArray[np.bool_]]) -> TilePyramid:
    """The pyramid of the tiles that :func:`kept_rows` gives."""
    grid = {name: rows[kept[name]] for name, rows in tiles.grid.items()}
    parent = {}
    for coarse, fine in pairwise(scale.name for scale in tiles.scales):
        new_rows = np.cumsum(kept[coarse], dtype=np.int32) - 1
        parent[fine] = new_rows[tiles.parent[fine][kept[fine]]]
    return replace(tiles, grid=grid, parent=parent)


def without_blurred(tiles: TilePyramid, blurred: npt.NDArray[np.bool_]) -> TilePyramid:
    """The tiles without some finest ones, and without the coarser ones that hold no other.

    Parameters
    ----------
    blurred: (N,) bool over the tiles of the finest scale.
    """
    share = float(blurred.mean()) if len(blurred) else 0.0
    sharp = select_rows(tiles, kept_rows(tiles, {tiles.scales[-1].name: blurred}))
    return replace(sharp, excluded={**tiles.excluded, "blur": share})


def covered_share(mask: MaskArray, tiles: TilePyramid) -> float:
    """The share of a mask's area that lies in tiles of the finest scale; 0 of an empty mask.

    Parameters
    ----------
    mask: (H, W) bool over the whole slide, at any resolution.
    """
    y_edges, x_edges = _edges(mask, tiles.geometry, tiles.size_px0)
    area = tissue_fraction(mask, x_edges, y_edges) * np.outer(np.diff(y_edges), np.diff(x_edges))
    rows, columns = tiles.grid[tiles.scales[-1].name].T
    return float(area[rows, columns].sum() / max(1, np.count_nonzero(mask)))


def _share(
    mask: MaskArray, geometry: PyramidGrid, size_px0: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """(rows, columns) of the finest scale: how much of each tile the mask covers."""
    y_edges, x_edges = _edges(mask, geometry, size_px0)
    return tissue_fraction(mask, x_edges, y_edges)


def _edges(
    mask: MaskArray, geometry: PyramidGrid, size_px0: tuple[int, int]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Upper and left edges of the finest tiles, and the last lower and right, in mask pixels."""
    finest = len(geometry.scales) - 1
    rows, columns = geometry.shape(finest, size_px0)
    y_edges = geometry.edges_px0(finest, np.arange(rows + 1)) * (mask.shape[0] / size_px0[1])
    x_edges = geometry.edges_px0(finest, np.arange(columns + 1)) * (mask.shape[1] / size_px0[0])
    return y_edges, x_edges


def _grids(
    geometry: PyramidGrid, fine_grid: npt.NDArray[np.integer]
) -> tuple[dict[str, npt.NDArray[np.int32]], dict[str, npt.NDArray[np.int32]]]:
    """``grid`` and ``parent`` of the pyramid over some finest tiles."""
    scales = geometry.scales
    finest = len(scales) - 1
    grid: dict[str, npt.NDArray[np.int32]] = {}
    parent: dict[str, npt.NDArray[np.int32]] = {}
    for number, scale in enumerate(scales):
        ancestors = fine_grid // geometry.ratio(number, finest)
        grid[scale.name] = np.unique(ancestors, axis=0).astype(np.int32).reshape(-1, 2)
        if number > 0:
            coarser = scales[number - 1].name
            rows_of_parents = grid[scale.name] // geometry.ratio(number - 1, number)
            parent_row = _find_rows(grid[coarser], rows_of_parents)
            order = np.argsort(parent_row, kind="stable")
            grid[scale.name] = grid[scale.name][order]
            parent[scale.name] = parent_row[order].astype(np.int32)
    return grid, parent


def _find_rows(
    table: npt.NDArray[np.int32], wanted: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """For each (row, col) in ``wanted`` its position in ``table``."""
    width = 1 + max(int(t[:, 1].max(initial=0)) for t in (table, wanted))
    keys = table[:, 0].astype(np.int64) * width + table[:, 1]
    order = np.argsort(keys)
    wanted_keys = wanted[:, 0].astype(np.int64) * width + wanted[:, 1]
    return order[np.searchsorted(keys, wanted_keys, sorter=order)]


def slide_changed(path: Path, tiles: TilePyramid) -> bool:
    """Whether a slide's file is another one than was tiled; its time alone may differ.

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


def write_tiles(path: Path, tiles: TilePyramid) -> None:
    """Safetensors with ``grid/<scale>`` and ``parent/<scale>``, the rest in the header."""
    tensors = {f"grid/{name}": np.ascontiguousarray(a) for name, a in tiles.grid.items()}
    tensors |= {f"parent/{name}": np.ascontiguousarray(a) for name, a in tiles.parent.items()}
    metadata = {
        "format": TABLE.format,
        "slide_id": tiles.slide_id,
        "scales": json.dumps([s.name for s in tiles.scales]),
        "tile_px": str(tiles.tile_px),
        "slide_mpp": repr(tiles.slide_mpp),
        "size_px0": json.dumps(tiles.size_px0),
        "tiling": tiles.tiling,
        "tissue_mm2": repr(tiles.tissue_mm2),
        "covered": repr(tiles.covered),
        "excluded": json.dumps(dict(tiles.excluded)),
        "bounds_px0": json.dumps(tiles.bounds_px0),
        "slide_digest": tiles.slide_digest,
        "slide_state": tiles.slide_state,
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, pack_metadata(metadata))


def read_parameters(path: Path) -> str:
    """The parameters that a tile table was made with, as JSON; no tensor is read.

    Raises
    ------
    InputError
        if the file is missing, damaged, or of another version.
    """
    header = read_header_of(path, TABLE)
    with refusing(path, TABLE):
        return header.parameters()


def read_tiles(path: Path) -> TilePyramid:
    """Read and check what :func:`write_tiles` wrote.

    Raises
    ------
    InputError
        if the file is missing, damaged, or of another version.
    """
    header = read_header_of(path, TABLE)
    with refusing(path, TABLE), safe_open(path, framework="numpy") as file:
        geometry = header.geometry(parse_scales(header.json("scales")))
        names = [scale.name for scale in geometry.scales]
        if header.slide_id() != path.name.removesuffix(path.suffix):
            raise ValueError(f"it is that of {header.slide_id()}")
        tiles = TilePyramid(
            slide_id=header.slide_id(),
            scales=geometry.scales,
            tile_px=geometry.tile_px,
            slide_mpp=geometry.slide_mpp,
            size_px0=header.size_px0(),
            grid={name: file.get_tensor(f"grid/{name}") for name in names},
            parent={name: file.get_tensor(f"parent/{name}") for name in names[1:]},
            tiling=header.parameters(),
            tissue_mm2=header.number("tissue_mm2", 0, MAX_PX),
            covered=header.number("covered", 0, MAX_COVERED),
            excluded=_shares(header.json("excluded")),
            bounds_px0=header.bounds_px0(),
            slide_digest=header.text("slide_digest"),
            slide_state=header.text("slide_state"),
        )
        _refuse_faulty(tiles)
        return tiles


def _shares(values: Any) -> dict[str, float]:
    shares = {str(name): float(share) for name, share in dict(values).items()}
    if not all(0 <= share <= 1 for share in shares.values()):
        raise ValueError(f"excluded is {shares}")
    return shares


def _refuse_faulty(tiles: TilePyramid) -> None:
    """ValueError unless the tiles are as :class:`TilePyramid` promises, and touch the slide."""
    geometry, above = tiles.geometry, None
    for number, scale in enumerate(tiles.scales):
        grid = tiles.grid[scale.name]
        fault = geometry.fault(number, grid, tiles.parent.get(scale.name), above)
        shape = geometry.shape(number, tiles.size_px0)
        if not fault and (grid >= shape).any():
            fault = "a tile lies outside the slide"
        if not fault and number > 0 and above is not None:
            childless = len(np.unique(tiles.parent[scale.name])) < len(above)
            fault = "a coarser tile holds none" if childless else ""
        if fault:
            raise ValueError(f"{scale.name}: {fault}")
        above = grid
