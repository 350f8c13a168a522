"""Scores of a slide's tiles over its picture."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from dasmil.bags import Bag
from dasmil.errors import InputError
from dasmil.files import atomic_path
from dasmil.slides.cohort import SlideRow
from dasmil.slides.reader import Slide

CANVAS_PX = 1000  # longer side of the slide's picture
OPACITY = 0.55


def slide_canvas(row: SlideRow, bag: Bag) -> tuple[npt.NDArray[np.uint8], str]:
    """The slide's picture; an empty canvas of its shape, and why, where the file is not at hand.

    Returns
    -------
    (H, W, 3) uint8 RGB, and the reason ("" when the picture is the slide's).
    """
    longer_px0 = max(bag.header.size_px0)
    factor = max(1.0, longer_px0 / CANVAS_PX)
    try:
        with Slide(row) as slide:
            return slide.thumbnail(slide.mpp * factor), ""
    except InputError as error:
        width, height = (max(1, round(side / factor)) for side in bag.header.size_px0)
        return np.full((height, width, 3), 255, dtype=np.uint8), str(error)


def heatmap_figure(
    canvas: npt.NDArray[np.uint8],
    bag: Bag,
    scale: str,
    scores: Mapping[str, npt.NDArray[np.floating]],
    title: str,
) -> Figure:
    """The slide, and beside it one panel for each score of its tiles.

    Parameters
    ----------
    canvas: (H, W, 3) uint8 RGB of the whole slide.
    scores: by caption (N_s,), from 0 to 1.
    """
    height, width = canvas.shape[:2]
    panel_inches = 5.0
    panels = 1 + len(scores)
    size = (panel_inches * panels * 1.08, panel_inches * height / width + 0.8)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots(1, panels)
    figure.suptitle(title)
    for axis in axes:
        axis.imshow(canvas)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].set_title(f"{bag.slide_id}")
    to_canvas = np.array([width, height, width, height]) / np.array(bag.header.size_px0 * 2)
    boxes = (bag.boxes_px0(scale).numpy() * to_canvas).round().astype(int)
    for axis, (caption, values) in zip(axes[1:], scores.items(), strict=True):
        layer = np.full((height, width), np.nan)
        for (left, top, right, bottom), value in zip(boxes, values, strict=True):
            layer[top:bottom, left:right] = value
        image = axis.imshow(layer, cmap="turbo", vmin=0, vmax=1, alpha=OPACITY)
        axis.set_title(caption)
        figure.colorbar(ScalarMappable(image.norm, image.cmap), ax=axis, shrink=0.8)
    return figure


def save_figure(path: Path, figure: Figure) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
