"""The extractors of all scales under Lightning's predict loop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from dasmil.bags import Bag
from dasmil.embedding.dataset import WAIT, ChunkDataset, TileChunk
from dasmil.embedding.embed_slide import SlideEmbedding, layout_on
from dasmil.embedding.extractor import Extractor
from dasmil.embedding.sampler import ClaimingSampler
from dasmil.embedding.waiting import Waiting
from dasmil.errors import InputError
from dasmil.reading import reader_options


@dataclass(frozen=True)
class EmbeddedSlide:
    """A slide whose embedding has ended.

    Parameters
    ----------
    number: of the slide in the dataset.
    bag: None if the slide has failed.
    error: why it has failed.
    damage: the place of its first damaged tile, and what is wrong with it.
    """

    number: int
    bag: Bag | None = None
    error: str = ""
    damage: str = ""


class EmbeddingModule(LightningModule):
    """Embed the chunks of a dataset, which may mix slides, slide by slide.

    Parameters
    ----------
    extractors: one per scale.
    dataset: the chunks to embed.
    make_sampler: makes the sampler of this process's chunks, once its rank is known.
    batch_size: tiles per pass through a network.
    num_workers: reading processes per device.
    max_damaged_tiles: share of a slide's finest tiles that may be left out, in 0..1.

    Attributes
    ----------
    waiting: for pixels; the writer of the bags begins it, the next chunk ends it.
    """

    def __init__(
        self,
        extractors: Mapping[str, Extractor],
        dataset: ChunkDataset,
        make_sampler: Callable[[], ClaimingSampler],
        batch_size: int,
        num_workers: int,
        max_damaged_tiles: float,
    ):
        super().__init__()
        self.extractors = dict(extractors)
        self.networks = nn.ModuleList(extractors.values())  # a name with a dot is no module's
        self.dataset = dataset
        self.make_sampler = make_sampler
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.max_damaged_tiles = max_damaged_tiles
        self.begun: dict[int, SlideEmbedding] = {}  # by number of the slide
        self.waiting = Waiting()
        self._failed: set[int] = set()
        # with fewer slides than processes, some processes have nothing to do
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def predict_dataloader(self) -> DataLoader[TileChunk]:
        self.sampler = self.make_sampler()
        return DataLoader(
            self.dataset,
            batch_size=None,  # a chunk is a batch
            sampler=self.sampler,
            **reader_options(self.num_workers),
            pin_memory=self.on_gpu,
        )

    def transfer_batch_to_device(
        self, batch: TileChunk, device: torch.device, dataloader_idx: int
    ) -> TileChunk:
        """Copy from pinned memory without waiting for the network; Lightning alone would wait."""
        if batch.slide != WAIT:
            self.waiting.end()
        return batch.to(device, non_blocking=device.type == "cuda")

    def on_predict_start(self) -> None:
        self.networks.to(memory_format=layout_on(self.device))

    def predict_step(self, chunk: TileChunk, batch_idx: int) -> list[EmbeddedSlide]:
        """Embed a chunk; the slide that is complete or has failed with it, if there is one."""
        number = chunk.slide
        if number == WAIT or number in self._failed:
            return []
        try:
            if chunk.error:
                raise InputError(chunk.error)
            if number not in self.begun:
                self.begun[number] = SlideEmbedding(
                    self.dataset.tables[number],
                    self.extractors,
                    self.batch_size,
                    self.max_damaged_tiles,
                )
            embedding = self.begun[number]
            embedding.add(chunk)
            if not embedding.is_complete:
                return []
            slide = EmbeddedSlide(number, embedding.bag(), damage=embedding.damage)
        except InputError as error:
            self._failed.add(number)
            self.sampler.drop(number)
            slide = EmbeddedSlide(number, error=str(error))
        self.begun.pop(number, None)
        return [slide]
