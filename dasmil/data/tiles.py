"""Pixels for self-supervision: augmented crops of tiles, read straight from the slides."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightly.transforms.dino_transform import DINOTransform
from lightning.pytorch import LightningDataModule
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from dasmil.data.augment import DrawnTiles, PilViews, TensorViews
from dasmil.data.bags import say_missing
from dasmil.data.sampler import TrainingLoader, go_on
from dasmil.errors import InputError
from dasmil.files import must_exist
from dasmil.reading import reader_options
from dasmil.seeds import training_seed
from dasmil.slides.cohort import SlideRow, read_cohort
from dasmil.slides.reader import DamagedError, RgbArray, Slide
from dasmil.slides.splits import placed, split_cohort
from dasmil.slides.study import SlideRecord
from dasmil.slides.tile_table import read_tiles, slide_changed, tiles_path

EVALUATED = ("val", "test")
# parameters of TileDataModule that decide the course of a training beside the slides' parts
OF_TRAINING = (
    *("scale", "batch_size", "tiles_per_epoch", "global_crop_px", "global_crop_scale"),
    *("local_crop_px", "local_crop_scale", "num_local_crops", "vertical_flip", "augmentation"),
    "augmentation_backend",
)
MAX_OPEN_SLIDES = 32  # of each reading process


class TileDataset(Dataset[Any]):
    """Views of single tiles; an item is named by (number of the slide, row of the tile, seed).

    In the place of a tile whose pixels cannot be decoded comes the next one of its slide that can
    be; a warning names the first such tile of a slide.

    Parameters
    ----------
    rows: the slides.
    boxes_px0: per slide (N, 4) level-0 boxes of its tiles.
    tile_px: side to which a tile is resampled.
    views: pixels (tile_px, tile_px, 3) and seed → the item; the seed decides what is drawn, in
        whatever process that is.
    """

    def __init__(
        self,
        rows: Sequence[SlideRow],
        boxes_px0: Sequence[np.ndarray],
        tile_px: int,
        views: Callable[[RgbArray, int], Any],
    ):
        self.rows = rows
        self.boxes_px0 = boxes_px0
        self.tile_px = tile_px
        self.views = views
        self._open: dict[int, Slide] = {}
        self._damaged: set[int] = set()  # slides of which it has been said

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
            try:
                return slide.read(
                    boxes_px0[(row + following) % len(boxes_px0)], (self.tile_px,) * 2
                )
            except DamagedError as error:
                if number not in self._damaged:
                    warnings.warn(f"{error}; other tiles of the slide are taken", stacklevel=2)
                self._damaged.add(number)
        raise InputError(f"{slide.row.path}: none of its tiles can be decoded; leave the slide out")

    def __len__(self) -> int:
        return sum(len(boxes) for boxes in self.boxes_px0)

    def _slide(self, number: int) -> Slide:
        """Slides stay open in the process that reads them, the oldest giving way to the newest."""
        if number not in self._open:
            if len(self._open) == MAX_OPEN_SLIDES:
                self._open.pop(next(iter(self._open))).close()
            self._open[number] = Slide(self.rows[number])
        return self._open[number]


class EvenSlideSampler(DistributedSampler[list[Tensor]]):
    """The same number of tiles from every slide, however many it has, in random order.

    A slide's tiles come without repetition until it has no more. The epoch number decides the draw
    and the seed of each tile's views, so every process draws the same and takes its own share.

    Parameters
    ----------
    sizes: tiles of each slide.
    num_samples: tiles an epoch, over all processes.
    """

    def __init__(self, sizes: Sequence[int], num_samples: int, world: int, rank: int, seed: int):
        self.sizes = sizes
        self.draws = num_samples
        self.skipped = 0  # of this process, in the epoch that a resumed training goes on in
        super().__init__(range(num_samples), world, rank, seed=seed, drop_last=True)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:  # type: ignore[override]
        start, self.skipped = self.skipped, 0
        return iter(self.items(self.epoch)[start:])

    def items(self, epoch: int) -> list[tuple[int, int, int]]:
        """All items of this process in an epoch, in their order."""
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
    """DINO's crops of one scale's tiles, from the training slides only.

    Parameters
    ----------
    tiles:
        folder that ``tile`` wrote.
    scale:
        which of its scales.
    batch_size:
        tiles a step of each device.
    tiles_per_epoch:
        tiles an epoch over all devices; all tiles of the training slides by default.
    num_workers:
        reading processes of each device.
    global_crop_px:
        side of the two large crops.
    global_crop_scale:
        share of the tile that a large crop covers, from and to.
    local_crop_px:
        side of the small crops.
    local_crop_scale:
        share of the tile that a small crop covers, from and to.
    num_local_crops:
        small crops of a tile.
    vertical_flip:
        probability; tissue has no upside.
    augmentation:
        further arguments of lightly's ``DINOTransform``.
    augmentation_backend:
        ``pil`` makes the views by lightly's transform itself. ``tensor`` makes the same several
        times faster: on a GPU for the whole batch at once, else in the reading processes.
    val_fraction:
        part drawn for validation; as in :class:`BagDataModule`, so that both see the same
        training slides where the cohort table gives no split.
    test_fraction:
        part drawn for the test, likewise.
    split_seed:
        of that draw, likewise.
    num_folds:
        K of a K-fold cross-validation, likewise.
    fold:
        which of them, likewise: its slides are held out.
    split_table:
        CSV with the part of each slide, likewise.
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
        global_crop_px: int = 224,
        global_crop_scale: tuple[float, float] = (0.4, 1.0),
        local_crop_px: int = 96,
        local_crop_scale: tuple[float, float] = (0.05, 0.4),
        num_local_crops: int = 6,
        vertical_flip: float = 0.5,
        augmentation: dict[str, Any] | None = None,
        augmentation_backend: Literal["tensor", "pil"] = "tensor",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        num_folds: int | None = None,
        fold: int | None = None,
        split_table: str | None = None,
    ):
        super().__init__()
        self.save_hyperparameters(*OF_TRAINING, logger=False)
        self.folder = Path(tiles)
        self.scale = scale
        self.batch_size = batch_size
        self.tiles_per_epoch = tiles_per_epoch
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed
        self.num_folds = num_folds
        self.fold = fold
        self.split_table = split_table
        try:
            self.transform = DINOTransform(
                global_crop_size=global_crop_px,
                global_crop_scale=global_crop_scale,
                local_crop_size=local_crop_px,
                local_crop_scale=local_crop_scale,
                n_local_views=num_local_crops,
                vf_prob=vertical_flip,
                normalize={"mean": list(self.mean), "std": list(self.std)},
                **(augmentation or {}),
            )
        except (IndexError, TypeError, ValueError) as error:
            raise InputError(
                f"data.augmentation: lightly's DINOTransform refuses it: {error}"
            ) from error
        self.views: PilViews | TensorViews = (
            PilViews(self.transform)
            if augmentation_backend == "pil"
            else TensorViews(self.transform)
        )
        self.crop_sizes = {"global_crop_px": global_crop_px, "local_crop_px": local_crop_px}
        self.rows: list[SlideRow] = []
        self.records: list[SlideRecord] = []  # of the same slides
        self.boxes_px0: list[np.ndarray] = []
        self.tile_px = 0
        self.mpp = 0.0

    def setup(self, stage: str) -> None:
        must_exist(self.folder, "give data.tiles the folder that tile wrote")
        cohort = read_cohort(self.folder / "cohort.csv")
        if self.split_table is not None:
            cohort = placed(cohort, self.split_table)
        split = split_cohort(
            cohort,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            seed=self.split_seed,
            num_folds=self.num_folds,
            fold=self.fold,
        )
        held_out = {
            row.patient for row in cohort if split.get(row.slide_id, row.split) in EVALUATED
        }
        training = [row for row in cohort if row.patient not in held_out]
        tiled = [
            row
            for row in training
            if not (row.fault or row.scale_fault) and tiles_path(self.folder, row.slide_id).exists()
        ]
        say_missing(self.folder, "tiles", [r.slide_id for r in training if r not in tiled])
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
        if isinstance(self.views, TensorViews) and self._is_on_gpu:
            views = self.views.draw  # the rest in on_after_batch_transfer
        dataset = TileDataset(self.rows, self.boxes_px0, self.tile_px, views)
        sampler = self._sampler()
        go_on(sampler, self.trainer, self.batch_size)
        if len(sampler) < self.batch_size:
            raise InputError(
                f"{self.folder}: {len(sampler)} tiles an epoch and process do not fill one batch "
                f"of {self.batch_size}; lower data.batch_size"
            )
        return TrainingLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            **reader_options(self.num_workers),
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def slides_of(self, epoch: int, batch_idx: int) -> list[str]:
        """The slide_ids of the tiles of a batch of this process."""
        start = batch_idx * self.batch_size
        items = self._sampler().items(epoch)[start : start + self.batch_size]
        return [self.rows[number].slide_id for number, _, _ in items]

    def _sampler(self) -> EvenSlideSampler:
        sizes = [len(boxes) for boxes in self.boxes_px0]
        return EvenSlideSampler(
            sizes,
            self.tiles_per_epoch or sum(sizes),
            self.trainer.world_size if self.trainer else 1,
            self.trainer.global_rank if self.trainer else 0,
            training_seed(),
        )

    @property
    def _is_on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type != "cpu"

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        if isinstance(batch, DrawnTiles):
            return batch._replace(tiles=batch.tiles.to(device, non_blocking=True))
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Per view (B, 3, side, side), whoever made it."""
        if isinstance(batch, DrawnTiles):
            assert isinstance(self.views, TensorViews)
            return self.views.batch(batch)
        return batch
