"""The files of ``predict``: one table of slides, and per slide a table of tiles and pictures."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dasmil.bags import Bag, BagGraph
from dasmil.bags.output import ScaleOutput
from dasmil.callbacks.evaluation_writer import (
    checkpoint_of,
    print_not_finite,
    refuse_other_checkpoint,
)
from dasmil.data.bag_dataset import UnreadBag
from dasmil.data.bags import BagDataModule
from dasmil.data.distributed import gather_lists
from dasmil.errors import DiskFullError, InputError, join_few
from dasmil.files import write_text
from dasmil.json_text import read_json_object
from dasmil.metrics import class_probabilities
from dasmil.metrics.evaluated_slides import YOUDEN
from dasmil.names import path_inside
from dasmil.reports.evaluation_files import CHECKPOINT
from dasmil.reports.heatmap import draw_heatmap, relative_attention, slide_canvas
from dasmil.reports.tile_scores import write_tiles
from dasmil.slides.cohort import SlideRow
from dasmil.slides.qc import write_png
from dasmil.tables import append_csv, write_csv

NOT_FINITE = "the output is not finite"


class PredictionWriter(Callback):
    """Writes predictions.csv, instances/<slide_id>.csv and overlays/<slide_id>_<scale>.png.

    ``predictions.json`` names the checkpoint of all of them.

    A slide whose bag cannot be read, or whose output is not finite, has the state ``failed`` in the
    table, and no other file. A row is added as soon as its slide is done; at the end the rows are
    sorted. The Trainer's model and DataModule give the classes, the labels and the bags.

    Parameters
    ----------
    output: the folder.

    Attributes
    ----------
    is_incomplete: whether slides have failed.
    """

    def __init__(self, output: Path):
        self.output = output
        self.table = output / "predictions.csv"
        # the complete table of an earlier run is kept until this one has ended
        self._before = output / "predictions.before.csv"
        self.is_incomplete = False
        self.checkpoint = ""
        self.rows: dict[str, SlideRow] = {}
        self.splits: Mapping[str, str] = {}
        self.columns: list[str] = []
        self.model: Any = None
        self._slides: list[dict[str, Any]] = []
        self._notes: list[str] = []

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        data: BagDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self.model = pl_module
        self.rows = {row.slide_id: row for row in data.rows}
        self.splits = data.describe_met_slides()
        scales, names, classes = pl_module.output_scales, pl_module.logit_classes, pl_module.classes
        self.columns = [
            *("slide_id", "patient_id", "label", "split"),
            *(f"logit/{scale}/{name}" for scale in scales for name in names),
            *(f"prob/{name}" for name in classes),
            *self._called(torch.zeros(len(classes))),
            *(CHECKPOINT, "state", "message"),
        ]
        name, self.checkpoint = checkpoint_of(trainer)
        self._record_checkpoint(name, trainer.is_global_zero)
        if trainer.is_global_zero:
            if self.table.exists() and not self._before.exists():
                os.replace(self.table, self._before)
            write_csv(self.table, self.columns, [])
        trainer.strategy.barrier()  # every process adds rows to the new table

    def _record_checkpoint(self, name: str, is_global_zero: bool) -> None:
        """Record whose output the folder holds; refuse a folder of another checkpoint."""
        path = self.output / "predictions.json"
        if path.is_file():
            record = read_json_object(path, "give another --output to keep the predictions there")
            refuse_other_checkpoint(
                self.output, "predictions", str(record.get(CHECKPOINT, "")), self.checkpoint
            )
        elif self.table.is_file():
            refuse_other_checkpoint(self.output, "predictions", "", self.checkpoint)
        if is_global_zero:
            about = {"checkpoint": name, CHECKPOINT: self.checkpoint}
            write_text(path, json.dumps(about, indent=2) + "\n")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: BagGraph | UnreadBag,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for number, slide_id in enumerate(batch.slide_ids):
            slide = self.rows[slide_id]
            row = {"slide_id": slide_id, "patient_id": slide.patient_id, "label": slide.label}
            row |= {"split": self.splits.get(slide_id), CHECKPOINT: self.checkpoint}
            try:
                if isinstance(batch, UnreadBag):
                    raise InputError(batch.reason)
                row |= {**self._write_slide(outputs, batch, number), "state": "done"}
            except DiskFullError:
                raise
            except InputError as error:
                row |= {"state": "failed", "message": str(error)}
                self._instances(slide_id).unlink(missing_ok=True)
                for scale in self.model.output_scales:
                    self._overlay(slide_id, scale).unlink(missing_ok=True)
            self._slides.append(row)
            append_csv(self.table, self.columns, row)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sort the table; print notes, and which slides have failed."""
        unique = {row["slide_id"]: row for row in gather_lists(self._slides)}
        notes = sorted(set(gather_lists(self._notes)))
        failed = {n: row["message"] for n, row in unique.items() if row["state"] == "failed"}
        self.is_incomplete = bool(failed)
        if not trainer.is_global_zero:
            return
        ordered = [unique[slide_id] for slide_id in self.rows if slide_id in unique]
        write_csv(self.table, self.columns, ordered)
        self._before.unlink(missing_ok=True)
        print(*notes, f"predict: {len(ordered)} slides; see {self.table}", sep="\n")
        if not_finite := [name for name, reason in failed.items() if reason == NOT_FINITE]:
            print_not_finite("predict", not_finite)
        unread = {name: reason for name, reason in failed.items() if reason != NOT_FINITE}
        if unread:
            print(
                f"error: predict: {len(unread)} bag(s) could not be read, their slides have no "
                f"class: {join_few(unread)}; the first: {next(iter(unread.values()))}; "
                f"see {self.table}",
                file=sys.stderr,
            )

    def _write_slide(
        self, outputs: Mapping[str, ScaleOutput], batch: BagGraph, number: int
    ) -> dict[str, Any]:
        """Write the files of a slide; returns its columns of the table.

        Raises
        ------
        InputError
            if the output is not finite.
        """
        bag, all_rows = batch.bag(number), batch.rows(number)
        bag_logits: dict[str, Tensor] = {}
        tiles: dict[str, dict[str, Tensor]] = {}
        for scale, output in outputs.items():
            rows = all_rows[scale]
            bag_logits[scale] = output.bag_logits[number].float().cpu()
            scores = {"logit": output.instance_logits, "attention": output.attention}
            tiles[scale] = {
                name: values[rows].float().cpu()
                for name, values in scores.items()
                if values is not None
            }
        values = [*bag_logits.values(), *(x for kinds in tiles.values() for x in kinds.values())]
        if not all(bool(x.isfinite().all()) for x in values):
            raise InputError(NOT_FINITE)
        columns = {
            scale: {
                f"{kind}/{name}": of_kind[:, place]
                for kind, of_kind in of_scale.items()
                for place, name in enumerate(self.model.logit_classes)
            }
            for scale, of_scale in tiles.items()
        }
        write_tiles(self._instances(bag.slide_id), bag, columns)
        self._write_overlays(bag, bag_logits, tiles)
        return self._output_row(bag_logits)

    def _instances(self, slide_id: str) -> Path:
        return path_inside(self.output / "instances", f"{slide_id}.csv")

    def _overlay(self, slide_id: str, scale: str) -> Path:
        return path_inside(self.output / "overlays", f"{slide_id}_{scale}.png")

    def _output_row(self, bag_logits: Mapping[str, Tensor]) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for scale, logits in bag_logits.items():
            for name, logit in zip(self.model.logit_classes, logits.tolist(), strict=True):
                row[f"logit/{scale}/{name}"] = logit
        finest = list(bag_logits)[-1]
        probabilities = class_probabilities(bag_logits[finest][None])[0]
        for name, probability in zip(self.model.classes, probabilities.tolist(), strict=True):
            row[f"prob/{name}"] = probability
        return row | self._called(probabilities)

    def _called(self, probabilities: Tensor) -> dict[str, str]:
        """The class of a slide with probabilities (P,): at 0.5, and at each stored threshold."""
        classes = self.model.classes
        if len(classes) > 2:
            return {"called": classes[int(probabilities.argmax())]}
        points = {"called_at_0.5": 0.5}
        thresholds = self.model.card.thresholds or {}
        for point, threshold in thresholds.get(self.model.output_scales[-1], {}).items():
            points[f"called_at_val_{'threshold' if point == YOUDEN else point}"] = threshold
        positive = float(probabilities[1])
        return {name: classes[positive > threshold] for name, threshold in points.items()}

    def _write_overlays(
        self, bag: Bag, bag_logits: Mapping[str, Tensor], tiles: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Draw instance probability and attention of the predicted (or only) logit's class."""
        row = self.rows[bag.slide_id]
        canvas, problem = slide_canvas(row, bag)
        if problem:
            self._notes.append(f"overlay of {bag.slide_id} on an empty canvas: {problem}")
        if not any(bag.num_tiles().values()):
            self._notes.append(f"{bag.slide_id} has no tiles: its prediction has no evidence")
        number = int(bag_logits[list(bag_logits)[-1]].argmax())
        name = self.model.logit_classes[number]
        place = self.model.classes.index(name)
        for scale, of_scale in tiles.items():
            scores = {}
            if "logit" in of_scale:
                probability = class_probabilities(of_scale["logit"])[:, place]
                scores[f"instance probability: {name}"] = probability.numpy()
            if "attention" in of_scale:
                weight = of_scale["attention"][:, number].numpy()
                scores["attention (1: largest, at least 2 x mean)"] = relative_attention(weight)
            if not scores:
                continue
            p = float(class_probabilities(bag_logits[scale][None])[0, place])
            title = f"{bag.slide_id}  {scale}: P({name}) = {p:.3f}"
            title += f", label {row.label}" if row.label else ""
            picture = draw_heatmap(canvas, bag, scale, scores, title)
            write_png(self._overlay(bag.slide_id, scale), picture)
