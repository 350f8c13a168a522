"""The QC picture of a slide: tissue, artefacts, and the kept tiles of every scale."""

from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from dasmil.files import atomic_path
from dasmil.geometry import Tiles
from dasmil.slides.tissue import MaskArray

PANEL_PX = 640  # longer side of one panel
CAPTION_PX = 26
MIN_TILE_PX = 4  # smaller tiles are drawn without lines between them
OUTLINE = (0, 120, 0)
TILE = (20, 60, 220)
ARTEFACTS = {"pen": (255, 120, 0), "black": (0, 170, 190), "blur": (230, 200, 0)}

RgbArray = npt.NDArray[np.uint8]


def shrink(thumbnail: RgbArray, side_px: int = PANEL_PX) -> RgbArray:
    """Resize (H, W, 3) uint8 RGB so that its longer side has ``side_px`` pixels."""
    factor = side_px / max(thumbnail.shape[:2])
    size = (max(1, round(thumbnail.shape[1] * factor)), max(1, round(thumbnail.shape[0] * factor)))
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(thumbnail, size, interpolation=interpolation), dtype=np.uint8)


def draw_qc(
    picture: RgbArray,
    mask: MaskArray,
    tiles: Tiles,
    artefacts: Mapping[str, MaskArray] | None = None,
    blurred_px0: npt.NDArray[np.int64] | None = None,
) -> RgbArray:
    """Draw a panel with the outlines of tissue and artefacts, and a panel per scale with its tiles.

    Parameters
    ----------
    picture: (H, W, 3) uint8 RGB of the whole slide, from :func:`shrink`.
    mask: (h, w) bool, the tissue found on it.
    tiles: the kept tiles.
    artefacts: ``pen`` and ``black`` → (h, w) bool, of any resolution; for the rules that were on.
    blurred_px0: (N, 4) boxes of the finest tiles that are blurred; None if the rule was off.

    Returns
    -------
    (height, width, 3) uint8 RGB.
    """
    size = picture.shape[1::-1]
    areas = {name: _at_size(found, size) for name, found in (artefacts or {}).items()}
    if blurred_px0 is not None:
        areas["blur"] = np.zeros(size[::-1], bool)
        for left, top, right, bottom in _boxes_px(blurred_px0, size, tiles.extent.size_px0):
            areas["blur"][top:bottom, left:right] = True
    outlined = picture.copy()
    for name, area in areas.items():
        outlined[area] = outlined[area] // 2 + np.array(ARTEFACTS[name], np.uint8) // 2
        _draw_outline(outlined, area, ARTEFACTS[name])
    _draw_outline(outlined, _at_size(mask, size), OUTLINE)
    text = f"{tiles.slide_id}  tissue {mask.mean():.1%}, {tiles.tissue.mm2:.1f} mm2"
    panels = [caption(outlined, text)]
    for scale in tiles.scales:
        panel = picture.copy()
        inside, lines = _tile_areas(tiles, scale.name, size)
        panel[inside] = (panel[inside] * 0.65 + np.array(TILE) * 0.35).round().astype(np.uint8)
        panel[lines] = TILE
        text = f"{scale.name} ({scale.mpp:g} um/px): {len(tiles.grid[scale.name])} tiles"
        if scale == tiles.scales[-1] and tiles.tissue.mm2:
            text += f", {tiles.tissue.covered:.1%} of the tissue"
        panels.append(caption(panel, text))
    row = np.concatenate(panels, axis=1)
    return np.concatenate([row, _legend(tiles, row.shape[1])]) if areas else row


def draw_mask(picture: RgbArray, mask: MaskArray) -> RgbArray:
    """The picture with the outline of a mask of any resolution."""
    outlined = picture.copy()
    _draw_outline(outlined, _at_size(mask, picture.shape[1::-1]), OUTLINE)
    return outlined


def _at_size(mask: MaskArray, size: tuple[int, int]) -> MaskArray:
    return cv2.resize(mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST).astype(bool)


def _draw_outline(picture: RgbArray, area: MaskArray, colour: tuple[int, int, int]) -> None:
    contours, _ = cv2.findContours(area.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(picture, contours, -1, colour, 2)


def _boxes_px(
    boxes_px0: npt.NDArray[np.int64], size: tuple[int, int], size_px0: tuple[int, int]
) -> list[list[int]]:
    """Left, top, right and bottom of boxes in a picture of the slide; at least 1 px wide."""
    boxes = (boxes_px0 * (np.array(size * 2) / np.array(size_px0 * 2))).round().astype(int)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    return boxes.tolist()


def _tile_areas(tiles: Tiles, scale: str, size: tuple[int, int]) -> tuple[MaskArray, MaskArray]:
    """Pixels of a panel inside kept tiles, and those on their outlines."""
    inside, lines = np.zeros((2, *size[::-1]), bool)
    for left, top, right, bottom in _boxes_px(tiles.boxes_px0(scale), size, tiles.extent.size_px0):
        inside[top:bottom, left:right] = True
        if right - left >= MIN_TILE_PX:
            # slices, since a tile may begin on the border
            lines[top : top + 1, left:right] = lines[top:bottom, left : left + 1] = True
    padded = np.pad(inside, 1).astype(np.uint8)  # else tiles at the border would lack a line there
    edge = inside & ~cv2.erode(padded, np.ones((3, 3), np.uint8))[1:-1, 1:-1].astype(bool)
    return inside, edge | (lines & inside)


def _legend(tiles: Tiles, width_px: int) -> RgbArray:
    """The meaning of the colours, and the excluded shares."""
    strip = np.full((CAPTION_PX * len(tiles.tissue.excluded), width_px, 3), 255, np.uint8)
    for number, (name, share) in enumerate(tiles.tissue.excluded.items()):
        y = number * CAPTION_PX
        cv2.rectangle(strip, (6, y + 6), (20, y + 20), ARTEFACTS[name], -1)
        text = f"{name} {share:.2%} of the {'tiles' if name == 'blur' else 'slide'}"
        cv2.putText(
            strip, text, (26, y + 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA
        )
    return strip


def caption(picture: RgbArray, text: str) -> RgbArray:
    """The picture with a white frame and a line of text over it."""
    framed = np.pad(picture, ((CAPTION_PX, 4), (4, 4), (0, 0)), constant_values=255)
    cv2.putText(framed, text, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return framed


def write_png(path: Path, picture: npt.NDArray[np.uint8]) -> None:
    """Write (H, W, 3) uint8 RGB."""
    with atomic_path(path) as temporary:
        _, encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        temporary.write_bytes(encoded.tobytes())  # cv2.imwrite does not report why it failed
