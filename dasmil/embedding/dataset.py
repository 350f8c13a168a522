"""Tiles of a cohort as chunks of pixels, and which process reads which slide."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from dasmil.slides.cohort import SlideRow
from dasmil.slides.cutting import TileCutter, rows_inside
from dasmil.slides.reader import READ_BLOCK_PX, Slide
from dasmil.slides.tiling import TilePyramid, read_tiles, tiles_path

# Decoded parts of the file that the next chunk reads again, at its upper edge: a strip of tiles
# across a wide slide.
CACHE_BYTES = 128 * 2**20


@dataclass  # not frozen: Lightning converts the fields for precisions such as bf16-true
class TileChunk:
    """Some coarsest tiles of one slide with all tiles inside them.

    Parameters
    ----------
    slide: number of the slide in the cohort.
    start: per scale the row of the first tile.
    tiles: per scale (n, 3, tile_px, tile_px) uint8 RGB, channels last in memory; empty when
        reading failed.
    error: why reading failed.
    """

    slide: int
    start: dict[str, int] = field(default_factory=dict)
    tiles: dict[str, Tensor] = field(default_factory=dict)
    error: str | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TileChunk":
        moved = {name: t.to(device, non_blocking=non_blocking) for name, t in self.tiles.items()}
        return replace(self, tiles=moved)

    def pin_memory(self) -> "TileChunk":
        return replace(self, tiles={name: t.pin_memory() for name, t in self.tiles.items()})


class ChunkDataset(Dataset[TileChunk]):
    """Chunks slide by slide; a slide that cannot be read yields its error.

    A chunk is a row of coarsest tiles that hold about ``READ_BLOCK_PX`` squared pixels at the
    finest scale, at least one.

    Parameters
    ----------
    rows: the slides.
    tiles: folder of tile tables.
    max_roots: coarsest tiles a chunk at most.
    """

    def __init__(self, rows: Sequence[SlideRow], tiles: Path, max_roots: int):
        self.rows = rows
        self.tiles = tiles
        self.chunks: list[tuple[int, int, int]] = []  # slide, first coarsest tile, end
        self.chunks_of: list[range] = []
        self.num_tiles: list[dict[str, int]] = []  # of each slide, per scale
        for number, row in enumerate(rows):
            first = len(self.chunks)
            table = read_tiles(tiles_path(tiles, row.slide_id))
            side_px = table.tile_px * table.geometry.ratio(0, len(table.scales) - 1)
            size = int(np.clip(READ_BLOCK_PX**2 // side_px**2, 1, max_roots))
            count = len(table.grid[table.scales[0].name])
            for start in range(0, count, size):
                self.chunks.append((number, start, min(start + size, count)))
            if count == 0:  # one empty chunk, so that it is written
                self.chunks.append((number, 0, 0))
            self.chunks_of.append(range(first, len(self.chunks)))
            self.num_tiles.append(table.num_tiles())
        self._open: tuple[int, Slide, TilePyramid, TileCutter] | None = None

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> TileChunk:
        number, start, stop = self.chunks[index]
        if start == stop:
            return TileChunk(number)
        try:
            tiles, cutter = self._cutter(number)
            pixels = cutter.cut(start, stop)
        except Exception as error:  # becomes the slide's row in status.csv; the cohort goes on
            return TileChunk(number, error=str(error) or repr(error))
        rows = rows_inside(tiles, start, stop)
        return TileChunk(
            number,
            {tiles.scales[scale].name: first for scale, (first, _) in rows.items()},
            {name: torch.from_numpy(found).permute(0, 3, 1, 2) for name, found in pixels.items()},
        )

    def _cutter(self, number: int) -> tuple[TilePyramid, TileCutter]:
        """The open slide; only the last one is kept open, in the process that reads it."""
        if self._open is None or self._open[0] != number:
            if self._open is not None:
                self._open[1].close()
                self._open = None
            tiles = read_tiles(tiles_path(self.tiles, self.rows[number].slide_id))
            slide = Slide(self.rows[number], CACHE_BYTES)
            self._open = (number, slide, tiles, TileCutter(slide, tiles))
        return self._open[2], self._open[3]


class WholeSlideSampler(DistributedSampler[int]):
    """Gives every process whole slides, about the same number of tiles each, none twice.

    The workers of a process are asked in turns, so their shares are dealt in turns, too: each reads
    neighbours one after the other, which share decoded pixels, and opens few slides.
    """

    def __init__(self, dataset: ChunkDataset, num_replicas: int, rank: int, num_workers: int = 0):
        super().__init__(dataset, num_replicas, rank, shuffle=False)
        loads = [0] * num_replicas
        mine: list[int] = []
        num_tiles = [sum(counts.values()) for counts in dataset.num_tiles]
        for slide in sorted(range(len(dataset.rows)), key=lambda s: -num_tiles[s]):
            lightest = loads.index(min(loads))
            loads[lightest] += num_tiles[slide] + 1
            if lightest == rank:
                mine.append(slide)
        chunks = [chunk for slide in sorted(mine) for chunk in dataset.chunks_of[slide]]
        shares = np.array_split(np.array(chunks, dtype=np.int64), max(1, num_workers))
        turns = zip_longest(*(share.tolist() for share in shares))
        self.indices = [chunk for chunk in chain.from_iterable(turns) if chunk is not None]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
