"""Synthetic H&E-like pictures: stain as optical density, light by Beer-Lambert.

A lesion's nuclei are *vesicular* (dark rim, pale centre, one nucleolus) instead of solid, but they
absorb as much light. So a lesion is visible at 0.5 um/px and hardly visible at 2 um/px.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from dasmil.demo.cells import draw_blood, draw_nuclei, render, turn_vesicular
from dasmil.demo.layout import (
    LAYOUT_STEP_UM,
    Frame,
    Layout,
    depth_field,
    draw_layout,
    enlarge,
    mask,
    smooth_noise,
)

DRAWING_VERSION = 1  # raise it when the pictures change, so that old cohorts are drawn again

_TEXTURE_STEP_UM = 1.0  # grid of the stroma's fibres

_BLUR_UM = 0.35  # standard deviation, of the optics
_SENSOR_NOISE = 1.0  # standard deviation, in grey levels
_HAEMATOXYLIN = np.array([0.54, 0.76, 0.36])  # optical density per unit of stain, R G B
_EOSIN = np.array([0.09, 0.90, 0.42])


@dataclass(frozen=True)
class SyntheticSlide:
    """One drawn slide with its ground truth.

    Attributes
    ----------
    pixels: (H, W, 3) uint8, RGB
    tumour: (H, W) bool, tissue inside a lesion; all False for a normal slide
    tissue: (H, W) bool, False on the background, in holes and in open gland lumens
    mpp: micrometres per pixel
    """

    pixels: np.ndarray
    tumour: np.ndarray
    tissue: np.ndarray
    mpp: float


@dataclass(frozen=True)
class _Stain:
    """Look of one slide: optical density per unit of stain, and the colour of clear glass."""

    haematoxylin: np.ndarray  # (3,)
    eosin: np.ndarray  # (3,)
    glass: np.ndarray  # (3,) of 0..255


def draw_slide(
    *, seed: int, tumour: bool, size_px0: tuple[int, int] = (2048, 2048), mpp: float = 0.5
) -> SyntheticSlide:
    """Draw a slide; the same seed gives the same picture at any resolution.

    A normal slide and a tumour slide with the same seed differ only in the nuclei inside lesions.

    Parameters
    ----------
    seed: of all random numbers
    tumour: whether to fill the lesions with vesicular nuclei
    size_px0: width and height in pixels
    mpp: micrometres per pixel; above 1 the nuclei are no longer drawn faithfully
    """
    frame = Frame(size_px0[::-1], mpp)
    seeds = np.random.SeedSequence(seed).spawn(6)
    layout_rng, stain_rng, stroma_rng, cell_rng, tumour_rng, noise_rng = map(
        np.random.default_rng, seeds
    )
    layout = draw_layout(layout_rng, frame)
    stain = _draw_stain(stain_rng)
    stroma, fibre_angle, fringe = _draw_stroma(stroma_rng, frame, layout)
    tissue = (enlarge(layout.edge, frame) + fringe > 0) & ~mask(layout.holes, frame)
    tissue &= ~mask(layout.glands, frame)
    lesion = mask(layout.lesions, frame) & tissue

    grain = stroma_rng.standard_normal(frame.grid_shape(_TEXTURE_STEP_UM), dtype=np.float32)
    chromatin = enlarge(grain, frame)  # mottling of the nuclei
    nuclei = draw_nuclei(cell_rng, frame, layout, fibre_angle)
    if tumour:
        nuclei = turn_vesicular(tumour_rng, nuclei, layout.lesions)
    blood = draw_blood(cell_rng, frame, layout.vessels)

    haematoxylin, nuclear_cover = render(nuclei, frame)
    haematoxylin *= 1 + 0.3 * chromatin
    haematoxylin += 0.03 * tissue
    _, blood_cover = render(blood, frame)
    eosin = (stroma * tissue + 0.9 * blood_cover) * (1 - 0.25 * nuclear_cover)
    pixels = _expose(noise_rng, haematoxylin, eosin, stain, mpp)
    return SyntheticSlide(pixels, lesion if tumour else np.zeros_like(lesion), tissue, mpp)


def _draw_stain(rng: np.random.Generator) -> _Stain:
    """Strength and hue of both stains, which vary from slide to slide."""

    def vary(stain: np.ndarray, strength: float) -> np.ndarray:
        hue = stain + rng.normal(0, 0.035, 3)
        return hue / np.linalg.norm(hue) * np.linalg.norm(stain) * np.exp(rng.normal(0, strength))

    return _Stain(
        haematoxylin=vary(_HAEMATOXYLIN, 0.14),
        eosin=vary(_EOSIN, 0.20),
        glass=rng.uniform(238, 247) + rng.uniform(-2, 2, 3),
    )


def _draw_stroma(
    rng: np.random.Generator, frame: Frame, layout: Layout
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eosin of wavy fibres.

    Returns
    -------
    eosin: (H, W) float32, units of stain, not yet cut to the tissue
    fibre_angle: (rows, cols) float32 on the layout grid, radians
    fringe: (H, W) float32, added to the tissue's edge field to fray it along the fibres
    """
    x_um, y_um = frame.grid(_TEXTURE_STEP_UM)
    turn = rng.uniform(0, math.pi)
    along = x_um * math.cos(turn) + y_um * math.sin(turn)
    across = y_um * math.cos(turn) - x_um * math.sin(turn)
    across += 16 * smooth_noise(rng, frame, 260, _TEXTURE_STEP_UM)
    across += 2.5 * smooth_noise(rng, frame, 60, _TEXTURE_STEP_UM)
    fine = _streaks(rng, along, across, length_um=12, width_um=0.6)
    coarse = _streaks(rng, along, across, length_um=45, width_um=3.0)
    slow = np.exp(0.16 * smooth_noise(rng, frame, 220, _TEXTURE_STEP_UM))
    grain = rng.standard_normal(x_um.shape, dtype=np.float32)
    texture = 1 + 0.20 * fine + 0.20 * coarse + 0.12 * grain
    eosin = 0.42 * slow * np.clip(texture, 0.25, None)

    _draw_walls(eosin, 0.5 * slow * (1 + 0.1 * grain), frame, layout)

    rows, cols = frame.grid_shape(LAYOUT_STEP_UM)
    down, right = np.gradient(cv2.resize(across, (cols, rows), interpolation=cv2.INTER_AREA))
    return enlarge(eosin, frame), np.arctan2(-right, down), enlarge(0.004 * coarse, frame)


def _draw_walls(eosin: np.ndarray, cytoplasm: np.ndarray, frame: Frame, layout: Layout) -> None:
    """Put the walls of glands and vessels and the plasma into ``eosin``, on the texture grid."""
    rows, cols = eosin.shape
    gland, vessel = (
        cv2.resize(depth_field(blobs, frame), (cols, rows), interpolation=cv2.INTER_CUBIC)
        for blobs in (layout.glands, layout.vessels)
    )
    eosin += np.clip((18 + gland) / 3, 0, 1) * (cytoplasm - eosin)
    eosin *= 1 + 0.5 * np.clip((6 + vessel) / 2, 0, 1)
    eosin += np.clip(vessel, 0, 1) * (0.28 - eosin)


def _streaks(
    rng: np.random.Generator,
    along_um: np.ndarray,
    across_um: np.ndarray,
    length_um: float,
    width_um: float,
) -> np.ndarray:
    """Noise drawn out along the fibres, of about unit variance, shaped like ``along_um``."""
    noise = rng.standard_normal((512, 512), dtype=np.float32)
    streaks = cv2.GaussianBlur(noise, (0, 0), sigmaX=length_um, sigmaY=width_um)
    warped = cv2.remap(
        streaks, along_um, across_um, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )
    return warped / streaks.std()


def _expose(
    rng: np.random.Generator, haematoxylin: np.ndarray, eosin: np.ndarray, stain: _Stain, mpp: float
) -> np.ndarray:
    """Light through the stains (H, W), optics and sensor, (H, W, 3) uint8."""
    light = np.empty((*eosin.shape, 3), np.float32)
    for channel in range(3):
        density = haematoxylin * np.float32(stain.haematoxylin[channel])
        density += eosin * np.float32(stain.eosin[channel])
        light[..., channel] = stain.glass[channel] * cv2.exp(-density)
    noise = _SENSOR_NOISE * rng.standard_normal(light.shape, dtype=np.float32)
    grey = cv2.GaussianBlur(light, (0, 0), _BLUR_UM / mpp) + noise
    return np.clip(grey + 0.5, 0, 255).astype(np.uint8)
