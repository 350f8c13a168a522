"""The rows of a sweep and their runs."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dasmil.arguments import read_config
from dasmil.config_files import find_config
from dasmil.errors import InputError
from dasmil.experiments.sweep.bag_steps import Embedding
from dasmil.experiments.sweep.steps import (
    Fold,
    Step,
    config_arguments,
    fold_folder,
    name_of,
    sha256,
)

OWN_FOLDERS = ("tiles", "extractors", "bags")  # no folders of rows


@dataclass(frozen=True)
class SweepRow:
    """One row of the table.

    Parameters
    ----------
    label:
        name of the row in the table.
    configs:
        configs on top of the base; later ones win. Without any, the row is the base itself.
    paper:
        the paper's value per column, if it has one.
    set:
        options on top of the configs, such as ``{model.objective.temperature: 2.0}``.
    """

    label: str
    configs: tuple[str, ...] = ()
    paper: dict[str, float] = field(default_factory=dict)
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run(Step):
    """``fit`` and ``test`` with one seed, of one row and fold, in ``<row>/fold_<k>/seed_<n>``.

    Rows with the same configs have the same runs.

    Parameters
    ----------
    row: folder of the row.
    seed: of ``fit``.
    bags: folder of bags.
    truth: folder of annotations for ``test``, or None.
    truth_classes: those of the annotations that are lesions, if not the usual ones.
    overrides: options of ``fit`` and their values, on top of the configs.
    """

    row: Path
    seed: int
    bags: Path
    truth: Path | None
    truth_classes: tuple[str, ...] = ()
    overrides: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return name_of(self.row.name, self.fold, "seed", self.seed)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.folder / "test" / "test_metrics.json"

    def commands(self) -> Iterator[list[str]]:
        if not (self.folder / "val" / "val_evaluation.json").is_file():  # the end of a ``fit``
            yield self.fit()
        yield self.test()

    def fit(self) -> list[str]:
        """Arguments of ``fit``, which goes on after the last epoch if it was interrupted."""
        if (self.folder / "config.yaml").is_file():
            return ["fit", "--resume", str(self.folder), "--data.bags", str(self.bags)]
        return [
            *("fit", *config_arguments(self.configs), "--seed_everything", str(self.seed)),
            *(word for name, value in self.overrides for word in (f"--{name}", value)),
            *("--data.bags", str(self.bags), *(self.fold.arguments() if self.fold else ())),
            *("--output", str(self.folder)),
        ]

    def test(self) -> list[str]:
        best = ["--ckpt_path", str(self.checkpoints / "best.ckpt"), "--bags", str(self.bags)]
        truth = [] if self.truth is None else ["--truth", str(self.truth)]
        if self.truth_classes:
            truth += ["--truth_classes", json.dumps(self.truth_classes)]
        output = ["--output", str(self.metrics.parent)]
        return ["test", *best, *truth, *output, *self._as_fitted()]

    def _as_fitted(self) -> list[str]:
        """Options of ``fit`` that ``test`` needs too and that are not in the checkpoint."""
        config = self.folder / "config.yaml"
        if not config.is_file():
            return []
        fitted = read_config(config)
        try:
            data = fitted["data"]["init_args"]
            table = (data.get("split") or {}).get("table")
            return [
                *(("--data.split.table", table) if table else ()),
                *("--data.allow_seen_slides", str(data["allow_seen_slides"]).lower()),
                *("--trainer.accelerator", str(fitted["trainer"]["accelerator"])),
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{config}: not the config of a fit; fit this run again") from error

    def options(self) -> dict[str, str]:
        classes = ", ".join(self.truth_classes)
        chosen = {"choice of annotated classes": classes} if classes else {}
        return super().options() | dict(self.overrides) | chosen

    def contents(self) -> dict[str, tuple[Path, str]]:
        found = {}
        if not self.needs:  # else the records of those steps identify the bags
            tables = (self.bags / name for name in ("cohort.csv", "extractors.json"))
            found["bags"] = (self.bags, sha256(path for path in tables if path.is_file()))
        if self.truth is not None:
            files = sorted(path for path in self.truth.iterdir() if path.is_file())
            found["annotations"] = (self.truth, sha256(files))
        return found

    def metric(self, column: str) -> float | None:
        """A test metric, of the finest scale if the column names none.

        None if the run has no such metric (a row may lack a scale), or if it is not defined.
        """
        if not self.done or not self.metrics.is_file():
            return None
        metrics: dict[str, float | None] = json.loads(self.metrics.read_text(encoding="utf-8"))
        if "/" in column or f"test/{column}" in metrics:
            return metrics.get(f"test/{column}")
        scales = (key.split("/")[1] for key in metrics if key.count("/") == 2)
        finest_first = sorted({s for s in scales if s[:1] == "x"}, key=lambda s: -float(s[1:]))
        keys = (f"test/{scale}/{column}" for scale in finest_first)
        return next((metrics[key] for key in keys if key in metrics), None)

    def outcome(self, column: str) -> str:
        value = self.metric(column)
        return f"{column} " + ("not defined" if value is None else f"{value:.3f}")


def plan(
    rows: Sequence[SweepRow],
    base: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    bags: Mapping[Fold | None, Path | Embedding],
    truth: Path | None = None,
    truth_classes: Sequence[str] = (),
) -> list[list[Run]]:
    """Plan the runs of each row, one per fold and seed, in folders named by the row's configs.

    Parameters
    ----------
    bags: per fold, a folder or the step that writes it; the key is None without folds.

    Raises
    ------
    InputError
        if two rows, or a row and a step of the sweep, would write to the same folder.
    """
    below = [find_config(config) for config in base]
    folders: dict[Path, tuple[list[Path], dict[str, str]]] = {}
    table = []
    for row in rows:
        above = [find_config(config) for config in row.configs]
        overrides = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in row.set.items()
        }
        folder = output / _folder_name(above, row.set)
        if folders.setdefault(folder, (above, overrides)) != (above, overrides):
            raise InputError(
                f"{folder}: the row {row.label!r} and another one with other configs would both "
                "write here; give their files different names"
            )
        if folder.name in OWN_FOLDERS:
            raise InputError(
                f"{above[0]}: the row {row.label!r} would write into {folder}, which is of the "
                "sweep itself; give the file another name"
            )
        table.append(
            [
                Run(
                    fold_folder(folder, fold) / f"seed_{seed}",
                    (*below, *above),
                    fold,
                    (source,) if isinstance(source, Embedding) else (),
                    folder,
                    seed,
                    source.folder if isinstance(source, Embedding) else source,
                    truth,
                    tuple(truth_classes),
                    tuple(overrides.items()),
                )
                for fold, source in bags.items()
                for seed in seeds
            ]
        )
    return table


def _folder_name(configs: Sequence[Path], overrides: Mapping[str, Any]) -> str:
    """The name of a row's folder, such as ``mil4wsi+scales_x10_x20+distillation_0.5``."""
    names = [path.stem for path in configs]
    for name, value in overrides.items():
        values = value if isinstance(value, list) else [value]
        words = [str(v).lower() if isinstance(v, bool) else str(v) for v in values]
        names.append(re.sub(r"[^\w.+-]", "_", "_".join([name.rsplit(".", 1)[-1], *words])))
    return "+".join(names) or "base"
