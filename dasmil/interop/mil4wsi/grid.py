"""Tiles that lie on several grids, put on one.

CLAM lays its grid anew at the bounding box of every piece of tissue, so the tiles of a slide share
no grid of integers; those of one piece do.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, product
from math import gcd

import numpy as np
import numpy.typing as npt

from dasmil.errors import InputError

IntArray = npt.NDArray[np.int64]
Key = tuple[int, ...]  # scale and two coordinates


def finest_side(
    place: IntArray,
    scale: IntArray,
    parent: IntArray,
    edges: IntArray,
    ratios: IntArray,
    default: int,
) -> int:
    """Side of a finest tile in level-0 pixels: how far neighbours lie apart.

    Without neighbours the places of children in their parents tell, without those ``default``.

    Parameters
    ----------
    place: (N, 2) x, y of the top left corner in level-0 pixels.
    scale: (N,) number of the scale, 0 is the coarsest.
    parent: (N,) row of the parent, -1 for none.
    edges: (2, E) rows of neighbours; edges between scales say nothing.
    ratios: (M,) side of each scale's tiles in sides of the finest.

    Raises
    ------
    InputError
        when neighbours lie differently far apart.
    """
    source, target = edges[:, scale[edges[0]] == scale[edges[1]]]
    distance = np.abs(place[source] - place[target]) / ratios[scale[source], None]
    found = np.unique(distance[distance > 0])
    if len(found) > 1 or (found % 1 != 0).any():
        some = ", ".join(f"{value:g}" for value in found[:3])
        raise InputError(f"its neighbours lie {some} level-0 px apart, counted in finest tiles")
    if len(found) == 1:
        return int(found[0])
    child = np.flatnonzero(parent >= 0)
    inner = (place[child] - place[parent[child]]) // ratios[scale[child], None]
    return gcd(*inner.ravel().tolist()) or default


def require_nested(place: IntArray, scale: IntArray, parent: IntArray, sides: IntArray) -> None:
    """Refuse children that do not lie inside their parent, or not on its grid.

    Parameters
    ----------
    place, scale, parent: see :func:`finest_side`.
    sides: (M,) side of each scale's tiles in level-0 pixels.
    """
    child = np.flatnonzero(parent >= 0)
    inner = place[child] - place[parent[child]]
    own, outer = sides[scale[child], None], sides[scale[parent[child]], None]
    astray = ((inner < 0) | (inner >= outer) | (inner % own != 0)).any(1)
    if astray.any():
        x, y = place[child[astray][0]]
        raise InputError(
            f"{astray.sum()} of its tiles, the first at {x},{y}, do not lie inside their parent "
            f"on a grid of {sides[-1]} level-0 px"
        )


def place_on_grid(
    place: IntArray, scale: IntArray, parent: IntArray, sides: IntArray
) -> tuple[IntArray, IntArray]:
    """Cells on one grid for tiles that lie on several.

    Tiles on one grid form a group and keep their places among themselves. The largest group comes
    first; each is moved as a whole, and by the least that brings it onto the common grid without
    its taking or touching another's cell. So no edge is won or lost inside a group, none is won
    between groups, and children stay inside their parents.

    Parameters
    ----------
    place, scale, parent, sides: see :func:`require_nested`; every child lies inside its parent.

    Returns
    -------
    (N, 2) row, col of each tile at its scale, never negative; (N, 2) by how much x, y was moved.
    """
    lift = -np.minimum(place.min(0) // sides[0], 0) * sides[0]
    place = place + lift
    groups = _groups(place, scale, parent, sides)
    moved = np.zeros_like(place)
    taken: set[Key] = set()
    for group in sorted(groups, key=lambda group: -len(group.rows)):
        rows = np.array(group.rows)
        for shift in _outward(group):
            cells = (place[rows] + shift) // sides[scale[rows], None]
            if cells.min() >= 0 and taken.isdisjoint(_keys(scale[rows], cells)):
                break
        moved[rows] = shift
        for step in product((-1, 0, 1), repeat=2) if len(groups) > 1 else ():
            taken.update(_keys(scale[rows], cells + step))
    return ((place + moved) // sides[scale, None])[:, ::-1], moved + lift


@dataclass
class _Group:
    """Tiles on one grid.

    Parameters
    ----------
    x, y: place of its first tile.
    side: of its first, and coarsest, tile: by this it may be shifted.
    rows: of all its tiles.
    keys: scale, x and y of all its tiles.
    """

    x: int
    y: int
    side: int
    rows: list[int] = field(default_factory=list)
    keys: set[Key] = field(default_factory=set)


def _groups(place: IntArray, scale: IntArray, parent: IntArray, sides: IntArray) -> list[_Group]:
    """A tile without parent, with all inside it, joins a group on whose grid it lies.

    Where there is none, or its place there is taken, it is the first of a new one.
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
    """Rows of each tile without parent and of all that lies inside it; coarse tiles first."""
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


def _outward(group: _Group) -> Iterator[IntArray]:
    """Shifts that bring a group onto the grid, the shortest (along the longer axis) first."""
    place = np.array([group.x, group.y])
    nearest = (place + group.side // 2) // group.side * group.side - place
    for radius in count():
        ring = product(range(-radius, radius + 1), repeat=2)
        shifts = [
            nearest + group.side * np.array(step) for step in ring if max(map(abs, step)) == radius
        ]
        yield from sorted(shifts, key=lambda shift: (np.abs(shift).max(), np.abs(shift).sum()))
