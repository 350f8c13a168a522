"""The bags of a cohort as graphs, split into train, val and test."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from dasmil.bags import Bag, BagGraph, bag_path, join_graphs, read_bag
from dasmil.data.bag_checks import (
    choose_scales,
    describe_foreign_bag,
    first_header,
    read_headers,
    refuse_large_cache,
    refuse_missing_classes,
    refuse_other_labels,
    refuse_seen_slides,
    warn_missing,
)
from dasmil.data.bag_dataset import (
    BagDataset,
    UnreadBag,
    copy_to_cache,
    feature_statistics,
    join_features_there,
)
from dasmil.data.distributed import compute_once, processes
from dasmil.data.sampler import TrainingSampler, sampling_weights, set_resumed_epoch
from dasmil.data.seeds import training_seed
from dasmil.data.split import (
    EVALUATIONS,
    HELD_OUT,
    SplitOptions,
    draw_places,
    places_for_model,
    print_evaluated,
    warn_test_is_validation,
)
from dasmil.errors import InputError
from dasmil.files import must_exist
from dasmil.names import name_fault
from dasmil.progress import progress
from dasmil.reading import reader_options
from dasmil.slides.cohort import PARTS, SlideRow, read_cohort
from dasmil.slides.splits import SPLIT_COLUMNS
from dasmil.slides.study import (
    UNLABELLED,
    Place,
    SlideRecord,
    Study,
    plain_records,
    read_records,
)

# parameters of BagDataModule that decide the course of a training beside the split
OF_TRAINING = ("scales", "batch_size", "weighted_sampling")


class BagDataModule(LightningDataModule):
    """Bags of a cohort, split into train, val and test.

    The split is the cohort table's ``split`` column; what it leaves open is drawn by patient and
    stratified by label (:func:`dasmil.slides.splits.split_cohort`). In ``validate`` and ``test``
    it is that of the model's card, see :func:`dasmil.slides.study.place_slides`.

    Parameters
    ----------
    bags:
        folder of bag files with its ``cohort.csv``.
    classes:
        the labels in their order; of two classes the second is the positive one.
    scales:
        scales that the model reads; null: all scales of the bags.
    batch_size:
        slides per training step. Evaluation takes one slide at a time: with the same number of
        threads its metrics depend neither on this nor on the number of processes, to the last
        digit.
    num_workers:
        reading processes per device.
    cache:
        where ``fit`` caches graphs: none, ram or device (if batch_size is above 1, the edges in
        ram, where they are joined). Each process needs its own copy: the size
        of the bag files plus 0.3 GB per million tiles (half as much again for ram with a GPU).
        ``fit`` refuses to begin if less is free; on a GPU a training step on the largest slides
        (about 5.5 GB for 250,000 x20 tiles) must fit too. A training process with a cache reads
        bags itself, without num_workers.
    split:
        how the cohort is split if its table leaves it open.
    weighted_sampling:
        draw training slides with replacement, each class equally often.
    allow_seen_slides:
        accept val and test slides on whose pixels an extractor was trained.
    other_cohort:
        the bags are of another cohort than the checkpoint's: equal slide_ids and patient_ids are
        coincidences, and only equal digests mean the same slide.
    """

    def __init__(
        self,
        bags: Path,
        classes: list[str],
        scales: list[str] | None = None,
        batch_size: int = 1,
        num_workers: int = 2,
        cache: Literal["none", "ram", "device"] = "none",
        split: SplitOptions = SplitOptions(),
        weighted_sampling: bool = False,
        allow_seen_slides: bool = False,
        other_cohort: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters(*OF_TRAINING, logger=False)
        if len(classes) < 2 or len(set(classes)) != len(classes):
            raise InputError(f"data.classes: {classes} must name at least two different labels")
        self.folder = Path(bags)
        self.classes = list(classes)
        self.given_scales = scales
        self.scales: Sequence[str] | None = scales  # that the model reads; None: all
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.cache = cache
        self.split_options = split
        self.val_part = split.val_part
        self.weighted_sampling = weighted_sampling
        self.allow_seen_slides = allow_seen_slides
        self.other_cohort = other_cohort
        self.cohort: list[SlideRow] = []  # all slides of the table
        self.rows: list[SlideRow] = []  # those with a bag
        self.digests: dict[str, str] = {}  # of the slides with a bag, as far as known
        self.bag_format: dict[str, Any] = {}
        self.empty: set[str] = set()  # slides whose bag holds no tile
        self.unreadable: dict[str, str] = {}  # why a bag cannot be read; only predict goes on
        self.places: dict[str, Place] = {}  # of the labelled slides
        self._met: Study | None = None  # the slides that the model has met
        self._has_fitted = False  # whether a training has begun with these slides
        self._cached: dict[str, BagGraph] | None = None

    @property
    def splits(self) -> dict[str, str]:
        """train, val, test or ``left out`` per labelled slide."""
        return {slide_id: place.split for slide_id, place in self.places.items()}

    def setup(self, stage: str) -> None:
        if self._device().type == "mps":  # torch's segment_reduce has no kernel for it
            raise InputError(
                "trainer.accelerator: no method runs on Apple's GPU (mps); give "
                "--trainer.accelerator cpu"
            )
        must_exist(self.folder, "give data.bags the folder that embed wrote")
        cohort = self.cohort = read_cohort(self.folder / "cohort.csv")
        if stage != "predict":
            refuse_other_labels(self.folder, cohort, self.classes)
        files = set(self.folder.iterdir())  # one listing: single checks are slow over a network
        has_bag = {
            r.slide_id: not name_fault(r.slide_id) and bag_path(self.folder, r.slide_id) in files
            for r in cohort
        }
        self.rows = [r for r in cohort if has_bag[r.slide_id]]
        warn_missing(self.folder, "bag file", [s for s, has in has_bag.items() if not has])
        if not self.rows:
            raise InputError(f"{self.folder}: no bag file for any slide of its cohort.csv")
        self._read_headers(stage)
        self._place_slides(stage)
        if stage == "fit":
            self._has_fitted = True
            for split in ("train", self.val_part):
                refuse_missing_classes(self.folder, split, self.class_counts(split))
        if stage in EVALUATIONS and processes(self.trainer)[1] == 0:
            self._print_evaluated(stage)
        if stage != "predict" and self.val_part == "test":
            warn_test_is_validation(self.folder, self.splits.values())
        if stage != "predict" and not self.allow_seen_slides:
            refuse_seen_slides(
                self.folder, list(self.bag_format["scales"]), self._make_study, self._held_out()
            )
        if self._cached is not None:
            self._cached.clear()  # loaders of an earlier fit may still hold it
        self._cached = None  # only a fit reads slides more than once
        if stage == "fit" and self.cache != "none":
            self._cached = {}
            train, val = ([r.slide_id for r in self.rows_of(s)] for s in ("train", self.val_part))
            copies = 1 if self.trainer is None else self.trainer.num_devices
            refuse_large_cache(
                *(self.folder, train, val, self.scales, self.cache, self._device(), copies),
                batch_size=self.batch_size,
            )

    def rows_of(self, split: str) -> list[SlideRow]:
        """The slides of a split that have a bag; those of ``train`` also have tiles."""
        splits, left_out = self.splits, self.empty if split == "train" else set()
        rows = (row for row in self.rows if row.slide_id not in left_out)
        return [row for row in rows if splits.get(row.slide_id) == split]

    def read_bag(self, slide_id: str) -> Bag:
        """The bag of a slide, with the scales that the model reads."""
        return read_bag(bag_path(self.folder, slide_id), self.scales)

    def train_statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation (D_s,) of the training tiles' features per scale.

        The first process reads the bags; all processes must call this.
        """

        def compute() -> dict[str, tuple[Tensor, Tensor]]:
            rows = progress(self.rows_of("train"), "statistics of the training bags", unit="bag")
            return feature_statistics(self.read_bag(row.slide_id) for row in rows)

        return compute_once(compute)

    def split_rows(self) -> Iterator[dict[str, str | None]]:
        """Rows of ``split.csv``, in the order of the cohort."""
        for record in self.study():
            if record["split"] in PARTS:
                yield {name: record[name] for name in SPLIT_COLUMNS}

    def class_counts(self, split: str = "train") -> dict[str, int]:
        """Number of slides per class in a split, in the order of the classes."""
        counts = Counter(row.label for row in self.rows_of(split))
        return {name: counts[name] for name in self.classes}

    def train_dataloader(self) -> DataLoader[BagGraph]:
        dataset = self._dataset(self.rows_of("train"))
        weights = None
        if self.weighted_sampling:
            weights = sampling_weights(dataset.labels, len(self.classes))
        sampler = TrainingSampler(
            len(dataset),
            *processes(self.trainer),
            training_seed(),
            batch_size=self.batch_size,
            accumulated=1 if self.trainer is None else self.trainer.accumulate_grad_batches,
            weights=weights,
        )
        set_resumed_epoch(sampler, self.trainer)
        return DataLoader(
            dataset, batch_size=self.batch_size, sampler=sampler, **self._loader_options()
        )

    def val_dataloader(self) -> DataLoader[BagGraph]:
        return self._evaluation_loader(self._evaluated(self.val_part))

    def test_dataloader(self) -> DataLoader[BagGraph]:
        return self._evaluation_loader(self._evaluated("test"))

    def predict_dataloader(self) -> DataLoader[BagGraph]:
        return self._evaluation_loader(self.rows, self.unreadable)

    def _evaluated(self, split: str) -> list[SlideRow]:
        rows = self.rows_of(split)
        if not rows:
            raise InputError(f"{self.folder}: no labelled slide is in the split {split!r}")
        return rows

    def transfer_batch_to_device(
        self, batch: BagGraph, device: torch.device, dataloader_idx: int
    ) -> BagGraph:
        """Copy from pinned memory without waiting; Lightning alone would wait."""
        if isinstance(batch, UnreadBag):
            return batch
        return batch.to(device, non_blocking=device.type == "cuda")

    def _evaluation_loader(
        self, rows: Sequence[SlideRow], unreadable: Mapping[str, str] | None = None
    ) -> DataLoader[BagGraph]:
        """One slide per batch, and the same number of batches in every process.

        Padding may repeat slides; the module counts each once.
        """
        dataset = self._dataset(rows, unreadable)
        sampler: DistributedSampler[BagGraph] = DistributedSampler(
            dataset, *processes(self.trainer), shuffle=False
        )
        return DataLoader(dataset, batch_size=1, sampler=sampler, **self._loader_options())

    def _dataset(
        self, rows: Sequence[SlideRow], unreadable: Mapping[str, str] | None = None
    ) -> BagDataset:
        to_cache = partial(copy_to_cache, device=self._device(), where=self.cache)
        return BagDataset(
            *(self.folder, rows, self.classes, self.scales),
            edges=getattr(self._model(), "uses_edges", True),
            cache=self._cached,
            to_cache=partial(to_cache, joins=self.batch_size > 1),
            unreadable=unreadable,
        )

    def _model(self) -> Any:
        return getattr(self.trainer, "lightning_module", None)

    def _card(self) -> Any:
        """The card of the model; None if the model has none yet."""
        model = self._model()
        return model.card if getattr(model, "is_bound", False) else None

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _loader_options(self) -> dict[str, Any]:
        has_cache = self._cached is not None
        workers = 0 if has_cache else self.num_workers  # each would fill a cache of its own
        is_on_device = has_cache and self.cache == "device"
        is_cuda = self._device().type == "cuda"
        joins_there = is_cuda and is_on_device and self.batch_size > 1
        return {
            "collate_fn": join_features_there if joins_there else join_graphs,
            **reader_options(workers),
            "persistent_workers": workers > 0,
            "pin_memory": is_cuda and not is_on_device,
        }

    def _read_headers(self, stage: str) -> None:
        """Read the format that all bags share, their digests, and which bags hold no tile.

        In ``predict`` a bag that cannot be read, or has another format than the model's, costs only
        its own slide.
        """
        headers, errors = read_headers(self.folder, [row.slide_id for row in self.rows])
        if errors and (stage != "predict" or not headers):
            raise next(iter(errors.values()))
        self.unreadable = {slide_id: str(error) for slide_id, error in errors.items()}
        card = self._card() if stage == "predict" else None
        first = first_header(headers, self.scales, None if card is None else card.bag_format)
        held = [scale.name for scale in first.scales]
        chosen = choose_scales(self.folder, held, self.given_scales)
        if hasattr(self._model(), "choose_scales"):
            chosen = list(self._model().choose_scales(chosen))
        self.scales = None if self.given_scales is None and chosen == held else chosen
        self.bag_format = first.bag_format(self.scales)
        self.digests = {s: header.slide_digest for s, header in headers.items()}
        self.empty = {s for s, header in headers.items() if header.num_tiles == 0}
        for slide_id, header in headers.items():
            path = bag_path(self.folder, slide_id)
            if fault := describe_foreign_bag(
                path, header, self.scales, self.bag_format, first.slide_id
            ):
                if stage != "predict":
                    raise InputError(fault)
                self.unreadable[slide_id] = fault

    def _place_slides(self, stage: str) -> None:
        """Draw the split of a new model; look up the slides that a trained model has met."""
        card = None if stage == "fit" else self._card()
        self._met = None
        if card is None:
            self.places = draw_places(self.split_options, self.cohort, self.digests)
            return
        self.places = {}
        if records := read_records(card.split):
            self._met = self._make_study(records)
        if stage in EVALUATIONS:
            evaluated = self._evaluated_split(stage)
            self.places = places_for_model(
                self.split_options, self.cohort, self._met, evaluated, self.folder
            )

    def _held_out(self) -> list[SlideRow]:
        """The val and test slides, also unlabelled ones that the split column holds out."""
        splits = self.splits
        return [r for r in self.cohort if splits.get(r.slide_id, r.split) in HELD_OUT]

    def _make_study(self, records: Sequence[SlideRecord]) -> Study:
        return Study(records, self.cohort, self.digests, self.other_cohort)

    def _evaluated_split(self, stage: str) -> str:
        return "test" if stage == "test" else self.val_part

    def study(self) -> list[dict[str, str | None]]:
        """One record per slide of the cohort, for the checkpoint: plain values."""
        return plain_records(
            SlideRecord(
                row.slide_id,
                row.patient_id,
                UNLABELLED if row.label is None else self.places[row.slide_id].split,
                self.digests.get(row.slide_id, ""),
                row.label,
            )
            for row in self.cohort
        )

    def describe_met_slides(self) -> dict[str, str]:
        """What the model has met of each slide with a bag; empty if that is not known."""
        met = self._met
        return {} if met is None else {row.slide_id: met.describe(row) for row in self.rows}

    def _print_evaluated(self, stage: str) -> None:
        verb = "test" if stage == "test" else "validate"  # Lightning's stage is an enum
        slide_ids = {row.slide_id for row in self.rows}
        evaluated = self._evaluated_split(stage)
        print_evaluated(verb, self.places, evaluated, self.cohort, slide_ids)
        if self._met is not None and not self._has_fitted:  # a fit meets its own slides
            for note in self._met.notes(self.rows):
                print(f"{verb}: {note}")
