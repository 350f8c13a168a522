"""The folder of a ``fit``: the record of its starts, and its checkpoints if it has moved."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dasmil.data.bags import BagDataModule
from dasmil.errors import InputError
from dasmil.provenance import record_start
from dasmil.slides.splits import SPLIT_COLUMNS
from dasmil.tables import write_csv

CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"


def logger_folder(trainer: Trainer) -> Path | None:
    """The folder of a run, which its logger names; None without a logger.

    Every process must call it, because the folder is broadcast.
    """
    folder = trainer.log_dir if trainer.loggers else None
    return None if folder is None else Path(folder)


def folder_of_checkpoint(checkpoint: Path) -> Path | None:
    """The folder of the ``fit`` that wrote a checkpoint; None if the checkpoint was moved."""
    folder = checkpoint.parent.parent
    written_there = checkpoint.parent.name == CHECKPOINTS and (folder / "config.yaml").is_file()
    return folder if written_there else None


def refuse_used_folder(trainer: Trainer) -> None:
    """Refuse to begin a fit in a folder that holds the checkpoints of another one.

    Its new config and table of the split would otherwise describe the old checkpoints.
    """
    for keeper in trainer.checkpoint_callbacks:
        folder = getattr(keeper, "dirpath", None)
        if folder is not None and any(Path(folder).glob("*.ckpt")):
            raise InputError(
                f"{folder}: holds the checkpoints of a fit; go on with it by fit --resume "
                f"{Path(folder).parent}, or choose another --output"
            )


class RunFolder(Callback):
    """Record each start of a ``fit`` in its folder; re-locate its checkpoints if that has moved.

    ``provenance.json`` gets the start, ``split.csv`` the split. They are written when the first
    epoch begins, because a module may still refuse to train in its ``on_train_start``, and a
    refused ``fit`` changes nothing.

    Parameters
    ----------
    command: the verb and its arguments as the user typed them.
    seed: that of ``seed_everything``.
    """

    def __init__(self, command: Sequence[str] = (), seed: int | None = None):
        self.command = command
        self.seed = seed
        self.begun = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.begun:
            return
        self.begun = True
        folder, data = logger_folder(trainer), getattr(trainer, "datamodule", None)
        if folder is None or not trainer.is_global_zero:
            return
        record_start(folder, self.seed, self.command, trainer.world_size)
        if isinstance(data, BagDataModule):
            write_csv(folder / "split.csv", SPLIT_COLUMNS, data.split_rows())

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Re-locate the checkpoints of a folder that has moved or is named in another way.

        Lightning compares names alone, and would take the next epoch for the best one.
        """
        for keeper in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(keeper.state_key)
            if state is None or not isinstance(keeper, ModelCheckpoint) or keeper.dirpath is None:
                continue
            folder, best = Path(keeper.dirpath), state["best_model_path"]
            if best and (folder / Path(best).name).is_file():
                checkpoint["callbacks"][keeper.state_key] = _moved(state, folder)


class Trace:
    """The files that a ``fit`` adds to its folder, which are removed if the fit is refused.

    Parameters
    ----------
    folder: folder of the run before this fit writes into it; None if it has none.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._before = set(folder.rglob("*")) if folder is not None else set()
        self._missing = [p for p in (folder, *folder.parents) if not p.exists()] if folder else []

    def remove(self) -> None:
        """Remove the files and folders that were not there before."""
        if self.folder is None or not self.folder.exists():
            return
        for path in sorted(set(self.folder.rglob("*")) - self._before, reverse=True):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
        for path in self._missing:
            with suppress(OSError):  # another process may have added a file
                path.rmdir()


def _moved(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The state of a ModelCheckpoint with its files in another folder."""

    def there(path: str) -> str:
        return str(folder / Path(path).name) if path else path

    names = ("best_model_path", "kth_best_model_path", "last_model_path")
    return {
        **state,
        "dirpath": str(folder),
        **{name: there(state[name]) for name in names},
        "best_k_models": {there(path): value for path, value in state["best_k_models"].items()},
    }
