"""Which process reads which slide."""

from collections import deque
from collections.abc import Callable, Iterator

from torch.utils.data import DistributedSampler

from dasmil.embedding.dataset import WAIT, ChunkDataset
from dasmil.work.worker import Worker

PREFETCHED = 3  # chunks per reading process, by DataLoader and by Lightning, at most
# in the record of a slide that may have killed a reading process: how many slides may have
SUSPECT = "suspect"


class ClaimingSampler(DistributedSampler[int]):
    """Chunks of slides that this process has claimed, slides with the most tiles first.

    An idle process claims the next slide, so processes, nodes and separate commands share a cohort
    by tiles and not by slides. Chunks are dealt round-robin, so each reading process stays on one
    slide and can reuse decoded regions; if no slide is left it helps with the longest one. While
    other workers hold slides the sampler yields WAIT: if such a worker dies, its slides are free
    again.

    Slides that may have killed a reading process come last, each after all chunks before it have
    been read: if one kills again, nothing else is lost, and it is known which one did. The fewer
    slides were suspected with it, and the larger it is, the later it comes.

    Parameters
    ----------
    dataset: chunks of the slides to embed.
    worker: claims the slides.
    is_done: whether the bag of a slide, by number, has been written meanwhile.
    num_workers: reading processes of this process.
    """

    def __init__(
        self,
        dataset: ChunkDataset,
        worker: Worker,
        is_done: Callable[[int], bool],
        num_workers: int = 0,
    ):
        super().__init__(dataset, num_replicas=1, rank=0)  # Lightning does not replace its kind
        self.dataset: ChunkDataset = dataset
        self.worker = worker
        self.is_done = is_done
        self.lanes: list[deque[int]] = [deque() for _ in range(max(1, num_workers))]
        suspects: list[tuple[int, int, int]] = []  # minus the slides suspected with it, its tiles
        self.waiting: deque[int] = deque()
        num_tiles = [sum(table.num_tiles().values()) for table in dataset.tables]
        for slide in sorted(range(len(num_tiles)), key=lambda slide: -num_tiles[slide]):
            if num_suspected := worker.last_record(self._slide_id(slide)).get(SUSPECT, 0):
                suspects.append((-num_suspected, num_tiles[slide], slide))
            else:
                self.waiting.append(slide)
        self.suspects = [slide for *_, slide in sorted(suspects)]

    def __iter__(self) -> Iterator[int]:
        yield from self._deal_waiting()
        for slide in self.suspects:
            yield from [WAIT] * (PREFETCHED * len(self.lanes))
            self.waiting.append(slide)
            yield from self._deal_waiting()

    def _deal_waiting(self) -> Iterator[int]:
        while True:
            is_idle = True
            for lane in self.lanes:
                if lane or self._fill(lane):
                    is_idle = False
                    yield lane.popleft()
            if is_idle and not self.waiting:
                return
            if is_idle:
                yield WAIT

    def __len__(self) -> int:
        raise TypeError("no length")  # other processes may claim any slide

    def drop(self, slide: int) -> None:
        """Do not read the rest of a slide that has failed."""
        for lane in self.lanes:
            chunks = [chunk for chunk in lane if self.dataset.chunks[chunk][0] != slide]
            lane.clear()
            lane.extend(chunks)

    def _slide_id(self, slide: int) -> str:
        return self.dataset.rows[slide].slide_id

    def _fill(self, lane: deque[int]) -> bool:
        slide = self.worker.claim_next(self.waiting, self._slide_id, self.is_done)
        if slide is not None:
            lane.extend(self.dataset.chunks_of[slide])
        else:
            longest = max(self.lanes, key=len)
            lane.extendleft(longest.pop() for _ in range(len(longest) // 2))
        return bool(lane)
