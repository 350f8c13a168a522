"""Find tiles that are out of focus. Every finest tile is read once, at about 1 µm/px."""

import cv2
import numpy as np
import numpy.typing as npt

from dasmil.geometry import Tiles
from dasmil.slides.artefacts import ArtefactParameters
from dasmil.slides.reader import RgbArray, Slide

RUN_TILES = 16  # adjacent tiles per read: up to 32 MB of a slide at 0.25 µm/px
SIGMAS_PX = (0.7, 1.4, 2.8)  # they bound the two bands that are compared
EDGE_PX = 8  # ignored left and right of a tile: the filters reach its neighbours there
FLOOR = 0.5  # grey levels squared, of noise and JPEG, so that even tiles have no detail


def detail(strip: RgbArray, num_tiles: int) -> npt.NDArray[np.float64]:
    """Variance of structures of about 1 pixel, divided by that of about 2 pixels.

    Tissue in focus has details of every size. A blur removes the small ones first, while stain and
    contrast change both. So one threshold of the ratio fits all laboratories, unlike a threshold of
    the variance of the Laplacian.

    Parameters
    ----------
    strip: (side, num_tiles · side, 3) uint8 RGB, tiles side by side.

    Returns
    -------
    (num_tiles,), at least 0; 0 for an even tile.
    """
    grey = cv2.cvtColor(strip, cv2.COLOR_RGB2GRAY).astype(np.float32)
    small, middle, large = (cv2.GaussianBlur(grey, (0, 0), sigma) for sigma in SIGMAS_PX)
    side = grey.shape[0]
    edge = min(EDGE_PX, side // 4)
    fine, coarse = (
        np.asarray(band).reshape(side, num_tiles, -1)[:, :, edge : side - edge].var(axis=(0, 2))
        for band in (small - middle, middle - large)
    )
    return np.asarray(fine / (coarse + FLOOR))


def blurred_tiles(
    slide: Slide, tiles: Tiles, parameters: ArtefactParameters
) -> npt.NDArray[np.bool_]:
    """(N,) bool over the tiles of the finest scale, True for too little detail."""
    finest = tiles.scales[-1]
    mpp = max(parameters.blur_mpp, slide.mpp)
    side_px = max(1, round(tiles.tile_px * finest.mpp / mpp))
    boxes_px0 = tiles.boxes_px0(finest.name)
    blurred = np.zeros(len(boxes_px0), bool)
    for run in _runs(tiles.grid[finest.name]):
        box_px0 = (*boxes_px0[run[0], :2], *boxes_px0[run[-1], 2:])
        strip = slide.read(box_px0, (len(run) * side_px, side_px))
        strip = _mirrored_outside(strip, box_px0, slide.size_px0)
        blurred[run] = detail(strip, len(run)) < parameters.min_detail
    return blurred


def _mirrored_outside(
    strip: RgbArray, box_px0: tuple[int, ...], size_px0: tuple[int, int]
) -> RgbArray:
    """The strip, with the part beyond the slide's border replaced by a mirror image.

    Otherwise the edge to the white outside, which is always sharp, would count as detail.
    """
    height, width = strip.shape[:2]
    left, top, right, bottom = (int(edge) for edge in box_px0)
    inside_x = max(1, int((size_px0[0] - left) / (right - left) * width))
    inside_y = max(1, int((size_px0[1] - top) / (bottom - top) * height))
    if inside_x >= width and inside_y >= height:
        return strip
    inside = strip[:inside_y, :inside_x]
    below, behind = max(0, height - inside_y), max(0, width - inside_x)
    return np.pad(inside, ((0, below), (0, behind), (0, 0)), "symmetric")


def _runs(grid: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int64]]:
    """Rows of ``grid`` in runs of adjacent tiles, at most :data:`RUN_TILES` each."""
    if len(grid) == 0:
        return []
    order = np.lexsort((grid[:, 1], grid[:, 0]))
    row, column = grid[order].T
    aligned = column // RUN_TILES
    new = (np.diff(row) != 0) | (np.diff(column) != 1) | (np.diff(aligned) != 0)
    return np.split(order, np.flatnonzero(new) + 1)
