"""Cells of the synthetic slides: their positions, shapes and stain."""

import math
from collections.abc import Sequence

import numpy as np

from dasmil.demo.layout import LAYOUT_STEP_UM, Blob, Frame, Layout, depth_um, smooth_noise

_EDGE_UM = 0.7  # width over which the outline of a nucleus fades
_NUCLEUS_SPACING_UM = 14.5
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
    rng: np.random.Generator, frame: Frame, spacing_um: float
) -> tuple[np.ndarray, np.ndarray]:
    """Points (N,) of a jittered grid over the frame."""
    x_um, y_um = (points.ravel() for points in frame.grid(spacing_um))
    return tuple(
        at + spacing_um * rng.uniform(-0.33, 0.33, at.size).astype(np.float32)
        for at in (x_um, y_um)
    )


def draw_nuclei(
    rng: np.random.Generator, frame: Frame, layout: Layout, fibre_angle: np.ndarray
) -> np.recarray:
    """All nuclei of a slide, every one of them solid."""
    nuclei = [_draw_stromal(rng, frame, layout, fibre_angle), _draw_lymphocytes(rng, frame, layout)]
    for gland in layout.glands:
        nuclei.append(_draw_ring(rng, gland, offset_um=7, spacing_um=6.2, along=False))
    for vessel in layout.vessels:
        nuclei.append(_draw_ring(rng, vessel, offset_um=2, spacing_um=22, along=True))
    return np.concatenate(nuclei).view(np.recarray)


def _draw_stromal(
    rng: np.random.Generator, frame: Frame, layout: Layout, fibre_angle: np.ndarray
) -> np.recarray:
    """Ordinary nuclei, many of them drawn out along the fibres."""
    x_um, y_um = _scatter(rng, frame, _NUCLEUS_SPACING_UM)
    crowding = smooth_noise(rng, frame, 140, LAYOUT_STEP_UM)
    keep = rng.uniform(size=x_um.size) < 0.82 + 0.12 * frame.sample(crowding, x_um, y_um)
    keep &= frame.sample(layout.edge, x_um, y_um) > 0.006
    decoys = ((layout.clusters, 0), (layout.glands, 20), (layout.vessels, 7), (layout.holes, 6))
    for blobs, margin_um in decoys:
        keep &= depth_um(blobs, x_um, y_um) < -margin_um
    cells = _new_cells(rng, x_um[keep], y_um[keep], diameter_um=(7, 9), aspect=(1.0, 1.9))
    cells.angle = frame.sample(fibre_angle, cells.x_um, cells.y_um)
    cells.angle += rng.normal(0, 0.35, len(cells))
    swollen = np.flatnonzero(depth_um(layout.swollen, cells.x_um, cells.y_um) > 0)
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


def _draw_lymphocytes(rng: np.random.Generator, frame: Frame, layout: Layout) -> np.recarray:
    """Small, round, dark nuclei, thinning out towards the rim of a cluster."""
    x_um, y_um = _scatter(rng, frame, 7.5)
    depth = depth_um(layout.clusters, x_um, y_um)
    keep = rng.uniform(size=x_um.size) < np.clip(0.5 + depth / 20, 0, 0.92)
    return _new_cells(
        rng, x_um[keep], y_um[keep], diameter_um=(5, 6.2), aspect=(1.0, 1.15), stain=1.3
    )


def _draw_ring(
    rng: np.random.Generator, blob: Blob, *, offset_um: float, spacing_um: float, along: bool
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


def draw_blood(rng: np.random.Generator, frame: Frame, vessels: Sequence[Blob]) -> np.recarray:
    """Red cells that fill the vessels."""
    x_um, y_um = _scatter(rng, frame, 6.4)
    keep = (depth_um(vessels, x_um, y_um) > 2.5) & (rng.uniform(size=x_um.size) < 0.9)
    return _new_cells(rng, x_um[keep], y_um[keep], diameter_um=(5.8, 7), aspect=(1.0, 1.25))


def turn_vesicular(
    rng: np.random.Generator, nuclei: np.recarray, lesions: Sequence[Blob]
) -> np.recarray:
    """Make the nuclei inside the lesions vesicular; they absorb as much light as before.

    ``pale`` balances the larger area: see the test that compares block means.
    """
    inside = np.flatnonzero(depth_um(lesions, nuclei.x_um, nuclei.y_um) > 0)
    cells = _swell(rng, nuclei[inside].view(np.recarray))
    cells.pale = rng.uniform(0.19, 0.31, len(cells))
    cells.nucleolus_um = rng.uniform(1.3, 1.7, len(cells))
    turned = nuclei.copy()
    turned[inside] = cells
    return turned


def render(cells: np.recarray, frame: Frame) -> tuple[np.ndarray, np.ndarray]:
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
