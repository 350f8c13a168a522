"""Pixels for self-supervision: augmented views of tiles, read straight from the slides."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from dasmil.data.bag_checks import warn_missing
from dasmil.data.distributed import processes
from dasmil.data.sampler import set_resumed_epoch
from dasmil.data.seeds import training_seed
from dasmil.data.split import HELD_OUT, SplitOptions
from dasmil.data.views import PackedTiles, PilViews, TensorViews, ViewOptions
from dasmil.errors import InputError
from dasmil.files import must_exist
from dasmil.reading import reader_options
from dasmil.slides.cohort import SlideRow, read_cohort
from dasmil.slides.reader import DamagedError, RgbArray, Slide
from dasmil.slides.study import SlideRecord
from dasmil.slides.tile_table import read_tiles, slide_changed, tiles_path

# parameters of TileDataModule that decide the course of a training beside the split
OF_TRAINING = ("scale", "batch_size", "tiles_per_epoch", "views")
MAX_OPEN_SLIDES = 32  # per reading process


@dataclass(eq=False)
class TileDataset(Dataset[Any]):
    """Views of single tiles; an index is (number of the slide, row of the tile, seed).

    If a tile cannot be decoded, the next tile of the slide that can be decoded replaces it. A
    warning names the first such tile of each slide.

    Parameters
    ----------
    rows: the slides.
    boxes_px0: per slide (N, 4) level-0 boxes of its tiles.
    tile_px: side in pixels to which a tile is resampled.
    views: makes the item from pixels (tile_px, tile_px, 3) and the seed, which alone decides the
        random numbers.
    """

    rows: Sequence[SlideRow]
    boxes_px0: Sequence[np.ndarray]
    tile_px: int
    views: Callable[[RgbArray, int], Any]

    def __post_init__(self) -> None:
        self._open: dict[int, Slide] = {}
        self._damaged: set[int] = set()  # slides for which a warning was given

    def __getitem__(self, index: tuple[int, int, int]) -> Any:
        number, row, seed = index
        return self.views(self._pixels(number, row), seed)

    def _pixels(self, number: int, row: int) -> RgbArray:
        """(tile_px, tile_px, 3) uint8.

        Raises
        ------
        InputError
            if no tile of the slide can be decoded.
        """
        boxes_px0, slide = self.boxes_px0[number], self._slide(number)
        for following in range(len(boxes_px0)):
            box_px0 = boxes_px0[(row + following) % len(boxes_px0)]
            try:
                return slide.read(box_px0, (self.tile_px,) * 2)
            except DamagedError as error:
                if number not in self._damaged:
                    warnings.warn(f"{error}; other tiles of the slide are used", stacklevel=2)
                self._damaged.add(number)
        raise InputError(f"{slide.row.path}: none of its tiles can be decoded; leave the slide out")

    def __len__(self) -> int:
        return sum(len(boxes) for boxes in self.boxes_px0)

    def _slide(self, number: int) -> Slide:
        """The open slide; if too many are open, the oldest one is closed."""
        if number not in self._open:
            if len(self._open) == MAX_OPEN_SLIDES:
                self._open.pop(next(iter(self._open))).close()
            self._open[number] = Slide(self.rows[number])
        return self._open[number]


class EvenSlideSampler(DistributedSampler[list[Tensor]]):
    """The same number of tiles from every slide, in random order.

    A slide's tiles are not repeated until all have been drawn. Seed and epoch decide the draw and
    the seed of each tile's views. So every process draws the same and takes its own share.

    Parameters
    ----------
    sizes: number of tiles per slide.
    num_samples: tiles per epoch over all processes.
    """

    def __init__(self, sizes: Sequence[int], num_samples: int, world: int, rank: int, seed: int):
        self.sizes = sizes
        self.draws = num_samples
        super().__init__(range(num_samples), world, rank, seed=seed, drop_last=True)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:  # type: ignore[override]
        return iter(self.items(self.epoch))

    def items(self, epoch: int) -> list[tuple[int, int, int]]:
        """The indices of this process in an epoch, in order."""
        generator = np.random.default_rng((self.seed, epoch))
        rounds = -(-self.draws // len(self.sizes))
        slides = np.concatenate([generator.permutation(len(self.sizes)) for _ in range(rounds)])
        orders = [
            np.concatenate([generator.permutation(size) for _ in range(-(-rounds // size))])
            for size in self.sizes
        ]
        rows = np.empty_like(slides)
        for number, order in enumerate(orders):
            rows[slides == number] = order[:rounds]
        seeds = generator.integers(2**63, size=len(slides))
        mine = slice(self.rank, self.total_size, self.num_replicas)
        return list(
            zip(slides[mine].tolist(), rows[mine].tolist(), seeds[mine].tolist(), strict=True)
        )


class TileDataModule(LightningDataModule):
    """DINO's views of one scale's tiles, from the training slides only.

    Parameters
    ----------
    tiles:
        folder that ``tile`` wrote.
    scale:
        which of its scales.
    batch_size:
        tiles per step and device.
    tiles_per_epoch:
        tiles per epoch over all devices; null: all tiles of the training slides.
    num_workers:
        reading processes per device.
    views:
        the views of a tile.
    split:
        how the cohort is split if its table leaves it open; as in :class:`BagDataModule`.
    """

    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD

    def __init__(
        self,
        tiles: Path,
        scale: str,
        batch_size: int = 64,
        tiles_per_epoch: int | None = None,
        num_workers: int = 2,
        views: ViewOptions = ViewOptions(),
        split: SplitOptions = SplitOptions(),
    ):
        super().__init__()
        self.save_hyperparameters(*OF_TRAINING, logger=False)
        self.folder = Path(tiles)
        self.scale = scale
        self.batch_size = batch_size
        self.tiles_per_epoch = tiles_per_epoch
        self.num_workers = num_workers
        self.view_options = views
        self.split_options = split
        self.transform = views.make_transform(self.mean, self.std)
        is_pil = views.augmentation_backend == "pil"
        self.views = PilViews(self.transform) if is_pil else TensorViews(self.transform)
        self.rows: list[SlideRow] = []
        self.records: list[SlideRecord] = []  # of the same slides
        self.boxes_px0: list[np.ndarray] = []
        self.tile_px = 0
        self.mpp = 0.0

    def setup(self, stage: str) -> None:
        must_exist(self.folder, "give data.tiles the folder that tile wrote")
        cohort = self.split_options.read_table(read_cohort(self.folder / "cohort.csv"))
        split = self.split_options.draw(cohort)
        held_out = {row.patient for row in cohort if split.get(row.slide_id, row.split) in HELD_OUT}
        training = [row for row in cohort if row.patient not in held_out]
        sound = (row for row in training if not (row.fault or row.scale_fault))
        tiled = [row for row in sound if tiles_path(self.folder, row.slide_id).exists()]
        warn_missing(self.folder, "tiles", [r.slide_id for r in training if r not in tiled])
        self.rows, self.boxes_px0, self.records = [], [], []
        for row in tiled:
            pyramid = read_tiles(tiles_path(self.folder, row.slide_id))
            if row.path.exists() and slide_changed(row.path, pyramid):
                raise InputError(
                    f"{row.path}: the slide file has changed since it was tiled; run tile again"
                )
            mpps = {scale.name: scale.mpp for scale in pyramid.scales}
            if self.scale not in mpps:
                raise InputError(
                    f"data.scale {self.scale!r}: {self.folder} holds {', '.join(mpps)}; "
                    "choose one of these, or tile again with it"
                )
            self.tile_px, self.mpp = pyramid.tile_px, mpps[self.scale]
            if len(pyramid.grid[self.scale]):
                self.rows.append(row)
                self.records.append(
                    SlideRecord(row.slide_id, row.patient_id, digest=pyramid.slide_digest)
                )
                self.boxes_px0.append(pyramid.boxes_px0(self.scale))
        if not self.rows:
            raise InputError(f"{self.folder}: no training slide has tiles; see its status.csv")

    def train_dataloader(self) -> DataLoader[Any]:
        views: Callable[[RgbArray, int], Any] = self.views
        collate: Callable[..., Any] = default_collate
        if isinstance(self.views, TensorViews) and self._is_on_gpu:
            # on_after_batch_transfer makes the views
            views, collate = self.views.draw, self.views.collate
        dataset = TileDataset(self.rows, self.boxes_px0, self.tile_px, views)
        sampler = self._sampler()
        set_resumed_epoch(sampler, self.trainer)
        if len(sampler) < self.batch_size:
            raise InputError(
                f"{self.folder}: {len(sampler)} tiles per epoch and process do not fill one batch "
                f"of {self.batch_size}; lower data.batch_size"
            )
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            **reader_options(self.num_workers),
            drop_last=True,
            collate_fn=collate,
            pin_memory=self._is_on_gpu and torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def slides_of(self, epoch: int, batch_idx: int) -> list[str]:
        """The slide_id of each tile in a batch of this process."""
        start = batch_idx * self.batch_size
        items = self._sampler().items(epoch)[start : start + self.batch_size]
        return [self.rows[number].slide_id for number, _, _ in items]

    def _sampler(self) -> EvenSlideSampler:
        sizes = [len(boxes) for boxes in self.boxes_px0]
        num_tiles = self.tiles_per_epoch or sum(sizes)
        return EvenSlideSampler(sizes, num_tiles, *processes(self.trainer), training_seed())

    @property
    def _is_on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type != "cpu"

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        if isinstance(batch, PackedTiles):
            return batch.to(device)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Make the views that were only drawn: per view (B, 3, side, side)."""
        if isinstance(batch, PackedTiles):
            assert isinstance(self.views, TensorViews) and self.trainer is not None
            views = self.views.batch(batch)
            # Lightning has done this before the transfer, when there were no views yet
            return self.trainer.precision_plugin.convert_input(views)
        return batch
