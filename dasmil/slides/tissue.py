"""A tissue mask from a thumbnail, and the share of tissue in any box. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from dasmil.plain import Kind, number, refuse_other, whole

MaskArray = npt.NDArray[np.bool_]
ByteArray = npt.NDArray[np.uint8]

BAND_PX = 256  # rows of a picture that are processed at a time
TEXTURE_MPP = 8.0  # about the µm/px at which texture is measured, however fine the thumbnail is
TEXTURE_UM = 96.0  # side of the square over which texture is averaged: one or two fat cells
TEXTURE_STEPS = 16  # texture is stored as whole 16ths of a grey level
MAX_CONTRAST = 12  # grey levels per pixel at most, so that specks of dust are no texture
GLASS_TEXTURE = 1.5  # glass is smoother than this, also with shading, stripes and JPEG noise
GLASS_SATURATION = 40  # and less saturated than this
MIN_GLASS = 0.01  # share of the picture that must be glass to measure its colour
DARK, BRIGHT = 50, 200  # grey levels: a black background, a bright one
LIMITS = {
    "mpp": number(1e-6, 1e6),
    "median_px": Kind("odd and positive", lambda value: value > 0 and value % 2 == 1),
    **dict.fromkeys(("min_saturation", "max_saturation"), whole(0, 255)),
    **dict.fromkeys(
        ("min_texture", "closing_um", "min_tissue_um2", "min_hole_um2"), number(0, 1e12)
    ),
}


@dataclass(frozen=True)
class TissueParameters:
    """How tissue differs from glass; areas are in µm², the same for every scanner.

    Parameters
    ----------
    mpp:
        µm per pixel of the thumbnail on which tissue is found.
    median_px:
        side of the median filter on the saturation, in thumbnail pixels (odd).
    min_saturation:
        pale tissue is at least this much more saturated than the slide's glass (8-bit). It is kept
        if it is connected to tissue above Otsu's threshold, or to textured tissue.
    max_saturation:
        upper limit of Otsu's threshold. It keeps pale tissue if a picture holds no glass, where
        Otsu would separate pale tissue from dark. At 0, the whole picture is tissue.
    min_texture:
        pale areas with at least this texture are tissue too: fat, loose stroma, whole pale
        sections. Texture is the mean contrast to the surroundings (8-bit grey levels); glass has
        0 to 1.5, fat 3 to 8. Lower keeps paler tissue, 255 switches the rule off.
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
    min_texture: float = 2.5
    closing_um: float = 32.0
    min_tissue_um2: float = 20_000.0
    min_hole_um2: float = 20_000.0

    def __post_init__(self) -> None:
        refuse_other(vars(self), LIMITS, "tissue")


def tissue_mask(
    thumbnail: npt.NDArray[np.uint8], mpp: float, parameters: TissueParameters
) -> MaskArray:
    """Otsu on the saturation (paper, section 4), pale tissue too, then connected components.

    Tissue is strongly stained, or pale and textured. Pale areas without texture, such as mucin, are
    tissue if they touch such areas. Glass is bright and smooth; its own saturation (a colour cast)
    is subtracted. In a picture without colour, darkness replaces saturation.

    Parameters
    ----------
    thumbnail: (H, W, 3) uint8 RGB.
    mpp: µm per thumbnail pixel.

    Returns
    -------
    (H, W) bool, True where tissue is.
    """
    if parameters.max_saturation == 0:
        return np.ones(thumbnail.shape[:2], bool)
    grey = _bytes(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY))
    factor = max(1, round(TEXTURE_MPP / mpp))
    window_px = 2 * round(TEXTURE_UM / mpp / factor / 2) + 1
    margin_px = 2 * window_px  # else all glass between tissue and the border would be rough
    texture = _texture(_pad(_reduce(grey, factor), margin_px), window_px)
    stain = _stain(thumbnail, grey, _enlarge(_crop(texture, margin_px), grey))
    del grey  # a large slide needs the memory from here on
    colourless = _is_colourless(thumbnail)
    rough = (texture > parameters.min_texture * TEXTURE_STEPS).view(np.uint8)
    uneven = texture >= GLASS_TEXTURE * TEXTURE_STEPS if colourless else None
    del texture
    _keep_coloured(
        rough, _pad(_reduce(stain, factor), margin_px), parameters.min_saturation, 3 * window_px
    )
    if min(stain.shape) > parameters.median_px:
        stain = _bytes(cv2.medianBlur(stain, parameters.median_px))

    pale: float = min(parameters.min_saturation, parameters.max_saturation)
    otsu = cv2.threshold(stain, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0]
    strong = float(np.clip(otsu, pale, parameters.max_saturation))
    seeds = (stain > strong).view(np.uint8)
    if uneven is not None:  # shading is dark too, but slight and smooth
        pale = strong
        seeds &= _enlarge(_crop(uneven.view(np.uint8), margin_px), seeds)
    # fill spots between fat cells, then undo the reach of an edge's roughness
    rough = _bytes(cv2.dilate(rough, disc(window_px / 2)))
    rough = _bytes(cv2.erode(rough, disc(window_px / 2 + 2 * (window_px - 1))))
    seeds |= _enlarge(_crop(rough, margin_px), seeds)
    mask = (stain > pale).view(np.uint8)
    mask |= seeds
    del stain, rough
    _keep_touching(mask, seeds)
    del seeds

    cv2.morphologyEx(mask, cv2.MORPH_CLOSE, disc(parameters.closing_um / mpp), dst=mask)
    _drop_small_parts(mask, parameters.min_tissue_um2 / mpp**2)
    if not mask.any():
        return mask.view(bool)  # else a tiny empty picture as a whole would be a small hole
    mask ^= 1
    _drop_small_parts(mask, parameters.min_hole_um2 / mpp**2)
    mask ^= 1
    return mask.view(bool)


def has_dark_background(thumbnail: npt.NDArray[np.uint8]) -> bool:
    """Whether a picture is mostly near-black and hardly anywhere bright, as in fluorescence."""
    grey = _bytes(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY))
    return bool(_level(grey, 0.5) < DARK and _level(grey, 0.99) < BRIGHT)


def _bytes(picture: npt.NDArray[np.integer | np.floating | np.bool_]) -> ByteArray:
    """The same array; OpenCV's type annotations do not state its dtype."""
    return np.asarray(picture, dtype=np.uint8)


def disc(diameter_px: float) -> ByteArray:
    """A round structuring element of at least one pixel."""
    odd = 2 * round(diameter_px / 2) + 1
    return _bytes(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (odd, odd)))


def _texture(grey: ByteArray, window_px: int) -> ByteArray:
    """Mean contrast between pixels and their surroundings, in steps of 1/16 grey level."""
    window = (window_px, window_px)
    contrast = cv2.absdiff(grey, cv2.blur(grey, window))
    return _bytes(cv2.blur(np.minimum(contrast, MAX_CONTRAST) * TEXTURE_STEPS, window))


def _stain(thumbnail: ByteArray, grey: ByteArray, texture: ByteArray) -> ByteArray:
    """Saturation after white balance on the glass; darkness if the picture has no colour.

    Glass is smooth, bright and hardly coloured. Pure white is no glass: it was never scanned, or
    was painted over.
    """
    glass = ((grey >= 0.75 * _brightest(grey)) & (grey < 255)).view(np.uint8)
    glass &= (texture < GLASS_TEXTURE * TEXTURE_STEPS).view(np.uint8)
    stain = _saturation(thumbnail, (255, 255, 255))
    glass &= (stain <= GLASS_SATURATION).view(np.uint8)
    is_known = cv2.countNonZero(glass) >= MIN_GLASS * glass.size
    if _is_colourless(thumbnail):
        white = _level(grey, 0.5, glass) if is_known else _brightest(grey)
        return _bytes(cv2.subtract(np.full_like(grey, white), grey))
    if not is_known:
        return stain
    del stain
    return _saturation(thumbnail, [_level(thumbnail, 0.5, glass, channel) for channel in range(3)])


def _saturation(thumbnail: ByteArray, white: Sequence[int]) -> ByteArray:
    """(H, W) 8-bit saturation after white balance: the colour ``white`` becomes white."""
    factors = 255 / np.maximum(white, 1)
    table = np.minimum(np.arange(256)[:, None] * factors, 255).round().astype(np.uint8)
    saturation = np.empty(thumbnail.shape[:2], np.uint8)
    for top in range(0, len(thumbnail), BAND_PX):
        band = slice(top, top + BAND_PX)
        balanced = cv2.LUT(thumbnail[band], table[None])
        saturation[band] = cv2.cvtColor(balanced, cv2.COLOR_RGB2HSV)[..., 1]
    return saturation


def _is_colourless(thumbnail: ByteArray) -> bool:
    return all(
        np.array_equal(row[:, 0], row[:, 1]) and np.array_equal(row[:, 0], row[:, 2])
        for row in thumbnail
    )


def _keep_coloured(rough: ByteArray, stain: ByteArray, min_saturation: int, window_px: int) -> None:
    """Set rough areas to 0 if their mean stain is less than a sixth of ``min_saturation``.

    Dust, hairs and scratches have no colour. The window is wide because JPEG stores colour
    coarsely. Both pictures are changed in place.
    """
    window = (window_px, window_px)
    np.minimum(stain, GLASS_SATURATION, out=stain)
    stain *= 6
    stain *= rough
    cv2.blur(stain, window, dst=stain)
    least = rough * np.uint8(min_saturation)
    cv2.blur(least, window, dst=least)
    rough &= (stain > least).view(np.uint8)


def _brightest(grey: ByteArray) -> int:
    """The 99th percentile of the pixels that are not pure white; 255 if all are."""
    return _level(grey, 0.99, (grey < 255).view(np.uint8))


def _level(
    picture: ByteArray, share: float, mask: ByteArray | None = None, channel: int = 0
) -> int:
    """The quantile of a channel over the pixels where the mask is not 0; 255 if there are none."""
    counts = cv2.calcHist([picture], [channel], mask, [256], [0, 256]).ravel().cumsum()
    return int(np.searchsorted(counts, share * counts[-1])) if counts[-1] else 255


def _reduce(picture: ByteArray, factor: int) -> ByteArray:
    if factor == 1:
        return picture
    size = tuple(max(1, round(side / factor)) for side in picture.shape[::-1])
    return _bytes(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))


def _enlarge(mask: ByteArray, like: ByteArray) -> ByteArray:
    if mask.shape == like.shape:
        return mask
    size = like.shape[::-1]
    return _bytes(cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST))


def _pad(picture: ByteArray, margin_px: int) -> ByteArray:
    padded = cv2.copyMakeBorder(picture, *(margin_px,) * 4, cv2.BORDER_REPLICATE)
    return _bytes(padded)


def _crop(picture: ByteArray, margin_px: int) -> ByteArray:
    return picture[margin_px:-margin_px, margin_px:-margin_px]


def _keep_touching(mask: ByteArray, seeds: ByteArray) -> None:
    """Set connected parts of a mask without a seed to 0, in place."""
    count, labels = cv2.connectedComponents(mask, connectivity=8)
    keep = np.zeros(count, np.uint8)
    for top in range(0, len(mask), BAND_PX):
        band = slice(top, top + BAND_PX)
        keep[labels[band][seeds[band] > 0]] = 1
    _keep_labels(mask, labels, keep)


def _drop_small_parts(mask: ByteArray, min_area_px: float) -> None:
    """Set connected parts of a mask smaller than ``min_area_px`` to 0, in place."""
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = _bytes(statistics[:, cv2.CC_STAT_AREA] >= min_area_px)
    _keep_labels(mask, labels, keep)


def _keep_labels(
    mask: ByteArray, labels: npt.NDArray[np.integer | np.floating], keep: ByteArray
) -> None:
    keep[0] = 0  # the background
    for top in range(0, len(mask), BAND_PX):  # NumPy converts the labels to 8-byte indices
        mask[top : top + BAND_PX] = keep[labels[top : top + BAND_PX]]


def tissue_fraction(
    mask: MaskArray, x_edges: npt.NDArray[np.floating], y_edges: npt.NDArray[np.floating]
) -> npt.NDArray[np.float64]:
    """Share of tissue in every cell of a grid; exact even if edges cut mask pixels.

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
    # integral image at the needed corners only: the whole one takes 8 bytes per pixel
    integral = np.empty((len(rows), len(columns)))
    count, counted = np.zeros(width + 1, np.int64), 0
    for corner, row in enumerate(rows.tolist()):
        count[1:] += mask[counted:row].sum(0)
        integral[corner] = count.cumsum()[columns]
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
    The corners in order; per edge the position of the corner before it in that list (the corner
    after it is the next one); and per edge its distance from the corner before it, in 0..1.
    """
    at = np.clip(edges, 0, length)
    low = np.minimum(at.astype(np.int64), length - 1)
    corners = np.unique([low, low + 1])
    return corners, np.searchsorted(corners, low), at - low
