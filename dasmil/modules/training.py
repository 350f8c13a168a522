"""What the trainings of all modules share: seeds per step, finite losses, and exact resuming."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from dasmil.data.seeds import draw_seed, training_seed
from dasmil.json_text import flatten
from dasmil.modules.finite_loss import FiniteLoss
from dasmil.modules.options import plain_options
from dasmil.modules.resume import SETTINGS, refuse_broken_state, training_settings

OPTIONS = LightningModule.CHECKPOINT_HYPER_PARAMS_KEY
DATA_OPTIONS = LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY


class TrainingModule(LightningModule):
    """Random numbers of a step depend on its place alone; losses and weights stay finite.

    Attributes
    ----------
    follows_steps: whether schedules follow the steps, which ``max_steps`` may cut short.
    """

    follows_steps = False

    def __init__(self) -> None:
        super().__init__()
        self.finite_loss = FiniteLoss()

    @property
    def options(self) -> dict[str, Any]:
        """The options that the module was made with, as plain values."""
        return plain_options(self.hparams_initial)

    @property
    def flat_options(self) -> dict[str, Any]:
        """The same by names such as ``objective.temperature``."""
        return flatten(self.options)

    @property
    def datamodule(self) -> Any:
        """The Trainer's DataModule; None if it has none."""
        return getattr(self.trainer, "datamodule", None)

    @property
    def shows_bar(self) -> bool:
        """Whether there is a progress bar; Lightning waits for what a bar shows in each step."""
        return self._trainer is not None and self._trainer.progress_bar_callback is not None

    def settings(self) -> dict[str, Any]:
        """The settings that a resumed training must share."""
        return training_settings(self.trainer, self, self.datamodule)

    def on_train_start(self) -> None:
        refuse_broken_state(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed what dropout draws by seed, epoch and place; see :mod:`dasmil.data.seeds`."""
        world, rank = self.trainer.world_size, self.trainer.global_rank
        seed = draw_seed(training_seed(), self.current_epoch, batch_idx * world + rank)
        torch.manual_seed(seed)

    def on_train_epoch_end(self) -> None:
        self.finite_loss.check()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.finite_loss.check_weights(checkpoint["state_dict"])
        for name in OPTIONS, DATA_OPTIONS:  # plain values: no pickle is needed to read them
            if name in checkpoint:
                checkpoint[name] = plain_options(checkpoint[name])
        checkpoint[SETTINGS] = self.settings()
