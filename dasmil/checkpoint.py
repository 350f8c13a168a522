"""A trained model from its checkpoint alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from dasmil.embedding.restricted import load_checkpoint
from dasmil.errors import InputError
from dasmil.modules.card import read_card
from dasmil.modules.mil import DASMILModule


def load(checkpoint: str | Path) -> DASMILModule:
    """The DAS-MIL model of a checkpoint, in eval mode on the CPU.

    It knows its ``scales``, ``classes``, ``tile_px`` and, under ``hparams["bag_format"]``, the
    extractors whose features it reads.

    Raises
    ------
    InputError
        when the file is missing, holds no DAS-MIL model, or would have to be unpickled.
    """
    state, hparams = read_checkpoint(Path(checkpoint))
    model = DASMILModule(**hparams)
    model.load_state_dict(state)
    return model.eval()


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and hyperparameters of a DAS-MIL checkpoint, checked against each other."""
    content = load_checkpoint(path)
    hparams = read_card(content, path, DASMILModule)
    return content["state_dict"], hparams


class RestrictedIO(TorchCheckpointIO):
    """Let a Trainer read checkpoints as we do: no pickle runs, and a refusal is one sentence."""

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Content of a checkpoint, on the CPU."""
        return load_checkpoint(Path(path))


@contextmanager
def said_of_restoring(checkpoint: object, trains: bool) -> Iterator[None]:
    """Say in one sentence what Lightning cannot restore: it takes for granted what a file holds."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of any kind, for the content may be anything
        frames = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
        if not any(
            Path(code.co_filename).stem == "checkpoint_connector"
            and code.co_name.lstrip("_").startswith(("resume", "restore"))
            for code in frames
        ):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        said = f"it cannot be loaded ({reason}); give a checkpoint as fit wrote it"
        if trains:
            said = (
                f"its training cannot be taken up ({reason}); go on from another checkpoint, or "
                "start another run"
            )
        raise InputError(f"{checkpoint}: {said}") from error
