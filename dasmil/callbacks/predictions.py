"""The files of ``predict``: one table of slides, and per slide a table of tiles and pictures."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dasmil.bags import Bag, BagGraph
from dasmil.bags.output import ScaleOutput
from dasmil.callbacks.evaluation_writer import checkpoint_of
from dasmil.data.bag_dataset import UnreadBag
from dasmil.data.bags import BagDataModule
from dasmil.data.distributed import gather_lists
from dasmil.errors import DiskFullError, InputError
from dasmil.files import write_text
from dasmil.json_text import parse_json
from dasmil.metrics import class_probabilities
from dasmil.metrics.evaluated_slides import YOUDEN
from dasmil.names import path_inside
from dasmil.reports.evaluation_files import CHECKPOINT, SHORT_HASH
from dasmil.reports.heatmap import draw_heatmap, relative_attention, slide_canvas
from dasmil.slides.cohort import SlideRow
from dasmil.slides.qc import write_png
from dasmil.tables import append_csv, write_csv

NOT_FINITE = "the output is not finite"
ROWS_AT_ONCE = 65_536


class PredictionWriter(Callback):
    """Writes predictions.csv, instances/<slide_id>.csv and overlays/<slide_id>_<scale>.png.

    ``predictions.json`` names the checkpoint of all of them.

    A slide whose bag cannot be read, or whose output is not finite, has the state ``failed`` in the
    table, and no other file. A row is added as soon as its slide is done; at the end the rows are
    sorted. The Trainer's model and DataModule give the classes, the labels and the bags.

    Parameters
    ----------
    output: the folder.
    """

    def __init__(self, output: Path):
        self.output = output
        self.rows: dict[str, SlideRow] = {}
        self.scales: tuple[str, ...] = ()
        self.classes: tuple[str, ...] = ()
        self.logit_classes: tuple[str, ...] = ()
        self.thresholds: Mapping[str, Mapping[str, float]] = {}
        self.failed: list[str] = []  # slides of all processes whose output is not finite
        self.unread: dict[str, str] = {}  # slides of all processes without output, and why
        self.splits: Mapping[str, str] = {}
        self.checkpoint = ""
        self._slides: list[dict[str, Any]] = []
        self._notes: list[str] = []

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        data: BagDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self.rows = {row.slide_id: row for row in data.rows}
        self.scales = pl_module.output_scales
        self.classes, self.logit_classes = pl_module.classes, pl_module.logit_classes
        self.thresholds = pl_module.card.thresholds or {}
        self.splits = data.describe_met_slides()
        name, self.checkpoint = checkpoint_of(trainer)
        self._record_checkpoint(name, trainer.is_global_zero)
        if trainer.is_global_zero:
            if self.table.exists() and not self._before.exists():
                os.replace(self.table, self._before)
            write_csv(self.table, self._columns(), [])
        trainer.strategy.barrier()  # every process adds rows to the new table

    @property
    def table(self) -> Path:
        return self.output / "predictions.csv"

    @property
    def _before(self) -> Path:
        """The complete table of an earlier run, kept until this one has ended."""
        return self.output / "predictions.before.csv"

    def _columns(self) -> list[str]:
        logits = [f"logit/{scale}/{name}" for scale in self.scales for name in self.logit_classes]
        probabilities = [f"prob/{name}" for name in self.classes]
        called = self._called(torch.zeros(len(self.classes)))
        known = ("slide_id", "patient_id", "label", "split")
        return [*known, *logits, *probabilities, *called, CHECKPOINT, "state", "message"]

    def _record_checkpoint(self, name: str, is_global_zero: bool) -> None:
        """Record whose output the folder holds; refuse a folder of another checkpoint."""
        path = self.output / "predictions.json"
        before = ""
        if path.is_file():
            before = _checkpoint_in(path)
        elif not (self.output / "predictions.csv").is_file():
            before = self.checkpoint
        if before != self.checkpoint:
            raise InputError(
                f"{self.output}: holds the predictions of another checkpoint "
                f"({before[:SHORT_HASH] or 'not known'}, this one is "
                f"{self.checkpoint[:SHORT_HASH]}); give another --output to keep both"
            )
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
            row = self._known(slide_id)
            try:
                if isinstance(batch, UnreadBag):
                    raise InputError(batch.reason)
                row |= {**self._write_slide(outputs, batch, number), "state": "done"}
            except DiskFullError:
                raise
            except InputError as error:
                row |= {"state": "failed", "message": str(error)}
                for path in self._files_of(slide_id):
                    path.unlink(missing_ok=True)
            self._slides.append(row)
            append_csv(self.table, self._columns(), row)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        unique = {row["slide_id"]: row for row in gather_lists(self._slides)}
        notes = sorted(set(gather_lists(self._notes)))
        if trainer.is_global_zero:
            ordered = [unique[slide_id] for slide_id in self.rows if slide_id in unique]
            write_csv(self.table, self._columns(), ordered)
            self._before.unlink(missing_ok=True)
            for note in notes:
                print(note)
            print(f"predict: {len(ordered)} slides; see {self.table}")
        failed = {n: row["message"] for n, row in unique.items() if row["state"] == "failed"}
        self.failed = [name for name, reason in failed.items() if reason == NOT_FINITE]
        self.unread = {name: reason for name, reason in failed.items() if reason != NOT_FINITE}

    def _known(self, slide_id: str) -> dict[str, Any]:
        """The columns of a slide that do not depend on the output."""
        row = self.rows[slide_id]
        return {
            "slide_id": slide_id,
            "patient_id": row.patient_id,
            "label": row.label,
            "split": self.splits.get(slide_id),
            CHECKPOINT: self.checkpoint,
            "message": "",
        }

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
        self._write_instances(bag, tiles)
        self._write_overlays(bag, bag_logits, tiles)
        return self._output_row(bag_logits)

    def _files_of(self, slide_id: str) -> list[Path]:
        overlays = [self._overlay(slide_id, scale) for scale in self.scales]
        return [self._instances(slide_id), *overlays]

    def _instances(self, slide_id: str) -> Path:
        return path_inside(self.output / "instances", f"{slide_id}.csv")

    def _overlay(self, slide_id: str, scale: str) -> Path:
        return path_inside(self.output / "overlays", f"{slide_id}_{scale}.png")

    def _output_row(self, bag_logits: Mapping[str, Tensor]) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for scale, logits in bag_logits.items():
            for name, logit in zip(self.logit_classes, logits.tolist(), strict=True):
                row[f"logit/{scale}/{name}"] = logit
        finest = list(bag_logits)[-1]
        probabilities = class_probabilities(bag_logits[finest][None])[0]
        for name, probability in zip(self.classes, probabilities.tolist(), strict=True):
            row[f"prob/{name}"] = probability
        return row | self._called(probabilities)

    def _called(self, probabilities: Tensor) -> dict[str, str]:
        """The class of a slide with probabilities (P,): at 0.5, and at each stored threshold."""
        if len(self.classes) > 2:
            return {"called": self.classes[int(probabilities.argmax())]}
        points = {"called_at_0.5": 0.5}
        for point, threshold in self.thresholds.get(self.scales[-1], {}).items():
            points[f"called_at_val_{'threshold' if point == YOUDEN else point}"] = threshold
        positive = float(probabilities[1])
        return {name: self.classes[positive > threshold] for name, threshold in points.items()}

    def _write_instances(self, bag: Bag, tiles: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write the table of the tiles with the scores of each."""
        kinds = list(next(iter(tiles.values())))
        columns = ["scale", "row", "col", "x0_px0", "y0_px0", "size_px0"]
        columns += [f"{kind}/{name}" for kind in kinds for name in self.logit_classes]

        def records() -> Iterator[dict[str, Any]]:
            for scale, of_scale in tiles.items():
                scores = [torch.empty(len(bag.grid[scale]), 0), *(of_scale[kind] for kind in kinds)]
                parts = (bag.grid[scale], bag.boxes_px0(scale), torch.cat(scores, dim=1))
                # in blocks, because Python's numbers take ten times the memory
                blocks = zip(*(part.split(ROWS_AT_ONCE) for part in parts), strict=True)
                rows = (row for block in blocks for row in zip(*(part.tolist() for part in block)))
                for (row, col), (left, top, right, _), scores_of_tile in rows:
                    place = [scale, row, col, left, top, right - left]
                    yield dict(zip(columns, [*place, *scores_of_tile], strict=True))

        write_csv(self._instances(bag.slide_id), columns, records())

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
        name = self.logit_classes[number]
        for scale, of_scale in tiles.items():
            scores = {}
            if "logit" in of_scale:
                probability = class_probabilities(of_scale["logit"])[:, self.classes.index(name)]
                scores[f"instance probability: {name}"] = probability.numpy()
            if "attention" in of_scale:
                weight = of_scale["attention"][:, number].numpy()
                scores["attention (1: largest, at least 2 x mean)"] = relative_attention(weight)
            if not scores:
                continue
            bag_probability = class_probabilities(bag_logits[scale][None])[0]
            p = float(bag_probability[self.classes.index(name)])
            title = f"{bag.slide_id}  {scale}: P({name}) = {p:.3f}"
            title += f", label {row.label}" if row.label else ""
            picture = draw_heatmap(canvas, bag, scale, scores, title)
            write_png(self._overlay(bag.slide_id, scale), picture)


def _checkpoint_in(path: Path) -> str:
    """The SHA-256 of the checkpoint in a predictions.json; "" if the file is damaged."""
    try:
        return str(dict(parse_json(path.read_bytes())).get(CHECKPOINT, ""))
    except (TypeError, ValueError):
        return ""
