"""A callback that ends its process as a crash or a scheduler would."""

import os
import signal
from pathlib import Path

from lightning.pytorch import Callback


class KillOnce(Callback):
    """SIGKILL after a step, or while an epoch is validated; never a second time.

    Parameters
    ----------
    marker: file that says that it has happened.
    step: after which to kill, counted over all epochs.
    validation_epoch: whose validation to break off, instead.
    """

    def __init__(self, marker: str, step: int = -1, validation_epoch: int = -1):
        self.marker = Path(marker)
        self.step = step
        self.validation_epoch = validation_epoch

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}{self.marker}"

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self._kill()

    def on_validation_batch_end(self, trainer, *_):
        if trainer.current_epoch == self.validation_epoch:
            self._kill()

    def _kill(self) -> None:
        if not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
