"""What a sweep is made of: rows, and the runs that they ask for."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dasmil import __version__
from dasmil.errors import InputError
from dasmil.files import configs_folder

QUIET = ("--trainer.enable_progress_bar", "false")
RESUME = "resume"  # the checkpoint of the last epoch


@dataclass(frozen=True)
class SweepRow:
    """One row of the table.

    Parameters
    ----------
    label:
        as it stands in the table.
    configs:
        on top of the base configs, later ones win; none is the base itself.
    paper:
        the paper's figure for each column where it has one.
    """

    label: str
    configs: tuple[str, ...] = ()
    paper: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One seed of one row; rows with the same configs have the same runs.

    Parameters
    ----------
    folder: for everything that the run writes; absolute, as all paths here.
    seed: of ``fit``.
    configs: later ones win.
    bags: folder of bags.
    """

    folder: Path
    seed: int
    configs: tuple[Path, ...]
    bags: Path

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name} seed {self.seed}"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        """Written by ``test``, whole: where it is, the run is done."""
        return self.folder / "test" / "test_metrics.json"

    @property
    def done(self) -> bool:
        return self.metrics.is_file()

    def fit(self) -> list[str]:
        logger, keeper = "--trainer.logger.init_args.", "--trainer.callbacks"
        return [
            *("fit", *(text for config in self.configs for text in ("--config", str(config)))),
            *("--seed_everything", str(self.seed), "--data.bags", str(self.bags)),
            *(f"{logger}save_dir", str(self.folder.parent)),
            *(f"{logger}name", self.folder.name, f"{logger}version", "", *QUIET),
            # of every epoch: Lightning 2.6 writes last.ckpt at improvements only
            f"{keeper}+=lightning.pytorch.callbacks.ModelCheckpoint",
            *(f"{keeper}.filename={RESUME}", f"{keeper}.enable_version_counter=false"),
            f"{keeper}.mode=max",  # without a monitor it only tells it from the config's own
        ]

    def resume(self) -> list[str]:
        """Lets ``fit`` go on after its last epoch; dropout is drawn anew from there.

        Not in a folder that was moved: by another path Lightning does not know ``best.ckpt`` again
        and would overwrite it with a worse epoch. There ``fit`` starts anew.
        """
        last = self.checkpoints / f"{RESUME}.ckpt"
        here = self.recorded().get("folder") == str(self.folder)
        return ["--ckpt_path", str(last)] if last.is_file() and here else []

    def test(self) -> list[str]:
        best = ["--ckpt_path", str(self.checkpoints / "best.ckpt"), "--bags", str(self.bags)]
        return ["test", *best, "--output", str(self.metrics.parent), *QUIET, *self._as_fitted()]

    def _as_fitted(self) -> list[str]:
        """What ``test`` must do as ``fit`` did, and a checkpoint does not say."""
        config = self.folder / "config.yaml"
        if not config.is_file():
            return []
        fitted = yaml.safe_load(config.read_text(encoding="utf-8"))
        allowed = fitted["data"]["init_args"]["allow_seen_slides"]
        return [
            *("--data.allow_seen_slides", str(allowed).lower()),
            *("--trainer.accelerator", str(fitted["trainer"]["accelerator"])),
        ]

    def figure(self, column: str) -> float | None:
        """A test figure; None where there is none, or where it is not defined."""
        if not self.done:
            return None
        value: float | None = json.loads(self.metrics.read_text()).get(f"test/{column}")
        return value

    def recorded(self) -> dict[str, Any]:
        path = self.folder / "run.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def record(self) -> dict[str, Any]:
        """What the run is made of, by place and by content; ``run.json``."""
        tables = [self.bags / name for name in ("cohort.csv", "extractors.json")]
        return {
            "dasmil": __version__,
            "fit": self.fit(),
            "seed": self.seed,
            "folder": str(self.folder),
            "configs": [[str(path), _sha256(path)] for path in self.configs],
            "bags": str(self.bags),
            "bags_sha256": {path.name: _sha256(path) for path in tables if path.is_file()},
        }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def plan(
    rows: Sequence[SweepRow], base: Sequence[str], seeds: Sequence[int], output: Path, bags: Path
) -> list[list[Run]]:
    """The runs of each row, one a seed, in folders that are named by the row's configs."""
    if not (bags / "cohort.csv").is_file():
        raise InputError(f"{bags}: it has no cohort.csv; give --bags the folder that embed wrote")
    below = [find_config(config) for config in base]
    folders: dict[Path, list[Path]] = {}
    table = []
    for row in rows:
        above = [find_config(config) for config in row.configs]
        folder = output / ("+".join(path.stem for path in above) or "base")
        if folders.setdefault(folder, above) != above:
            raise InputError(
                f"{folder}: the row {row.label!r} and another one with other configs would both "
                "write here; give their files different names"
            )
        configs = (*below, *above)
        table.append([Run(folder / f"seed_{seed}", seed, configs, bags) for seed in seeds])
    return table


def find_config(name: str) -> Path:
    """A config where it is given, else in dasmil's own folder ``configs/``."""
    for path in (Path(name), configs_folder() / name.removeprefix("configs/")):
        if path.is_file():
            return path.resolve()
    raise InputError(f"{name}: no such config, neither here nor in {configs_folder()}")


def refuse_other_runs(runs: Sequence[Run]) -> None:
    """A folder that holds another run than is asked for now is left alone."""
    for run in runs:
        before = run.recorded()
        if before:
            other = differences(before, run.record())
        else:
            other = "something that is not of a sweep" if run.checkpoints.exists() else ""
        if other:
            raise InputError(
                f"{run.folder}: made with {other}; choose another --output, or delete that folder "
                "to start over"
            )


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What two records differ in; the same content in another place is no difference."""
    different = []
    old, new = ([(Path(path).name, digest) for path, digest in r["configs"]] for r in (before, now))
    if old != new:
        names = sorted({name for name, _ in set(old) ^ set(new)}) or ["another order"]
        different.append(f"other configs ({', '.join(names)})")
    if before["bags_sha256"] != now["bags_sha256"]:
        different.append(f"other bags (those of {before['bags']} as they were then)")
    if before["dasmil"] != now["dasmil"]:
        different.append(f"dasmil {before['dasmil']}")
    return " and ".join(different)
