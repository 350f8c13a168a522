"""A step of a sweep: its processes, its folder, and the record that identifies it."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dasmil import __version__
from dasmil.errors import InputError
from dasmil.files import file_sha256

LOCK = "run.lock"


@dataclass(frozen=True)
class Fold:
    """One fold of a cross-validation; its slides are held out."""

    number: int
    num_folds: int

    def __str__(self) -> str:
        return f"fold {self.number}"

    def arguments(self) -> list[str]:
        return [
            "--data.split.num_folds",
            str(self.num_folds),
            "--data.split.fold",
            str(self.number),
        ]


def fold_folder(parent: Path, fold: Fold | None) -> Path:
    return parent if fold is None else parent / f"fold_{fold.number}"


def name_of(*parts: object) -> str:
    return " ".join(str(part) for part in parts if part is not None)


@dataclass(frozen=True)
class Step(ABC):
    """One or more processes, run in sequence, that write to one folder.

    Parameters
    ----------
    folder: for everything that the step writes; absolute, as all paths here.
    configs: later ones win.
    fold: that is held out; None if there are no folds, or the step does not depend on them.
    needs: the steps that must be done before.
    """

    folder: Path
    configs: tuple[Path, ...]
    fold: Fold | None
    needs: tuple["Step", ...]

    @property
    @abstractmethod
    def name(self) -> str:
        """Printed name, unique within a sweep."""

    @abstractmethod
    def commands(self) -> Iterator[list[str]]:
        """Arguments of dasmil per process; each is requested when its turn comes."""

    @abstractmethod
    def outcome(self, column: str) -> str:
        """Result of the finished step in a few words; for a run, its metric in this column."""

    def options(self) -> dict[str, str]:
        """Settings that identify the step beyond its configs and folder."""
        return {} if self.fold is None else {"number of folds": str(self.fold.num_folds)}

    def contents(self) -> dict[str, tuple[Path, str]]:
        """Input files that no step writes: path and SHA-256."""
        return {}

    @property
    def mark(self) -> Path:
        """Written when all its processes have succeeded."""
        return self.folder / "done.txt"

    @property
    def done(self) -> bool:
        return self.mark.is_file()

    @property
    def begun(self) -> bool:
        """Whether there is anything in the folder but the lock."""
        return self.folder.is_dir() and any(p.name != LOCK for p in self.folder.iterdir())

    def recorded(self) -> dict[str, Any]:
        path = self.folder / "run.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def record(self) -> dict[str, Any]:
        """Everything that identifies the step, back to the slides; written to ``run.json``."""
        return {
            "dasmil": __version__,
            "folder": str(self.folder),
            "configs": [[str(path), sha256((path,))] for path in self.configs],
            "options": self.options(),
            "contents": {what: [str(p), digest] for what, (p, digest) in self.contents().items()},
            "needs": {step.name: step.record() for step in self.needs},
        }


def config_arguments(configs: Iterable[Path]) -> list[str]:
    return [text for config in configs for text in ("--config", str(config))]


def sha256(paths: Iterable[Path]) -> str:
    """SHA-256 of the names and contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.name} {_content(path, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@cache
def _content(path: Path, size: int, mtime_ns: int) -> str:
    """Cached hash: all runs need that of the same annotations."""
    return file_sha256(path)


def in_order(steps: Iterable[Step]) -> list[Step]:
    """These steps and all that they need, each once and after the steps that it needs."""
    ordered: dict[Step, None] = {}
    for step in steps:
        ordered |= dict.fromkeys((*in_order(step.needs), step))
    return list(ordered)


def refuse_other_steps(steps: Sequence[Step]) -> None:
    """Refuse folders that hold a step with other settings."""
    for step in steps:
        before = step.recorded()
        if before:
            other = describe_differences(before, step.record())
        else:
            other = "something else" if step.begun else ""
        if other:
            raise InputError(
                f"{step.folder}: made with {other}; choose another --output, or delete that folder "
                "to start over"
            )


def describe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe how two records differ; the same content at another path is no difference."""
    if before.keys() != now.keys():
        return "a version of dasmil with other records"
    different = list(_differences(before, now))
    if before["dasmil"] != now["dasmil"]:
        different.append(f"dasmil {before['dasmil']}")
    return " and ".join(different)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    old, new = ([(Path(path).name, digest) for path, digest in r["configs"]] for r in (before, now))
    if old != new:
        names = sorted({name for name, _ in set(old) ^ set(new)}) or ["another order"]
        yield f"other configs ({', '.join(names)})"
    for what in before["options"] | now["options"]:
        value = before["options"].get(what)
        if value != now["options"].get(what):
            yield f"another {what} ({value or 'none'})"
    for what in before["contents"] | now["contents"]:
        path, digest = before["contents"].get(what, ("none", ""))
        if digest != now["contents"].get(what, ("none", ""))[1]:
            yield f"other {what} ({path}" + (" as it was then)" if digest else ")")
    for name in before["needs"] | now["needs"]:
        if name not in before["needs"] or name not in now["needs"]:
            yield f"{'no' if name in now['needs'] else 'a'} step '{name}' before it"
        else:
            inner = " and ".join(_differences(before["needs"][name], now["needs"][name]))
            if inner:
                yield f"'{name}' made with {inner}"
