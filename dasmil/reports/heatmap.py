"""Scores of a slide's tiles drawn over its thumbnail."""

from collections.abc import Mapping

import cv2
import numpy as np
import numpy.typing as npt

from dasmil.bags import Bag
from dasmil.errors import InputError
from dasmil.slides.cohort import SlideRow
from dasmil.slides.digest import sample_digest
from dasmil.slides.qc import caption
from dasmil.slides.reader import RgbArray, Slide

CANVAS_PX = 800  # longer side of the slide's picture
OPACITY = 0.55
BAR_PX = 18  # width of the colour bar
BAR_LABELS_PX = 46


def slide_canvas(row: SlideRow, bag: Bag) -> tuple[RgbArray, str]:
    """The slide's thumbnail, or a white canvas of its shape if the slide cannot be read.

    Returns
    -------
    (H, W, 3) uint8 RGB, and the reason for the white canvas ("" if it is the thumbnail).
    """
    width_px0, height_px0 = bag.tiles.extent.size_px0
    factor = CANVAS_PX / max(width_px0, height_px0)
    size = (max(1, round(width_px0 * factor)), max(1, round(height_px0 * factor)))
    try:
        if bag.reader and bag.tiles.slide_digest not in ("", sample_digest(row.path)):
            raise InputError(f"{row.path}: not the slide file of the bag; tile and embed it again")
        with Slide(row) as slide:
            picture = slide.thumbnail(slide.mpp / factor)
    except InputError as error:
        return np.full((size[1], size[0], 3), 255, dtype=np.uint8), str(error)
    if picture.shape[:2] == size[::-1]:
        return picture, ""
    resized = cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST)
    return np.asarray(resized, dtype=np.uint8), ""


def draw_heatmap(
    canvas: RgbArray,
    bag: Bag,
    scale: str,
    scores: Mapping[str, npt.NDArray[np.floating]],
    title: str,
) -> RgbArray:
    """The slide, and beside it one panel with a colour bar per score.

    Parameters
    ----------
    canvas: (H, W, 3) uint8 RGB of the whole slide.
    scale: whose tiles are drawn.
    scores: (N_s,) from 0 to 1 per caption; a tile whose score is not finite is not coloured.
    title: above the slide.

    Returns
    -------
    (height, width, 3) uint8 RGB.
    """
    height, width = canvas.shape[:2]
    to_canvas = np.array([width, height, width, height]) / np.array(bag.tiles.extent.size_px0 * 2)
    boxes = (bag.boxes_px0(scale).numpy() * to_canvas).round().astype(int)
    panels = [caption(canvas, title)]
    for text, values in scores.items():
        known = np.isfinite(values)
        colours = _colours(values[known])
        panel = canvas.copy()
        for (left, top, right, bottom), colour in zip(boxes[known], colours, strict=True):
            tile = panel[top:bottom, left:right]
            tile[:] = ((1 - OPACITY) * tile + OPACITY * colour).round()
        panels.append(caption(np.concatenate([panel, _colour_bar(height)], axis=1), text))
    return np.concatenate(panels, axis=1)


def relative_attention(weights: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Attention of a slide's tiles (N,) → colour values (N,) from 0 to 1.

    1 is the largest weight, or twice the mean weight if that is more: uniform attention is 0.5
    everywhere, and not as red as attention on a single tile.
    """
    if len(weights) == 0:
        return weights
    return weights / max(weights.max(), 2 * weights.mean(), np.finfo(weights.dtype).tiny)


def _colours(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """(N,) from 0 to 1 → (N, 3) RGB of the turbo map."""
    levels = (np.clip(values, 0, 1) * 255).round().astype(np.uint8).reshape(-1, 1)
    if len(levels) == 0:
        return np.empty((0, 3), dtype=np.uint8)
    return cv2.applyColorMap(levels, cv2.COLORMAP_TURBO)[:, 0, ::-1].astype(np.uint8)


def _colour_bar(height: int) -> RgbArray:
    bar = np.full((height, BAR_PX + BAR_LABELS_PX + 8, 3), 255, dtype=np.uint8)
    ramp = _colours(np.linspace(1, 0, height))
    bar[:, 8 : 8 + BAR_PX] = ramp[:, None]
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = min(height - 2, max(10, round((1 - value) * height) + 4))
        place = (8 + BAR_PX + 4, y)
        cv2.putText(bar, f"{value:g}", place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, 16)
    return bar
