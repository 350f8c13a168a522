"""The geometry of a mil4wsi graph: how large its tiles are, and whether children nest."""

from math import gcd

import numpy as np

from dasmil.errors import InputError
from dasmil.interop.features.common_grid import IntArray


def find_side_px0(
    place: IntArray,
    scale: IntArray,
    parent: IntArray,
    edges: IntArray,
    ratios: IntArray,
    default: int,
) -> int:
    """Side of a finest tile in level-0 pixels: the distance between neighbours.

    Without neighbours it follows from the places of children in their parents; without children it
    is ``default``.

    Parameters
    ----------
    place: (N, 2) x, y of the top left corner in level-0 pixels.
    scale: (N,) number of the scale, 0 is the coarsest.
    parent: (N,) row of the parent, -1 for none.
    edges: (2, E) rows of neighbours; edges between scales are ignored.
    ratios: (M,) side of each scale's tiles in sides of the finest.

    Raises
    ------
    InputError
        if the distances between neighbours differ.
    """
    source, target = edges[:, scale[edges[0]] == scale[edges[1]]]
    distance = np.abs(place[source] - place[target]) / ratios[scale[source], None]
    distances = np.unique(distance[distance > 0])
    if len(distances) > 1 or (distances % 1 != 0).any():
        some = ", ".join(f"{value:g}" for value in distances[:3])
        raise InputError(f"its neighbours lie {some} level-0 px apart, counted in finest tiles")
    if len(distances) == 1:
        return int(distances[0])
    child = np.flatnonzero(parent >= 0)
    inner = (place[child] - place[parent[child]]) // ratios[scale[child], None]
    return gcd(*inner.ravel().tolist()) or default


def require_nested(place: IntArray, scale: IntArray, parent: IntArray, sides: IntArray) -> None:
    """Refuse children that do not lie inside their parent, or not on its grid.

    Parameters
    ----------
    place, scale, parent: see :func:`find_side_px0`.
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
