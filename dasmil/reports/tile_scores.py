"""Tables of a slide's tiles with scores: those of ``predict`` and of the instance truth."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
from torch import Tensor

from dasmil.bags import Bag
from dasmil.tables import write_csv

PLACE = ("scale", "row", "col", "x0_px0", "y0_px0", "size_px0")
ROWS_AT_ONCE = 65_536


def write_tiles(
    path: Path,
    bag: Bag,
    scores: Mapping[str, Mapping[str, Tensor | npt.NDArray[Any]]],
    **constant: str,
) -> None:
    """Write one row per tile: its place and its scores.

    Parameters
    ----------
    scores: per scale the columns, (N_s,) each, by name; every scale has the same ones.
    constant: columns before them with the same value in every row.
    """
    names = [*constant, *PLACE, *next(iter(scores.values()))]

    def rows() -> Iterator[dict[str, Any]]:
        for scale, columns in scores.items():
            parts = (bag.grid[scale], bag.boxes_px0(scale), *columns.values())
            # in blocks, because Python's numbers take ten times the memory
            for start in range(0, len(parts[0]), ROWS_AT_ONCE):
                block = (part[start : start + ROWS_AT_ONCE].tolist() for part in parts)
                for (row, col), (left, top, right, _), *values in zip(*block, strict=True):
                    cells = [*constant.values(), scale, row, col, left, top, right - left, *values]
                    yield dict(zip(names, cells, strict=True))

    write_csv(path, names, rows())
