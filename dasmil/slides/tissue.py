"""Where tissue is: a mask from a thumbnail, and the share of it in any box. Pure functions."""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

MaskArray = npt.NDArray[np.bool_]

BAND_PX = 256  # rows of a picture that are worked on at a time


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
    saturation = cv2.extractChannel(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2HSV), 1)
    if min(saturation.shape) > parameters.median_px:
        saturation = np.asarray(cv2.medianBlur(saturation, parameters.median_px), dtype=np.uint8)
    otsu = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0]
    threshold = np.clip(otsu, parameters.min_saturation, parameters.max_saturation)
    mask = (saturation > threshold).view(np.uint8)
    del saturation  # of a large slide, memory counts from here on

    diameter_px = 2 * round(parameters.closing_um / mpp / 2) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter_px, diameter_px))
    cv2.morphologyEx(mask, cv2.MORPH_CLOSE, disc, dst=mask)

    _drop_small_parts(mask, parameters.min_tissue_um2 / mpp**2)
    if not mask.any():
        return mask.view(bool)  # else the whole of a tiny empty picture would be a small hole
    mask ^= 1
    _drop_small_parts(mask, parameters.min_hole_um2 / mpp**2)
    mask ^= 1
    return mask.view(bool)


def _drop_small_parts(mask: npt.NDArray[np.uint8], min_area_px: float) -> None:
    """Set to 0, in place."""
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = np.asarray(statistics[:, cv2.CC_STAT_AREA] >= min_area_px, dtype=np.uint8)
    keep[0] = 0  # the background
    for top in range(0, len(mask), BAND_PX):  # NumPy makes 8-byte indices of the labels
        mask[top : top + BAND_PX] = keep[labels[top : top + BAND_PX]]


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
    rows, above, part_y = _between(y_edges, height)
    columns, before, part_x = _between(x_edges, width)
    # tissue above and left of a pixel's corner, at the corners that are asked for: the table of all
    # takes 8 bytes a pixel
    integral = np.empty((len(rows), len(columns)))
    count, counted = np.zeros(width + 1, np.int64), 0
    for number, row in enumerate(rows.tolist()):
        count[1:] += mask[counted:row].sum(0)
        integral[number] = count.cumsum()[columns]
        counted = row
    at_y = integral[above] * (1 - part_y)[:, None] + integral[above + 1] * part_y[:, None]
    at_both = at_y[:, before] * (1 - part_x) + at_y[:, before + 1] * part_x
    area = np.diff(y_edges)[:, None] * np.diff(x_edges)[None, :]
    return np.clip(np.diff(np.diff(at_both, axis=0), axis=1) / area, 0, 1)


def _between(
    edges: npt.NDArray[np.floating], length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Corners of pixels on both sides of each edge.

    Returns
    -------
    The corners in order, for each edge the position there of the one before it (the next one is the
    one behind it), and how far it lies between the two, in 0..1.
    """
    at = np.clip(edges, 0, length)
    low = np.minimum(at.astype(np.int64), length - 1)
    corners = np.unique([low, low + 1])
    return corners, np.searchsorted(corners, low), at - low
