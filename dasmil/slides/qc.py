"""The picture that shows what tiling did: tissue outline, and the kept tiles of every scale."""

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from dasmil.files import atomic_path
from dasmil.slides.tiling import TilePyramid
from dasmil.slides.tissue import MaskArray

PANEL_PX = 640  # longer side of one panel
CAPTION_PX = 26
OUTLINE = (0, 120, 0)
TILE = (20, 60, 220)


def draw_qc(
    thumbnail: npt.NDArray[np.uint8], mask: MaskArray, tiles: TilePyramid
) -> npt.NDArray[np.uint8]:
    """One panel with the tissue outline, then one panel a scale with its tiles.

    Parameters
    ----------
    thumbnail: (H, W, 3) uint8 RGB of the whole slide.
    mask: (H, W) bool, the tissue found on it.

    Returns
    -------
    (height, width, 3) uint8 RGB.
    """
    factor = PANEL_PX / max(thumbnail.shape[:2])
    size = (max(1, round(thumbnail.shape[1] * factor)), max(1, round(thumbnail.shape[0] * factor)))
    picture = cv2.resize(thumbnail, size, interpolation=cv2.INTER_AREA if factor < 1 else 0)
    small_mask = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)

    outlined = picture.copy()
    contours, _ = cv2.findContours(small_mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(outlined, contours, -1, OUTLINE, 2)
    share = mask.mean()
    panels = [caption(outlined, f"{tiles.slide_id}  tissue {share:.1%}")]
    to_panel = np.array(size * 2) / np.array(tiles.size_px0 * 2)
    for scale in tiles.scales:
        boxes = (tiles.boxes_px0(scale.name) * to_panel).round().astype(int)
        panel = picture.copy()
        for left, top, right, bottom in boxes:
            cv2.rectangle(panel, (left, top), (right, bottom), TILE, -1)
        panel = cv2.addWeighted(panel, 0.35, picture, 0.65, 0)
        for left, top, right, bottom in boxes:
            cv2.rectangle(panel, (left, top), (right, bottom), TILE, 1)
        panels.append(caption(panel, f"{scale.name} ({scale.mpp:g} um/px): {len(boxes)} tiles"))
    return np.concatenate(panels, axis=1)


def caption(picture: npt.NDArray[np.integer | np.floating], text: str) -> npt.NDArray[np.uint8]:
    """The picture with a white frame and a line of text over it."""
    framed = cv2.copyMakeBorder(
        picture, CAPTION_PX, 4, 4, 4, cv2.BORDER_CONSTANT, value=(255, 255, 255)
    )
    cv2.putText(framed, text, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return np.asarray(framed, dtype=np.uint8)


def write_png(path: Path, picture: npt.NDArray[np.uint8]) -> None:
    """Write (H, W, 3) uint8 RGB."""
    with atomic_path(path) as temporary:
        if not cv2.imwrite(str(temporary), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)):
            raise OSError(f"{path}: the picture could not be written")
