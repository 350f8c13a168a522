"""The tiles of one slide, as a tool placed them, and the bag they become."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dasmil.bags import Bag, ExtractorCard
from dasmil.geometry import Extent, Tiles
from dasmil.interop.features.common_grid import IntArray, place_on_grid
from dasmil.units import Mpp, Scale, TilePx


def assemble_bag(
    cards: Mapping[str, ExtractorCard],
    *,
    slide_id: str,
    scales: tuple[Scale, ...],
    tile_px: int,
    tiling: str,
    slide_digest: str,
    features: Sequence[Tensor],
    place: IntArray,
    scale: IntArray,
    parent: IntArray,
    sides: IntArray,
    unit_px0: float = 1.0,
    size_px0: tuple[int, int] | None = None,
    mpp_is_known: bool = True,
) -> tuple[Bag, dict[str, Any]]:
    """The bag of a slide, and its columns of import.csv; scales run from coarse to fine.

    Parameters
    ----------
    cards: of the extractors, per scale.
    tile_px: side of a tile as the extractors saw it.
    tiling: for the header: JSON that identifies the import.
    slide_digest: of the features (:func:`~dasmil.interop.features.digest.features_digest`).
    features: per scale (N_s, D_s) float16 or float32, in the order of the rows of that scale.
    place: (N, 2) x, y of the top left corner of each tile, in units of ``unit_px0``.
    scale: (N,) number of the scale, 0 is the coarsest.
    parent: (N,) row of the parent, in the next coarser scale; -1 for none.
    sides: (M,) side of each scale's tiles, in units of ``unit_px0``.
    unit_px0: level-0 pixels per unit.
    size_px0: width and height of the slide; None if they are not known.
    mpp_is_known: as in :class:`~dasmil.geometry.Extent`.
    """
    cells, moved = place_on_grid(place, scale, parent, sides)
    rows, parents = order_by_parents(scale, parent, len(scales))
    names = [each.name for each in scales]
    side_px0 = float(sides[-1] * unit_px0)
    ends = ((cells + 1) * sides[scale, None]).max(0, initial=0)
    height, width = np.maximum(1, np.ceil(ends * unit_px0)).astype(int).tolist()
    tiles = Tiles(
        slide_id=slide_id,
        extent=Extent(
            size_px0=size_px0 or (width, height),
            mpp=Mpp(tile_px * scales[-1].mpp / side_px0),
            size_is_known=size_px0 is not None,
            mpp_is_known=mpp_is_known,
        ),
        scales=scales,
        tile_px=TilePx(tile_px),
        tiling=tiling,
        slide_digest=slide_digest,
        grid={n: cells[r].astype(np.int32) for n, r in zip(names, rows, strict=True)},
        parent=dict(zip(names[1:], parents, strict=True)),
    )
    own = [np.flatnonzero(scale == number) for number in range(len(names))]
    ordered_features = {
        name: rows_of_scale[np.searchsorted(of_scale, ordered)]
        for name, rows_of_scale, of_scale, ordered in zip(names, features, own, rows)
    }
    bag = Bag(tiles, ordered_features, dict(cards))
    distance_px0 = np.abs(moved).max(1, initial=0) * unit_px0
    return bag, {
        **{f"tiles/{name}": number for name, number in bag.num_tiles().items()},
        **count_unrelated(scale, parent, len(names)),
        "moved": int((distance_px0 > 0).sum()),
        "max_moved_px0": round(float(distance_px0.max(initial=0)), 1),
    }


def order_by_parents(
    scale: IntArray, parent: IntArray, num_scales: int
) -> tuple[list[IntArray], list[npt.NDArray[np.int32]]]:
    """Sort the tiles of each scale by their parents.

    Returns
    -------
    Per scale the rows of its tiles; per scale but the coarsest the position of each one's parent
    among the tiles of the next coarser scale.
    """
    rows = [np.flatnonzero(scale == 0)]
    parents = []
    for number in range(1, num_scales):
        position = np.full(len(scale) + 1, -1, dtype=np.int32)  # the last entry is read by -1
        position[rows[-1]] = np.arange(len(rows[-1]))
        tiles = np.flatnonzero(scale == number)
        order = np.argsort(position[parent[tiles]], kind="stable")
        rows.append(tiles[order])
        parents.append(position[parent[tiles[order]]])
    return rows, parents


def count_unrelated(scale: IntArray, parent: IntArray, num_scales: int) -> dict[str, int]:
    """The number of tiles without a parent (orphans), and of coarser ones without a child."""
    has_child = np.zeros(len(scale) + 1, dtype=bool)  # the last entry is written by -1
    has_child[parent] = True
    return {
        "orphans": int(((scale > 0) & (parent < 0)).sum()),
        "childless": int(((scale < num_scales - 1) & ~has_child[:-1]).sum()),
    }
