"""A training that was broken off goes on with the settings that it began with, or not at all."""

import json
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from dasmil.embedding.restricted import refuse_no_numbers
from dasmil.errors import InputError, some_of
from dasmil.seeds import training_seed

KEY = "settings"  # of a checkpoint
NOT_COMPARED = ("val_part", "specificity", "patient_pooling")  # of the evaluation alone
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
    options = getattr(module, "flat_options", module.hparams_initial)
    found = {f"model.{name}": value for name, value in options.items()}
    if data is not None:
        found |= {f"data.{name}": value for name, value in data.hparams_initial.items()}
    found |= {f"trainer.{name}": getattr(trainer, name) for name in OF_TRAINER}
    if getattr(module, "schedules_by_step", False):  # which max_steps may cut short
        found["trainer.max_steps"] = trainer.max_steps
    found[BATCHES] = trainer.world_size * trainer.accumulate_grad_batches
    found["seed_everything"] = training_seed()
    kept = {
        name: value
        for name, value in found.items()
        if (option := name.rsplit(".", 1)[-1]) not in NOT_COMPARED and option[0] != "_"
    }
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return plain


def refuse_other_settings(
    checkpoint: Mapping[str, Any], settings: Mapping[str, Any], where: object
) -> None:
    """Refuse to go on from a checkpoint with other settings; an older one knows none.

    The optimiser and the schedule come from the checkpoint, so new values would be written down
    and not be used; a schedule that is stretched lets the rate rise again.

    Parameters
    ----------
    where: the file of the checkpoint.
    """
    before = checkpoint.get(KEY, {})
    if not isinstance(before, dict):
        raise InputError(f"{where}: its settings are no dictionary; start another run")
    if before and not isinstance(checkpoint.get("loops"), dict):  # Lightning would begin anew
        raise InputError(
            f"{where}: it does not say how far its training was; go on from another checkpoint"
        )
    if unknown := [n for n in before if n.startswith("model.") and n not in settings]:
        raise InputError(
            f"{where}: its training was begun by another version, with options that are not known "
            f"here ({some_of(unknown)}); go on with that version, or start another run"
        )
    other = [
        f"{name} {settings[name]} instead of {value}"
        for name, value in before.items()
        if name in settings and settings[name] != value
    ]
    if other:
        raise InputError(
            f"{where}: its training goes on with the settings that it began with, not with "
            f"{some_of(other)}; leave them as they are in its config.yaml, or start another run"
        )


def refuse_broken_state(trainer: Trainer) -> None:
    """Check the state of the optimisers that a checkpoint has brought.

    Raises
    ------
    InputError
        if a tensor of it does not fit its weight, or is complex, NaN or infinite.
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
                        f"{tuple(weight.shape)}; go on from another checkpoint"
                    )
                refuse_no_numbers({name: value}, where)
