"""The steps that produce a sweep's bags: tiles once, then per fold its extractors and bags.

An extractor is trained only on the training slides of its fold, so no step has seen a held-out
slide before it is tested.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dasmil.config_files import find_config
from dasmil.experiments.sweep.steps import (
    Fold,
    Step,
    config_arguments,
    fold_folder,
    name_of,
    sha256,
)
from dasmil.files import must_be_file
from dasmil.tables import read_csv
from dasmil.units import parse_scales


@dataclass(frozen=True)
class Tiling(Step):
    """``tile``: the whole cohort, into ``<output>/tiles``.

    Parameters
    ----------
    cohort: the table of slides.
    scales: coarse to fine.
    """

    cohort: Path
    scales: tuple[str, ...]

    @property
    def name(self) -> str:
        return "tiles"

    def commands(self) -> Iterator[list[str]]:
        scales = ["--scales", f"[{','.join(self.scales)}]"]
        given = ["--cohort", str(self.cohort), "--output", str(self.folder), *scales]
        yield ["tile", *config_arguments(self.configs), *given]

    def options(self) -> dict[str, str]:
        return {"set of scales": ",".join(self.scales)}

    def contents(self) -> dict[str, tuple[Path, str]]:
        return {"cohort table": (self.cohort, sha256((self.cohort,)))}

    def outcome(self, column: str) -> str:
        return slides_by_state(self.folder / "status.csv")


@dataclass(frozen=True)
class Pretraining(Step):
    """``fit`` with DINO: the extractor of one scale, into ``<output>/extractors/fold_<k>/<scale>``.

    Parameters
    ----------
    tiles: folder of tiles.
    scale: which of its scales.
    """

    tiles: Path
    scale: str

    @property
    def name(self) -> str:
        return name_of("extractor", self.scale, self.fold)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    def commands(self) -> Iterator[list[str]]:
        if (self.folder / "config.yaml").is_file():
            yield ["fit", "--resume", str(self.folder), "--data.tiles", str(self.tiles)]
            return
        yield [
            *("fit", *config_arguments(self.configs), "--data.tiles", str(self.tiles)),
            *("--data.scale", self.scale, *(self.fold.arguments() if self.fold else ())),
            *("--output", str(self.folder)),
        ]

    def outcome(self, column: str) -> str:
        path = self.folder / "history.csv"
        losses = [row.get("train/loss") for row in read_csv(path)[1]] if path.is_file() else []
        known = [float(loss) for loss in losses if loss]
        return f"train/loss {known[-1]:.3f}" if known else "trained"


@dataclass(frozen=True)
class Embedding(Step):
    """``embed``: the bags of a fold, into ``<output>/bags/fold_<k>``.

    Parameters
    ----------
    tiles: folder of tiles.
    extractors: per scale (name, checkpoint).
    """

    tiles: Path
    extractors: tuple[tuple[str, Path], ...]

    @property
    def name(self) -> str:
        return name_of("bags", self.fold)

    def commands(self) -> Iterator[list[str]]:
        sources = [text for s, path in self.extractors for text in (f"--extractors.{s}", str(path))]
        given = ["--tiles", str(self.tiles), "--output", str(self.folder), *sources]
        yield ["embed", *config_arguments(self.configs), *given]

    def outcome(self, column: str) -> str:
        return slides_by_state(self.folder / "status.csv")


def plan_bags(
    output: Path,
    cohort: Path,
    scales: Sequence[str],
    folds: Sequence[Fold | None],
    *,
    tile: Sequence[str],
    extractor: Sequence[str],
    embed: Sequence[str],
) -> dict[Fold | None, Embedding]:
    """The last step of each fold, whose bags it writes; it names the steps that it needs.

    Raises
    ------
    InputError
        if the cohort table or a config is missing.
    """
    must_be_file(cohort, "give --cohort a CSV with slide_id, path, label")
    names = tuple(scale.name for scale in parse_scales(scales))
    of_tile, of_extractor, of_embed = (
        tuple(find_config(config) for config in configs) for configs in (tile, extractor, embed)
    )
    tiling = Tiling(output / "tiles", of_tile, None, (), cohort, names)
    embeddings: dict[Fold | None, Embedding] = {}
    for fold in folds:
        parent = fold_folder(output / "extractors", fold)
        trainings = tuple(
            Pretraining(parent / scale, of_extractor, fold, (tiling,), tiling.folder, scale)
            for scale in names
        )
        embeddings[fold] = Embedding(
            fold_folder(output / "bags", fold),
            of_embed,
            fold,
            (tiling, *trainings),
            tiling.folder,
            tuple((training.scale, training.checkpoint) for training in trainings),
        )
    return embeddings


def slides_by_state(status: Path) -> str:
    """The slides of a ``status.csv``, for example ``48 done, 2 empty``."""
    _, rows = read_csv(status)
    states = Counter(row["state"] for row in rows)
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
