"""How a training resumes from a checkpoint: with the settings that it began with, or not at all."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from dasmil.data.seeds import training_seed
from dasmil.embedding.restricted import load_checkpoint, refuse_no_numbers
from dasmil.errors import InputError, join_few
from dasmil.json_text import flatten
from dasmil.modules.options import plain_options

SETTINGS = "settings"  # entry of a checkpoint
NOT_COMPARED = ("val_part", "specificity", "patient_pooling")  # options of the evaluation alone
OF_TRAINER = (
    *("max_epochs", "precision", "gradient_clip_val", "gradient_clip_algorithm"),
    "limit_train_batches",
)
BATCHES = "trainer.devices × num_nodes × accumulate_grad_batches"


def training_settings(
    trainer: Trainer, module: LightningModule, data: LightningDataModule | None
) -> dict[str, Any]:
    """The options that decide what the weights become, by name, as plain values.

    Those of the data are what its class saves as hyperparameters.
    """
    settings: dict[str, Any] = {}
    for name, source in (("model", module), ("data", data)):
        options = {} if source is None else flatten(plain_options(source.hparams_initial))
        settings |= {f"{name}.{key}": value for key, value in options.items()}
    settings |= {f"trainer.{name}": getattr(trainer, name) for name in OF_TRAINER}
    if getattr(module, "follows_steps", False):
        settings["trainer.max_steps"] = trainer.max_steps
    settings[BATCHES] = trainer.world_size * trainer.accumulate_grad_batches
    settings["seed_everything"] = training_seed()
    kept = {n: v for n, v in settings.items() if n.rsplit(".", 1)[-1] not in NOT_COMPARED}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return plain


def refuse_other_settings(
    checkpoint: Mapping[str, Any], settings: Mapping[str, Any], where: object
) -> None:
    """Refuse to resume from a checkpoint with other settings; an older checkpoint has none.

    The optimiser and the schedule come from the checkpoint, so new values would be recorded but
    not used, and a longer schedule would let the learning rate rise again.

    Parameters
    ----------
    settings: of the training that resumes, see :func:`training_settings`.
    where: the file of the checkpoint.

    Raises
    ------
    InputError
        if a setting differs, or the checkpoint lacks the state of its training.
    """
    before = checkpoint.get(SETTINGS, {})
    if not isinstance(before, dict):
        raise InputError(f"{where}: its settings are no dictionary; start another run")
    if before and not isinstance(checkpoint.get("loops"), dict):  # Lightning would start at epoch 0
        raise InputError(
            f"{where}: the progress of its training is missing; resume from another checkpoint"
        )
    groups = {name.split(".")[0] for name in settings} & {"model", "data"}
    if unknown := [n for n in before if n.split(".")[0] in groups and n not in settings]:
        raise InputError(
            f"{where}: another version began this training, with options that do not exist here "
            f"({join_few(unknown)}); resume with that version, or start another run"
        )
    other = [
        f"{name} {settings[name]} instead of {value}"
        for name, value in before.items()
        if name in settings and settings[name] != value
    ]
    if other:
        raise InputError(
            f"{where}: a training resumes only with the settings of its config.yaml, not with "
            f"{join_few(other)}; leave these options out, or start another run"
        )


def refuse_broken_state(trainer: Trainer) -> None:
    """Check the optimisers' state that a checkpoint restored.

    Raises
    ------
    InputError
        if one of its tensors does not fit its weight, or is complex, NaN or infinite.
    """
    for optimizer in trainer.optimizers:
        for weight, state in optimizer.state.items():
            for name, value in state.items():
                if not isinstance(value, Tensor):
                    continue
                where = f"{trainer.ckpt_path}: the optimiser's state"
                if value.shape not in (weight.shape, ()):
                    raise InputError(
                        f"{where} holds {name} {tuple(value.shape)} for a weight "
                        f"{tuple(weight.shape)}; resume from another checkpoint"
                    )
                refuse_no_numbers({name: value}, where)


class RestrictedIO(TorchCheckpointIO):
    """Reads checkpoints without pickle: :func:`dasmil.embedding.restricted.load_checkpoint`."""

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Content of a checkpoint, on the CPU."""
        return load_checkpoint(Path(path))


@contextmanager
def explain_restoring(checkpoint: object, trains: bool) -> Iterator[None]:
    """Turn Lightning's errors of restoring a checkpoint into one sentence.

    Lightning does not check what a checkpoint holds.

    Parameters
    ----------
    checkpoint: its file.
    trains: whether a training resumes from it.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of any kind: a file may hold anything
        frames = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
        if not any(
            Path(code.co_filename).stem == "checkpoint_connector"
            and code.co_name.lstrip("_").startswith(("resume", "restore"))
            for code in frames
        ):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        sentence = f"it cannot be loaded ({reason}); give a checkpoint as fit wrote it"
        if trains:
            sentence = (
                f"its training cannot be resumed ({reason}); resume from another checkpoint, or "
                "start another run"
            )
        raise InputError(f"{checkpoint}: {sentence}") from error
