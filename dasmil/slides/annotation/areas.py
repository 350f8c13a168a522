"""Marked areas of a slide: the marked share of each tile, and filled polygons."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dasmil.errors import InputError
from dasmil.geometry import Extent

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
MaskArray = npt.NDArray[np.bool_]
Rings = Sequence[FloatArray]  # a polygon: its outline and then its holes, each (V, 2)

MAX_MASK_PX = 2**28  # of a slide's mask in memory, one byte each: 100,000 x 200,000 px at 1/16
BAND_CROSSINGS = 2**20  # filled at once, some 150 bytes each
MAX_COST = 20_000_000  # of a file; a crossing takes some 0.3 µs
FAR_PX0 = 2.0**40  # of a corner from the slide; products of coordinates stay exact enough
MAX_EXTENT_PX0 = 2**22  # a metre at x40; how far a slide of unknown size may reach


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
        """(H, W) bool over the whole slide, as fine as memory allows; shares are computed on it."""

    @property
    def is_empty(self) -> bool:
        return not self.finest.any()

    def overlap(self, boxes_px0: IntArray) -> FloatArray:
        """(N, 4) left, top, right, bottom → (N,) marked share of each tile, in 0..1.

        Exact on :attr:`finest`, even if edges of tiles cut its pixels. For a tile that reaches over
        the slide's border, it is the share of its part inside the slide.
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
    """How much of each of these pixels is in the interval."""
    edges = np.arange(np.floor(low), np.ceil(high) + 1)
    return np.diff(np.clip(edges, low, high))


class Polygons(Areas):
    """Areas inside polygons, which may have holes.

    A pixel of a mask is marked if its centre is inside. The downsample of :attr:`finest` is the
    smallest power of two that leaves at most 2^28 pixels: 16 for 100,000 x 200,000 px, 1 for
    16,000 x 16,000 px.

    Parameters
    ----------
    lesions: polygons; each is its outline and then its holes, (V, 2) x, y in level-0 pixels.
    excluded: polygons that are cut out of all lesions.
    """

    def __init__(
        self,
        size_px0: tuple[int, int],
        lesions: Sequence[Rings] = (),
        excluded: Sequence[Rings] = (),
    ):
        super().__init__(size_px0)
        self.lesions = lesions
        self.excluded = excluded

    def mask(self, downsample: float) -> MaskArray:
        return self._filled(mask_shape(self.size_px0, downsample), np.full(2, 1 / downsample))

    @cached_property
    def finest(self) -> MaskArray:
        shape = mask_shape(self.size_px0, reduction(self.size_px0))
        return self._filled(shape, np.array(shape[::-1]) / self.size_px0)

    @property
    def cost(self) -> int:
        """The cost of :attr:`finest`: crossings of edges with rows."""
        shape = mask_shape(self.size_px0, reduction(self.size_px0))
        to_mask = np.array(shape[::-1]) / self.size_px0
        return sum(
            _Edges(polygons, to_mask, shape[0]).num_crossings
            for polygons in (self.lesions, self.excluded)
        )

    def _filled(self, shape: tuple[int, int], to_mask: FloatArray) -> MaskArray:
        mask = np.zeros(shape, dtype=bool)
        for polygons, value in ((self.lesions, True), (self.excluded, False)):
            _Edges(polygons, to_mask, shape[0]).fill(mask, value)
        return mask


def mask_shape(size_px0: tuple[int, int], downsample: float) -> tuple[int, int]:
    """Rows and columns of a mask; raises :class:`InputError` if it takes too much memory."""
    width, height = (max(1, round(length / downsample)) for length in size_px0)
    if width * height > 2 * MAX_MASK_PX:  # rounding may make it a little larger
        raise InputError(
            f"a mask of {width} x {height} px, of a slide of {size_px0[0]} x {size_px0[1]} px, "
            "takes too much memory; are the slide's size and mpp right?"
        )
    return height, width


def reduction(size: tuple[int, int]) -> int:
    """The smallest power of two by which a mask of this size must be reduced."""
    factor = 1
    while (size[0] // factor) * (size[1] // factor) > MAX_MASK_PX:
        factor *= 2
    return factor


class _Edges:
    """The edges of polygons, and the rows of a mask that they cross.

    An edge crosses a row if the centres of its pixels are between the ends of the edge. Between two
    crossings of a polygon in a row, pixels are inside by the even-odd rule over all its rings.
    OpenCV and Pillow also set pixels that the outline touches: half a pixel too much on every side.

    Parameters
    ----------
    to_mask: pixels of the mask per level-0 pixel, along x and y.
    num_rows: of the mask.
    """

    def __init__(self, polygons: Sequence[Rings], to_mask: FloatArray, num_rows: int):
        rings = [xy for rings in polygons for xy in rings]
        corners = np.concatenate([np.empty((0, 2)), *rings]) * to_mask
        lengths = np.array([len(xy) for xy in rings], dtype=np.int64)
        self._start = corners - 0.5  # pixel (0, 0) has its centre at 0, 0
        following = np.arange(1, len(self._start) + 1)
        held = lengths > 0
        following[lengths.cumsum()[held] - 1] = (lengths.cumsum() - lengths)[held]
        self._end = self._start[following]
        of_ring = np.repeat(np.arange(len(polygons)), [len(rings) for rings in polygons])
        self._polygon = np.repeat(of_ring, lengths)
        y0, y1 = self._start[:, 1], self._end[:, 1]
        self._first, self._last = (
            np.clip(np.ceil(bound(y0, y1)), 0, num_rows).astype(np.int64)
            for bound in (np.minimum, np.maximum)
        )

    @property
    def num_crossings(self) -> int:
        return int((self._last - self._first).sum())

    def fill(self, mask: MaskArray, value: bool) -> None:
        """Set the pixels inside to ``value``, as many rows at a time as memory allows."""
        crossed = np.bincount(self._first, minlength=len(mask) + 1)
        crossed = (crossed - np.bincount(self._last, minlength=len(mask) + 1)).cumsum()
        bands = crossed.cumsum() // BAND_CROSSINGS
        begins = [0, *(np.flatnonzero(np.diff(bands[:-1])) + 1).tolist()]
        for begin, end in zip(begins, [*begins[1:], len(mask)], strict=True):
            self._fill_rows(mask[begin:end], begin, value)

    def _fill_rows(self, mask: MaskArray, begin: int, value: bool) -> None:
        num_rows, width = mask.shape
        held = np.flatnonzero((self._first < begin + num_rows) & (self._last > begin))
        first = np.maximum(self._first[held], begin)
        times = np.minimum(self._last[held], begin + num_rows) - first
        edge = np.repeat(held, times)
        row = np.arange(len(edge)) - np.repeat(times.cumsum() - times - first, times)
        (x0, y0), (x1, y1) = self._start[edge].T, self._end[edge].T
        crossing = np.clip(np.ceil(x0 + (row - y0) * (x1 - x0) / (y1 - y0)), 0, width)
        # polygon, row and crossing as one number, which sorts much faster
        number = (self._polygon[edge] * num_rows + row - begin) * (width + 1)
        number = np.sort(number + crossing.astype(np.int64)).reshape(-1, 2)
        row = number[:, 0] // (width + 1) % num_rows
        inside = number % (width + 1) + (row * width)[:, None]  # first pixel and end of each run
        inside = inside[inside[:, 0] < inside[:, 1]]
        starts, ends = np.sort(inside[:, 0]), np.sort(inside[:, 1])
        apart = np.flatnonzero(starts[1:] > ends[:-1])  # no run reaches over these gaps
        starts = np.concatenate([starts[:1], starts[apart + 1]])
        ends = np.concatenate([ends[apart], ends[-1:]])
        pixels = mask.reshape(-1)
        for at, to in zip(starts.tolist(), ends.tolist(), strict=True):
            pixels[at:to] = value


def polygons_on(extent: Extent, lesions: Sequence[Rings], excluded: Sequence[Rings]) -> Polygons:
    """Polygons on a slide; one of unknown size reaches at least as far as the lesions."""
    size_px0 = extent.size_px0
    if not extent.size_is_known:
        corners = np.concatenate([np.array([size_px0]), *(rings[0] for rings in lesions)])
        width, height = np.ceil(corners.max(axis=0)).astype(int).tolist()
        size_px0 = width, height
    return Polygons(size_px0, lesions, excluded)


def refuse_other_slide(path: Path, what: str, xy_px0: FloatArray, extent: Extent) -> None:
    """Raise :class:`InputError` if a shape (V, 2) does not touch the slide."""
    if not extent.size_is_known and xy_px0.max() > MAX_EXTENT_PX0:
        raise InputError(
            f"{path}: {what} reaches to {xy_px0.max():g} px, further than any slide; "
            "coordinates are level-0 pixels"
        )
    beyond = extent.size_is_known and (xy_px0.min(axis=0) > extent.size_px0).any()
    if beyond or (xy_px0.max(axis=0) < 0).any():
        raise InputError(
            f"{path}: {what} is outside the slide of {extent.size_px0[0]} x "
            f"{extent.size_px0[1]} px; is it of another slide?"
        )
