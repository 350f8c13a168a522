"""The checkpoint of the best epoch, with a rule for ties."""

from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from dasmil.errors import InputError


class BestCheckpoint(ModelCheckpoint):
    """Keeps the epoch with the best monitored metric, and of ties the one with the lowest loss.

    With few validation slides many epochs tie, and Lightning keeps the first of them.

    Parameters
    ----------
    monitor:
        name of the metric that decides.
    mode:
        whether the largest (max) or the smallest value (min) is best.
    ties:
        name of the metric whose smallest value decides between epochs with equal values.
    filename:
        file name of the checkpoint without its suffix.
    kwargs:
        further arguments of Lightning's ModelCheckpoint; save_top_k must be 1.
    """

    def __init__(
        self,
        monitor: str = "val/auroc",
        mode: Literal["min", "max"] = "max",
        ties: str = "val/loss",
        filename: str = "best",
        **kwargs: Any,
    ):
        if kwargs.get("save_top_k", 1) != 1:
            raise InputError(
                "BestCheckpoint keeps one epoch; for save_top_k use Lightning's ModelCheckpoint"
            )
        fixed = {"auto_insert_metric_name": False, "enable_version_counter": False}
        super().__init__(filename=filename, monitor=monitor, mode=mode, **{**fixed, **kwargs})
        self.ties = ties
        self.best_tie: float | None = None  # value of ``ties`` in the best epoch

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether this epoch is better than the best one so far."""
        if super().check_monitor_top_k(trainer, current):
            return True
        value = trainer.callback_metrics.get(self.ties)
        if current is None or value is None or self.best_tie is None:
            return False
        is_better = bool(current == self.best_model_score) and float(value) < self.best_tie
        return trainer.strategy.reduce_boolean_decision(is_better)

    def _update_best_and_save(
        self, current: Tensor, trainer: Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        value = monitor_candidates.get(self.ties)
        self.best_tie = None if value is None else float(value)  # before the state is saved
        super()._update_best_and_save(current, trainer, monitor_candidates)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "best_tie": self.best_tie}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.best_tie = state_dict.get("best_tie")
