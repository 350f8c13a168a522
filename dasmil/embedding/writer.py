"""The prediction callback that puts a slide's features together and writes its bag file."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dasmil.bag_folder import status_row
from dasmil.bags import Bag, BagHeader, ExtractorCard, all_finite, bag_path, write_bag
from dasmil.embedding.dataset import WAIT, TileChunk
from dasmil.endings import end_on_sigterm
from dasmil.errors import DiskFullError, InputError, some_of
from dasmil.geometry import BoolArray, Tiles
from dasmil.progress import Watchdog, progress
from dasmil.work.worker import Worker

READER = "2"  # changes whenever the same tile is read with other pixels


def bag_header(tiles: Tiles, cards: Mapping[str, ExtractorCard], num_damaged: int = 0) -> BagHeader:
    """The header of the bag that these extractors make of these tiles."""
    return BagHeader(
        **tiles.header_fields(),
        extractors=dict(cards),
        num_tiles=tiles.num_tiles()[tiles.scales[-1].name],
        reader=READER,
        num_damaged=num_damaged,
    )


@dataclass(frozen=True)
class Embedded:
    """Features of consecutive tiles of one scale of one slide.

    Parameters
    ----------
    slide: number of the slide in the cohort.
    start: row of the first tile.
    features: (n, D).
    """

    slide: int
    scale: str
    start: int
    features: Tensor


class BagWriter(Callback):
    """Collects the features of each slide and writes its bag when the last ones are there.

    Parameters
    ----------
    tables: tile table of each slide, by number.
    output: folder of bag files.
    cards: extractor per scale.
    worker: has claimed the slides, and is told what became of them.
    max_damaged: share of a slide's finest tiles that may be left out as damaged.
    show_progress: a bar of the tiles of all workers.
    """

    def __init__(
        self,
        tables: Sequence[Tiles],
        output: Path,
        cards: Mapping[str, ExtractorCard],
        worker: Worker,
        max_damaged: float,
        show_progress: bool,
    ):
        self.tables = tables
        self.output = output
        self.cards = cards
        self.worker = worker
        self.max_damaged = max_damaged
        self.show_progress = show_progress
        self.seconds_waiting = 0.0  # for pixels
        self._stepped = 0.0
        self._num_tiles = {t.slide_id: sum(t.num_tiles().values()) for t in tables}
        self._begun: dict[int, float] = {}  # when
        self._features: dict[int, dict[str, Tensor]] = {}
        self._waiting: dict[int, int] = {}
        self._failed: set[int] = set()
        self._damaged: dict[int, dict[str, BoolArray]] = {}  # per scale (N_s,), of the tiles
        self._reasons: dict[int, str] = {}  # of the first damaged tile
        self._watchdog = Watchdog(lambda: f"pixels of {some_of(self.worker.claimed())}")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        end_on_sigterm()
        self._stepped = time.monotonic()
        total, hidden = sum(self._num_tiles.values()), not self.show_progress
        self._bar = progress(desc="embed", total=total, unit="tile", disable=hidden, smoothing=0.05)
        self._watchdog.start()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._watchdog.stop()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watchdog.stop()
        self._show_progress()
        self._bar.close()

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: TileChunk,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._watchdog.touch()
        if batch.slide != WAIT:
            self.seconds_waiting += time.monotonic() - self._stepped
        if batch.damaged and batch.slide not in self._failed:
            batch.error = self._take_damage(batch)

    def _take_damage(self, chunk: TileChunk) -> str | None:
        """Remember the damaged tiles of a chunk; why the slide fails if they are too many."""
        tiles = self.tables[chunk.slide]
        damaged = self._damaged.setdefault(
            chunk.slide, {name: np.zeros(count, bool) for name, count in tiles.num_tiles().items()}
        )
        for name, found in chunk.damaged.items():
            start = chunk.start[name]
            damaged[name][start : start + len(found)] = found.numpy()
        reason = self._reasons.setdefault(chunk.slide, chunk.reason)
        finest = tiles.scales[-1].name
        kept = tiles.kept_rows(damaged)[finest]
        lost = len(kept) - int(kept.sum())
        if lost <= self.max_damaged * len(kept):
            return None
        return (
            f"{reason}; with it {lost} of {len(kept)} {finest} tiles are lost, and "
            f"--max_damaged_tiles {self.max_damaged:g} allows {int(self.max_damaged * len(kept))}"
        )

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: TileChunk,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch.error is not None:
            self._fail(batch.slide, batch.error)
        elif batch.slide != WAIT and not batch.tiles:
            self._begin(batch.slide, pl_module.device)
            self._write(batch.slide)
        embedded: list[Embedded] = outputs
        for some in embedded:
            self._store(some)
        if batch.slide == WAIT or embedded:
            self._show_progress(waits=batch.slide == WAIT)
        self._stepped = time.monotonic()

    def num_settled(self) -> int:
        """Tiles of the slides that were settled in this run, by whatever worker."""
        self.worker.board.update()
        return sum(self._num_tiles.get(slide_id, 0) for slide_id in self.worker.board.settled)

    def _show_progress(self, waits: bool = False) -> None:
        """The tiles of all slides that are settled, whoever did it, and of those begun here."""
        if self.show_progress:
            begun = (
                self._num_tiles[self.tables[number].slide_id] - to_come
                for number, to_come in self._waiting.items()
            )
            if waits:
                self._bar.set_postfix_str("waiting for other workers")
            self._bar.update(self.num_settled() + sum(begun) - self._bar.n)

    def _begin(self, number: int, device: torch.device) -> None:
        """Room for the features of a slide, on the device: to copy each batch would wait for it."""
        counts = self.tables[number].num_tiles()
        self._begun[number] = time.monotonic()
        self._features[number] = {
            name: torch.empty(
                count, self.cards[name].feature_dim, dtype=torch.float32, device=device
            )
            for name, count in counts.items()
        }
        self._waiting[number] = sum(counts.values())

    def _store(self, some: Embedded) -> None:
        if some.slide in self._failed:
            return
        if some.slide not in self._features:
            self._begin(some.slide, some.features.device)
        stop = some.start + len(some.features)
        self._features[some.slide][some.scale][some.start : stop] = some.features
        self._waiting[some.slide] -= len(some.features)
        if self._waiting[some.slide] == 0:
            self._write(some.slide)

    def _write(self, number: int) -> None:
        tiles, num_damaged = self.tables[number], 0
        if not self.worker.still_holds(tiles.slide_id):
            print(f"embed: {tiles.slide_id}: another worker has taken it over; nothing is written")
            self._forget(number)
            return
        features = {name: _as_stored(rows) for name, rows in self._features[number].items()}
        if wrong := [name for name, rows in features.items() if not all_finite(rows)]:
            self._fail(
                number,
                f"{tiles.slide_id}: some {', '.join(wrong)} features are not finite; embed with "
                "--trainer.precision 32-true, or another extractor",
            )
            return
        if damaged := self._damaged.get(number):
            kept = tiles.kept_rows(damaged)
            features = {name: rows[torch.from_numpy(kept[name])] for name, rows in features.items()}
            num_damaged = int((~kept[tiles.scales[-1].name]).sum())
            tiles = tiles.select_rows(kept)
        bag = Bag(tiles, features, self.cards, READER, num_damaged)
        try:
            write_bag(bag_path(self.output, tiles.slide_id), bag)
        except DiskFullError:
            raise
        except InputError as error:  # told in status.csv
            self._fail(number, str(error))
        else:
            first = self._reasons.get(number, "")
            self._settle(number, status_row(tiles.num_tiles(), num_damaged, first))

    def _fail(self, number: int, reason: str) -> None:
        """The slide is lost, and only this slide."""
        if number not in self._failed:
            self._failed.add(number)
            self._settle(number, {"state": "failed", "message": reason})

    def _settle(self, number: int, row: Mapping[str, Any]) -> None:
        seconds = time.monotonic() - self._begun.get(number, time.monotonic())
        self._forget(number)
        self.worker.settle(self.tables[number].slide_id, {**row, "seconds": round(seconds, 2)})

    def _forget(self, number: int) -> None:
        self._damaged.pop(number, None)
        self._reasons.pop(number, None)
        self._begun.pop(number, None)
        self._features.pop(number, None)
        self._waiting.pop(number, None)


def _as_stored(features: Tensor) -> Tensor:
    """float16, or float32 if some of them are too large for it."""
    half = features.half()
    return (half if all_finite(half) else features).cpu()
