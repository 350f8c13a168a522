"""Where tissue is: a mask from a thumbnail, and the share of it in any box. Pure functions."""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

MaskArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TissueParameters:
    """How tissue is told from glass; areas in µm², so that they hold for every scanner.

    Parameters
    ----------
    mpp:
        µm per pixel of the thumbnail on which tissue is sought.
    median_px:
        side of the median filter on the saturation, in thumbnail pixels (odd).
    min_saturation:
        Otsu's threshold on the 8-bit saturation is at least this: keeps an empty slide empty.
    max_saturation:
        and at most this: keeps pale tissue where a picture holds no glass at all and Otsu would
        divide pale tissue from dark.
    closing_um:
        gaps narrower than this are closed.
    min_tissue_um2:
        smaller pieces are dropped.
    min_hole_um2:
        smaller holes are filled; larger ones stay open.
    """

    mpp: float = 8.0
    median_px: int = 5
    min_saturation: int = 12
    max_saturation: int = 40
    closing_um: float = 32.0
    min_tissue_um2: float = 20_000.0
    min_hole_um2: float = 20_000.0


def tissue_mask(
    thumbnail: npt.NDArray[np.uint8], mpp: float, parameters: TissueParameters
) -> MaskArray:
    """Otsu on the saturation (paper, section 4), then connected components.

    Parameters
    ----------
    thumbnail: (H, W, 3) uint8 RGB.
    mpp: µm per thumbnail pixel.

    Returns
    -------
    (H, W) bool, True where tissue is.
    """
    saturation = cv2.cvtColor(thumbnail, cv2.COLOR_RGB2HSV)[..., 1]
    if min(saturation.shape) > parameters.median_px:
        saturation = cv2.medianBlur(saturation, parameters.median_px)
    otsu, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    threshold = np.clip(otsu, parameters.min_saturation, parameters.max_saturation)
    mask = np.asarray(saturation > threshold, dtype=np.uint8)

    diameter_px = 2 * round(parameters.closing_um / mpp / 2) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter_px, diameter_px))
    mask = np.asarray(cv2.morphologyEx(mask, cv2.MORPH_CLOSE, disc), dtype=np.uint8)

    tissue = _without_small_parts(mask, parameters.min_tissue_um2 / mpp**2)
    if not tissue.any():
        return tissue.astype(bool)  # else the whole of a tiny empty picture would be a small hole
    holes = _without_small_parts(1 - tissue, parameters.min_hole_um2 / mpp**2)
    return holes == 0


def _without_small_parts(mask: npt.NDArray[np.uint8], min_area_px: float) -> npt.NDArray[np.uint8]:
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = statistics[:, cv2.CC_STAT_AREA] >= min_area_px
    keep[0] = False  # the background
    return keep[labels].astype(np.uint8)


def tissue_fraction(
    mask: MaskArray, x_edges: npt.NDArray[np.floating], y_edges: npt.NDArray[np.floating]
) -> npt.NDArray[np.float64]:
    """Share of tissue in every cell of a grid, exact also where edges cut mask pixels.

    Parameters
    ----------
    mask: (H, W) bool.
    x_edges, y_edges: (columns + 1,) and (rows + 1,) edges of the cells in mask pixels.

    Returns
    -------
    (rows, columns) in 0..1.
    """
    height, width = mask.shape
    integral = np.zeros((height + 1, width + 1))
    integral[1:, 1:] = mask.cumsum(0, dtype=np.int64).cumsum(1)
    at_y = _interpolate(integral, y_edges)
    at_both = _interpolate(at_y.T, x_edges).T
    area = np.diff(y_edges)[:, None] * np.diff(x_edges)[None, :]
    return np.clip(np.diff(np.diff(at_both, axis=0), axis=1) / area, 0, 1)


def _interpolate(
    table: npt.NDArray[np.float64], at: npt.NDArray[np.floating]
) -> npt.NDArray[np.float64]:
    """Rows of ``table`` at fractional positions."""
    at = np.clip(at, 0, len(table) - 1)
    low = np.minimum(at.astype(np.int64), len(table) - 2)
    part = (at - low)[:, None]
    return np.asarray(table[low] * (1 - part) + table[low + 1] * part)
