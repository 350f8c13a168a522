"""Synthetic H&E-like slides for the demo: small lesions that only fine detail gives away.

Stroma, nuclei, decoys and stain are drawn in micrometres and as optical density; light follows
from Beer-Lambert. A lesion differs from normal tissue by its nuclei alone: *vesicular* (dark rim,
pale centre, one nucleolus) instead of solid. Both kinds take away the same light on average, so
that a lesion shows at 0.5 um/px and is hard to tell at 2 um/px. All else, decoys included, is
drawn from the seed alone, whatever the label; among the decoys are patches of benign nuclei that
are as large and pale as a lesion's, but even.
"""

import json
import math
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import cv2
import numpy as np
import tifffile

from dasmil.errors import InputError
from dasmil.files import atomic_path, write_csv, write_text

DEFAULT_NUM_SLIDES: Mapping[str, int] = MappingProxyType({"train": 40, "val": 8, "test": 16})
COHORT_COLUMNS = ("slide_id", "path", "label", "patient_id", "split")
TRUTH_DOWNSAMPLE = 4
DRAWING_VERSION = 1  # raise it when the pictures change, so that old cohorts are drawn anew

_LAYOUT_STEP_UM = 4.0  # grid of the tissue outline and of the slow fields
_TEXTURE_STEP_UM = 1.0  # grid of the stroma's fibres
_TILE_PX = 256

_TISSUE_COVER = (0.42, 0.58)  # of the slide's area
_LESION_COVER = (0.035, 0.105)  # of the tissue's area
_LESION_DIAMETER_UM = (150.0, 300.0)

_NUCLEUS_SPACING_UM = 14.5
_BLUR_UM = 0.35  # standard deviation, of the optics
_SENSOR_NOISE = 1.0  # standard deviation, in grey levels
_EDGE_UM = 0.7  # width over which the outline of a nucleus fades
_HAEMATOXYLIN = np.array([0.54, 0.76, 0.36])  # optical density per unit of stain, R G B
_EOSIN = np.array([0.09, 0.90, 0.42])

_CELL = np.dtype(
    [
        ("x_um", "f4"),
        ("y_um", "f4"),
        ("radius_um", "f4"),
        ("aspect", "f4"),  # long axis over short axis
        ("angle", "f4"),  # of the long axis, radians
        ("wobble", "f4"),  # relative amplitude of the outline's irregularity
        ("phase", "f4"),  # of that irregularity and of the nucleolus, radians
        ("stain", "f4"),  # of the rim
        ("pale", "f4"),  # stain of the centre relative to the rim; 1 for a solid nucleus
        ("nucleolus_um", "f4"),  # radius; 0 for none
    ]
)
_REACH_UM = 9.5  # from the centre of a cell to beyond its outline
_RIM_UM = 0.9
_NUCLEOLUS_STAIN = 1.1  # relative to the rim


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
class _Frame:
    """Pixel grid (`shape_px0` is height, width) and physical extent of a slide."""

    shape_px0: tuple[int, int]
    mpp: float

    @property
    def extent_um(self) -> tuple[float, float]:
        return self.shape_px0[0] * self.mpp, self.shape_px0[1] * self.mpp

    def grid_shape(self, step_um: float) -> tuple[int, int]:
        height, width = (max(2, round(extent / step_um)) for extent in self.extent_um)
        return height, width

    def grid(self, step_um: float) -> tuple[np.ndarray, np.ndarray]:
        """Positions x and y of a grid's cell centres, each (rows, cols) float32, um."""
        shape = self.grid_shape(step_um)
        y, x = (
            (np.arange(n, dtype=np.float32) + 0.5) * (extent / n)
            for n, extent in zip(shape, self.extent_um, strict=True)
        )
        x_um, y_um = np.meshgrid(x, y)
        return x_um, y_um

    def sample(self, field: np.ndarray, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
        """Values of a (rows, cols) grid over the frame at points (N,), nearest cell."""
        rows, cols = (
            np.clip((at / extent * n).astype(int), 0, n - 1)
            for at, extent, n in zip((y_um, x_um), self.extent_um, field.shape, strict=True)
        )
        return field[rows, cols]


@dataclass(frozen=True)
class _Blob:
    """Roundish patch with an irregular outline."""

    x_um: float
    y_um: float
    radius_um: float
    waves: tuple[float, float, float]  # relative amplitudes of 2, 3 and 5 waves around the outline
    phases: tuple[float, float, float]

    def outline_um(self, angle: np.ndarray) -> np.ndarray:
        radius = np.ones_like(angle)
        for count, wave, phase in zip((2, 3, 5), self.waves, self.phases, strict=True):
            radius += wave * np.cos(count * angle + phase)
        return self.radius_um * radius

    def depth_um(self, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
        """Distance inside the outline along the ray from the centre, negative outside."""
        dx, dy = x_um - self.x_um, y_um - self.y_um
        return self.outline_um(np.arctan2(dy, dx)) - np.hypot(dx, dy)


@dataclass(frozen=True)
class _Layout:
    """Where things lie on a slide: the tissue's outline, the lesions and the benign decoys."""

    edge: np.ndarray  # (rows, cols) float32 on the layout grid, above zero in tissue, no unit
    lesions: list[_Blob]
    clusters: list[_Blob]
    swollen: list[_Blob]  # patches where benign nuclei are large and pale
    glands: list[_Blob]
    vessels: list[_Blob]
    holes: list[_Blob]


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

    A normal slide and a tumour slide of one seed differ by the nuclei inside the lesions alone.

    Parameters
    ----------
    seed: of everything that is drawn
    tumour: whether to fill the lesions with vesicular nuclei
    size_px0: width and height in pixels
    mpp: micrometres per pixel; above 1 the nuclei are no longer drawn faithfully
    """
    frame = _Frame(size_px0[::-1], mpp)
    seeds = np.random.SeedSequence(seed).spawn(6)
    layout_rng, stain_rng, stroma_rng, cell_rng, tumour_rng, noise_rng = map(
        np.random.default_rng, seeds
    )
    layout = _draw_layout(layout_rng, frame)
    stain = _draw_stain(stain_rng)
    stroma, fibre_angle, fringe = _draw_stroma(stroma_rng, frame, layout)
    tissue = (_enlarge(layout.edge, frame) + fringe > 0) & ~_mask(layout.holes, frame)
    tissue &= ~_mask(layout.glands, frame)
    lesion = _mask(layout.lesions, frame) & tissue

    chromatin = _draw_chromatin(stroma_rng, frame)
    nuclei = _draw_nuclei(cell_rng, frame, layout, fibre_angle)
    if tumour:
        nuclei = _turn_vesicular(tumour_rng, nuclei, layout.lesions)
    blood = _draw_blood(cell_rng, frame, layout.vessels)

    haematoxylin, nuclear_cover = _render(nuclei, frame)
    haematoxylin *= 1 + 0.3 * chromatin
    haematoxylin += 0.03 * tissue
    _, blood_cover = _render(blood, frame)
    eosin = (stroma * tissue + 0.9 * blood_cover) * (1 - 0.25 * nuclear_cover)
    pixels = _expose(noise_rng, haematoxylin, eosin, stain, mpp)
    return SyntheticSlide(pixels, lesion if tumour else np.zeros_like(lesion), tissue, mpp)


def _smooth_noise(
    rng: np.random.Generator, frame: _Frame, wavelength_um: float, step_um: float
) -> np.ndarray:
    """Slow field of about unit variance on a grid of ``step_um``, (rows, cols) float32."""
    coarse = rng.standard_normal(
        [n + 3 for n in frame.grid_shape(wavelength_um / 2)], dtype=np.float32
    )
    rows, cols = frame.grid_shape(step_um)
    return 1.3 * cv2.resize(coarse, (cols, rows), interpolation=cv2.INTER_CUBIC)


def _enlarge(field: np.ndarray, frame: _Frame) -> np.ndarray:
    """Bring a grid over the frame to its pixels, (H, W) float32."""
    height, width = frame.shape_px0
    return cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC)


def _depth_um(blobs: Sequence[_Blob], x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
    """Depth inside the nearest of the blobs, far below zero when there is none."""
    depth = np.full(np.shape(x_um), -1e6, np.float32)
    for blob in blobs:
        np.maximum(depth, blob.depth_um(x_um, y_um), out=depth)
    return depth


def _depth_field(blobs: Sequence[_Blob], frame: _Frame) -> np.ndarray:
    """Depth on the layout grid (rows, cols), um, cut off at -100."""
    return np.maximum(_depth_um(blobs, *frame.grid(_LAYOUT_STEP_UM)), np.float32(-100))


def _mask(blobs: Sequence[_Blob], frame: _Frame) -> np.ndarray:
    """Pixels inside any of the blobs, (H, W) bool."""
    return _enlarge(_depth_field(blobs, frame), frame) > 0


# Layout


def _draw_layout(rng: np.random.Generator, frame: _Frame) -> _Layout:
    """Place the tissue, then the lesions, then the decoys in what room is left."""
    edge = _draw_tissue_edge(rng, frame)
    free = edge > 0
    free[[0, -1]] = free[:, [0, -1]] = False
    area_mm2 = free.mean() * math.prod(frame.extent_um) / 1e6
    lesions = _place_lesions(rng, frame, free, area_mm2)

    def decoys(per_mm2: float, radius_um: tuple[float, float], margin_um: float) -> list[_Blob]:
        blobs = []
        for radius in rng.uniform(*radius_um, size=1 + rng.poisson(per_mm2 * area_mm2)):
            centre = _find_room(rng, frame, free, radius * 1.2 + margin_um)
            if centre is not None:
                blobs.append(_draw_blob(rng, *centre, radius, irregularity=0.12))
                _occupy(frame, free, blobs[-1:], margin_um)
        return blobs

    return _Layout(
        edge=edge,
        lesions=lesions,
        swollen=decoys(3, (60, 110), margin_um=4),
        clusters=decoys(4, (25, 60), margin_um=10),
        glands=decoys(8, (10, 24), margin_um=22),
        vessels=decoys(3, (14, 40), margin_um=12),
        holes=decoys(9, (10, 38), margin_um=8),
    )


def _draw_tissue_edge(rng: np.random.Generator, frame: _Frame) -> np.ndarray:
    """Field above zero in one to three pieces of tissue, (rows, cols) on the layout grid."""
    x_um, y_um = frame.grid(_LAYOUT_STEP_UM)
    height_um, width_um = frame.extent_um
    x, y = x_um / width_um - 0.5, y_um / height_um - 0.5
    count = int(rng.integers(1, 4))
    turn = rng.uniform(0, 2 * math.pi)
    away = 0.03 if count == 1 else 0.26
    pieces = [_draw_piece(rng, x, y, turn + 2 * math.pi * k / count, away) for k in range(count)]
    field = np.max(pieces, axis=0)
    if count > 1:
        lead = field - np.sort(pieces, axis=0)[-2]
        field -= 0.8 * np.clip(0.06 - lead, 0, None)  # clefts between the pieces
    for wavelength_um, weight in ((0.4 * min(frame.extent_um), 0.03), (90, 0.012), (25, 0.004)):
        field += weight * _smooth_noise(rng, frame, wavelength_um, _LAYOUT_STEP_UM)
    field -= 2 * np.clip((x**6 + y**6) ** (1 / 6) - 0.42, 0, None)
    return field - np.quantile(field, 1 - rng.uniform(*_TISSUE_COVER)).astype(np.float32)


def _draw_piece(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, angle: float, away: float
) -> np.ndarray:
    """Field of one elliptic piece; x, y and its distance ``away`` are relative to the slide."""
    dx, dy = x - away * math.cos(angle), y - away * math.sin(angle)
    tilt, aspect = rng.uniform(0, math.pi), rng.uniform(1, 1.3)
    along = dx * math.cos(tilt) + dy * math.sin(tilt)
    across = dy * math.cos(tilt) - dx * math.sin(tilt)
    return -np.hypot(along / aspect, across * aspect)


def _draw_blob(
    rng: np.random.Generator, x_um: float, y_um: float, radius_um: float, irregularity: float
) -> _Blob:
    waves = irregularity * rng.uniform(0.3, 1, 3) * (1.0, 0.6, 0.35)
    return _Blob(x_um, y_um, radius_um, tuple(waves), tuple(rng.uniform(0, 2 * np.pi, 3)))


def _place_lesions(
    rng: np.random.Generator, frame: _Frame, free: np.ndarray, tissue_mm2: float
) -> list[_Blob]:
    """One to four lesions, as many as the tissue has room for; takes their room from ``free``."""
    tissue_um2 = 1e6 * tissue_mm2
    smallest, largest = (math.pi / 4 * diameter**2 for diameter in _LESION_DIAMETER_UM)
    least, most = (cover * tissue_um2 for cover in _LESION_COVER)
    count = max(1, min(int(rng.integers(1, 5)), int(most / smallest)))
    least = max(least, count * smallest)
    area_um2 = rng.uniform(least, max(least, min(most, count * largest)))
    lesions = []
    for share in rng.uniform(0.85, 1.15, count):
        diameter_um = math.sqrt(area_um2 / count * share * 4 / math.pi)
        diameter_um = float(np.clip(diameter_um, *_LESION_DIAMETER_UM))
        centre = _find_room(rng, frame, free, diameter_um / 2) or _roomiest(frame, free)
        lesions.append(_draw_blob(rng, *centre, diameter_um / 2, irregularity=0.2))
        _occupy(frame, free, lesions[-1:], margin_um=10)
    return lesions


def _room_um(free: np.ndarray) -> np.ndarray:
    """Distance of every cell of the layout grid to the next one that is taken."""
    return cv2.distanceTransform(free.astype(np.uint8), cv2.DIST_L2, 5) * _LAYOUT_STEP_UM


def _find_room(
    rng: np.random.Generator, frame: _Frame, free: np.ndarray, radius_um: float
) -> tuple[float, float] | None:
    """Random centre (x_um, y_um) of a disc inside ``free``; None where it fits nowhere."""
    fits = np.flatnonzero(_room_um(free) > radius_um)
    if not fits.size:
        return None
    at = fits[int(rng.uniform() * fits.size)]
    x_um, y_um = frame.grid(_LAYOUT_STEP_UM)
    return float(x_um.flat[at]), float(y_um.flat[at])


def _roomiest(frame: _Frame, free: np.ndarray) -> tuple[float, float]:
    x_um, y_um = frame.grid(_LAYOUT_STEP_UM)
    at = int(_room_um(free).argmax())
    return float(x_um.flat[at]), float(y_um.flat[at])


def _occupy(frame: _Frame, free: np.ndarray, blobs: Sequence[_Blob], margin_um: float) -> None:
    free &= _depth_field(blobs, frame) < -margin_um


# Stroma


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
    rng: np.random.Generator, frame: _Frame, layout: _Layout
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
    across += 16 * _smooth_noise(rng, frame, 260, _TEXTURE_STEP_UM)
    across += 2.5 * _smooth_noise(rng, frame, 60, _TEXTURE_STEP_UM)
    fine = _streaks(rng, along, across, length_um=12, width_um=0.6)
    coarse = _streaks(rng, along, across, length_um=45, width_um=3.0)
    slow = np.exp(0.16 * _smooth_noise(rng, frame, 220, _TEXTURE_STEP_UM))
    grain = rng.standard_normal(x_um.shape, dtype=np.float32)
    texture = 1 + 0.20 * fine + 0.20 * coarse + 0.12 * grain
    eosin = 0.42 * slow * np.clip(texture, 0.25, None)

    _draw_walls(eosin, 0.5 * slow * (1 + 0.1 * grain), frame, layout)

    rows, cols = frame.grid_shape(_LAYOUT_STEP_UM)
    down, right = np.gradient(cv2.resize(across, (cols, rows), interpolation=cv2.INTER_AREA))
    return _enlarge(eosin, frame), np.arctan2(-right, down), _enlarge(0.004 * coarse, frame)


def _draw_walls(eosin: np.ndarray, cytoplasm: np.ndarray, frame: _Frame, layout: _Layout) -> None:
    """Put the walls of glands and vessels and the plasma into ``eosin``, on the texture grid."""
    rows, cols = eosin.shape
    gland, vessel = (
        cv2.resize(_depth_field(blobs, frame), (cols, rows), interpolation=cv2.INTER_CUBIC)
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


def _draw_chromatin(rng: np.random.Generator, frame: _Frame) -> np.ndarray:
    """Mottling of the nuclei, (H, W) float32 of about unit variance."""
    grain = rng.standard_normal(frame.grid_shape(_TEXTURE_STEP_UM), dtype=np.float32)
    return _enlarge(grain, frame)


# Cells


def _new_cells(
    rng: np.random.Generator,
    x_um: np.ndarray,
    y_um: np.ndarray,
    *,
    diameter_um: tuple[float, float],
    aspect: tuple[float, float] = (1.0, 1.4),
    stain: float = 1.0,
) -> np.recarray:
    """Solid cells of random size and direction at the points (N,)."""
    cells = np.recarray(len(x_um), _CELL)
    cells.x_um, cells.y_um = x_um, y_um
    cells.radius_um = rng.uniform(*diameter_um, len(cells)) / 2
    cells.aspect = rng.uniform(*aspect, len(cells))
    cells.angle = rng.uniform(0, np.pi, len(cells))
    cells.wobble = rng.uniform(0.0, 0.08, len(cells))
    cells.phase = rng.uniform(0, 2 * np.pi, len(cells))
    cells.stain = stain * np.exp(rng.normal(0, 0.15, len(cells)))
    cells.pale, cells.nucleolus_um = 1, 0
    return cells


def _scatter(
    rng: np.random.Generator, frame: _Frame, spacing_um: float
) -> tuple[np.ndarray, np.ndarray]:
    """Points (N,) of a jittered grid over the frame."""
    x_um, y_um = (points.ravel() for points in frame.grid(spacing_um))
    return tuple(
        at + spacing_um * rng.uniform(-0.33, 0.33, at.size).astype(np.float32)
        for at in (x_um, y_um)
    )


def _draw_nuclei(
    rng: np.random.Generator, frame: _Frame, layout: _Layout, fibre_angle: np.ndarray
) -> np.recarray:
    """All nuclei of a slide, every one of them solid."""
    nuclei = [_draw_stromal(rng, frame, layout, fibre_angle), _draw_lymphocytes(rng, frame, layout)]
    for gland in layout.glands:
        nuclei.append(_draw_ring(rng, gland, offset_um=7, spacing_um=6.2, along=False))
    for vessel in layout.vessels:
        nuclei.append(_draw_ring(rng, vessel, offset_um=2, spacing_um=22, along=True))
    return np.concatenate(nuclei).view(np.recarray)


def _draw_stromal(
    rng: np.random.Generator, frame: _Frame, layout: _Layout, fibre_angle: np.ndarray
) -> np.recarray:
    """Ordinary nuclei, many of them drawn out along the fibres."""
    x_um, y_um = _scatter(rng, frame, _NUCLEUS_SPACING_UM)
    crowding = _smooth_noise(rng, frame, 140, _LAYOUT_STEP_UM)
    keep = rng.uniform(size=x_um.size) < 0.82 + 0.12 * frame.sample(crowding, x_um, y_um)
    keep &= frame.sample(layout.edge, x_um, y_um) > 0.006
    decoys = ((layout.clusters, 0), (layout.glands, 20), (layout.vessels, 7), (layout.holes, 6))
    for blobs, margin_um in decoys:
        keep &= _depth_um(blobs, x_um, y_um) < -margin_um
    cells = _new_cells(rng, x_um[keep], y_um[keep], diameter_um=(7, 9), aspect=(1.0, 1.9))
    cells.angle = frame.sample(fibre_angle, cells.x_um, cells.y_um)
    cells.angle += rng.normal(0, 0.35, len(cells))
    swollen = np.flatnonzero(_depth_um(layout.swollen, cells.x_um, cells.y_um) > 0)
    cells[swollen] = _swell(rng, cells[swollen].view(np.recarray))
    cells.stain[swollen] *= 0.56  # spread over the larger area
    return cells


def _swell(rng: np.random.Generator, cells: np.recarray) -> np.recarray:
    """Copy of the cells, made larger, rounder and less regular."""
    cells = cells.copy()
    cells.radius_um *= rng.uniform(1.15, 1.4, len(cells)).astype(np.float32)
    cells.aspect = rng.uniform(1.0, 1.35, len(cells))
    cells.wobble = rng.uniform(0.06, 0.18, len(cells))
    return cells


def _draw_lymphocytes(rng: np.random.Generator, frame: _Frame, layout: _Layout) -> np.recarray:
    """Small, round, dark nuclei, thinning out towards the rim of a cluster."""
    x_um, y_um = _scatter(rng, frame, 7.5)
    depth = _depth_um(layout.clusters, x_um, y_um)
    keep = rng.uniform(size=x_um.size) < np.clip(0.5 + depth / 20, 0, 0.92)
    return _new_cells(
        rng, x_um[keep], y_um[keep], diameter_um=(5, 6.2), aspect=(1.0, 1.15), stain=1.3
    )


def _draw_ring(
    rng: np.random.Generator, blob: _Blob, *, offset_um: float, spacing_um: float, along: bool
) -> np.recarray:
    """Elongated nuclei around a lumen, along its wall or pointing at its centre."""
    count = int(2 * np.pi * (blob.radius_um + offset_um) / spacing_um)
    angle = (np.arange(count) + rng.uniform(-0.25, 0.25, count)) * (2 * np.pi / count)
    radius_um = blob.outline_um(angle) + offset_um + rng.normal(0, 0.8, count)
    x_um, y_um = blob.x_um + radius_um * np.cos(angle), blob.y_um + radius_um * np.sin(angle)
    diameter_um, aspect = ((4.5, 5.5), (2.2, 3.0)) if along else ((6.5, 7.5), (1.3, 1.8))
    cells = _new_cells(rng, x_um, y_um, diameter_um=diameter_um, aspect=aspect)
    cells.angle = angle + (np.pi / 2 if along else 0)
    return cells


def _draw_blood(rng: np.random.Generator, frame: _Frame, vessels: Sequence[_Blob]) -> np.recarray:
    """Red cells that fill the vessels."""
    x_um, y_um = _scatter(rng, frame, 6.4)
    keep = (_depth_um(vessels, x_um, y_um) > 2.5) & (rng.uniform(size=x_um.size) < 0.9)
    return _new_cells(rng, x_um[keep], y_um[keep], diameter_um=(5.8, 7), aspect=(1.0, 1.25))


def _turn_vesicular(
    rng: np.random.Generator, nuclei: np.recarray, lesions: Sequence[_Blob]
) -> np.recarray:
    """Make the nuclei inside the lesions vesicular, taking away as much light as before.

    ``pale`` balances the larger area: see the test that compares block means.
    """
    inside = np.flatnonzero(_depth_um(lesions, nuclei.x_um, nuclei.y_um) > 0)
    cells = _swell(rng, nuclei[inside].view(np.recarray))
    cells.pale = rng.uniform(0.19, 0.31, len(cells))
    cells.nucleolus_um = rng.uniform(1.3, 1.7, len(cells))
    turned = nuclei.copy()
    turned[inside] = cells
    return turned


# Rendering


def _render(cells: np.recarray, frame: _Frame) -> tuple[np.ndarray, np.ndarray]:
    """Draw cells.

    Returns
    -------
    stain: (H, W) float32, summed over the cells
    cover: (H, W) float32 of 0..1, the part of a pixel that lies inside some cell
    """
    margin = 2 * math.ceil(_REACH_UM / frame.mpp)
    height, width = frame.shape_px0
    stain = np.zeros((height + 2 * margin, width + 2 * margin), np.float32)
    cover = np.zeros_like(stain)
    half = math.ceil(_REACH_UM / frame.mpp)
    for start in range(0, len(cells), 256):
        batch = cells[start : start + 256].view(np.recarray)
        left = np.floor(batch.x_um / frame.mpp).astype(int) - half
        top = np.floor(batch.y_um / frame.mpp).astype(int) - half
        steps = np.arange(2 * half)
        x_um = (left[:, None] + steps + 0.5) * frame.mpp - batch.x_um[:, None]
        y_um = (top[:, None] + steps + 0.5) * frame.mpp - batch.y_um[:, None]
        stains, covers = _cell_patches(
            batch,
            x_um.astype(np.float32)[:, None, :],
            y_um.astype(np.float32)[:, :, None],
            frame.mpp,
        )
        for i, (x, y) in enumerate(zip(left + margin, top + margin, strict=True)):
            window = slice(y, y + 2 * half), slice(x, x + 2 * half)
            stain[window] += stains[i]
            np.maximum(cover[window], covers[i], out=cover[window])
    inner = slice(margin, margin + height), slice(margin, margin + width)
    return stain[inner], cover[inner]


def _cell_patches(
    cells: np.recarray, x_um: np.ndarray, y_um: np.ndarray, mpp: float
) -> tuple[np.ndarray, np.ndarray]:
    """Stain and cover, each (N, P, P), at (N, 1, P) by (N, P, 1) offsets from the centres."""

    def each(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32)[:, None, None]

    fade_um = max(_EDGE_UM, mpp)

    def inside(depth_um: np.ndarray) -> np.ndarray:
        return np.clip(depth_um / fade_um + 0.5, 0, 1)

    cos, sin, stretch = (each(f) for f in (np.cos(cells.angle), np.sin(cells.angle), cells.aspect))
    stretch = np.sqrt(stretch)
    along, across = (x_um * cos + y_um * sin) / stretch, (y_um * cos - x_um * sin) * stretch
    around = np.arctan2(across, along)
    wave = np.cos(2 * around + each(cells.phase)) + np.cos(3 * around - 2 * each(cells.phase))
    depth_um = each(cells.radius_um) * (1 + 0.5 * each(cells.wobble) * wave)
    depth_um -= np.hypot(along, across)
    cover = inside(depth_um)
    stain = cover - each(1 - cells.pale) * inside(depth_um - _RIM_UM)
    if cells.nucleolus_um.any():
        off_um = 0.2 * cells.radius_um
        dx, dy = off_um * np.cos(cells.phase), off_um * np.sin(cells.phase)
        dot = inside(each(cells.nucleolus_um) - np.hypot(x_um - each(dx), y_um - each(dy)))
        stain += _NUCLEOLUS_STAIN * dot * each(cells.nucleolus_um > 0)
    return stain * each(cells.stain), cover


def _expose(
    rng: np.random.Generator,
    haematoxylin: np.ndarray,
    eosin: np.ndarray,
    stain: _Stain,
    mpp: float,
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


# Files


def write_pyramid(
    path: Path, pixels: np.ndarray, mpp: float, downsamples: Sequence[int] = (1, 2, 4, 8)
) -> None:
    """Write (H, W, 3) uint8 RGB as a tiled pyramidal TIFF, which OpenSlide calls generic-tiff.

    ``mpp`` is that of ``pixels``; ``downsamples`` are relative to it and begin with 1. Tiles are
    deflated, hence without loss.
    """
    height, width = pixels.shape[:2]
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary) as tiff:
        for downsample in downsamples:
            size = max(1, round(width / downsample)), max(1, round(height / downsample))
            per_cm = 1e4 / (mpp * downsample)
            tiff.write(
                cv2.resize(pixels, size, interpolation=cv2.INTER_AREA),
                photometric="rgb",
                tile=(_TILE_PX, _TILE_PX),
                compression="zlib",
                compressionargs={"level": 1},  # higher levels take far longer and save 5 %
                predictor=True,
                maxworkers=1,
                subfiletype=int(downsample > 1),
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                metadata=None,
            )


@dataclass(frozen=True)
class _Job:
    """One slide of a cohort that is to be drawn and written."""

    slide: Path
    truth: Path
    seed: int
    tumour: bool
    size_px0: tuple[int, int]
    mpp: float


def write_cohort(
    folder: Path,
    *,
    num_slides: Mapping[str, int] = DEFAULT_NUM_SLIDES,
    seed: int = 0,
    size_px0: tuple[int, int] = (2048, 2048),
    mpp: float = 0.5,
    workers: int = 1,
) -> Path:
    """Draw a cohort of which half the slides of every split (rounded down) hold a tumour.

    Writes ``slides/<slide_id>.tiff``, ``truth/<slide_id>.png`` (0 or 255; the mask reduced 4 times
    by area, then cut at one half) and, last, ``cohort.csv`` with paths relative to ``folder``. The
    parameters stand in ``demo.json``: files drawn with the same ones are kept, and with others all
    are drawn anew.

    Parameters
    ----------
    num_slides: slides of each split
    size_px0: width and height of a slide in pixels
    mpp: micrometres per pixel
    workers: processes to draw with

    Returns
    -------
    The path of ``cohort.csv``.
    """
    table = folder / "cohort.csv"
    parameters = {
        "drawing_version": DRAWING_VERSION,
        "num_slides": dict(num_slides),
        "seed": seed,
        "size_px0": list(size_px0),
        "mpp": mpp,
    }
    _prepare_folder(folder, json.dumps(parameters, indent=2) + "\n")
    rows, jobs = [], []
    for row, slide_seed in _plan_cohort(num_slides, seed):
        slide, truth = folder / row["path"], folder / "truth" / f"{row['slide_id']}.png"
        rows.append(row)
        if not (slide.is_file() and truth.is_file()):
            jobs.append(_Job(slide, truth, slide_seed, row["label"] == "tumour", size_px0, mpp))
    _run_jobs(jobs, workers)
    write_csv(table, COHORT_COLUMNS, rows)
    return table


def _prepare_folder(folder: Path, parameters: str) -> None:
    """Remove the slides of a demo with other parameters, and note the new ones."""
    note, table = folder / "demo.json", folder / "cohort.csv"
    if table.exists() and not note.exists():
        raise InputError(f"{folder}: its cohort.csv is not the demo's; choose another folder")
    if note.exists() and note.read_text(encoding="utf-8") == parameters:
        return
    outdated = [table, *folder.glob("slides/demo_*.tiff"), *folder.glob("truth/demo_*.png")]
    for path in outdated:
        path.unlink(missing_ok=True)
    write_text(note, parameters)


def _plan_cohort(num_slides: Mapping[str, int], seed: int) -> Iterator[tuple[dict[str, str], int]]:
    """Rows of the table, each with the seed of its slide; neither id nor seed tells the label."""
    rng = np.random.default_rng(seed)
    splits = [split for split, count in num_slides.items() for _ in range(count)]
    seeds = rng.integers(2**32, size=len(splits))
    tumour = np.concatenate(
        [rng.permutation(np.arange(count) < count // 2) for count in num_slides.values()]
    )
    for number, split in enumerate(splits):
        slide_id = f"demo_{number:03d}"
        row = {
            "slide_id": slide_id,
            "path": f"slides/{slide_id}.tiff",
            "label": "tumour" if tumour[number] else "normal",
            "patient_id": f"patient_{number:03d}",
            "split": split,
        }
        yield row, int(seeds[number])


def _run_jobs(jobs: Sequence[_Job], workers: int) -> None:
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            _write_slide(job)
        return
    context = multiprocessing.get_context("spawn")  # OpenCV's threads do not survive a fork
    with ProcessPoolExecutor(
        min(workers, len(jobs)), context, initializer=cv2.setNumThreads, initargs=(1,)
    ) as pool:
        list(pool.map(_write_slide, jobs))


def _write_slide(job: _Job) -> None:
    """Write the truth, then the slide."""
    slide = draw_slide(seed=job.seed, tumour=job.tumour, size_px0=job.size_px0, mpp=job.mpp)
    width, height = (max(1, length // TRUTH_DOWNSAMPLE) for length in job.size_px0)
    share = cv2.resize(
        slide.tumour.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_AREA
    )
    with atomic_path(job.truth) as temporary:
        cv2.imwrite(str(temporary), np.where(share > 127, 255, 0).astype(np.uint8))
    write_pyramid(job.slide, slide.pixels, job.mpp)
