"""The callback of ``embed`` that writes bag files and reports the progress."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from dasmil.bag_folder import status_row
from dasmil.bags import bag_path, write_bag
from dasmil.embedding.dataset import WAIT, TileChunk
from dasmil.embedding.module import EmbeddedSlide, EmbeddingModule
from dasmil.endings import end_on_sigterm
from dasmil.errors import DiskFullError, InputError, join_few
from dasmil.progress import Watchdog, progress
from dasmil.work.worker import Worker


class BagWriter(Callback):
    """Write the bag of each slide that the module has embedded, and settle the slide.

    Parameters
    ----------
    module: embeds the slides.
    output: folder of bag files.
    worker: has claimed the slides.
    show_progress: whether to show a bar of the tiles of all workers.
    """

    def __init__(self, module: EmbeddingModule, output: Path, worker: Worker, show_progress: bool):
        self.module = module
        self.output = output
        self.worker = worker
        self.show_progress = show_progress
        self._starts: dict[int, float] = {}  # by number of the slide
        self._num_tiles = {t.slide_id: sum(t.num_tiles().values()) for t in module.dataset.tables}
        self._watchdog = Watchdog(lambda: f"pixels of {join_few(self.worker.claimed())}")

    def setup(self, *_: Any, **__: Any) -> None:
        self._watchdog.start()  # Lightning waits for the first chunk before on_predict_start

    def on_predict_start(self, *_: Any) -> None:
        end_on_sigterm()
        self.module.waiting.begin(self.module.device)
        total, is_hidden = sum(self._num_tiles.values()), not self.show_progress
        self._bar = progress(
            desc="embed", total=total, unit="tile", disable=is_hidden, smoothing=0.05
        )

    def on_exception(self, *_: Any) -> None:
        self._watchdog.stop()

    def on_predict_end(self, *_: Any) -> None:
        self._watchdog.stop()
        self._update_bar()
        self._bar.close()

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: TileChunk, *_: Any, **__: Any
    ) -> None:
        self._watchdog.touch()
        if batch.slide != WAIT:
            self._starts.setdefault(batch.slide, time.monotonic())

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: TileChunk, *_: Any, **__: Any
    ) -> None:
        for slide in outputs:
            self._settle(slide)
        self._update_bar(is_waiting=batch.slide == WAIT)
        self.module.waiting.begin(self.module.device)

    def num_settled(self) -> int:
        """Tiles of the slides that any worker has settled in this run."""
        self.worker.board.update()
        return sum(self._num_tiles.get(slide_id, 0) for slide_id in self.worker.board.settled)

    def _update_bar(self, is_waiting: bool = False) -> None:
        if self.show_progress:
            if is_waiting:
                self._bar.set_postfix_str("waiting for other workers")
            num_begun = sum(embedding.num_embedded for embedding in self.module.begun.values())
            self._bar.update(self.num_settled() + num_begun - self._bar.n)

    def _settle(self, slide: EmbeddedSlide) -> None:
        slide_id = self.module.dataset.tables[slide.number].slide_id
        row: dict[str, str | int] = {"state": "failed", "message": slide.error}
        if slide.bag is not None:
            if not self.worker.still_holds(slide_id):
                print(f"embed: {slide_id}: another worker has taken it over; nothing is written")
                return
            try:
                write_bag(bag_path(self.output, slide_id), slide.bag)
            except DiskFullError:
                raise
            except InputError as error:
                row["message"] = str(error)
            else:
                num_damaged = slide.bag.header.num_damaged
                row = status_row(slide.bag.num_tiles(), num_damaged, slide.damage)
        seconds = time.monotonic() - self._starts[slide.number]
        self.worker.settle(slide_id, {**row, "seconds": round(seconds, 2)})
