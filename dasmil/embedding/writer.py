"""The prediction callback that puts a slide's features together and writes its bag file."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dasmil.bags import Bag, BagHeader, ExtractorCard, bag_path, write_bag
from dasmil.embedding.dataset import TileChunk
from dasmil.errors import InputError
from dasmil.files import write_text
from dasmil.slides.tiling import TilePyramid, read_tiles


def bag_header(tiles: TilePyramid, cards: Mapping[str, ExtractorCard]) -> BagHeader:
    """The header of the bag that these extractors make of these tiles."""
    return BagHeader(
        slide_id=tiles.slide_id,
        scales=tiles.scales,
        tile_px=tiles.tile_px,
        slide_mpp=tiles.slide_mpp,
        size_px0=tiles.size_px0,
        tiling=tiles.tiling,
        extractors=dict(cards),
        num_tiles=tiles.num_tiles()[tiles.scales[-1].name],
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
    tile_files: tile table of each slide, by number.
    output: folder of bag files.
    cards: extractor per scale.
    """

    def __init__(
        self, tile_files: Sequence[Path], output: Path, cards: Mapping[str, ExtractorCard]
    ):
        self.tile_files = tile_files
        self.output = output
        self.cards = cards
        self.seconds_waiting = 0.0  # for pixels
        self._stepped = 0.0
        self._tiles: dict[int, TilePyramid] = {}
        self._features: dict[int, dict[str, Tensor]] = {}
        self._waiting: dict[int, int] = {}
        self._failed: set[int] = set()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stepped = time.monotonic()

    def on_predict_batch_start(self, *_: Any) -> None:
        self.seconds_waiting += time.monotonic() - self._stepped

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
        elif not batch.tiles:
            self._begin(batch.slide, pl_module.device)
            self._write(batch.slide)
        embedded: list[Embedded] = outputs
        for some in embedded:
            self._store(some)
        self._stepped = time.monotonic()

    def _begin(self, number: int, device: torch.device) -> None:
        """Room for the features of a slide, on the device: to copy each batch would wait for it."""
        tiles = self._tiles[number] = read_tiles(self.tile_files[number])
        self._features[number] = {
            name: torch.empty(
                count, self.cards[name].feature_dim, dtype=torch.float16, device=device
            )
            for name, count in tiles.num_tiles().items()
        }
        self._waiting[number] = sum(tiles.num_tiles().values())

    def _store(self, some: Embedded) -> None:
        if some.slide in self._failed:
            return
        if some.slide not in self._tiles:
            self._begin(some.slide, some.features.device)
        stop = some.start + len(some.features)
        self._features[some.slide][some.scale][some.start : stop] = some.features.half()
        self._waiting[some.slide] -= len(some.features)
        if self._waiting[some.slide] == 0:
            self._write(some.slide)

    def _write(self, number: int) -> None:
        tiles = self._tiles.pop(number)
        bag = Bag(
            header=bag_header(tiles, self.cards),
            features={name: rows.cpu() for name, rows in self._features.pop(number).items()},
            grid={name: torch.from_numpy(grid) for name, grid in tiles.grid.items()},
            parent={name: torch.from_numpy(parent) for name, parent in tiles.parent.items()},
        )
        try:
            write_bag(bag_path(self.output, tiles.slide_id), bag)
        except InputError as error:  # features that are not finite, say; told in status.csv
            self._fail(number, str(error))

    def _fail(self, number: int, reason: str) -> None:
        """The slide is lost, and only this slide; ``embed`` reports the reason."""
        self._failed.add(number)
        self._tiles.pop(number, None)
        self._features.pop(number, None)
        write_text(failure_path(self.output, self.tile_files[number].stem), reason)


def failure_path(output: Path, slide_id: str) -> Path:
    """Where the reason is kept for a slide that could not be embedded."""
    return output / "failed" / f"{slide_id}.txt"
