"""Metrics and predictions of one checkpoint are never replaced by those of another."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from dasmil.data.bags import BagDataModule
from dasmil.errors import InputError, some_of
from dasmil.files import file_sha256, read_csv
from dasmil.reports.evaluation import SHORT_HASH, evaluation_file, read_checkpoint


def checkpoint_of(trainer: Trainer) -> tuple[str, str]:
    """Name and SHA-256 of the checkpoint that a Trainer evaluates; empty if there is none."""
    if not trainer.ckpt_path:  # Lightning sets it after the setup hooks
        return "", ""
    path = Path(trainer.ckpt_path)
    return path.name, file_sha256(path)


class KeptMetrics(Callback):
    """Refuses ``validate`` or ``test`` into a folder that holds other metrics, before they start.

    Parameters
    ----------
    output: the folder.
    """

    def __init__(self, output: Path):
        self.output = output

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refuse_other_metrics(trainer, "val")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refuse_other_metrics(trainer, "test")

    def _refuse_other_metrics(self, trainer: Trainer, part: str) -> None:
        data: BagDataModule | None = getattr(trainer, "datamodule", None)
        if not evaluation_file(self.output, part).is_file() or data is None:
            return
        _, before = read_checkpoint(self.output, part)
        _, now = checkpoint_of(trainer)
        if before != now:
            raise InputError(
                f"{self.output}: holds the metrics of another checkpoint "
                f"({before[:SHORT_HASH] or 'not known'}, this one is "
                f"{now[:SHORT_HASH] or 'not known'}); give --output to keep both"
            )
        _, rows = read_csv(self.output / f"{part}_slides.csv")
        evaluated = data.part(data.val_part if part == "val" else "test")
        other = {row["slide_id"] for row in rows} ^ {row.slide_id for row in evaluated}
        if other:
            raise InputError(
                f"{self.output}: holds the metrics of other {part} slides (the two differ in "
                f"{some_of(sorted(other))}); give --output to keep both"
            )
