"""Move tiles that lie on several grids onto one.

CLAM starts a grid at the bounding box of each piece of tissue. So the tiles of a slide share no
grid of integers; the tiles of one piece do.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, product

import numpy as np
import numpy.typing as npt

from dasmil.errors import InputError

IntArray = npt.NDArray[np.int64]
Key = tuple[int, ...]  # scale and two coordinates


def place_on_grid(
    place: IntArray, scale: IntArray, parent: IntArray, sides: IntArray
) -> tuple[IntArray, IntArray]:
    """Find cells on one grid for tiles that lie on several.

    Tiles on one grid form a group and keep their places relative to each other. The largest group
    comes first. Each group moves as a whole, by the shortest shift that brings it onto the common
    grid and keeps it from taking or touching a cell of another group. So no edge is lost or added
    inside a group, none is added between groups, and children stay inside their parents.

    Parameters
    ----------
    place: (N, 2) x, y of the top left corner.
    scale: (N,) number of the scale, 0 is the coarsest.
    parent: (N,) row of the parent, -1 for none; every child lies inside its parent.
    sides: (M,) side of each scale's tiles, in the unit of the places.

    Returns
    -------
    (N, 2) row, col of each tile at its scale, never negative; (N, 2) by how much x, y was moved.
    """
    if _lie_on_grid(place, scale, sides):  # what follows finds the same, slower
        return (place // sides[scale, None])[:, ::-1], np.zeros_like(place)
    lift = -np.minimum(place.min(0) // sides[0], 0) * sides[0]
    place = place + lift
    groups = _group_tiles(place, scale, parent, sides)
    moved = np.zeros_like(place)
    taken: set[Key] = set()
    for group in sorted(groups, key=lambda group: -len(group.rows)):
        rows = np.array(group.rows)
        for shift in _shifts_outward(group):
            cells = (place[rows] + shift) // sides[scale[rows], None]
            if cells.min() >= 0 and taken.isdisjoint(_keys(scale[rows], cells)):
                break
        moved[rows] = shift
        for step in product((-1, 0, 1), repeat=2) if len(groups) > 1 else ():
            taken.update(_keys(scale[rows], cells + step))
    return ((place + moved) // sides[scale, None])[:, ::-1], moved + lift


def _lie_on_grid(place: IntArray, scale: IntArray, sides: IntArray) -> bool:
    """Whether all tiles lie on the grid of the origin, each in a cell of its own."""
    if (place < 0).any() or (place % sides[scale, None] != 0).any():
        return False
    return len(set(_keys(scale, place))) == len(place)


@dataclass
class _Group:
    """Tiles on one grid.

    Parameters
    ----------
    x, y: place of its first tile.
    side: of its first and coarsest tile; the group may be shifted by multiples of it.
    rows: of all its tiles.
    keys: scale, x and y of all its tiles.
    """

    x: int
    y: int
    side: int
    rows: list[int] = field(default_factory=list)
    keys: set[Key] = field(default_factory=set)


def _group_tiles(
    place: IntArray, scale: IntArray, parent: IntArray, sides: IntArray
) -> list[_Group]:
    """Put each tile without a parent, with all tiles inside it, into a group on whose grid it lies.

    It starts a new group if there is none, or if its place in that group is taken.
    """
    keys = _keys(scale, place)
    groups: list[_Group] = []
    for root, rows in _trees(scale, parent):
        tiles = {keys[row] for row in rows}
        number, x, y = keys[root]
        if len(tiles) < len(rows):
            raise InputError(f"two tiles inside the one at {x},{y} lie in the same place")
        side = int(sides[number])
        fitting = [
            group
            for group in groups
            if (x - group.x) % side == 0 == (y - group.y) % side and tiles.isdisjoint(group.keys)
        ]
        if not fitting:
            fitting = [_Group(x, y, side)]
            groups += fitting
        group = fitting[0]
        if number > 0 and len(fitting) > 1:
            group = min(fitting, key=lambda g: np.abs(place[g.rows] - place[root]).max(1).min())
        group.rows += rows
        group.keys |= tiles
    return groups


def _trees(scale: IntArray, parent: IntArray) -> list[tuple[int, list[int]]]:
    """Row of each tile without a parent, with the rows of all tiles inside it; coarse first."""
    root = np.arange(len(scale))
    for number in range(1, scale.max() + 1):
        rows = np.flatnonzero((scale == number) & (parent >= 0))
        root[rows] = root[parent[rows]]
    trees = defaultdict(list)
    for row, first in enumerate(root.tolist()):
        trees[first].append(row)
    return sorted(trees.items(), key=lambda tree: scale[tree[0]])


def _keys(scale: IntArray, pairs: IntArray) -> list[Key]:
    return list(zip(scale.tolist(), *pairs.T.tolist(), strict=True))


def _shifts_outward(group: _Group) -> Iterator[IntArray]:
    """Shifts that bring a group onto the grid, the shortest (along the longer axis) first."""
    place = np.array([group.x, group.y])
    nearest = (place + group.side // 2) // group.side * group.side - place
    for radius in count():
        ring = product(range(-radius, radius + 1), repeat=2)
        shifts = [
            nearest + group.side * np.array(step) for step in ring if max(map(abs, step)) == radius
        ]
        yield from sorted(shifts, key=lambda shift: (np.abs(shift).max(), np.abs(shift).sum()))
