"""Masks of pen marks and black borders, by colour and size. Pure functions.

A thumbnail does not show blur: see :mod:`dasmil.slides.focus`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import cv2
import numpy as np
import numpy.typing as npt

from dasmil.plain import SWITCH, number, one_of, refuse_other, several, whole
from dasmil.slides.tissue import MaskArray, disc

MPP = 16.0  # about the µm/px used here: a stroke of 300 µm is 19 px wide, nuclei vanish

Colour = tuple[int, int, int]  # OpenCV's 8-bit HSV: hue in steps of 2°, saturation, value

#: Colours of each ink, as (lowest, highest) HSV. At this mpp the tissue of 19 H&E slides has hues
#: of 250° to 354°; by the absorbances of Ruifrok and Johnston (2001) DAB lies at 25°, haematoxylin
#: at 244°, with less saturation than these rules require. The inks are the remaining colours.
#: Similar rules in RGB: deep-histopath (IBM CODAIT 2018), and after it histolab and
#: wsi-tile-cleanup.
INKS: Mapping[str, tuple[tuple[Colour, Colour], ...]] = MappingProxyType(
    {
        "blue": (((90, 102, 0), (116, 255, 255)), ((117, 166, 0), (124, 255, 255))),  # 2: on tissue
        "green": (((35, 64, 0), (89, 255, 255)),),
        "red": (((173, 153, 102), (180, 255, 255)), ((0, 153, 102), (6, 255, 255))),
        "black": (((0, 0, 0), (180, 90, 90)), ((0, 0, 0), (180, 255, 30))),
    }
)


LIMITS = {
    "pen": several(one_of(*INKS), 0, len(INKS)),
    "max_share": number(0, 1),
    "max_black": whole(0, 255),
    **dict.fromkeys(("black", "blur"), SWITCH),
    **dict.fromkeys(("min_width_um", "margin_um", "min_black_mm2"), number(0, 1e9)),
    **dict.fromkeys(("blur_mpp", "min_detail"), number(1e-6, 1e6)),
}


@dataclass(frozen=True)
class ArtefactParameters:
    """Which artefacts are excluded from the tissue; none by default.

    Parameters
    ----------
    pen:
        inks of pen marks to exclude, any of blue, green, red and black. Do not list an ink if a
        stain has its colour: blue and green for Masson's trichrome or Alcian blue, red for AEC or
        Fast Red, black for lungs with much coal or for very dense DAB. Ink over dark tissue mixes
        with its colour and may remain.
    black:
        exclude near-black areas that touch the slide's border or are large: areas that were not
        scanned, padding, the edge of the coverslip.
    blur:
        exclude finest tiles that are out of focus. Each one is read once, at blur_mpp.
    max_share:
        largest share of a finest tile that may be pen or black.
    min_width_um:
        narrower regions (nuclei, folds, dust) are ignored; pen strokes are at least 300 µm wide.
    margin_um:
        pen and black areas are widened by this to include their pale rim.
    max_black:
        largest red, green or blue of a near-black pixel (8-bit).
    min_black_mm2:
        near-black areas inside the slide are excluded from this size on.
    blur_mpp:
        µm per pixel at which focus is measured; a coarser slide is measured at its own mpp.
    min_detail:
        a tile with less detail is blurred. Detail is the variance of structures of about 1 pixel
        over that of about 2 pixels; it does not depend on contrast and stain. Sharp tiles have 0.34
        and more, and less than 0.25 if blurred by a Gaussian of 2 pixels or more.
    """

    pen: tuple[str, ...] = ()
    black: bool = False
    blur: bool = False
    max_share: float = 0.25
    min_width_um: float = 100.0
    margin_um: float = 50.0
    max_black: int = 50
    min_black_mm2: float = 1.0
    blur_mpp: float = 1.0
    min_detail: float = 0.25

    def __post_init__(self) -> None:
        refuse_other(vars(self), LIMITS, "artefacts")


def artefact_masks(
    thumbnail: npt.NDArray[np.uint8], mpp: float, parameters: ArtefactParameters
) -> dict[str, MaskArray]:
    """Masks of pen and black, for the rules that are on.

    Parameters
    ----------
    thumbnail: (H, W, 3) uint8 RGB of the whole slide.
    mpp: µm per thumbnail pixel.

    Returns
    -------
    ``pen`` and ``black`` → (h, w) bool over the whole slide, reduced by the whole number that comes
    nearest to :data:`MPP`; not reduced from 11 µm/px on. No pixel is in both.
    """
    if not (parameters.pen or parameters.black):
        return {}
    factor = max(1, round(MPP / mpp))
    size = tuple(max(1, round(side / factor)) for side in thumbnail.shape[1::-1])
    mpp *= thumbnail.shape[1] / size[0]
    hsv = cv2.cvtColor(cv2.resize(thumbnail, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2HSV)
    width_px, margin_px = parameters.min_width_um / mpp, parameters.margin_um / mpp
    masks: dict[str, MaskArray] = {}
    if parameters.pen:
        ink = np.zeros(hsv.shape[:2], np.uint8)
        for name in parameters.pen:
            for lowest, highest in INKS[name]:
                ink |= cv2.inRange(hsv, lowest, highest).astype(np.uint8)
        masks["pen"] = _widened(_wide_parts(ink, width_px), margin_px)
    if parameters.black:
        dark = np.asarray(hsv[..., 2] <= parameters.max_black, dtype=np.uint8)
        dark = _border_or_large(
            _wide_parts(dark, width_px), parameters.min_black_mm2 * 1e6 / mpp**2
        )
        masks["black"] = _widened(dark, margin_px)
    if len(masks) == 2:
        masks["pen"] &= ~masks["black"]
    return masks


def exclude(masks: Mapping[str, MaskArray], thumbnail: npt.NDArray[np.uint8]) -> MaskArray:
    """Paint the masked areas white, in place, so that they do not shift the tissue's threshold.

    Returns
    -------
    (H, W) bool, the painted pixels of the thumbnail.
    """
    excluded = np.any(list(masks.values()), axis=0).view(np.uint8)
    size = thumbnail.shape[1::-1]
    painted = cv2.resize(excluded, size, interpolation=cv2.INTER_NEAREST).view(bool)
    np.copyto(thumbnail, 255, where=painted[..., None])
    return painted


def _wide_parts(mask: npt.NDArray[np.uint8], width_px: float) -> npt.NDArray[np.uint8]:
    return np.asarray(cv2.morphologyEx(mask, cv2.MORPH_OPEN, disc(width_px)), dtype=np.uint8)


def _widened(mask: npt.NDArray[np.uint8], margin_px: float) -> MaskArray:
    return np.asarray(cv2.dilate(mask, disc(2 * margin_px)), dtype=bool)


def _border_or_large(mask: npt.NDArray[np.uint8], min_area_px: float) -> npt.NDArray[np.uint8]:
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = statistics[:, cv2.CC_STAT_AREA] >= min_area_px
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        keep[edge] = True
    keep[0] = False  # the background
    return keep[labels].astype(np.uint8)
