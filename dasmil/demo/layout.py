"""Layout of a synthetic slide: positions of tissue, lesions and benign decoys in micrometres.

The layout depends only on the seed, not on the slide's label.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

LAYOUT_STEP_UM = 4.0  # grid of the tissue outline and of the slow fields

_TISSUE_COVER = (0.42, 0.58)  # of the slide's area
_LESION_COVER = (0.035, 0.105)  # of the tissue's area
_LESION_DIAMETER_UM = (150.0, 300.0)


@dataclass(frozen=True)
class Frame:
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
class Blob:
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
class Layout:
    """Positions on a slide: the tissue's outline, the lesions and the benign decoys."""

    edge: np.ndarray  # (rows, cols) float32 on the layout grid, above zero in tissue, no unit
    lesions: list[Blob]
    clusters: list[Blob]
    swollen: list[Blob]  # patches where benign nuclei are large and pale
    glands: list[Blob]
    vessels: list[Blob]
    holes: list[Blob]


def smooth_noise(
    rng: np.random.Generator, frame: Frame, wavelength_um: float, step_um: float
) -> np.ndarray:
    """Slow field of about unit variance on a grid of ``step_um``, (rows, cols) float32."""
    coarse = rng.standard_normal(
        [n + 3 for n in frame.grid_shape(wavelength_um / 2)], dtype=np.float32
    )
    rows, cols = frame.grid_shape(step_um)
    return 1.3 * cv2.resize(coarse, (cols, rows), interpolation=cv2.INTER_CUBIC)


def enlarge(field: np.ndarray, frame: Frame) -> np.ndarray:
    """Bring a grid over the frame to its pixels, (H, W) float32."""
    height, width = frame.shape_px0
    return cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC)


def depth_um(blobs: Sequence[Blob], x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
    """Depth inside the nearest of the blobs, far below zero if there is none."""
    depth = np.full(np.shape(x_um), -1e6, np.float32)
    for blob in blobs:
        np.maximum(depth, blob.depth_um(x_um, y_um), out=depth)
    return depth


def depth_field(blobs: Sequence[Blob], frame: Frame) -> np.ndarray:
    """Depth on the layout grid (rows, cols), um, cut off at -100."""
    return np.maximum(depth_um(blobs, *frame.grid(LAYOUT_STEP_UM)), np.float32(-100))


def mask(blobs: Sequence[Blob], frame: Frame) -> np.ndarray:
    """Pixels inside any of the blobs, (H, W) bool."""
    return enlarge(depth_field(blobs, frame), frame) > 0


# Placement


def draw_layout(rng: np.random.Generator, frame: Frame) -> Layout:
    """Place the tissue, then the lesions, then the decoys in what room is left."""
    edge = _draw_tissue_edge(rng, frame)
    free = edge > 0
    free[[0, -1]] = free[:, [0, -1]] = False
    area_mm2 = free.mean() * math.prod(frame.extent_um) / 1e6
    lesions = _place_lesions(rng, frame, free, area_mm2)

    def decoys(per_mm2: float, radius_um: tuple[float, float], margin_um: float) -> list[Blob]:
        blobs = []
        for radius in rng.uniform(*radius_um, size=1 + rng.poisson(per_mm2 * area_mm2)):
            centre = _find_room(rng, frame, free, radius * 1.2 + margin_um)
            if centre is not None:
                blobs.append(_draw_blob(rng, *centre, radius, irregularity=0.12))
                _occupy(frame, free, blobs[-1:], margin_um)
        return blobs

    return Layout(
        edge=edge,
        lesions=lesions,
        swollen=decoys(3, (60, 110), margin_um=4),
        clusters=decoys(4, (25, 60), margin_um=10),
        glands=decoys(8, (10, 24), margin_um=22),
        vessels=decoys(3, (14, 40), margin_um=12),
        holes=decoys(9, (10, 38), margin_um=8),
    )


def _draw_tissue_edge(rng: np.random.Generator, frame: Frame) -> np.ndarray:
    """Field above zero in one to three pieces of tissue, (rows, cols) on the layout grid."""
    x_um, y_um = frame.grid(LAYOUT_STEP_UM)
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
        field += weight * smooth_noise(rng, frame, wavelength_um, LAYOUT_STEP_UM)
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
) -> Blob:
    waves = irregularity * rng.uniform(0.3, 1, 3) * (1.0, 0.6, 0.35)
    return Blob(x_um, y_um, radius_um, tuple(waves), tuple(rng.uniform(0, 2 * np.pi, 3)))


def _place_lesions(
    rng: np.random.Generator, frame: Frame, free: np.ndarray, tissue_mm2: float
) -> list[Blob]:
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
    return cv2.distanceTransform(free.astype(np.uint8), cv2.DIST_L2, 5) * LAYOUT_STEP_UM


def _find_room(
    rng: np.random.Generator, frame: Frame, free: np.ndarray, radius_um: float
) -> tuple[float, float] | None:
    """Random centre (x_um, y_um) of a disc inside ``free``; None where it fits nowhere."""
    fits = np.flatnonzero(_room_um(free) > radius_um)
    if not fits.size:
        return None
    at = fits[int(rng.uniform() * fits.size)]
    x_um, y_um = frame.grid(LAYOUT_STEP_UM)
    return float(x_um.flat[at]), float(y_um.flat[at])


def _roomiest(frame: Frame, free: np.ndarray) -> tuple[float, float]:
    x_um, y_um = frame.grid(LAYOUT_STEP_UM)
    at = int(_room_um(free).argmax())
    return float(x_um.flat[at]), float(y_um.flat[at])


def _occupy(frame: Frame, free: np.ndarray, blobs: Sequence[Blob], margin_um: float) -> None:
    free &= depth_field(blobs, frame) < -margin_um
