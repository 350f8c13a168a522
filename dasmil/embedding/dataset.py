"""Tiles of a cohort as chunks of pixels, and which process reads which slide."""

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, get_worker_info

from dasmil.geometry import Tiles
from dasmil.slides.cohort import SlideRow
from dasmil.slides.cutting import TileCutter
from dasmil.slides.reader import READ_BLOCK_PX, Slide
from dasmil.work.worker import Worker

# Decoded parts of the file that the next chunk reads again, at its upper edge: a strip of tiles
# across a wide slide.
CACHE_BYTES = 128 * 2**20
WAIT = -1  # index of no chunk, after a while
WAIT_S = 1.0
READ_TIMEOUT_S = 600.0
PREFETCHED = 3  # chunks for each reading process, by DataLoader and by Lightning, at most
SUSPECT = "suspect"  # in what is written down of a slide: it may have killed a reading process


@dataclass  # not frozen: Lightning converts the fields for precisions such as bf16-true
class TileChunk:
    """Some coarsest tiles of one slide with all tiles inside them.

    Parameters
    ----------
    slide: number of the slide in the cohort; WAIT for no tiles of no slide.
    start: per scale the row of the first tile.
    tiles: per scale (n, 3, tile_px, tile_px) uint8 RGB, channels last in memory; empty when
        reading failed.
    damaged: per scale (n,) bool, tiles whose pixels cannot be decoded, which are white; empty if
        there are none.
    reason: where the first damaged tile lies, and what is wrong with it.
    error: why reading failed.
    """

    slide: int
    start: dict[str, int] = field(default_factory=dict)
    tiles: dict[str, Tensor] = field(default_factory=dict)
    damaged: dict[str, Tensor] = field(default_factory=dict)
    reason: str = ""
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
    tables: their tiles.
    max_roots: coarsest tiles a chunk at most.
    timeout: seconds that reading a chunk may take; a reading process that takes longer is ended.
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
        self.chunks_of: list[range] = []
        self.num_tiles: list[dict[str, int]] = []  # of each slide, per scale
        for number, table in enumerate(tables):
            first = len(self.chunks)
            side_px = table.tile_px * table.geometry.ratio(0, len(table.scales) - 1)
            size = int(np.clip(READ_BLOCK_PX**2 // side_px**2, 1, max_roots))
            count = len(table.grid[table.scales[0].name])
            for start in range(0, count, size):
                self.chunks.append((number, start, min(start + size, count)))
            if count == 0:  # one empty chunk, so that it is written
                self.chunks.append((number, 0, 0))
            self.chunks_of.append(range(first, len(self.chunks)))
            self.num_tiles.append(table.num_tiles())
        self._open: tuple[int, Slide, Tiles, TileCutter] | None = None

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
            with _ended_after(self.timeout):
                tiles, cutter = self._cutter(number)
                cut = cutter.cut(start, stop)
        except Exception as error:  # becomes the slide's row in status.csv; the cohort goes on
            return TileChunk(number, error=str(error) or repr(error))
        rows = tiles.rows_inside(start, stop)
        return TileChunk(
            number,
            {tiles.scales[scale].name: first for scale, (first, _) in rows.items()},
            {n: torch.from_numpy(found).permute(0, 3, 1, 2) for n, found in cut.pixels.items()},
            {n: torch.from_numpy(found) for n, found in cut.damaged.items()},
            cut.reason,
        )

    def _cutter(self, number: int) -> tuple[Tiles, TileCutter]:
        """The open slide; only the last one is kept open, in the process that reads it."""
        if self._open is None or self._open[0] != number:
            if self._open is not None:
                self._open[1].close()
                self._open = None
            tiles = self.tables[number]
            slide = Slide(self.rows[number], CACHE_BYTES)
            self._open = (number, slide, tiles, TileCutter(slide, tiles))
        return self._open[2], self._open[3]


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End this reading process by SIGALRM if the block takes longer: nothing else ends a decoder.

    The main process is never ended so.
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


class ClaimingSampler(DistributedSampler[int]):
    """Chunks of slides that this process has claimed, the slides with most tiles first.

    Whoever is free takes the next slide, so processes, nodes and separate commands share a cohort
    by tiles and not by slides. The reading processes are asked in turns: each has a slide of its
    own, so that it reads neighbours one after the other, which share decoded pixels; where no slide
    is left it helps with the longest. While other workers still hold slides there is an empty chunk
    to wait for, since their slides are to be taken over where they die.

    Slides that may have killed a reading process come last, each when all before it has come
    through: should it do so again, nothing else is lost, and it is known which it is.

    Parameters
    ----------
    dataset: the slides that are to be done.
    worker: claims them.
    is_done: whether the bag of a slide, by number, has been made meanwhile.
    num_workers: reading processes of this process.
    """

    def __init__(
        self,
        dataset: ChunkDataset,
        worker: Worker,
        is_done: Callable[[int], bool],
        num_workers: int = 0,
    ):
        super().__init__(dataset, num_replicas=1, rank=0)  # Lightning leaves its kind as it is
        self.dataset: ChunkDataset = dataset
        self.worker = worker
        self.is_done = is_done
        self.lanes: list[deque[int]] = [deque() for _ in range(max(1, num_workers))]
        num_tiles = [sum(counts.values()) for counts in dataset.num_tiles]
        self.suspects: list[int] = []
        self.waiting: deque[int] = deque()
        for slide in sorted(range(len(num_tiles)), key=lambda slide: -num_tiles[slide]):
            suspect = worker.last(dataset.rows[slide].slide_id).get(SUSPECT, False)
            (self.suspects if suspect else self.waiting).append(slide)

    def __iter__(self) -> Iterator[int]:
        yield from self._share()
        for slide in self.suspects:
            yield from [WAIT] * (PREFETCHED * len(self.lanes))
            self.waiting.append(slide)
            yield from self._share()

    def _share(self) -> Iterator[int]:
        while True:
            empty = True
            for lane in self.lanes:
                if lane or self._fill(lane):
                    empty = False
                    yield lane.popleft()
            if empty and not self.waiting:
                return
            if empty:
                yield WAIT

    def __len__(self) -> int:
        raise TypeError("no length")  # nobody knows how many come to this process

    def drop(self, slide: int) -> None:
        """The rest of a slide that has failed is not read."""
        for lane in self.lanes:
            chunks = [chunk for chunk in lane if self.dataset.chunks[chunk][0] != slide]
            lane.clear()
            lane.extend(chunks)

    def _fill(self, lane: deque[int]) -> bool:
        slide = self._claim()
        if slide is not None:
            lane.extend(self.dataset.chunks_of[slide])
        else:
            longest = max(self.lanes, key=len)
            lane.extendleft(longest.pop() for _ in range(len(longest) // 2))
        return bool(lane)

    def _claim(self) -> int | None:
        """The next slide; those of others wait, those that are settled are left out."""
        held = self.worker.held_by_others() if self.waiting else {}
        for _ in range(len(self.waiting)):
            slide = self.waiting.popleft()
            slide_id = self.dataset.rows[slide].slide_id
            if self.worker.is_settled(slide_id):
                continue
            if slide_id in held or not self.worker.claim(slide_id):
                self.waiting.append(slide)
            elif self.worker.is_settled(slide_id) or self.is_done(slide):
                self.worker.release(slide_id)  # between the two questions
            else:
                return slide
        return None
