"""Instances compared with annotations: AUROC of the tiles, FROC of the lesions."""

import sys
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dasmil.bags import Bag, BagGraph
from dasmil.data.bags import BagDataModule
from dasmil.data.distributed import gather_lists
from dasmil.errors import InputError, error_text, join_few
from dasmil.metrics import class_probabilities
from dasmil.metrics.froc import (
    NMS_RADIUS_UM,
    Detections,
    Froc,
    Lesions,
    SlideHits,
    detections,
    evaluation_downsample,
    evaluation_lesions,
    froc,
    slide_hits,
)
from dasmil.metrics.instance import instance_auroc, instance_auroc_per_slide
from dasmil.names import path_inside
from dasmil.reports.froc import write_detections, write_froc
from dasmil.reports.shown import show_line
from dasmil.reports.tile_scores import write_tiles
from dasmil.slides.annotation import (
    ENDINGS,
    Areas,
    Points,
    Polygons,
    class_names,
    find_truths,
    marks_points,
    read_annotation,
)


@dataclass(frozen=True)
class SlideTruth:
    """What one slide adds to the metrics, per scale.

    Parameters
    ----------
    scores: (N_s,) probabilities of the positive class; of a method without instance logits, the
        attention.
    truth: (N_s,) bool.
    hits: of the slide's detections; empty if there is no FROC.
    """

    slide_id: str
    scores: Mapping[str, Tensor]
    truth: Mapping[str, Tensor]
    hits: Mapping[str, SlideHits]


class InstanceTruth(Callback):
    """Instance metrics of two classes, from annotations that say which tiles are positive.

    ``test/x20/instance_auroc`` over all tiles, ``test/x20/instance_auroc_per_slide`` (mean over the
    slides with tiles of both kinds) and, if all annotations are areas, ``test/x20/froc``: the
    mean sensitivity of Camelyon16 (:mod:`dasmil.metrics.froc`).

    A slide of the first (negative) class without an annotation is negative everywhere. A slide of
    the positive class without one is left out and named, because its truth is not known. A slide
    whose annotation is refused is left out too. If all are refused, there are no instance metrics.

    Parameters
    ----------
    truth:
        folder with one annotation per slide (:mod:`dasmil.slides.annotation`).
    min_share:
        a tile is positive if at least this share of it is marked, or if it contains a point.
    output:
        folder for froc.csv, froc.png, detections/<scale>/<slide_id>.csv, which the challenge's own
        script reads, and instance_truth/<slide_id>.csv: every tile with the share of it that is
        marked (overlap; or its number of points), whether that makes it positive, and its
        probability. None: nothing is written.
    froc:
        whether to compute the FROC.
    classes:
        classes of the annotations that are lesions; None: the default of each file format.

    Attributes
    ----------
    refused:
        why annotations were refused, by slide; after an evaluation of all processes.
    """

    def __init__(
        self,
        truth: Path,
        min_share: float = 0.5,
        output: Path | None = None,
        froc: bool = True,
        classes: Collection[str] | None = None,
    ):
        if not 0 < min_share <= 1:
            raise InputError(f"min_share: {min_share} is outside 0..1 (0 excluded)")
        self.truth = Path(truth)
        self.min_share = min_share
        self.output = None if output is None else Path(output)
        self.froc = froc
        self.classes = classes
        self.metrics: dict[str, float] = {}
        self.refused: dict[str, str] = {}
        self.curves: dict[str, Froc] = {}
        self._files: dict[str, Path] = {}
        self._negative: set[str] = set()
        self._positive_class = ""
        self._has_froc = False
        self._slides: list[SlideTruth] = []
        self._failed: list[str] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: BagDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self._find_files(data, data.val_part)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._find_files(trainer.datamodule, "test")  # type: ignore[attr-defined]

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: BagGraph,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._add_batch(outputs, batch)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._conclude(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._conclude(trainer, pl_module, "test")

    def _find_files(self, data: BagDataModule, split: str) -> None:
        """Find the annotations before anything is computed."""
        if len(data.classes) != 2:
            raise InputError(
                f"{self.truth}: instance metrics need two classes, the model has "
                f"{len(data.classes)} ({', '.join(data.classes)}); leave the truth out"
            )
        rows = data.rows_of(split)
        slide_ids = [row.slide_id for row in rows]
        self._files = find_truths(self.truth, slide_ids)
        if not self._files:
            some = next(iter(slide_ids), "<slide_id>")
            names = ", ".join(f"{some}{ending}" for ending in ENDINGS)
            raise InputError(
                f"{self.truth}: no annotation of any of the {len(rows)} {split} slides; for {some} "
                f"it would be one of {names}"
            )
        self._negative = {row.slide_id for row in rows if row.label == data.classes[0]}
        self._positive_class = data.classes[1]
        self._slides, self._failed, self.metrics, self.curves = [], [], {}, {}
        self.refused = {}
        self._look_into_files()
        unknown = sorted(set(slide_ids) - self._files.keys() - self._negative)
        if unknown:
            warnings.warn(
                f"{self.truth}: {len(unknown)} {split} slide(s) of class {data.classes[1]} have no "
                "annotation and are left out of the instance metrics: "
                f"{join_few(unknown)}",
                stacklevel=2,
            )

    def _look_into_files(self) -> None:
        """Check whether there is a FROC, and whether the requested classes occur."""
        present, points = set[str](), [False]
        for slide_id, path in self._files.items():
            try:
                points.append(marks_points(path, self.classes))
                present |= class_names(path) if self.classes else set()
            except Exception as error:  # it costs one slide only
                self._refuse(slide_id, error)
        self._has_froc = self.froc and not any(points)
        if self.classes and not self._are_all_refused:
            self._refuse_missing_classes(self.classes, present)

    def _refuse(self, slide_id: str, error: Exception) -> None:
        message = error_text(error)
        if not isinstance(error, InputError):
            message = f"{self._files.get(slide_id, slide_id)}: {message}; correct or remove it"
        self.refused[slide_id] = message

    def _refuse_missing_classes(self, classes: Collection[str], present: set[str]) -> None:
        """Refuse classes of which none occurs; a single one may be a typo, or rare."""
        known = {name.strip().lower() for name in present}
        missing = [name for name in classes if name.strip().lower() not in known]
        if len(missing) == len(classes):
            raise InputError(
                f"{self.truth}: no annotation is of the classes {', '.join(classes)}; there "
                f"are {_listed(present) or 'none, as in masks and tables of points'}"
            )
        if missing:
            warnings.warn(
                f"{self.truth}: no annotation is of the classes {', '.join(missing)}; there are "
                f"{_listed(present)}",
                stacklevel=2,
            )

    def _add_batch(self, outputs: Any, batch: BagGraph) -> None:
        for number, slide_id in enumerate(batch.slide_ids):
            is_known = slide_id in self._files or slide_id in self._negative
            if not is_known or slide_id in self.refused:
                continue
            rows, scores = batch.rows(number), {}
            for scale, output in outputs.items():
                values = output.tile_scores()[rows[scale]].float().cpu()
                is_logit = output.instance_logits is not None
                scores[scale] = class_probabilities(values)[:, 1] if is_logit else values[:, -1]
            if not all(bool(values.isfinite().all()) for values in scores.values()):
                self._failed.append(slide_id)
                continue
            bag = batch.bag(number)
            try:
                overlap, truth, lesions = self._read_marked(bag, scores)
            except Exception as error:  # a file may hold anything, and costs one slide only
                self._refuse(slide_id, error)
                continue
            self._write_tiles(bag, scores, overlap, truth)
            found = self._detect(bag, scores) if self._has_froc else {}
            hits = {scale: slide_hits(each, lesions) for scale, each in found.items()}
            self._slides.append(SlideTruth(slide_id, scores, truth, hits))

    def _read_marked(
        self, bag: Bag, scales: Collection[str]
    ) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Tensor], Lesions | None]:
        """Read the annotation; a damaged picture may be noticed only here.

        Returns
        -------
        Per scale (N_s,) the share of each tile that is marked, or its number of points; per scale
        (N_s,) bool; and the lesions for the FROC, None if there is no FROC or nothing is marked.
        """
        annotation = self._annotation(bag)
        overlap = {scale: annotation.overlap(bag.boxes_px0(scale).numpy()) for scale in scales}
        truth = {
            scale: torch.from_numpy(annotation.positive(values, self.min_share))
            for scale, values in overlap.items()
        }
        lesions = None
        if self._has_froc and not isinstance(annotation, Points) and not annotation.is_empty:
            downsample = evaluation_downsample(bag.tiles.extent.mpp)
            lesions = evaluation_lesions(annotation.mask(downsample), downsample)
        return overlap, truth, lesions

    def _write_tiles(
        self,
        bag: Bag,
        scores: Mapping[str, Tensor],
        overlap: Mapping[str, npt.NDArray[Any]],
        truth: Mapping[str, Tensor],
    ) -> None:
        if self.output is None:
            return
        columns: dict[str, dict[str, Any]] = {
            scale: {
                "overlap": overlap[scale],
                "positive": truth[scale].int(),
                f"prob/{self._positive_class}": scores[scale],
            }
            for scale in scores
        }
        path = path_inside(self.output / "instance_truth", f"{bag.slide_id}.csv")
        write_tiles(path, bag, columns, slide_id=bag.slide_id)

    def _detect(self, bag: Bag, scores: Mapping[str, Tensor]) -> dict[str, Detections]:
        """The detections of the FROC per scale, which are also written."""
        extent, found = bag.tiles.extent, {}
        for scale, of_scale in scores.items():
            on_slide = np.clip(bag.boxes_px0(scale).numpy(), 0, extent.size_px0 * 2)
            found[scale] = detections(of_scale.numpy(), on_slide, NMS_RADIUS_UM / extent.mpp)
            if self.output is not None:
                folder = self.output / "detections"
                write_detections(path_inside(folder, scale, f"{bag.slide_id}.csv"), found[scale])
        return found

    def _annotation(self, bag: Bag) -> Points | Areas:
        """The annotation of a slide; an empty one for a negative slide without a file."""
        path, extent = self._files.get(bag.slide_id), bag.tiles.extent
        if path is None:
            return Polygons(extent.size_px0)
        if not extent.mpp_is_known:
            raise InputError(
                f"{path}: the tiles of {bag.slide_id} have no place in level-0 pixels, because it "
                "was imported without its mpp; give --cohort of `import stamp` a table with the "
                "column mpp"
            )
        annotation = read_annotation(path, extent, self.classes)
        if bag.slide_id in self._negative and not annotation.is_empty:
            raise InputError(
                f"{path}: it marks something on a slide of the negative class; correct the label, "
                "or the annotation (in a mask only what is positive differs from 0)"
            )
        return annotation

    def _conclude(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compute and log the metrics over all slides, each once; equal in every process.

        There are none if the output of a slide is not finite, or all annotations are refused.
        """
        self.refused = dict(sorted(gather_lists(list(self.refused.items()))))
        if trainer.is_global_zero and self.refused:
            self._print_refused()
            self._remove_files_of_refused()
        if gather_lists(self._failed) or self._are_all_refused:
            return
        unique = {slide.slide_id: slide for slide in gather_lists(self._slides)}
        slides = [unique[slide_id] for slide_id in sorted(unique)]
        for scale in slides[0].scores if slides else ():
            scores, truth = [s.scores[scale] for s in slides], [s.truth[scale] for s in slides]
            self.metrics[f"{scale}/instance_auroc"] = instance_auroc(scores, truth)
            per_slide = instance_auroc_per_slide(scores, truth)
            self.metrics[f"{scale}/instance_auroc_per_slide"] = per_slide
            if self._has_froc:
                self.curves[scale] = froc([slide.hits[scale] for slide in slides])
                self.metrics[f"{scale}/froc"] = self.curves[scale].score
        for name, value in self.metrics.items():
            pl_module.log(f"{stage}/{name}", value, sync_dist=False)
        num_lesions = sum(hits.num_lesions for slide in slides for hits in slide.hits.values())
        if self.curves and num_lesions == 0:
            warnings.warn(
                f"{self.truth}: FROC is not defined: the {stage} slides hold no lesion longer than "
                "isolated tumour cells (200 µm)",
                stacklevel=2,
            )
        elif self.curves and trainer.is_global_zero and self.output is not None:
            write_froc(self.output, self.curves)

    @property
    def _are_all_refused(self) -> bool:
        return self.refused.keys() >= self._files.keys()

    def _remove_files_of_refused(self) -> None:
        """Remove the files of refused slides that an earlier evaluation has written."""
        if self.output is None:
            return
        folders = [self.output / "instance_truth", *self.output.glob("detections/*")]
        for folder, slide_id in product(folders, self.refused):
            path_inside(folder, f"{slide_id}.csv").unlink(missing_ok=True)
        if self._are_all_refused:
            for name in ("froc.csv", "froc.png"):
                (self.output / name).unlink(missing_ok=True)

    def _print_refused(self) -> None:
        consequence = f"their slides are left out of the instance metrics: {join_few(self.refused)}"
        if self._are_all_refused:
            consequence = "so there are no instance metrics"
        print(
            f"error: {self.truth}: {len(self.refused)} annotation(s) are refused, {consequence}; "
            f"the first: {next(iter(self.refused.values()))}",
            file=sys.stderr,
        )


def _listed(names: Collection[str]) -> str:
    """Names of classes for an error message."""
    return join_few([show_line(name) for name in sorted(names)])
