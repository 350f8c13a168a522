"""The methods of a comparison: find their runs and check that they are comparable."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from dasmil.arguments import read_config
from dasmil.errors import InputError, join_few
from dasmil.metrics import Evaluation
from dasmil.reports.evaluation_files import (
    SHORT_HASH,
    evaluation_file,
    read_checkpoint,
    read_evaluation,
)

TestSet = tuple[str, ...]  # slide_ids, sorted

MARKS_OF_A_RUN = ("config.yaml", "checkpoints", "run.json")  # of fit, and of a sweep's run


@dataclass(frozen=True)
class Run:
    """One model on its test slides.

    Parameters
    ----------
    folder: of its evaluation.
    evaluation: sorted by slide_id.
    seed: of its ``fit``; None if the folder of the ``fit`` is missing or names no seed.
    model: name and hash of the checkpoint file, as tables name it; "" if unknown.
    """

    folder: Path
    seed: int | None
    evaluation: Evaluation
    model: str


@dataclass(frozen=True)
class Method:
    """Runs that differ only in their seed or their test slides (folds).

    Parameters
    ----------
    label: name in the table.
    folder: as given by the user.
    scale: whose probabilities are evaluated.
    runs: sorted by folder.
    """

    label: str
    folder: Path
    scale: str
    runs: tuple[Run, ...]

    @property
    def runs_of(self) -> dict[TestSet, list[Run]]:
        """The runs on each test set."""
        found: dict[TestSet, list[Run]] = defaultdict(list)
        for run in self.runs:
            found[run.evaluation.slide_ids].append(run)
        return dict(sorted(found.items()))


def read_methods(
    folders: Sequence[Path], labels: Sequence[str] | None = None, scale: str | None = None
) -> list[Method]:
    """Read one method per folder, with every run in it.

    Parameters
    ----------
    folders: one per method.
    labels: one per folder; None for the folders' names.
    scale: at which all are evaluated; None for the finest of each.

    Raises
    ------
    InputError
        if runs are not finished, or cannot be compared: see :func:`refuse_unequal`.
    """
    if labels is not None and len(labels) != len(folders):
        raise InputError(
            f"compare: --labels names {len(labels)} methods, but {len(folders)} folders are given"
        )
    methods = []
    for folder, label in zip(folders, labels or folder_labels(folders)):
        runs = tuple(map(_read_run, find_evaluations(folder)))
        methods.append(Method(label, folder, scale or runs[0].evaluation.scales[-1], runs))
    _refuse_same_runs(methods)
    for method in methods:
        _refuse_mixture(method)
    refuse_unequal(methods)
    return methods


def folder_labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or the whole paths if two have the same name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def find_evaluations(folder: Path) -> list[Path]:
    """Find folders of test files: ``folder``, ``folder/test``, or those of all runs below."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a folder of fit, of test, or of a sweep")
    unfinished: list[Path] = []
    found = list(_walk(folder, unfinished))
    if unfinished:
        raise InputError(
            f"{join_few(unfinished)}: not tested yet; run `python -m dasmil test --ckpt_path "
            f"{unfinished[0]}/checkpoints/best.ckpt --bags BAGS`, or the sweep again"
        )
    if not found:
        raise InputError(
            f"{folder}: contains no run; give a folder of fit, of test --output, or of a sweep"
        )
    return found


def _walk(folder: Path, unfinished: list[Path]) -> Iterator[Path]:
    for place in (folder, folder / "test"):
        if evaluation_file(place, "test").is_file():
            yield place
            return
    if any((folder / mark).exists() for mark in MARKS_OF_A_RUN):
        unfinished.append(folder)
        return
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        yield from _walk(inner, unfinished)


def _read_run(folder: Path) -> Run:
    checkpoint, sha256 = read_checkpoint(folder, "test")
    model = f"{checkpoint} {sha256[:SHORT_HASH]}".strip()
    return Run(folder, seed_of(folder), read_evaluation(folder, "test"), model)


def seed_of(evaluation: Path) -> int | None:
    """The seed of the ``fit`` whose folder contains an evaluation; None if unknown."""
    config = evaluation.parent / "config.yaml"
    if not config.is_file():
        return None
    seed = read_config(config).get("seed_everything")
    return seed if isinstance(seed, int) and not isinstance(seed, bool) else None


def _refuse_same_runs(methods: Sequence[Method]) -> None:
    """Refuse a run that belongs to two methods: it would be compared with itself."""
    for one, other in combinations(methods, 2):
        ours = {run.folder.resolve() for run in one.runs}
        same = [run.folder for run in other.runs if run.folder.resolve() in ours]
        if same:
            raise InputError(
                f"compare: {one.folder} and {other.folder} both hold the run {same[0]}; name each "
                "run once"
            )


def _refuse_mixture(method: Method) -> None:
    """Refuse runs of a method that differ in more than seed and fold."""
    first = method.runs[0]
    for run in method.runs:
        if run.evaluation.scales != first.evaluation.scales:
            raise InputError(
                f"{method.folder}: its runs have different scales ({first.folder}: "
                f"{', '.join(first.evaluation.scales)}; {run.folder}: "
                f"{', '.join(run.evaluation.scales)}), so they are several methods; name each "
                "method's own folder"
            )
        if method.scale not in run.evaluation.scales:
            raise InputError(
                f"{method.folder}: it has no scale {method.scale}, only "
                f"{', '.join(run.evaluation.scales)}; leave out --scale to judge each method at "
                "its finest one"
            )
    for runs in method.runs_of.values():
        for one, other in combinations(runs, 2):
            if one.seed is not None and one.seed == other.seed:
                raise InputError(
                    f"{method.folder}: {one.folder} and {other.folder} have the same seed and the "
                    "same test slides, so they are several methods; name each method's own folder"
                )


def refuse_unequal(methods: Sequence[Method]) -> None:
    """Refuse classes, test slides, folds, labels or patients other than the first method's."""
    first = methods[0]
    known = _slides_of(first.runs[0])
    for method in methods:
        for run in method.runs:
            classes, wanted = run.evaluation.classes, first.runs[0].evaluation.classes
            if classes != wanted:
                raise InputError(
                    f"{run.folder}: its classes are {', '.join(classes)}, and those of "
                    f"{first.runs[0].folder} {', '.join(wanted)}; only runs with the same classes "
                    "in the same order can be compared"
                )
            for slide_id, facts in _slides_of(run).items():
                for what, one, other in zip(
                    ("label", "patient"), known.setdefault(slide_id, facts), facts
                ):
                    if one != other:
                        raise InputError(
                            f"{run.folder}: slide {slide_id} has the {what} {other}, and {one} in "
                            "another run; only runs on the same cohort can be compared"
                        )
    ours = set(first.runs_of)
    for method in methods[1:]:
        theirs = set(method.runs_of)
        if theirs != ours:
            raise InputError(
                f"compare: the test slides of {method.folder} are not those of {first.folder} "
                f"({_difference(ours, theirs)}); only runs on the same test slides can be compared"
            )


def _slides_of(run: Run) -> dict[str, tuple[str, str]]:
    """Label and patient of each slide."""
    evaluation = run.evaluation
    labels = [evaluation.classes[label] for label in evaluation.labels.tolist()]
    return dict(zip(evaluation.slide_ids, zip(labels, evaluation.patients)))


def _difference(ours: set[TestSet], theirs: set[TestSet]) -> str:
    our_slides, their_slides = ({slide for s in sets for slide in s} for sets in (ours, theirs))
    lacking, beyond = sorted(our_slides - their_slides), sorted(their_slides - our_slides)
    if not lacking and not beyond:
        return f"the same slides, divided otherwise: {len(theirs)} test sets and {len(ours)}"
    return "; ".join(
        f"it {verb} {join_few(names)}"
        for verb, names in (("lacks", lacking), ("has in addition", beyond))
        if names
    )
