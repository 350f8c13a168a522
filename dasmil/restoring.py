"""How a Trainer reads checkpoints: no pickle runs, and a refusal is one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from dasmil.embedding.restricted import load_checkpoint
from dasmil.errors import InputError


class RestrictedIO(TorchCheckpointIO):
    """Reads checkpoints with :func:`dasmil.embedding.restricted.load_checkpoint`."""

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
