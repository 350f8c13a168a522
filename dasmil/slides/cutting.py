"""Cut the tiles of all scales from a few large reads of a slide."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import cv2
import numpy as np
import numpy.typing as npt

from dasmil.geometry import BoolArray, Rows, Tiles
from dasmil.slides.reader import DamagedError, RgbArray, Slide, resize

MAX_SIDE_PX = 4096  # of a read; OpenSlide splits larger ones, and rounds at the seams
SUBPIXEL = 1 / 256  # OpenSlide ignores smaller shifts too


@dataclass(frozen=True)
class Cut:
    """Some coarsest tiles of a slide and all tiles inside them.

    Parameters
    ----------
    pixels: per scale (n, tile_px, tile_px, 3) uint8 RGB, in the order of the rows.
    damaged: per scale (n,) bool, tiles whose pixels cannot be decoded; empty if there are none.
    reason: place of the first of them, and what is wrong with it.
    """

    pixels: Mapping[str, RgbArray]
    damaged: Mapping[str, BoolArray] = field(default_factory=dict)
    reason: str = ""


class TileCutter:
    """Cuts tiles from an open slide; their pixels are those of :meth:`Slide.read`.

    Scales that use the same stored level share reads, one per row of coarse tiles. If the level's
    downsample is not whole, every tile is read on its own: OpenSlide interpolates such a level, and
    differently from each origin, which takes far longer than sharing would save.

    Parameters
    ----------
    slide: the slide.
    tiles: its tiles.
    """

    def __init__(self, slide: Slide, tiles: Tiles):
        self.slide = slide
        self.tiles = tiles
        self.boxes_px0 = {name: tiles.boxes_px0(name) for name in tiles.scale_names}
        levels = ((slide.level_for(s.mpp / tiles.extent.mpp), s.name) for s in tiles.scales)
        #: (level, names of the scales that are read from it, coarse to fine)
        self.reads = [
            (level, [name for _, name in group]) for level, group in groupby(levels, itemgetter(0))
        ]

    def cut(self, start: int, stop: int) -> Cut:
        """The coarsest tiles [start, stop) and all tiles inside them; damaged ones are white."""
        side = self.tiles.tile_px
        rows = self.tiles.rows_inside(start, stop)
        pixels = {n: np.empty((b - a, side, side, 3), np.uint8) for n, (a, b) in rows.items()}
        try:
            self._cut(rows, pixels)
        except DamagedError:
            return Cut(pixels, *self._cut_one_by_one(rows, pixels))
        return Cut(pixels)

    def _cut(self, rows: Mapping[str, Rows], pixels: Mapping[str, RgbArray]) -> None:
        """Fill in the tiles; raises :class:`DamagedError` at the first damaged pixel."""
        side = self.tiles.tile_px
        for level, names in self.reads:
            if self.slide.is_whole(level):
                self._cut_shared(level, names, rows, pixels)
            else:
                for name in names:
                    boxes = self.boxes_px0[name][slice(*rows[name])]
                    for tile, box in zip(pixels[name], boxes, strict=True):
                        tile[...] = self.slide.read(box, (side, side))

    def _cut_one_by_one(
        self, rows: Mapping[str, Rows], pixels: Mapping[str, RgbArray]
    ) -> tuple[dict[str, BoolArray], str]:
        """Fill in each tile by its own read; return which are damaged, and why the first is."""
        side, reason = self.tiles.tile_px, ""
        damaged = {name: np.zeros(len(found), bool) for name, found in pixels.items()}
        for name, (first, end) in rows.items():
            for index, box in enumerate(self.boxes_px0[name][first:end]):
                try:
                    pixels[name][index] = self.slide.read(box, (side, side))
                except DamagedError as error:
                    pixels[name][index], damaged[name][index] = 255, True
                    reason = reason or (
                        f"{self.slide.row.path}: its {name} tile at "
                        f"{box[0]},{box[1]} (level-0 pixels) cannot be read: {error.__cause__}"
                    )
        return damaged, reason

    def _cut_shared(
        self, level: int, names: list[str], rows: Mapping[str, Rows], pixels: Mapping[str, RgbArray]
    ) -> None:
        """Fill in the tiles of some scales from reads of one level, one per run."""
        coarsest, stored = names[0], round(self.slide.downsamples[level])
        for first, end in _runs(self.boxes_px0[coarsest], *rows[coarsest], MAX_SIDE_PX * stored):
            left, top, _, bottom = self.boxes_px0[coarsest][first].tolist()
            right = int(self.boxes_px0[coarsest][end - 1, 2])
            left, top = left // stored * stored, top // stored * stored  # a pixel of the level
            size_px = (math.ceil((right - left) / stored), math.ceil((bottom - top) / stored))
            region = self.slide.region((left, top), level, size_px)
            inside = self.tiles.rows_inside(first, end, coarsest)
            for name in names:
                boxes_px = (self.boxes_px0[name][slice(*inside[name])] - [left, top] * 2) / stored
                into = pixels[name][inside[name][0] - rows[name][0] :]
                for tile, box_px in zip(into, boxes_px.tolist(), strict=False):
                    resize(_cut_out(region, box_px), tile)


def _runs(
    boxes_px0: npt.NDArray[np.int64], start: int, stop: int, longest_px0: int
) -> Iterator[Rows]:
    """Rows [start, stop) as runs of adjacent tiles, so that no gap is read."""
    first = start
    for row in range(start + 1, stop + 1):
        if (
            row == stop
            or boxes_px0[row, 1] != boxes_px0[first, 1]
            or boxes_px0[row, 0] != boxes_px0[row - 1, 2]
            or boxes_px0[row, 2] - boxes_px0[first, 0] > longest_px0
        ):
            yield first, row
            first = row


def _cut_out(region: RgbArray, box_px: list[float]) -> RgbArray:
    """A box of a region; interpolated between pixels, as OpenSlide would."""
    left, top, right, bottom = box_px
    width, height = max(1, round(right - left)), max(1, round(bottom - top))
    x, y = round(left), round(top)
    if abs(left - x) < SUBPIXEL and abs(top - y) < SUBPIXEL:
        return region[y : y + height, x : x + width]
    centre = left + (width - 1) / 2, top + (height - 1) / 2
    return np.asarray(cv2.getRectSubPix(region, (width, height), centre), dtype=np.uint8)
