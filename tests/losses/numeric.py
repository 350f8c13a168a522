"""Slopes by central differences, for what has been written down by hand in plain numbers."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def slope(function: Callable[[Array], float], at: Array, step: float = 1e-5) -> Array:
    """d function / d at, entry by entry."""
    found = np.zeros_like(at)
    for entry in np.ndindex(*at.shape):
        ahead, behind = at.copy(), at.copy()
        ahead[entry] += step
        behind[entry] -= step
        found[entry] = (function(ahead) - function(behind)) / (2 * step)
    return found
