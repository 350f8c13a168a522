"""Tables, confidence intervals and figures of an evaluation."""

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from dasmil.callbacks.instance_truth import InstanceTruth
from dasmil.data.bags import BagDataModule
from dasmil.errors import InputError, join_few
from dasmil.files import file_sha256
from dasmil.reports.evaluation_files import (
    SHORT_HASH,
    auroc_lines,
    evaluation_file,
    read_checkpoint,
    write_evaluation,
)
from dasmil.reports.figures import evaluation_figures, write_figures
from dasmil.tables import read_csv


def checkpoint_of(trainer: Trainer) -> tuple[str, str]:
    """File name and SHA-256 of the checkpoint that a Trainer evaluates; "" if there is none."""
    if not trainer.ckpt_path:  # Lightning sets it after the setup hooks
        return "", ""
    path = Path(trainer.ckpt_path)
    return path.name, file_sha256(path)


def refuse_other_checkpoint(folder: Path, what: str, before: str, now: str) -> None:
    """Refuse to replace the output of another checkpoint; both are named by their SHA-256."""
    if before != now:
        raise InputError(
            f"{folder}: holds the {what} of another checkpoint "
            f"({before[:SHORT_HASH] or 'not known'}, this one is "
            f"{now[:SHORT_HASH] or 'not known'}); give another --output to keep both"
        )


class EvaluationWriter(Callback):
    """Writes the metrics of ``validate`` or ``test``, and prints the AUROC.

    Before the evaluation begins, it refuses to replace metrics of another checkpoint or of other
    slides. It does nothing in the validations of a ``fit``.

    Parameters
    ----------
    output: folder for ``test_metrics.csv``, ``test_slides.csv``, ``figures/`` and so on; None:
        nothing is written.
    replaces: whether metrics of another checkpoint are replaced, as a resumed run does.

    Attributes
    ----------
    is_incomplete: whether slides are missing from the metrics, or there are no metrics.
    """

    def __init__(self, output: Path | None = None, replaces: bool = False):
        self.output = None if output is None else Path(output)
        self.replaces = replaces
        self.is_incomplete = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._refuse_other_metrics(trainer, "val")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refuse_other_metrics(trainer, "test")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    def _write(self, trainer: Trainer, module: Any, split: str) -> None:
        """Write in one process; set ``is_incomplete`` in every process."""
        truths = [each for each in trainer.callbacks if isinstance(each, InstanceTruth)]  # type: ignore[attr-defined]
        refused = {slide: why for truth in truths for slide, why in truth.refused.items()}
        evaluation, failed = module.evaluation, module.failed
        self.is_incomplete = bool(refused or failed)
        if not trainer.is_global_zero:
            return
        verb = "validate" if split == "val" else "test"
        if failed:
            print_not_finite(verb, failed, "; so no metrics are written")
        else:
            print(*auroc_lines(split, evaluation), sep="\n")
        if self.output is None:
            return
        more = dict(module.losses)
        for truth in truths:
            more |= truth.metrics
        name, digest = checkpoint_of(trainer)
        write_evaluation(
            *(self.output, split, evaluation, more),
            {"checkpoint": name or None, "checkpoint_sha256": digest or None},
            pooling=module.evaluation_options.patient_pooling,
            failed=failed,
            refused=refused,
        )
        if failed:
            return
        write_figures(self.output, split, evaluation_figures(evaluation, split))
        print(f"{verb}: metrics {self.output / f'{split}_metrics.csv'}, {self.output / 'figures'}")

    def _refuse_other_metrics(self, trainer: Trainer, split: str) -> None:
        data: BagDataModule | None = getattr(trainer, "datamodule", None)
        if data is None or self.output is None or self.replaces:
            return
        if not evaluation_file(self.output, split).is_file():
            return
        _, before = read_checkpoint(self.output, split)
        _, now = checkpoint_of(trainer)
        refuse_other_checkpoint(self.output, "metrics", before, now)
        _, rows = read_csv(self.output / f"{split}_slides.csv")
        evaluated = data.rows_of(data.val_part if split == "val" else "test")
        other = {row["slide_id"] for row in rows} ^ {row.slide_id for row in evaluated}
        if other:
            raise InputError(
                f"{self.output}: holds the metrics of other {split} slides (the two differ in "
                f"{join_few(sorted(other))}); give --output to keep both"
            )


def print_not_finite(verb: str, slide_ids: list[str], consequence: str = "") -> None:
    """Print the slides whose output is not finite."""
    print(
        f"error: {verb}: the output is not finite for {len(slide_ids)} slide(s), which have no "
        f"class: {join_few(slide_ids)}{consequence}; run it again with "
        "--trainer.precision 32-true, or check their features",
        file=sys.stderr,
    )
