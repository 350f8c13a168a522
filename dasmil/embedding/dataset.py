"""The tiles of a cohort as chunks: the parts in which slides are read, once for all scales."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from dasmil.geometry import Tiles
from dasmil.slides.cohort import SlideRow
from dasmil.slides.cutting import TileCutter
from dasmil.slides.reader import READ_BLOCK_PX, Slide

# Decoded parts of the file that the next chunk reads again, at its upper edge: a strip of tiles
# across a wide slide.
CACHE_BYTES = 128 * 2**20
WAIT = -1  # index, and slide, of a chunk without tiles, for which a reading process waits
WAIT_S = 1.0
READ_TIMEOUT_S = 600.0


@dataclass  # not frozen: Lightning converts the fields for precisions such as bf16-true
class TileChunk:
    """A few coarsest tiles of one slide, and all tiles inside them.

    Parameters
    ----------
    slide: number of the slide in the cohort, or WAIT.
    start: per scale the row of the first tile.
    tiles: per scale (n, 3, tile_px, tile_px) uint8 RGB, channels last in memory; empty if reading
        failed.
    damaged: per scale (n,) bool, tiles whose pixels cannot be decoded, which are white; empty if
        all can.
    reason: the place of the first damaged tile, and what is wrong with it.
    error: why reading failed.
    """

    slide: int
    start: dict[str, int] = field(default_factory=dict)
    tiles: dict[str, Tensor] = field(default_factory=dict)
    damaged: dict[str, Tensor] = field(default_factory=dict)
    reason: str = ""
    error: str = ""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TileChunk":
        moved = {name: t.to(device, non_blocking=non_blocking) for name, t in self.tiles.items()}
        return replace(self, tiles=moved)

    def pin_memory(self) -> "TileChunk":
        return replace(self, tiles={name: t.pin_memory() for name, t in self.tiles.items()})


def chunk_ranges(tiles: Tiles, max_roots: int) -> list[tuple[int, int]]:
    """The chunks of a slide as ranges of rows of its coarsest tiles; an empty one without tiles.

    A chunk covers about ``READ_BLOCK_PX`` squared pixels at the finest scale.

    Parameters
    ----------
    max_roots: coarsest tiles per chunk, at most.
    """
    side_px = tiles.tile_px * tiles.geometry.ratio(0, len(tiles.scales) - 1)
    size = int(np.clip(READ_BLOCK_PX**2 // side_px**2, 1, max_roots))
    count = len(tiles.grid[tiles.scales[0].name])
    return [(start, min(start + size, count)) for start in range(0, max(1, count), size)]


def read_chunk(cutter: TileCutter, start: int, stop: int, slide: int = 0) -> TileChunk:
    """Read the coarsest tiles [start, stop) of a slide and all tiles inside them.

    Parameters
    ----------
    slide: number of the slide.
    """
    cut = cutter.cut(start, stop)
    rows = cutter.tiles.rows_inside(start, stop)
    return TileChunk(
        slide,
        {name: first for name, (first, _) in rows.items()},
        {name: torch.from_numpy(rgb).permute(0, 3, 1, 2) for name, rgb in cut.pixels.items()},
        {name: torch.from_numpy(is_damaged) for name, is_damaged in cut.damaged.items()},
        cut.reason,
    )


class ChunkDataset(Dataset[TileChunk]):
    """Chunks slide by slide; a chunk that cannot be read holds its error.

    Parameters
    ----------
    rows: the slides.
    tables: their tiles.
    max_roots: coarsest tiles per chunk, at most.
    timeout: seconds that reading a chunk may take; a reading process that takes longer is killed.
    """

    def __init__(
        self,
        rows: Sequence[SlideRow],
        tables: Sequence[Tiles],
        max_roots: int,
        timeout: float = READ_TIMEOUT_S,
    ):
        self.rows = rows
        self.tables = tables
        self.timeout = timeout
        self.chunks: list[tuple[int, int, int]] = []  # slide, first coarsest tile, end
        self.chunks_of: list[range] = []  # per slide
        for number, table in enumerate(tables):
            first = len(self.chunks)
            self.chunks += [(number, *rows) for rows in chunk_ranges(table, max_roots)]
            self.chunks_of.append(range(first, len(self.chunks)))
        self._open: tuple[int, Slide, TileCutter] | None = None

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> TileChunk:
        if index == WAIT:
            time.sleep(WAIT_S)
            return TileChunk(WAIT)
        number, start, stop = self.chunks[index]
        if start == stop:
            return TileChunk(number)
        try:
            with _killed_after(self.timeout):
                return read_chunk(self._cutter(number), start, stop, number)
        except Exception as error:  # becomes the slide's row in status.csv; the cohort goes on
            return TileChunk(number, error=str(error) or repr(error))

    def _cutter(self, number: int) -> TileCutter:
        """Open a slide; each reading process keeps only its last one open."""
        if self._open is None or self._open[0] != number:
            if self._open is not None:
                self._open[1].close()
                self._open = None
            slide = Slide(self.rows[number], CACHE_BYTES)
            self._open = (number, slide, TileCutter(slide, self.tables[number]))
        return self._open[2]


@contextmanager
def _killed_after(seconds: float) -> Iterator[None]:
    """Kill this reading process by SIGALRM if the block takes longer: only that ends a decoder.

    The main process is never killed.
    """
    if get_worker_info() is None:
        yield
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
