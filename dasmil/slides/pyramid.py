"""Mask + scales → aligned tiles. Pure integers; no pixel is read here."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import numpy.typing as npt

from dasmil.errors import InputError
from dasmil.geometry import BoolArray, Extent, Int32Array, PyramidGrid, Tiles, Tissue
from dasmil.slides.artefacts import ArtefactParameters
from dasmil.slides.tissue import MaskArray, TissueParameters, tissue_fraction
from dasmil.units import TilePx, parse_scales


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


def lay_tiles(
    slide_id: str,
    mask: MaskArray,
    extent: Extent,
    parameters: TilingParameters,
    artefacts: Mapping[str, MaskArray] | None = None,
) -> Tiles:
    """Keep a finest tile if enough of it is tissue, a coarser one if a child of it is kept.

    The part of a tile outside the slide counts as no tissue.

    Parameters
    ----------
    mask: (H, W) bool over the whole slide, at any resolution.
    artefacts: name → (h, w) bool over the whole slide, all of one resolution. A finest tile is left
        out if they cover more than ``max_share`` of it.

    Raises
    ------
    InputError
        if a scale is finer than the slide holds.
    """
    artefacts = artefacts or {}
    scales = parse_scales(parameters.scales)
    for scale in scales:
        if extent.mpp > scale.mpp * parameters.max_upsampling:
            raise InputError(
                f"slide {slide_id}: it holds {extent.mpp:g} µm/px, too coarse for {scale.name} "
                f"({scale.mpp:g} µm/px, of which max_upsampling {parameters.max_upsampling:g} is "
                "tolerated); leave that scale out, or correct the column mpp"
            )
    geometry = PyramidGrid(scales, TilePx(parameters.tile_px), extent.mpp)
    # rounding must not cost a tile that is all tissue, or just as much artefact as it may be
    kept = _share(mask, geometry, extent.size_px0) >= parameters.min_tissue - 1e-6
    if artefacts:
        share = _share(np.any(list(artefacts.values()), axis=0), geometry, extent.size_px0)
        kept &= share <= parameters.artefacts.max_share + 1e-6
    grid, parent = _grids(geometry, np.argwhere(kept))
    return Tiles(
        slide_id=slide_id,
        extent=extent,
        scales=scales,
        tile_px=geometry.tile_px,
        tiling=parameters.as_json(),
        grid=grid,
        parent=parent,
        tissue=Tissue(
            mm2=float(mask.mean() * np.prod(extent.size_px0) * extent.mpp**2 / 1e6),
            excluded={name: float(marked.mean()) for name, marked in artefacts.items()},
        ),
    )


def without_blurred(tiles: Tiles, blurred: BoolArray) -> Tiles:
    """The tiles without some finest ones, and without the coarser ones that then hold none.

    Parameters
    ----------
    blurred: (N,) bool over the tiles of the finest scale.
    """
    share = float(blurred.mean()) if len(blurred) else 0.0
    sharp = tiles.select_rows(tiles.kept_rows({tiles.scale_names[-1]: blurred}))
    return replace(
        sharp, tissue=replace(tiles.tissue, excluded={**tiles.tissue.excluded, "blur": share})
    )


def covered_share(mask: MaskArray, tiles: Tiles) -> float:
    """The share of a mask's area inside tiles of the finest scale; 0 for an empty mask.

    Parameters
    ----------
    mask: (H, W) bool over the whole slide, at any resolution.
    """
    y_edges, x_edges = _edges(mask, tiles.geometry, tiles.extent.size_px0)
    area = tissue_fraction(mask, x_edges, y_edges) * np.outer(np.diff(y_edges), np.diff(x_edges))
    rows, columns = tiles.grid[tiles.scale_names[-1]].T
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
) -> tuple[dict[str, Int32Array], dict[str, Int32Array]]:
    """``grid`` and ``parent`` of the pyramid over some finest tiles."""
    finest = len(geometry.scales) - 1
    ancestors = [fine_grid // geometry.ratio(number, finest) for number in range(finest + 1)]
    # by the coarsest ancestor first; lexsort begins with its last key
    order = np.lexsort(np.concatenate(ancestors, axis=1).T[::-1])
    grid: dict[str, Int32Array] = {}
    parent: dict[str, Int32Array] = {}
    rows = np.empty(0, np.int32)  # of each finest tile's ancestor in the coarser grid
    for number, scale in enumerate(geometry.scales):
        tiles = ancestors[number][order].astype(np.int32)
        is_first = (np.diff(tiles, axis=0, prepend=-1) != 0).any(axis=1)  # finest tile inside it
        grid[scale.name] = tiles[is_first]
        if number > 0:
            parent[scale.name] = rows[is_first]
        rows = np.cumsum(is_first, dtype=np.int32) - 1
    return grid, parent
