"""Marked areas of a slide: the share of a tile that is marked, and polygons filled."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dasmil.errors import InputError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
MaskArray = npt.NDArray[np.bool_]
Rings = Sequence[FloatArray]  # a polygon: its outline and then its holes, each (V, 2)

MAX_MASK_PX = 2**28  # of a slide's mask in memory, one byte each: 100,000 x 200,000 px at 1/16


class Areas(ABC):
    """Marked areas of a slide.

    Parameters
    ----------
    size_px0: width and height of the slide.
    """

    def __init__(self, size_px0: tuple[int, int]):
        self.size_px0 = size_px0

    @abstractmethod
    def mask(self, downsample: float) -> MaskArray:
        """(H, W) bool over the whole slide, whose pixels are ``downsample`` level-0 pixels wide."""

    @cached_property
    @abstractmethod
    def finest(self) -> MaskArray:
        """(H, W) bool over the whole slide, as fine as memory allows: from it shares are taken."""

    @property
    def is_empty(self) -> bool:
        return not self.finest.any()

    def overlap(self, boxes_px0: IntArray) -> FloatArray:
        """(N, 4) left, top, right, bottom → (N,) share of each that is marked, in 0..1.

        Exact on :attr:`finest`, also where edges of tiles cut its pixels. Of a tile that reaches
        over the slide's border it is the share of what lies on the slide.
        """
        mask = self.finest
        share = np.zeros(len(boxes_px0))
        limits = np.array([mask.shape[1], mask.shape[0]] * 2)
        boxes = np.clip(boxes_px0 * (limits / np.array(self.size_px0 * 2)), 0, limits)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        for number, (left, top, right, bottom) in enumerate(boxes):
            rows, columns = _cells(top, bottom), _cells(left, right)
            cut = mask[rows, columns]
            if cut.any():
                share[number] = _cover(top, bottom) @ cut @ _cover(left, right) / areas[number]
        return share

    def positive(self, overlap: FloatArray | IntArray, min_share: float = 0.5) -> MaskArray:
        """(N,) bool: at least this share of the tile is marked."""
        return overlap >= min_share - 1e-9


def _cells(low: float, high: float) -> slice:
    """The pixels that an interval touches."""
    return slice(int(np.floor(low)), int(np.ceil(high)))


def _cover(low: float, high: float) -> FloatArray:
    """How much of each of these pixels lies in the interval."""
    edges = np.arange(np.floor(low), np.ceil(high) + 1)
    return np.diff(np.clip(edges, low, high))


class Polygons(Areas):
    """Areas inside polygons, which may have holes.

    A pixel of a mask is marked when its centre lies inside. :attr:`finest` has the smallest power
    of two as downsample with which it has at most 2^28 pixels: 16 for 100,000 x 200,000 px, 1 for
    16,000 x 16,000 px.

    Parameters
    ----------
    lesions: polygons; each its outline and then its holes, (V, 2) x, y in level-0 pixels.
    excluded: polygons that are cut out of all lesions.
    size_is_extent: the slide's size is not known: it reaches at least as far as the lesions.
    """

    def __init__(
        self,
        size_px0: tuple[int, int],
        lesions: Sequence[Rings] = (),
        excluded: Sequence[Rings] = (),
        size_is_extent: bool = False,
    ):
        if size_is_extent:
            corners = np.concatenate([np.array([size_px0]), *(rings[0] for rings in lesions)])
            width, height = np.ceil(corners.max(axis=0)).astype(int).tolist()
            size_px0 = width, height
        super().__init__(size_px0)
        self.lesions = lesions
        self.excluded = excluded

    def mask(self, downsample: float) -> MaskArray:
        return self._filled(mask_shape(self.size_px0, downsample), np.full(2, 1 / downsample))

    @cached_property
    def finest(self) -> MaskArray:
        shape = mask_shape(self.size_px0, reduction(self.size_px0))
        return self._filled(shape, np.array(shape[::-1]) / self.size_px0)

    def _filled(self, shape: tuple[int, int], to_mask: FloatArray) -> MaskArray:
        mask = np.zeros(shape, dtype=bool)
        for polygons, value in ((self.lesions, True), (self.excluded, False)):
            for rings in polygons:
                _fill(mask, [xy * to_mask for xy in rings], value)
        return mask


def mask_shape(size_px0: tuple[int, int], downsample: float) -> tuple[int, int]:
    """Rows and columns of a mask."""
    width, height = (max(1, round(length / downsample)) for length in size_px0)
    return height, width


def reduction(size: tuple[int, int]) -> int:
    """The smallest power of two by which a mask of this size must be reduced."""
    factor = 1
    while (size[0] // factor) * (size[1] // factor) > MAX_MASK_PX:
        factor *= 2
    return factor


def _fill(mask: MaskArray, rings: Rings, value: bool) -> None:
    """Set the pixels whose centre lies inside a polygon, by the even-odd rule over all its rings.

    OpenCV and Pillow set those that its outline touches too: half a pixel too much on every side.
    """
    start = np.concatenate(rings) - 0.5  # pixel (0, 0) has its centre at 0, 0
    end = np.concatenate([np.roll(xy, -1, axis=0) for xy in rings]) - 0.5
    first, last = (
        np.clip(np.ceil(bound(start[:, 1], end[:, 1])).astype(int), 0, len(mask))
        for bound in (np.minimum, np.maximum)
    )
    num_rows = last - first  # of pixels whose centre the edge passes
    edge = np.repeat(np.arange(len(start)), num_rows)
    row = np.arange(len(edge)) - np.repeat(num_rows.cumsum() - num_rows, num_rows) + first[edge]
    (x0, y0), (x1, y1) = start[edge].T, end[edge].T
    crossing = np.ceil(x0 + (row - y0) * (x1 - x0) / (y1 - y0)).astype(int)
    order = np.lexsort((crossing, row))
    bounds = np.clip(crossing[order], 0, mask.shape[1]).reshape(-1, 2)
    for at, (left, right) in zip(row[order][::2].tolist(), bounds.tolist(), strict=True):
        mask[at, left:right] = value


def refuse_other_slide(
    path: Path, what: str, xy_px0: FloatArray, size_px0: tuple[int, int], size_is_extent: bool
) -> None:
    """A shape (V, 2) must at least touch the slide, as far as its size is known."""
    beyond = (xy_px0.min(axis=0) > size_px0).any() and not size_is_extent
    if beyond or (xy_px0.max(axis=0) < 0).any():
        raise InputError(
            f"{path}: {what} lies outside the slide of {size_px0[0]} x {size_px0[1]} px; "
            "is it of another slide?"
        )
