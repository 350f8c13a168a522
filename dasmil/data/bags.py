"""Cached bags as graphs, in parts: what DAS-MIL is trained and tested on."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from dasmil.bags import (
    UNKNOWN,
    Bag,
    BagGraph,
    BagHeader,
    bag_graph,
    bag_path,
    describe_difference,
    join_graphs,
    read_bag,
    read_header,
)
from dasmil.bags.store import graph_bytes
from dasmil.data.sampler import TrainingLoader, TrainingSampler, go_on, sampling_weights
from dasmil.errors import InputError, some_of
from dasmil.files import map_files, must_exist
from dasmil.json_text import read_json_object
from dasmil.names import name_fault
from dasmil.progress import progress
from dasmil.reading import reader_options
from dasmil.seeds import training_seed
from dasmil.slides.cohort import SlideRow, read_cohort
from dasmil.slides.splits import SPLIT_COLUMNS, placed, refuse_overlap, split_cohort
from dasmil.slides.study import (
    LEFT_OUT,
    UNLABELLED,
    Place,
    SlideRecord,
    Study,
    place_slides,
    plain_records,
    read_records,
)

Value = TypeVar("Value")

EVALUATIONS = {"validate": "validated", "test": "tested"}
DRAWING = {  # options that draw parts, and their names in split_cohort
    "val_fraction": "val_fraction",
    "test_fraction": "test_fraction",
    "split_seed": "seed",
    "num_folds": "num_folds",
    "fold": "fold",
}
# parameters of BagDataModule that decide the course of a training beside the slides' parts
OF_TRAINING = ("scales", "batch_size", "weighted_sampling", "val_part")
PINNED_ROUNDING = 1.5  # CUDA's pinned memory comes in powers of two
NETWORK_ROUNDING = 1e-6  # relative; what a float32 network makes of equal tiles in other batches


class BagDataset(Dataset[BagGraph]):
    """One graph per slide, made from its bag file when it is asked for.

    Parameters
    ----------
    edges: whether graphs have edges.
    kept: graphs by slide_id, filled as they are made; none is kept where None.
    keep: puts a graph where it is kept.
    """

    def __init__(
        self,
        folder: Path,
        rows: Sequence[SlideRow],
        classes: Sequence[str],
        scales: Sequence[str] | None = None,
        edges: bool = True,
        kept: dict[str, BagGraph] | None = None,
        keep: Callable[[BagGraph], BagGraph] = copy,
    ):
        self.folder = folder
        self.rows = rows
        self.scales = scales
        self.edges = edges
        numbers = {name: number for number, name in enumerate(classes)}
        self.labels = [UNKNOWN if r.label is None else numbers.get(r.label, UNKNOWN) for r in rows]
        self.kept = kept
        self.keep = keep

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> BagGraph:
        if self.kept is None:
            return self._make(index)
        slide_id = self.rows[index].slide_id
        if slide_id not in self.kept:
            self.kept[slide_id] = self.keep(self._make(index))
        return self.kept[slide_id]

    def _make(self, index: int) -> BagGraph:
        bag = read_bag(bag_path(self.folder, self.rows[index].slide_id), self.scales)
        return bag_graph(bag, self.labels[index], self.edges)


@dataclass(frozen=True)
class UnreadBag:
    """Takes the place of a graph in ``predict``, which goes on without a bag that it cannot read.

    Parameters
    ----------
    slide_ids: the slide, as in a :class:`BagGraph`.
    reason: a sentence.
    """

    slide_ids: tuple[str]
    reason: str


class PredictDataset(BagDataset):
    """Graphs, and an :class:`UnreadBag` for each bag that cannot be read.

    Parameters
    ----------
    unreadable: why bags cannot be read, as far as their headers say so.
    """

    def __init__(self, *args: Any, unreadable: Mapping[str, str]):
        super().__init__(*args)
        self.unreadable = unreadable

    def __getitem__(self, index: int) -> BagGraph | UnreadBag:  # type: ignore[override]
        slide_id = self.rows[index].slide_id
        if slide_id in self.unreadable:
            return UnreadBag((slide_id,), self.unreadable[slide_id])
        try:
            return super().__getitem__(index)
        except InputError as error:
            return UnreadBag((slide_id,), str(error))


class BagDataModule(LightningDataModule):
    """Bags of a cohort, divided into train, val and test.

    The parts are the cohort table's ``split`` column; what it leaves open is drawn by patient and
    stratified by label (:func:`dasmil.slides.splits.split_cohort`).

    Parameters
    ----------
    bags:
        folder of bag files with its ``cohort.csv``.
    classes:
        the labels in their order; for two classes the second is the positive one.
    scales:
        those of the bags' scales that the model reads; all where None.
    batch_size:
        slides per step in training. Evaluation takes one at a time: with one number of threads its
        metrics depend neither on this nor on the number of processes, to the last digit.
    num_workers:
        reading processes of each device.
    cache:
        what ``fit`` keeps of its slides once it has read them: none; ram, their graphs in the
        memory of each training process; device, on its device. Either takes, for every process
        anew, the size of the bag files and 0.2 GB a million tiles (ram for a GPU half as much
        again); fit refuses to begin where less is free. The training process then reads slides
        itself, without num_workers.
    val_fraction:
        part of the patients drawn for validation where the table has no such part; 0.1 if not
        given.
    test_fraction:
        part of the patients drawn for the test where the table gives no parts at all; 0.2 if not
        given.
    split_seed:
        of these draws; 0 if not given.
    num_folds:
        K of a K-fold cross-validation, drawn by patient and stratified by label.
    fold:
        which of them, 0 to K - 1: the test part, or where the table has one already, the
        validation part.
    split_table:
        CSV with the part of each slide, instead of the cohort table's: a run's split.csv, or an
        official list such as splits/camelyon16.csv.
    weighted_sampling:
        draw training slides with replacement, of each class equally often.
    split:
        the slides that a checkpoint has met, its hyperparameter ``split``; not for ``fit``. In
        ``validate`` and ``test`` it is that of the model if not given. See
        :func:`dasmil.slides.study.place_slides`.
    val_part:
        the part on which the checkpoint is chosen and that ``validate`` reads. ``test`` is
        what the released code does (D17): its figures are then no test figures.
    allow_seen_slides:
        accept validation and test slides whose pixels an extractor was trained on.
    other_cohort:
        the bags are of another cohort than the checkpoint's: an equal slide_id or patient_id is a
        coincidence, and only a slide with the same digest is the same slide.
    """

    def __init__(
        self,
        bags: Path,
        classes: list[str],
        scales: list[str] | None = None,
        batch_size: int = 1,
        num_workers: int = 2,
        cache: Literal["none", "ram", "device"] = "none",
        val_fraction: float | None = None,
        test_fraction: float | None = None,
        split_seed: int | None = None,
        num_folds: int | None = None,
        fold: int | None = None,
        split_table: str | None = None,
        weighted_sampling: bool = False,
        split: list[dict[str, str | None]] | dict[str, str] | None = None,
        val_part: Literal["val", "test"] = "val",
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
        self.scales: Sequence[str] | None = scales  # those that the model reads; None: all
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.cache = cache
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed
        self.num_folds = num_folds
        self.fold = fold
        self.split_table = split_table
        self.weighted_sampling = weighted_sampling
        self.given_split = split
        self.val_part = val_part
        self.allow_seen_slides = allow_seen_slides
        self.other_cohort = other_cohort
        self.cohort: list[SlideRow] = []  # all slides of the table
        self.rows: list[SlideRow] = []  # those with a bag
        self.split: dict[str, str] = {}
        self.digests: dict[str, str] = {}  # of the slides with a bag, as far as known
        self.bag_format: dict[str, Any] = {}
        self.empty: set[str] = set()
        self.unreadable: dict[str, str] = {}  # why a bag cannot be read; only predict goes on
        self.places: dict[str, Place] = {}  # of the labelled slides
        self._met: Study | None = None  # the slides that the model has met
        self._fitted = False  # whether a training has begun with these slides
        self._kept: dict[str, BagGraph] | None = None

    def setup(self, stage: str) -> None:
        cohort = self.cohort = self._read_cohort(stage)
        files = set(self.folder.iterdir())  # to ask for each by itself takes long over a network
        has_bag = {
            r.slide_id: not name_fault(r.slide_id) and bag_path(self.folder, r.slide_id) in files
            for r in cohort
        }
        self.rows = [r for r in cohort if has_bag[r.slide_id]]
        say_missing(self.folder, "bag file", [s for s, has in has_bag.items() if not has])
        if not self.rows:
            raise InputError(f"{self.folder}: no bag file for any slide of its cohort.csv")
        self._read_headers(stage)
        self._met = None
        self.split = self._parts(stage)
        if stage == "fit":
            self._fitted = True
            self._refuse_missing_classes("train", self.val_part)
        if stage in EVALUATIONS and self._processes()[1] == 0:
            self._say_what_is_evaluated(stage)
        if stage != "predict" and self.val_part == "test":
            unused = sum(part == "val" for part in self.split.values())
            warnings.warn(
                f"{self.folder}: the validation slides are the test slides (data.val_part: test, "
                "D17); figures on them are no test figures"
                + (f"; {unused} slide(s) of the part 'val' are not used" if unused else ""),
                stacklevel=1,  # the caller is Lightning: each process would say it
            )
        if stage != "predict" and not self.allow_seen_slides:
            self._refuse_seen_slides()
        if self._kept is not None:
            self._kept.clear()  # loaders of an earlier fit may still hold it
        self._kept = None  # what reads every slide once has no use for it
        if stage == "fit" and self.cache != "none":
            self._kept = {}
            self._refuse_what_does_not_fit(self.part("train") + self.part(self.val_part))

    def part(self, name: str) -> list[SlideRow]:
        """The slides of a part that have a bag; training leaves bags without tiles out."""
        rows = [row for row in self.rows if self.split.get(row.slide_id) == name]
        if name == "train":
            return [row for row in rows if row.slide_id not in self.empty]
        return rows

    def read_bag(self, slide_id: str) -> Bag:
        """The bag of a slide, with the scales that the model reads."""
        return read_bag(bag_path(self.folder, slide_id), self.scales)

    def train_statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation (D_s,) of the training tiles' features per scale.

        The deviation is 0 if rounding explains it: two neighbours of the stored type that alternate
        deviate by half their distance.
        """
        count: dict[str, int] = defaultdict(int)
        total: dict[str, Tensor] = defaultdict(lambda: torch.zeros(1, dtype=torch.float64))
        total_square: dict[str, Tensor] = defaultdict(lambda: torch.zeros(1, dtype=torch.float64))
        origin: dict[str, Tensor] = {}  # a tile's features: differences to it do not cancel
        rounding: dict[str, float] = defaultdict(lambda: NETWORK_ROUNDING)
        for row in progress(self.part("train"), "statistics of the training bags", unit="bag"):
            bag = self.read_bag(row.slide_id)
            for scale in bag.scales:
                x = bag.features[scale].double()
                if not len(x):
                    continue
                half_step = torch.finfo(bag.features[scale].dtype).eps / 2
                rounding[scale] = max(rounding[scale], half_step)
                x = x - origin.setdefault(scale, x[0].clone())
                count[scale] += len(x)
                total[scale] = total[scale] + x.sum(0)
                total_square[scale] = total_square[scale] + x.square().sum(0)
        statistics = {}
        for scale in count:
            mean = total[scale] / count[scale]
            std = (total_square[scale] / count[scale] - mean.square()).clamp(min=0).sqrt()
            mean = mean + origin[scale]
            varies = std > rounding[scale] * mean.abs()
            statistics[scale] = (mean.float(), torch.where(varies, std, 0).float())
        return statistics

    def split_rows(self) -> Iterator[dict[str, str | None]]:
        """Rows of ``split.csv``, in the order of the cohort."""
        for row in self.cohort:
            part = self.split.get(row.slide_id, LEFT_OUT)
            if part != LEFT_OUT:
                yield dict(zip(SPLIT_COLUMNS, (row.slide_id, row.patient_id, row.label, part)))

    def class_counts(self, part: str = "train") -> dict[str, int]:
        """Slides of each class in a part, in the order of the classes."""
        counts = Counter(row.label for row in self.part(part))
        return {name: counts[name] for name in self.classes}

    def train_dataloader(self) -> DataLoader[BagGraph]:
        dataset = self._dataset(self.part("train"))
        world, rank = self._processes()
        accumulated = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        weights = None
        if self.weighted_sampling:
            weights = sampling_weights(dataset.labels, len(self.classes))
        sampler = TrainingSampler(
            len(dataset),
            world,
            rank,
            training_seed(),
            batch_size=self.batch_size,
            accumulated=accumulated,
            weights=weights,
        )
        go_on(sampler, self.trainer, self.batch_size)
        return TrainingLoader(
            dataset, batch_size=self.batch_size, sampler=sampler, **self._loader_options()
        )

    def val_dataloader(self) -> DataLoader[BagGraph]:
        return self._evaluation_loader(self._dataset(self._evaluated(self.val_part)))

    def test_dataloader(self) -> DataLoader[BagGraph]:
        return self._evaluation_loader(self._dataset(self._evaluated("test")))

    def predict_dataloader(self) -> DataLoader[BagGraph]:
        given = self.folder, self.rows, self.classes, self.scales, self._makes_edges()
        return self._evaluation_loader(PredictDataset(*given, unreadable=self.unreadable))

    def _evaluated(self, name: str) -> list[SlideRow]:
        rows = self.part(name)
        if not rows:
            raise InputError(f"{self.folder}: no labelled slide is in the part {name!r}")
        return rows

    def transfer_batch_to_device(
        self, batch: BagGraph, device: torch.device, dataloader_idx: int
    ) -> BagGraph:
        """From pinned memory while the process goes on; Lightning alone would wait."""
        if isinstance(batch, UnreadBag):
            return batch
        return batch.to(device, non_blocking=device.type == "cuda")

    def _evaluation_loader(self, dataset: BagDataset) -> DataLoader[BagGraph]:
        """One slide a batch, and the same number of batches in every process.

        Some slides may so come twice; the module counts each slide once.
        """
        sampler: DistributedSampler[BagGraph] = DistributedSampler(
            dataset, *self._processes(), shuffle=False
        )
        return DataLoader(dataset, batch_size=1, sampler=sampler, **self._loader_options())

    def _dataset(self, rows: Sequence[SlideRow]) -> BagDataset:
        given = self.folder, rows, self.classes, self.scales, self._makes_edges()
        if self._kept is None:
            return BagDataset(*given)
        return BagDataset(*given, self._kept, self._to_be_kept)

    def _makes_edges(self) -> bool:
        """Whether the model reads them; without a model they are made."""
        return bool(getattr(self._model(), "uses_edges", True))

    def _model(self) -> Any:
        return getattr(self.trainer, "lightning_module", None)

    def _card(self) -> Any:
        """What the model knows of its bags and slides; None if it knows nothing yet."""
        model = self._model()
        return model.card if getattr(model, "is_bound", False) else None

    def _to_be_kept(self, graph: BagGraph) -> BagGraph:
        """A copy where it is kept, with nothing left in the file."""
        device = self._device()
        graph = replace(graph, grid={name: x.clone() for name, x in graph.grid.items()})
        if self.cache == "device" and device.type != "cpu":
            return graph.to(device)
        if device.type == "cuda":
            return graph.pin_memory()
        return replace(graph, features={name: x.clone() for name, x in graph.features.items()})

    def _processes(self) -> tuple[int, int]:
        """How many there are, and which one this is."""
        if self.trainer is None:
            return 1, 0
        return self.trainer.world_size, self.trainer.global_rank

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _loader_options(self) -> dict[str, Any]:
        keeps = self._kept is not None
        workers = 0 if keeps else self.num_workers  # each would keep graphs of its own
        on_device = keeps and self.cache == "device"
        return {
            "collate_fn": join_graphs,
            **reader_options(workers),
            "persistent_workers": workers > 0,
            "pin_memory": self._device().type == "cuda" and not on_device,
        }

    def _refuse_what_does_not_fit(self, rows: Sequence[SlideRow]) -> None:
        """The graphs of these slides must fit into the memory that they are to be kept in."""
        paths = [bag_path(self.folder, row.slide_id) for row in rows]
        need = sum(self._of_each(partial(graph_bytes, scales=self.scales), paths))
        device = self._device()
        if self.cache == "device" and device.type == "cuda":
            reused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free = torch.cuda.mem_get_info(device)[0] + reused
            where, copies = str(device), 1
        else:
            free, where = psutil.virtual_memory().available, "memory"
            copies = 1 if self.trainer is None else self.trainer.num_devices
            need = int(need * (PINNED_ROUNDING if device.type == "cuda" else 1))
        if need * copies > free:
            each = f" in each of {copies} processes" if copies > 1 else ""
            raise InputError(
                f"{self.folder}: data.cache: {self.cache} takes {need / 1e9:,.1f} GB for its "
                f"{len(paths)} training and validation slides{each}, but {free / 1e9:,.1f} GB of "
                f"{where} are free; choose another (none, ram, device), or fewer data.scales"
            )

    def _read_cohort(self, stage: str) -> list[SlideRow]:
        """The slides; their labels must be of the classes, except in ``predict``."""
        must_exist(self.folder, "give data.bags the folder that embed wrote")
        cohort = read_cohort(self.folder / "cohort.csv")
        for row in cohort if stage != "predict" else ():
            if row.label is not None and row.label not in self.classes:
                raise InputError(
                    f"{self.folder / 'cohort.csv'}: slide {row.slide_id} has the label "
                    f"{row.label!r}, data.classes are {', '.join(self.classes)}"
                )
        return cohort

    def _read_headers(self, stage: str) -> None:
        """All bags must share one format; remember it, and which bags hold no tile.

        In ``predict`` a bag that cannot be read, or is of another format than the model's, costs
        its slide alone.
        """
        paths = [bag_path(self.folder, row.slide_id) for row in self.rows]
        found = self._of_each(_header_or_error, paths)
        slides = {row.slide_id: header for row, header in zip(self.rows, found, strict=True)}
        errors = {s: error for s, error in slides.items() if isinstance(error, InputError)}
        headers = {s: header for s, header in slides.items() if isinstance(header, BagHeader)}
        if errors and (stage != "predict" or not headers):
            raise next(iter(errors.values()))
        self.unreadable = {slide_id: str(error) for slide_id, error in errors.items()}
        first_id, first = self._first(headers, stage)
        held = [scale.name for scale in first.scales]
        missing = [name for name in self.given_scales or () if name not in held]
        if missing or self.given_scales == []:
            raise InputError(
                f"{self.folder}: data.scales asks for {', '.join(missing) or 'none'}, its bags "
                f"hold {', '.join(held)}"
            )
        asked = [name for name in held if name in (self.given_scales or held)]
        chosen = list(self._choose_scales(asked))
        self.scales = None if self.given_scales is None and chosen == held else chosen
        self.bag_format = first.bag_format(self.scales)
        self.digests = {s: header.slide_digest for s, header in headers.items()}
        self.empty = {s for s, header in headers.items() if header.num_tiles == 0}
        for slide_id, header in headers.items():
            if fault := self._fault(slide_id, header, first_id):
                if stage != "predict":
                    raise InputError(fault)
                self.unreadable[slide_id] = fault

    def _first(self, headers: Mapping[str, BagHeader], stage: str) -> tuple[str, BagHeader]:
        """The first bag; in ``predict`` the first of the format that the model reads, if any is."""
        card = self._card() if stage == "predict" else None
        wanted = None if card is None else card.bag_format
        fitting = (
            (slide_id, header)
            for slide_id, header in headers.items()
            if wanted and not describe_difference(wanted, header.bag_format(self.scales))
        )
        return next(fitting, None) or next(iter(headers.items()))

    def _choose_scales(self, available: Sequence[str]) -> Sequence[str]:
        """The scales that the model reads, of these."""
        choose = getattr(self._model(), "choose_scales", None)
        return available if choose is None else choose(available)

    def _fault(self, slide_id: str, header: BagHeader, first_id: str) -> str:
        """Why a bag does not belong to the others; "" if it does."""
        if header.slide_id != slide_id:
            return (
                f"{bag_path(self.folder, slide_id)}: it is the bag of {header.slide_id}; "
                "give the file its own name back"
            )
        difference = describe_difference(self.bag_format, header.bag_format(self.scales))
        if difference:
            return (
                f"{self.folder}: the bag {slide_id} holds {difference} (as in {first_id}); "
                "embed all slides in the same way"
            )
        return ""

    @staticmethod
    def _of_each(read: Callable[[Path], Value], paths: Sequence[Path]) -> list[Value]:
        """What many files say; when that takes long, a bar shows how far it is."""
        found = map_files(read, paths)
        return list(
            progress(found, "opening bags", total=len(paths), unit="bag", delay=2, leave=False)
        )

    def study(self) -> list[dict[str, str | None]]:
        """One record per slide of the cohort, for the checkpoint: plain values."""
        return plain_records(
            SlideRecord(
                row.slide_id,
                row.patient_id,
                UNLABELLED if row.label is None else self.split[row.slide_id],
                self.digests.get(row.slide_id, ""),
                row.label,
            )
            for row in self.cohort
        )

    def parts_in_study(self) -> dict[str, str]:
        """What the model has met of each slide with a bag; empty if that is not known."""
        met = self._met
        return {} if met is None else {row.slide_id: met.describe(row) for row in self.rows}

    def _parts(self, stage: str) -> dict[str, str]:
        """Part of each labelled slide, or ``left out``."""
        records = self._records(stage)
        if records is not None:
            return self._parts_for_model(records, stage)
        parts = split_cohort(self.cohort, **self._drawing(), split_table=self.split_table)
        labelled = [row for row in self.cohort if row.label is not None]
        rows = [replace(row, split=parts.get(row.slide_id)) for row in labelled]
        refuse_overlap(rows, self.digests)
        return self._keep_places(labelled, parts)

    def _parts_for_model(self, records: list[SlideRecord], stage: str) -> dict[str, str]:
        """Parts for a model that has met the slides of ``records``, or unknown ones if empty."""
        if records:
            self._met = Study(records, self.cohort, self.digests, self.other_cohort)
        if stage not in EVALUATIONS:
            return {}
        evaluated = "test" if stage == "test" else self.val_part
        rows = self.cohort if self.split_table is None else placed(self.cohort, self.split_table)
        marked = {row.slide_id: row.split for row in rows if row.split is not None}
        labelled = [row for row in self.cohort if row.label is not None]
        if self._met is None:
            self._refuse_unknown_study(evaluated, marked)
            return self._keep_places(labelled, marked)
        given = ["data.split_table"] * (self.split_table is not None)
        given += [f"data.{name}" for name in DRAWING if getattr(self, name) is not None]
        asked = marked if given else None
        if drawing := self._drawing():
            asked = split_cohort(self.cohort, **drawing, split_table=self.split_table)
        source = ", ".join(given) or str(self.folder / "cohort.csv")
        self.places = place_slides(labelled, self._met, evaluated, marked, asked, source)
        return {slide_id: place.split for slide_id, place in self.places.items()}

    def _keep_places(self, rows: Sequence[SlideRow], parts: Mapping[str, str]) -> dict[str, str]:
        self.places = {row.slide_id: Place(parts.get(row.slide_id, LEFT_OUT)) for row in rows}
        return {slide_id: place.split for slide_id, place in self.places.items()}

    def _records(self, stage: str) -> list[SlideRecord] | None:
        """The slides that the model has met, none if that is not known; None without a model."""
        if stage == "fit":
            if self.given_split is not None:
                raise InputError("data.split: it is for checkpoints; give fit a data.split_table")
            return None
        split = self.given_split
        if split is None:
            card = self._card()
            split = None if card is None else card.split
        return None if split is None else read_records(split)

    def _drawing(self) -> dict[str, Any]:
        """The options that draw parts, as far as they are given."""
        given = {name: getattr(self, name) for name in DRAWING}
        return {DRAWING[name]: value for name, value in given.items() if value is not None}

    def _refuse_unknown_study(self, evaluated: str, marked: Mapping[str, str]) -> None:
        """Only a table can say what may be evaluated if the checkpoint does not know its slides.

        Warns that this is so, or refuses if there is no such table.
        """
        table = self.split_table or "the column split of its cohort.csv"
        if self.num_folds is None and self.fold is None and evaluated in marked.values():
            warnings.warn(
                f"{self.folder}: the checkpoint does not know which slides it was trained on; only "
                f"{table} says that the {evaluated} slides are not among them",
                stacklevel=2,
            )
            return
        raise InputError(
            f"{self.folder}: the checkpoint does not know which slides it was trained on, so "
            f"{table} must name the {evaluated} slides, and data.num_folds and data.fold cannot "
            "be given; fill the column, or give --data.split_table"
        )

    def _say_what_is_evaluated(self, stage: str) -> None:
        """Print how many slides are evaluated, how many are left out, and why."""
        verb = "test" if stage == "test" else "validate"  # Lightning's stage is no plain text
        evaluated = "test" if stage == "test" else self.val_part
        with_bag = {row.slide_id for row in self.rows}
        left_out: dict[str, list[str]] = defaultdict(list)
        for row in self.cohort:
            place = self.places.get(row.slide_id)
            if place is None:
                left_out["without a label"].append(row.slide_id)
            elif place.split != evaluated:
                left_out[place.why].append(place.name or row.slide_id)
            elif row.slide_id not in with_bag:
                left_out["without a bag file"].append(row.slide_id)
        why = ", ".join(f"{len(ids)} {why} ({some_of(ids)})" for why, ids in left_out.items())
        num_left_out = sum(map(len, left_out.values()))
        print(
            f"{verb}: {len(self.part(evaluated))} slides are {EVALUATIONS[stage]}, "
            f"{num_left_out} are left out" + (f": {why}" if why else "")
        )
        if self._met is not None and not self._fitted:  # a fit meets its own slides
            for note in self._met.notes(self.rows):
                print(f"{verb}: {note}")

    def _refuse_missing_classes(self, *parts: str) -> None:
        for part in parts:
            present = {row.label for row in self.part(part)}
            missing = [name for name in self.classes if name not in present]
            if missing:
                raise InputError(
                    f"{self.folder}: the part {part!r} has no slide of class {', '.join(missing)}; "
                    "fill the split column of cohort.csv, or change the fractions or split_seed"
                )

    def _is_held_out(self, row: SlideRow) -> bool:
        """Also an unlabelled slide, if the split column says so."""
        return self.split.get(row.slide_id, row.split) in ("val", "test")

    def _refuse_seen_slides(self) -> None:
        """A slide that an extractor has seen in its own training is no fair test of the whole.

        Where it is not known what the extractors have seen, a warning says so.
        """
        path = self.folder / "extractors.json"
        if not path.exists():
            return
        records = read_json_object(path, "embed or import again, what is done is kept")
        records = {scale: records[scale] for scale in self.bag_format["scales"] if scale in records}
        for scale, record in records.items():
            if not isinstance(record, dict) or "trained_on" not in record:
                raise InputError(f"{path}: {scale} has no record of an extractor; embed again")
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
            trained_on = read_records(record["trained_on"])
            study = Study(trained_on, self.cohort, self.digests, self.other_cohort)
            held_out = [r for r in self.cohort if self._is_held_out(r)]
            seen = [r.slide_id for r in held_out if study.find(r) or study.part_of_patient(r)]
            if seen:
                raise InputError(
                    f"{path}: the {scale} extractor was trained on {len(seen)} slide(s) that are "
                    f"held out here, or on their patients ({some_of(seen)}); use the same split "
                    "for both, set data.other_cohort if equal slide_ids and patient_ids belong to "
                    "another cohort, or data.allow_seen_slides if that is meant"
                )


def _header_or_error(path: Path) -> BagHeader | InputError:
    try:
        return read_header(path)
    except InputError as error:
        return error


def say_missing(folder: Path, what: str, slide_ids: Sequence[str]) -> None:
    """Warn of slides that are left out, by name."""
    if slide_ids:
        warnings.warn(
            f"{folder}: {len(slide_ids)} slide(s) of cohort.csv have no {what} and are left out: "
            f"{', '.join(slide_ids[:10])}; see status.csv there",
            stacklevel=2,
        )
