"""Tiles of a cohort as chunks of pixels, and which process reads which slide."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from dasmil.slides.cohort import SlideRow
from dasmil.slides.reader import Slide
from dasmil.slides.tile import tiles_path
from dasmil.slides.tiling import TilePyramid, read_tiles


@dataclass  # not frozen: Lightning converts the fields for precisions such as bf16-true
class TileChunk:
    """Some tiles of one scale of one slide.

    Parameters
    ----------
    slide: number of the slide in the cohort.
    start: row of the first tile.
    tiles: (n, 3, tile_px, tile_px) uint8 RGB; empty when reading failed.
    error: why reading failed.
    """

    slide: int
    scale: str
    start: int
    tiles: Tensor
    error: str | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TileChunk":
        return replace(self, tiles=self.tiles.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TileChunk":
        return replace(self, tiles=self.tiles.pin_memory())


def read_tile_pixels(slide: Slide, boxes_px0: np.ndarray, tile_px: int) -> Tensor:
    """(n, 4) level-0 boxes → (n, 3, tile_px, tile_px) uint8."""
    pixels = np.empty((len(boxes_px0), tile_px, tile_px, 3), dtype=np.uint8)
    for number, box_px0 in enumerate(boxes_px0):
        pixels[number] = slide.read(box_px0, (tile_px, tile_px))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


class ChunkDataset(Dataset[TileChunk]):
    """Chunks slide by slide, scale by scale; a slide that cannot be read yields its error.

    Parameters
    ----------
    rows: the slides.
    tiles: folder of tile tables.
    chunk_size: tiles a chunk at most.
    """

    def __init__(self, rows: Sequence[SlideRow], tiles: Path, chunk_size: int):
        self.rows = rows
        self.tiles = tiles
        self.chunks: list[tuple[int, str, int, int]] = []  # slide, scale, start, stop
        self.chunks_of: list[range] = []
        self.num_tiles: list[int] = []
        for number, row in enumerate(rows):
            first = len(self.chunks)
            counts = read_tiles(tiles_path(tiles, row.slide_id)).num_tiles()
            for scale, count in counts.items():
                for start in range(0, count, chunk_size):
                    self.chunks.append((number, scale, start, min(start + chunk_size, count)))
            if first == len(self.chunks):  # no tiles at all: one empty chunk, so that it is written
                self.chunks.append((number, next(iter(counts)), 0, 0))
            self.chunks_of.append(range(first, len(self.chunks)))
            self.num_tiles.append(sum(counts.values()))
        self._open: tuple[int, Slide, TilePyramid] | None = None

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> TileChunk:
        number, scale, start, stop = self.chunks[index]
        empty = torch.empty(0, 3, 1, 1, dtype=torch.uint8)
        if start == stop:
            return TileChunk(number, scale, start, empty)
        try:
            slide, pyramid = self._slide(number)
            boxes_px0 = pyramid.boxes_px0(scale)[start:stop]
            pixels = read_tile_pixels(slide, boxes_px0, pyramid.tile_px)
        except Exception as error:  # becomes the slide's row in status.csv; the cohort goes on
            return TileChunk(number, scale, start, empty, str(error) or repr(error))
        return TileChunk(number, scale, start, pixels)

    def _slide(self, number: int) -> tuple[Slide, TilePyramid]:
        """The open slide; only the last one is kept open, in the process that reads it."""
        if self._open is None or self._open[0] != number:
            if self._open is not None:
                self._open[1].close()
                self._open = None
            row = self.rows[number]
            self._open = (number, Slide(row), read_tiles(tiles_path(self.tiles, row.slide_id)))
        return self._open[1], self._open[2]


class WholeSlideSampler(DistributedSampler[int]):
    """Gives every process whole slides, about the same number of tiles each, none twice."""

    def __init__(self, dataset: ChunkDataset, num_replicas: int, rank: int):
        super().__init__(dataset, num_replicas, rank, shuffle=False)
        loads = [0] * num_replicas
        mine: list[int] = []
        for slide in sorted(range(len(dataset.rows)), key=lambda s: -dataset.num_tiles[s]):
            lightest = loads.index(min(loads))
            loads[lightest] += dataset.num_tiles[slide] + 1
            if lightest == rank:
                mine.append(slide)
        self.indices = [chunk for slide in sorted(mine) for chunk in dataset.chunks_of[slide]]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
