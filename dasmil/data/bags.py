"""Cached bags as graphs, in parts: what DAS-MIL is trained and tested on."""

import json
import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tqdm import tqdm

from dasmil.bags import (
    UNKNOWN,
    Bag,
    BagGraph,
    bag_graph,
    bag_path,
    describe_difference,
    join_graphs,
    read_bag,
    read_header,
)
from dasmil.errors import InputError
from dasmil.slides.cohort import SlideRow, read_cohort, split_cohort


class BagDataset(Dataset[BagGraph]):
    """One graph a slide, made from its bag file when it is asked for."""

    def __init__(
        self,
        folder: Path,
        rows: Sequence[SlideRow],
        classes: Sequence[str],
        scales: Sequence[str] | None = None,
    ):
        self.folder = folder
        self.rows = rows
        self.scales = scales
        self.labels = [UNKNOWN if r.label is None else list(classes).index(r.label) for r in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> BagGraph:
        bag = read_scales(self.folder, self.rows[index].slide_id, self.scales)
        return bag_graph(bag, self.labels[index])


class BagDataModule(LightningDataModule):
    """Bags of a cohort, divided into train, val and test.

    The parts are the cohort table's ``split`` column; what it leaves open is drawn by patient and
    stratified by label (:func:`dasmil.slides.cohort.split_cohort`).

    Parameters
    ----------
    bags:
        folder of bag files with its ``cohort.csv``.
    classes:
        the labels in their order; for two classes the second is the positive one.
    scales:
        those of the bags' scales that the model reads; all where None.
    batch_size:
        slides a step; evaluation gives the same result at any size.
    num_workers:
        reading processes of each device.
    val_fraction:
        part of the patients drawn for validation where the table has no such part.
    test_fraction:
        part of the patients drawn for the test where the table gives no parts at all.
    split_seed:
        of these draws.
    split:
        part of each slide as a checkpoint remembers it; a slide that it does not know has the
        part of the table, else is a test slide.
    val_part:
        the part on which the checkpoint is chosen and that ``validate`` reads. ``test`` is
        what the released code does (D17): its figures are then no test figures.
    allow_seen_slides:
        accept validation and test slides whose pixels an extractor was trained on.
    """

    def __init__(
        self,
        bags: Path,
        classes: list[str],
        scales: list[str] | None = None,
        batch_size: int = 1,
        num_workers: int = 2,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        split: dict[str, str] | None = None,
        val_part: Literal["val", "test"] = "val",
        allow_seen_slides: bool = False,
    ):
        super().__init__()
        if len(classes) < 2 or len(set(classes)) != len(classes):
            raise InputError(f"data.classes: {classes} must name at least two different labels")
        self.folder = Path(bags)
        self.classes = list(classes)
        self.scales = scales
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed
        self.given_split = split
        self.val_part = val_part
        self.allow_seen_slides = allow_seen_slides
        self.rows: list[SlideRow] = []
        self.split: dict[str, str] = {}
        self.bag_format: dict[str, Any] = {}
        self.empty: set[str] = set()

    def setup(self, stage: str) -> None:
        cohort = self._read_cohort()
        self.rows = [r for r in cohort if bag_path(self.folder, r.slide_id).exists()]
        say_missing(self.folder, "bag file", [r.slide_id for r in cohort if r not in self.rows])
        if not self.rows:
            raise InputError(f"{self.folder}: no bag file for any slide of its cohort.csv")
        self._read_headers()
        self.split = self._parts(cohort)
        if stage == "fit":
            self._refuse_missing_classes("train", self.val_part)
        if stage != "predict" and self.val_part == "test":
            unused = sum(part == "val" for part in self.split.values())
            warnings.warn(
                f"{self.folder}: the validation slides are the test slides (data.val_part: test, "
                "D17); figures on them are no test figures"
                + (f"; {unused} slide(s) of the part 'val' are not used" if unused else ""),
                stacklevel=2,
            )
        if stage != "predict" and not self.allow_seen_slides:
            self._refuse_seen_slides()

    def part(self, name: str) -> list[SlideRow]:
        """The slides of a part that have a bag; training leaves bags without tiles out."""
        rows = [row for row in self.rows if self.split.get(row.slide_id) == name]
        if name == "train":
            return [row for row in rows if row.slide_id not in self.empty]
        return rows

    def read_bag(self, slide_id: str) -> Bag:
        """The bag of a slide, with the scales that the model reads."""
        return read_scales(self.folder, slide_id, self.scales)

    def train_statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation (D_s,) of the training tiles' features per scale."""
        count: dict[str, int] = defaultdict(int)
        total: dict[str, Tensor] = defaultdict(lambda: torch.zeros(1, dtype=torch.float64))
        total_square: dict[str, Tensor] = defaultdict(lambda: torch.zeros(1, dtype=torch.float64))
        for row in tqdm(self.part("train"), "statistics of the training bags", unit="bag"):
            bag = self.read_bag(row.slide_id)
            for scale in bag.scales:
                x = bag.features[scale].double()
                count[scale] += len(x)
                total[scale] = total[scale] + x.sum(0)
                total_square[scale] = total_square[scale] + x.square().sum(0)
        statistics = {}
        for scale in count:
            mean = total[scale] / count[scale]
            variance = (total_square[scale] / count[scale] - mean.square()).clamp(min=0)
            statistics[scale] = (mean.float(), variance.sqrt().float())
        return statistics

    def train_dataloader(self) -> DataLoader[BagGraph]:
        return self._loader(self.part("train"), shuffle=True)

    def val_dataloader(self) -> DataLoader[BagGraph]:
        return self._loader(self._evaluated(self.val_part))

    def test_dataloader(self) -> DataLoader[BagGraph]:
        return self._loader(self._evaluated("test"))

    def predict_dataloader(self) -> DataLoader[BagGraph]:
        return self._loader(self.rows)

    def _evaluated(self, name: str) -> list[SlideRow]:
        rows = self.part(name)
        if not rows:
            raise InputError(f"{self.folder}: no labelled slide is in the part {name!r}")
        return rows

    def _loader(self, rows: Sequence[SlideRow], shuffle: bool = False) -> DataLoader[BagGraph]:
        """Every process gets the same number of batches.

        In evaluation some slides may so come twice; the module counts each slide once.
        """
        world, rank = 1, 0
        if self.trainer is not None:
            world, rank = self.trainer.world_size, self.trainer.global_rank
        dataset = BagDataset(self.folder, rows, self.classes, self.scales)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=DistributedSampler(dataset, world, rank, shuffle=shuffle, seed=order_seed()),
            collate_fn=join_graphs,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _read_cohort(self) -> list[SlideRow]:
        cohort = read_cohort(self.folder / "cohort.csv")
        for row in cohort:
            if row.label is not None and row.label not in self.classes:
                raise InputError(
                    f"{self.folder / 'cohort.csv'}: slide {row.slide_id} has the label "
                    f"{row.label!r}, data.classes are {', '.join(self.classes)}"
                )
        return cohort

    def _read_headers(self) -> None:
        """All bags must share one format; remember it, and which bags hold no tile."""
        headers = {
            row.slide_id: read_header(bag_path(self.folder, row.slide_id)) for row in self.rows
        }
        first_id, first = next(iter(headers.items()))
        held = [scale.name for scale in first.scales]
        missing = [name for name in self.scales or () if name not in held]
        if missing or self.scales == []:
            raise InputError(
                f"{self.folder}: data.scales asks for {', '.join(missing) or 'none'}, its bags "
                f"hold {', '.join(held)}"
            )
        self.bag_format = first.bag_format(self.scales)
        for slide_id, header in headers.items():
            if header.slide_id != slide_id:
                raise InputError(
                    f"{bag_path(self.folder, slide_id)}: it is the bag of {header.slide_id}; "
                    "give the file its own name back"
                )
            difference = describe_difference(self.bag_format, header.bag_format(self.scales))
            if difference:
                raise InputError(
                    f"{self.folder}: the bag {slide_id} holds {difference} (as in {first_id}); "
                    "embed all slides in the same way"
                )
            if header.num_tiles == 0:
                self.empty.add(slide_id)

    def _parts(self, cohort: Sequence[SlideRow]) -> dict[str, str]:
        if self.given_split is not None:
            labelled = [row for row in cohort if row.label is not None]
            return {
                r.slide_id: self.given_split.get(r.slide_id, r.split or "test") for r in labelled
            }
        return split_cohort(
            cohort,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            seed=self.split_seed,
        )

    def _refuse_missing_classes(self, *parts: str) -> None:
        for part in parts:
            present = {row.label for row in self.part(part)}
            missing = [name for name in self.classes if name not in present]
            if missing:
                raise InputError(
                    f"{self.folder}: the part {part!r} has no slide of class {', '.join(missing)}; "
                    "fill the split column of cohort.csv, or change the fractions or split_seed"
                )

    def _refuse_seen_slides(self) -> None:
        """A slide that an extractor has seen in its own training is no fair test of the whole.

        Where it is not known what the extractors have seen, a warning says so.
        """
        path = self.folder / "extractors.json"
        if not path.exists():
            return
        held_out = {s for s, part in self.split.items() if part in ("val", "test")}
        records = json.loads(path.read_text())
        records = {scale: records[scale] for scale in self.bag_format["scales"] if scale in records}
        unknown = [scale for scale, record in records.items() if record["trained_on"] is None]
        if unknown:
            warnings.warn(
                f"{path}: which slides the {', '.join(unknown)} extractors were trained on is not "
                "known; held-out slides may be among them",
                stacklevel=2,
            )
        for scale, record in records.items():
            if record["trained_on"] is None:
                continue
            seen = sorted(held_out & set(record["trained_on"]))
            if seen:
                raise InputError(
                    f"{path}: the {scale} extractor was trained on {len(seen)} slide(s) that are "
                    f"held out here ({', '.join(seen[:3])}); use the same split for both, or set "
                    "data.allow_seen_slides if that is meant"
                )


def read_scales(folder: Path, slide_id: str, scales: Sequence[str] | None) -> Bag:
    """A slide's bag with these of its scales; all where None."""
    bag = read_bag(bag_path(folder, slide_id))
    return bag if scales is None else bag.select(scales)


def order_seed() -> int:
    """Seed of the order in training: that of ``seed_everything``, the same in every process."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def say_missing(folder: Path, what: str, slide_ids: Sequence[str]) -> None:
    """Warn of slides that are left out, by name."""
    if slide_ids:
        warnings.warn(
            f"{folder}: {len(slide_ids)} slide(s) of cohort.csv have no {what} and are left out: "
            f"{', '.join(slide_ids[:10])}; see status.csv there",
            stacklevel=2,
        )
