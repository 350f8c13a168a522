"""Lines instead of Lightning's progress bar, for output that is no terminal."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dasmil.progress import progress


class LogLines(Callback):
    """Print one line per epoch, and one every two minutes of an epoch or an evaluation.

    The line of an epoch holds the logged losses and AUROCs, and its duration.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._validated = False
        self._bars: dict[str, Any] = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start, self._validated = time.monotonic(), False
        self._begin(trainer, "fit", _epoch(trainer), trainer.num_training_batches, "step")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._bars["fit"].update()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bars.pop("fit").close()
        metrics = trainer.callback_metrics  # in every process: means are reduced here
        names = [name for name in metrics if name.split("/")[-1] in ("loss", "auroc")]
        names.sort(key=lambda name: (name[:5] != "train", name[-4:] != "loss"))
        if "val/auroc" in names and any(name.count("/") == 2 for name in names):
            names.remove("val/auroc")  # that of the last scale, which is listed by its own name
        shown = [
            f"{name} {float(metrics[name]):.4f}"
            for name in names
            if self._validated or not name.startswith("val/")
        ]
        if trainer.is_global_zero:
            seconds = f"{time.monotonic() - self._start:.1f} s"
            print(f"{_epoch(trainer)}: {', '.join([*shown, seconds])}", flush=True)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, "test", "test", sum(map(int, trainer.num_test_batches)), "slide")

    def on_test_batch_end(self, *_: Any) -> None:
        self._bars["test"].update()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        count = sum(map(int, trainer.num_predict_batches))
        self._begin(trainer, "predict", "predict", count, "slide")

    def on_predict_batch_end(self, *_: Any) -> None:
        self._bars["predict"].update()

    def _begin(self, trainer: Trainer, key: str, desc: str, total: float, unit: str) -> None:
        hidden = not trainer.is_global_zero
        self._bars[key] = progress(desc=desc, total=total, unit=unit, disable=hidden)


def _epoch(trainer: Trainer) -> str:
    total = trainer.max_epochs or 0
    return f"epoch {trainer.current_epoch}" + (f" (last: {total - 1})" if total > 0 else "")
