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


@dataclass(frozen=True)
class Scale:
    """One magnification of the pyramid; its truth is the target ``mpp``, its name only a label."""

    name: str
    mpp: Mpp

    @classmethod
    def parse(cls, text: str) -> "Scale":
        """``"x20"`` is 0.5 µm/px, ``"x10"`` 1, ``"x2.5"`` 4: mpp = 10 / magnification."""
        match = re.fullmatch(r"x(\d+(?:\.\d+)?)", text)
        if match is None or float(match[1]) == 0:
            raise InputError(f"scale {text!r}: write a magnification such as x20, x10 or x2.5")
        return cls(text, Mpp(10 / float(match[1])))


def parse_scales(names: Iterable[str]) -> tuple[Scale, ...]:
    """Scales from coarse to fine; each must be a whole multiple of the next finer one."""
    scales = tuple(sorted(map(Scale.parse, names), key=lambda scale: -scale.mpp))
    if not scales:
        raise InputError("scales: give at least one, for example [x10,x20]")
    for coarse, fine in pairwise(scales):
        ratio = coarse.mpp / fine.mpp
        if round(ratio) < 2 or abs(ratio - round(ratio)) > 1e-6:
            raise InputError(
                f"scales {coarse.name} and {fine.name}: the ratio {ratio:g} is not a whole number "
                "of at least 2, so their tiles cannot nest"
            )
    return scales


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
    """

    scales: tuple[Scale, ...]
    tile_px: TilePx
    slide_mpp: Mpp

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

    def _count(self, scale: int, length_px0: int) -> int:
        count = int(length_px0 / (self.tile_px * self.scales[scale].mpp / self.slide_mpp))
        while self.edges_px0(scale, np.array(count)) < length_px0:  # edges are rounded
            count += 1
        return count
