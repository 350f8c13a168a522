"""Units of length and the integer grid on which the tiles of all scales lie.

Three lengths never mix: level-0 pixels of a slide (suffix ``_px0``), pixels of a tile as the
network sees it (``_px``) and micrometres (``_um``). An mpp (µm per pixel) converts between them.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NewType

import numpy as np
import numpy.typing as npt

from dasmil.errors import InputError

Mpp = NewType("Mpp", float)  # µm per pixel
Px0 = NewType("Px0", int)  # pixels of OpenSlide's level 0
TilePx = NewType("TilePx", int)  # pixels of a tile

IntArray = npt.NDArray[np.integer]

SCALE_NAME = re.compile(r"x(?=[0.]*[1-9])([0-9]{1,6}(?:\.[0-9]{1,6})?)")
MAX_PX = 2**31  # along a slide, and of what else counts pixels
MPPS = (1e-6, 1e6)  # between these lies that of every slide and scale
MAX_EDGE_PX0 = 2**53  # up to here a float counts pixels one by one


@dataclass(frozen=True)
class Scale:
    """One magnification of the pyramid; its truth is the target ``mpp``, its name only a label.

    Raises
    ------
    InputError
        if the name is not one such as x20, or the mpp is impossible.
    """

    name: str
    mpp: Mpp

    def __post_init__(self) -> None:
        if SCALE_NAME.fullmatch(self.name) is None:
            raise InputError(f"scale {self.name!r}: write a magnification such as x20, x10 or x2.5")
        check_mpp(self.mpp, f"scale {self.name}")

    @classmethod
    def parse(cls, text: str) -> "Scale":
        """``"x20"`` is 0.5 µm/px, ``"x10"`` 1, ``"x2.5"`` 4: mpp = 10 / magnification."""
        match = SCALE_NAME.fullmatch(text)
        return cls(text, Mpp(10 / float(match[1]) if match else 1.0))


def check_mpp(mpp: float, what: str) -> None:
    """Raise :class:`InputError` unless a slide or a scale can have so many µm per pixel."""
    if not MPPS[0] <= mpp <= MPPS[1]:
        raise InputError(f"{what}: {mpp:g} µm per pixel are impossible")


def parse_scales(names: Iterable[str]) -> tuple[Scale, ...]:
    """Scales from coarse to fine; each must be a whole multiple of the next finer one."""
    scales = tuple(sorted(map(Scale.parse, names), key=lambda scale: -scale.mpp))
    require_nesting(scales)
    return scales


def require_nesting(scales: Sequence[Scale], tolerance: float = 1e-6) -> None:
    """Raise :class:`InputError` unless scales go from coarse to fine by whole ratios."""
    if not scales:
        raise InputError("scales: give at least one, for example [x10,x20]")
    for coarse, fine in pairwise(scales):
        ratio = coarse.mpp / fine.mpp
        if round(ratio) < 2 or abs(ratio - round(ratio)) > tolerance:
            raise InputError(
                f"scales {coarse.name} and {fine.name}: the ratio {ratio:g} is not a whole number "
                "of at least 2, so their tiles cannot nest"
            )


@dataclass(frozen=True)
class PyramidGrid:
    """Where tile (row, col) of a scale lies in a slide.

    The grid starts at the slide's origin. A tile's edges are whole multiples of the finest scale's
    edges, rounded once, so children fill their parent exactly and no two tiles overlap:
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
        if no tiles of these can be laid.
    """

    scales: tuple[Scale, ...]
    tile_px: TilePx
    slide_mpp: Mpp

    def __post_init__(self) -> None:
        check_mpp(self.slide_mpp, "slide")
        if not 1 <= self.tile_px < MAX_PX:
            raise InputError(f"tile_px: {self.tile_px} is not a positive number of pixels")
        require_nesting(self.scales, tolerance=1e-3)  # others round the mpp of their scales
        step_px0 = self.tile_px * self.scales[-1].mpp / self.slide_mpp
        if not 0.5 <= step_px0 < MAX_PX:
            raise InputError(f"tiles of {step_px0:g} level-0 px are impossible")

    def ratio(self, coarse: int, fine: int) -> int:
        """How many tiles of scale number ``fine`` fit along one of scale number ``coarse``."""
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

        The last ones may reach over its right and lower border; each touches the slide, and so
        does its parent.

        Parameters
        ----------
        size_px0: the slide's width and height.
        """
        width_px0, height_px0 = size_px0
        return self._count(scale, height_px0), self._count(scale, width_px0)

    def fault(
        self,
        scale: int,
        grid: IntArray,
        parent: IntArray | None,
        above: IntArray | None,
        orphans: bool = False,
    ) -> str:
        """What is wrong with the tiles of a scale, as the end of a sentence; "" if nothing is.

        Parameters
        ----------
        grid: row, col of each tile; should be (N, 2) int32.
        parent: row of each tile's parent in ``above``, -1 for none; should be (N,) int32. None for
            the coarsest scale.
        above: (M, 2) row, col of the next coarser scale's tiles; None for the coarsest scale.
        orphans: whether a tile may have no parent.
        """
        if grid.ndim != 2 or grid.shape[1] != 2 or grid.dtype != np.int32 or (grid < 0).any():
            return "the grid must be non-negative int32"
        cells = grid.astype(np.int64)
        if len(np.unique((cells[:, 0] << 32) + cells[:, 1])) < len(cells):
            return "two tiles lie in the same place"
        step_px0 = self.tile_px * self.scales[scale].mpp / self.slide_mpp
        if (int(cells.max(initial=0)) + 1) * step_px0 > MAX_EDGE_PX0:
            return "a tile lies on no slide"
        if parent is None or above is None:
            return ""
        if parent.shape != (len(grid),) or parent.dtype != np.int32:
            return "parents must be (N,) int32"
        if len(parent) == 0:
            return ""
        if parent.min() < -int(orphans) or parent.max() >= len(above):
            return f"a parent is not among the {len(above)} of {self.scales[scale - 1].name}"
        if (parent[1:] < parent[:-1]).any():
            return "tiles do not lie in the order of their parents"
        held = parent >= 0
        if not np.array_equal(above[parent[held]], grid[held] // self.ratio(scale - 1, scale)):
            return "a tile does not lie inside its parent"
        return ""

    def _count(self, scale: int, length_px0: int) -> int:
        count = int(length_px0 / (self.tile_px * self.scales[scale].mpp / self.slide_mpp))
        while self.edges_px0(scale, np.array(count)) < length_px0:  # edges are rounded
            count += 1
        return count
