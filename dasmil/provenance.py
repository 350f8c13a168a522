"""Provenance of a run: every start is recorded in ``provenance.json`` of its folder."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from dasmil.errors import explaining
from dasmil.files import write_text

FILE = "provenance.json"
PACKAGES = (
    *("dasmil", "torch", "torchvision", "lightning", "torch-geometric", "torchmetrics", "lightly"),
    *("timm", "jsonargparse", "openslide-python", "numpy", "safetensors"),
)


def record_start(folder: Path, seed: int | None, command: Sequence[str], world_size: int) -> None:
    """Append a start to the folder's list; a resumed run has several.

    Parameters
    ----------
    folder: of the run.
    seed: of ``seed_everything``.
    command: verb and arguments as the user typed them.
    world_size: number of processes.

    Raises
    ------
    InputError
        if the file that is there is not such a list.
    """
    path = folder / FILE
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m dasmil " + shlex.join(command),
        "seed": seed,
        "processes": world_size,
        "git_revision": git_revision(),
        "versions": versions(),
        "devices": _devices(),
    }
    write_text(path, json.dumps([*_read_starts(path), start], indent=2) + "\n")


def _read_starts(path: Path) -> list[Any]:
    """The starts so far; an empty list if there is no file yet."""
    if not path.is_file():
        return []
    with explaining(f"{path}: not the list of a run's starts", "move it away", ValueError):
        starts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(starts, list):
            raise ValueError("it holds another value")
    return starts


def git_revision() -> str | None:
    """Git revision of dasmil's source, with ``-dirty`` if tracked files differ.

    An installed package has one if it was installed from a git address; otherwise it is None.
    """
    package = Path(__file__).parent
    tracked = _git(package, "ls-files", "--error-unmatch", Path(__file__).name)
    revision = _git(package, "rev-parse", "HEAD") if tracked else None
    if revision is not None:
        changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", ".")
        return revision + ("-dirty" if changed else "")
    try:
        text = distribution("dasmil").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    commit: str | None = json.loads(text or "{}").get("vcs_info", {}).get("commit_id")
    return commit


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of git in a folder; None if there is no git or no repository.

    Ignores ``GIT_*`` variables set by hooks, and takes no index lock, because many runs may start
    at once.
    """
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    except OSError:  # not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that compute; None for one that is not installed."""
    numbers: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            numbers[name] = None
    return numbers


def _devices() -> dict[str, Any]:
    """Processor and GPUs; GPUs only if torch has been imported already."""
    torch = sys.modules.get("torch")
    gpus = [] if torch is None else range(torch.cuda.device_count())
    return {
        "machine": platform.machine(),
        "cuda": None if torch is None else torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(number) for number in gpus] if torch else [],
    }
