"""Where the tiles of a slide are: its extent, the integer grid of all scales, and the tiles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dasmil.errors import InputError
from dasmil.units import MAX_PX, Mpp, Scale, TilePx, check_mpp, require_nesting

IntArray = npt.NDArray[np.integer]
Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
Rows = tuple[int, int]  # first, and one after the last

MAX_EDGE_PX0 = 2**53  # up to here a float counts pixels one by one


@dataclass(frozen=True)
class PyramidGrid:
    """The grid of the tiles of all scales in a slide.

    The grid starts at the slide's origin. The edges of a tile are edges of the finest scale's grid,
    which is rounded once, so children fill their parent exactly and no two tiles overlap:
    x0 = round(col · tile_px · mpp_scale / mpp_slide). Tiles may reach over the right and lower
    border of the slide.

    Parameters
    ----------
    scales: coarse to fine, as :func:`parse_scales` returns them.
    tile_px: side of a tile at every scale.
    slide_mpp: µm per level-0 pixel of the slide.

    Raises
    ------
    InputError
        if there can be no such tiles.
    """

    scales: tuple[Scale, ...]
    tile_px: TilePx
    slide_mpp: Mpp

    def __post_init__(self) -> None:
        check_mpp(self.slide_mpp, "slide")
        if not 1 <= self.tile_px < MAX_PX:
            raise InputError(f"tile_px: {self.tile_px} is not a positive number of pixels")
        require_nesting(self.scales, tolerance=1e-3)  # other tools round the mpp of scales
        step_px0 = self.tile_px * self.scales[-1].mpp / self.slide_mpp
        if not 0.5 <= step_px0 < MAX_PX:
            raise InputError(f"tiles of {step_px0:g} level-0 px are impossible")

    def ratio(self, coarse: int, fine: int) -> int:
        """Tiles of scale number ``fine`` along the side of one of scale number ``coarse``."""
        return round(self.scales[coarse].mpp / self.scales[fine].mpp)

    def edges_px0(self, scale: int, index: IntArray) -> npt.NDArray[np.int64]:
        """Level-0 coordinate of the left (or top) edge of column (or row) ``index``."""
        finest = len(self.scales) - 1
        step_px0 = self.tile_px * self.scales[finest].mpp / self.slide_mpp
        steps = np.asarray(index, dtype=np.int64) * self.ratio(scale, finest)
        return np.floor(steps * step_px0 + 0.5).astype(np.int64)

    def boxes_px0(self, scale: int, grid: IntArray) -> npt.NDArray[np.int64]:
        """(N, 2) row, col → (N, 4) left, top, right, bottom in level-0 pixels."""
        top_left = self.edges_px0(scale, grid)
        bottom_right = self.edges_px0(scale, grid + 1)
        return np.concatenate([top_left[:, ::-1], bottom_right[:, ::-1]], axis=1)

    def shape(self, scale: int, size_px0: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the tiles that cover the slide.

        The last ones may reach over its right and lower border. Each tile touches the slide, and so
        does its parent.

        Parameters
        ----------
        size_px0: the slide's width and height.
        """
        width_px0, height_px0 = size_px0
        return self._count(scale, height_px0), self._count(scale, width_px0)

    def _count(self, scale: int, length_px0: int) -> int:
        count = int(length_px0 / (self.tile_px * self.scales[scale].mpp / self.slide_mpp))
        while self.edges_px0(scale, np.array(count)) < length_px0:  # edges are rounded
            count += 1
        return count


@dataclass(frozen=True)
class Extent:
    """How large a slide is, and what of that is known.

    Parameters
    ----------
    size_px0: width and height.
    mpp: µm per level-0 pixel.
    bounds_px0: left and top of the scanned area (``openslide.bounds-x, -y``), from which QuPath
        counts; 0, 0 if it is not known.
    size_is_known: if False, ``size_px0`` is how far the tiles reach.
    mpp_is_known: if False, places are in pixels of the finest scale instead of level 0, and ``mpp``
        is the finest scale's.
    """

    size_px0: tuple[int, int]
    mpp: Mpp
    bounds_px0: tuple[int, int] = (0, 0)
    size_is_known: bool = True
    mpp_is_known: bool = True


@dataclass(frozen=True, kw_only=True)
class TilesHeader:
    """A slide and the grid of its tiles, without the tiles.

    Parameters
    ----------
    scales: coarse to fine.
    tile_px: side of a tile at every scale.
    tiling: parameters of ``tile`` or of an import, as JSON.
    slide_digest: of the slide file (:func:`dasmil.slides.digest.sample_digest`), or of imported
        features; "" if it is not known.
    """

    slide_id: str
    extent: Extent
    scales: tuple[Scale, ...]
    tile_px: TilePx
    tiling: str = "{}"
    slide_digest: str = ""

    @property
    def scale_names(self) -> tuple[str, ...]:
        """Coarse to fine."""
        return tuple(scale.name for scale in self.scales)

    @cached_property
    def geometry(self) -> PyramidGrid:
        """The grid of the tiles; raises :class:`InputError` if there can be no such grid."""
        return PyramidGrid(self.scales, self.tile_px, self.extent.mpp)

    def header_fields(self) -> dict[str, Any]:
        """The values of these fields, to make another record of the same tiles."""
        return {each.name: getattr(self, each.name) for each in fields(TilesHeader)}


@dataclass(frozen=True)
class Tissue:
    """How much tissue a slide has, and how much of it the tiles hold.

    Parameters
    ----------
    mm2: area of the tissue, without pen and black; blurred tiles still count.
    covered: share of that area inside tiles of the finest scale, in 0..1; 0 without tissue.
    excluded: what each rule that was on left out: ``pen`` and ``black`` as shares of the slide's
        area, ``blur`` as a share of the finest tiles.
    """

    mm2: float = 0.0
    covered: float = 0.0
    excluded: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Tiles(TilesHeader):
    """The tiles of one slide, at all scales.

    Parameters
    ----------
    grid: per scale (N_s, 2) int32 row, col, in the order of the parents.
    parent: per scale but the coarsest (N_s,) int32, row in the next coarser scale's grid; -1 for a
        tile without a parent, which only imported tiles have.
    tissue: all zero in a bag, which does not record it.
    slide_state: size and time of the slide file when it was tiled
        (:func:`dasmil.slides.digest.file_state`); "" if not known.
    """

    grid: Mapping[str, Int32Array]
    parent: Mapping[str, Int32Array]
    tissue: Tissue = Tissue()
    slide_state: str = ""

    def num_tiles(self) -> dict[str, int]:
        """Tiles per scale."""
        return {name: len(self.grid[name]) for name in self.scale_names}

    def boxes_px0(self, scale: str) -> npt.NDArray[np.int64]:
        """(N_s, 4) left, top, right, bottom of the tiles of a scale, in level-0 pixels."""
        return self.geometry.boxes_px0(self.scale_names.index(scale), self.grid[scale])

    def rows_inside(self, start: int, stop: int, coarsest: str | None = None) -> dict[str, Rows]:
        """Rows of the tiles [start, stop) of one scale and of all tiles inside them.

        Children are contiguous, so there is one range per scale. Every tile must have a parent.

        Parameters
        ----------
        coarsest: the scale that ``start`` and ``stop`` count in; by default the coarsest of all.

        Returns
        -------
        First row and end per scale.
        """
        names = self.scale_names
        first = names.index(coarsest) if coarsest else 0
        rows = {names[first]: (start, stop)}
        for name in names[first + 1 :]:
            start, stop = np.searchsorted(self.parent[name], (start, stop)).tolist()
            rows[name] = (start, stop)
        return rows

    def kept_rows(self, left_out: Mapping[str, BoolArray]) -> dict[str, BoolArray]:
        """Per scale (N_s,) bool: the tiles that remain if some are left out.

        The tiles inside such a tile go with it, and so does a coarser tile that then holds none.
        Every tile must have a parent.

        Parameters
        ----------
        left_out: (N_s,) bool over the tiles of some scales.
        """
        names = self.scale_names
        kept = {n: ~left_out.get(n, np.zeros(len(self.grid[n]), bool)) for n in names}
        for coarse, fine in pairwise(names):
            kept[fine] &= kept[coarse][self.parent[fine]]
        for coarse, fine in reversed(list(pairwise(names))):
            with_child = np.zeros(len(kept[coarse]), bool)
            with_child[self.parent[fine][kept[fine]]] = True
            kept[coarse] = with_child
        return kept

    def select_rows(self, kept: Mapping[str, BoolArray]) -> "Tiles":
        """The tiles that :meth:`kept_rows` returns."""
        grid = {name: rows[kept[name]] for name, rows in self.grid.items()}
        parent = {}
        for coarse, fine in pairwise(self.scale_names):
            new_rows = np.cumsum(kept[coarse], dtype=np.int32) - 1
            parent[fine] = new_rows[self.parent[fine][kept[fine]]]
        return replace(self, grid=grid, parent=parent)

    def fault(self, complete: bool) -> str:
        """What is wrong with the tiles, as the end of a sentence; "" if nothing is.

        Parameters
        ----------
        complete: whether the tiles must be as ``tile`` lays them: each touches the slide and has a
            parent, and each coarser tile holds a finer one.
        """
        names = self.scale_names
        if set(self.grid) != set(names):
            return f"the grid of one of the scales {', '.join(names)} is missing"
        if set(self.parent) != set(names[1:]):
            return "every scale but the coarsest needs parents"
        for number, name in enumerate(names):
            above = self.grid[names[number - 1]] if number else None
            fault = self._grid_fault(number, within=complete)
            if not fault and above is not None:
                fault = self._parent_fault(number, above, complete)
            if fault:
                return f"{name}: {fault}"
        return ""

    def _grid_fault(self, number: int, within: bool) -> str:
        grid = self.grid[self.scales[number].name]
        if grid.ndim != 2 or grid.shape[1] != 2 or grid.dtype != np.int32 or (grid < 0).any():
            return "the grid must be non-negative int32"
        cells = grid.astype(np.int64)
        if len(np.unique((cells[:, 0] << 32) + cells[:, 1])) < len(cells):
            return "two tiles have the same place"
        step_px0 = self.tile_px * self.scales[number].mpp / self.extent.mpp
        if (int(cells.max(initial=0)) + 1) * step_px0 > MAX_EDGE_PX0:
            return "a tile is outside any slide"
        if within and (grid >= self.geometry.shape(number, self.extent.size_px0)).any():
            return "a tile is outside the slide"
        return ""

    def _parent_fault(self, number: int, above: Int32Array, complete: bool) -> str:
        name, coarser = self.scales[number].name, self.scales[number - 1].name
        grid, parent = self.grid[name], self.parent[name]
        if parent.shape != (len(grid),) or parent.dtype != np.int32:
            return "parents must be (N,) int32"
        if parent.min(initial=0) < -int(not complete) or parent.max(initial=-1) >= len(above):
            return f"a parent is not among the {len(above)} of {coarser}"
        if (parent[1:] < parent[:-1]).any():
            return "tiles are not in the order of their parents"
        held = parent >= 0
        ratio = self.geometry.ratio(number - 1, number)
        if not np.array_equal(above[parent[held]], grid[held] // ratio):
            return "a tile is not inside its parent"
        if complete and len(np.unique(parent)) < len(above):
            return "a coarser tile holds none"
        return ""
