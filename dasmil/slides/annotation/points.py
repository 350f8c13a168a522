"""Marked points of a slide, and the number of points per tile."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dasmil.errors import InputError
from dasmil.geometry import Extent
from dasmil.slides.annotation.limits import TABLE_BYTES, read_file, refuse_costly_text, shorten
from dasmil.tables import read_csv, to_number

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
MaskArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Points:
    """Marked points; all count, whatever the other columns of their table hold.

    Parameters
    ----------
    xy_px0: (P, 2).
    """

    xy_px0: FloatArray

    @property
    def is_empty(self) -> bool:
        return len(self.xy_px0) == 0

    def overlap(self, boxes_px0: IntArray) -> IntArray:
        """(N, 4) left, top, right, bottom → (N,) points in each; left and top edge are inside."""
        x, y = self.xy_px0[np.argsort(self.xy_px0[:, 0])].T
        first, end = np.searchsorted(x, boxes_px0[:, 0]), np.searchsorted(x, boxes_px0[:, 2])
        counts = [
            np.count_nonzero((y[i:j] >= top) & (y[i:j] < bottom))
            for i, j, top, bottom in zip(first, end, boxes_px0[:, 1], boxes_px0[:, 3], strict=True)
        ]
        return np.array(counts, dtype=np.int64)

    def positive(self, overlap: FloatArray | IntArray, min_share: float = 0.5) -> MaskArray:
        """(N,) bool: at least one point is in the tile; ``min_share`` only concerns areas."""
        return overlap > 0


def read_points(path: Path, extent: Extent) -> Points:
    """Read a table with the columns x and y; other columns are ignored."""
    refuse_costly_text(path, read_file(path).decode("latin-1"), TABLE_BYTES)
    columns, rows = read_csv(path)
    if not {"x", "y"} <= set(columns):
        raise InputError(f"{path}: points need the columns x and y, in level-0 pixels; add them")
    try:
        xy = np.array([(to_number(row["x"]), to_number(row["y"])) for row in rows]).reshape(-1, 2)
    except ValueError as error:
        raise InputError(f"{path}: {shorten(error)}; x and y are level-0 pixels") from None
    return points_of(path, xy, extent)


def points_of(path: Path, xy_px0: FloatArray, extent: Extent) -> Points:
    """Points (P, 2) of a file; raises :class:`InputError` if one is outside the slide."""
    limit = np.array(extent.size_px0) if extent.size_is_known else np.full(2, np.inf)
    outside = ~((xy_px0 >= 0) & (xy_px0 <= limit)).all(axis=1)
    if outside.any():
        x, y = xy_px0[outside][0]
        raise InputError(
            f"{path}: the point {x:g},{y:g} is outside the slide of {extent.size_px0[0]} x "
            f"{extent.size_px0[1]} px; x and y are level-0 pixels"
        )
    return Points(xy_px0)
