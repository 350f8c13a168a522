"""The split of a cohort into train, val and test, as both DataModules draw or look it up.

D numbers: ``.github/docs/paper.md``.
"""

import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dasmil.errors import InputError, join_few
from dasmil.slides.cohort import SlideRow
from dasmil.slides.splits import placed, refuse_overlap, split_cohort
from dasmil.slides.study import LEFT_OUT, Place, Study, place_slides

EVALUATIONS = {"validate": "validated", "test": "tested"}  # stages, and what is done with slides
HELD_OUT = ("val", "test")
DRAWING = ("val_fraction", "test_fraction", "seed", "num_folds", "fold")  # options that draw


@dataclass(frozen=True)
class SplitOptions:
    """How slides are split if the ``split`` column of the cohort table leaves it open.

    A DataModule of bags and one of tiles with the same options hold out the same slides.

    Parameters
    ----------
    val_fraction:
        share of the patients drawn for validation if the table has no val slides; null: 0.1.
    test_fraction:
        share of the patients drawn for the test if the table has no split at all; null: 0.2.
    seed:
        seed of these draws; null: 0.
    num_folds:
        K of a K-fold cross-validation, drawn by patient and stratified by label.
    fold:
        number of the fold that is held out, 0 to K - 1: it is the test split, or the validation
        split if the table has test slides already.
    table:
        CSV with the split of each slide, instead of the cohort table's column: the split.csv of a
        run, or an official list such as splits/camelyon16.csv.
    val_part:
        the split on which the best checkpoint is chosen and that ``validate`` reads. ``test`` is
        what the released code does; its test metrics are then too good.
    """

    val_fraction: float | None = None
    test_fraction: float | None = None
    seed: int | None = None
    num_folds: int | None = None
    fold: int | None = None
    table: str | None = None
    val_part: Literal["val", "test"] = "val"

    def given_draws(self) -> dict[str, Any]:
        """The options that draw slides, without those that are null."""
        values = {name: getattr(self, name) for name in DRAWING}
        return {name: value for name, value in values.items() if value is not None}

    def read_table(self, cohort: Sequence[SlideRow]) -> list[SlideRow]:
        """The slides that ``table`` names with their split there; all slides without a table."""
        return list(cohort) if self.table is None else placed(cohort, self.table)

    def draw(self, rows: Sequence[SlideRow]) -> dict[str, str]:
        """The split of each labelled slide.

        Parameters
        ----------
        rows: as :meth:`read_table` returns them.
        """
        return split_cohort(rows, **self.given_draws())


def draw_places(
    options: SplitOptions, cohort: Sequence[SlideRow], digests: Mapping[str, str]
) -> dict[str, Place]:
    """The place of each labelled slide in a study that begins.

    Raises
    ------
    InputError
        if a patient, a file or a content (``digests``, per slide_id) is in two splits.
    """
    splits = options.draw(options.read_table(cohort))
    labelled = [row for row in cohort if row.label is not None]
    refuse_overlap([replace(row, split=splits.get(row.slide_id)) for row in labelled], digests)
    return _places(labelled, splits)


def places_for_model(
    options: SplitOptions,
    cohort: Sequence[SlideRow],
    study: Study | None,
    evaluated: str,
    folder: Path,
) -> dict[str, Place]:
    """The place of each labelled slide in the evaluation of a model.

    Parameters
    ----------
    study: the slides that the model has met; None if that is not known.
    evaluated: the split that is evaluated.
    folder: of the bags, for messages.

    Raises
    ------
    InputError
        if a slide may not be evaluated with this model, or nothing says which slides may be.
    """
    rows = options.read_table(cohort)
    marked = {row.slide_id: row.split for row in rows if row.split is not None}
    labelled = [row for row in cohort if row.label is not None]
    if study is None:
        _refuse_unknown_study(options, evaluated, marked.values(), folder)
        return _places(labelled, marked)
    given = ["data.split.table"] * (options.table is not None)
    given += [f"data.split.{name}" for name in options.given_draws()]
    asked = marked if given else None
    if options.given_draws():
        asked = options.draw(rows)
    source = ", ".join(given) or str(folder / "cohort.csv")
    return place_slides(labelled, study, evaluated, marked, asked, source)


def _places(rows: Sequence[SlideRow], splits: Mapping[str, str]) -> dict[str, Place]:
    return {row.slide_id: Place(splits.get(row.slide_id, LEFT_OUT)) for row in rows}


def _refuse_unknown_study(
    options: SplitOptions, evaluated: str, marked: Collection[str], folder: Path
) -> None:
    """Only a table can say what may be evaluated if the checkpoint does not know its slides.

    Warns that this is so, or refuses if there is no such table.
    """
    table = options.table or "the column split of its cohort.csv"
    unknown = f"{folder}: the checkpoint does not know which slides it was trained on"
    if options.num_folds is None and options.fold is None and evaluated in marked:
        warnings.warn(
            f"{unknown}; only {table} says that the {evaluated} slides are not among them",
            stacklevel=2,
        )
        return
    raise InputError(
        f"{unknown}, so {table} must name the {evaluated} slides, and data.split.num_folds and "
        "data.split.fold cannot be given; fill the column, or give --data.split.table"
    )


def print_evaluated(
    verb: str,
    places: Mapping[str, Place],
    evaluated: str,
    cohort: Sequence[SlideRow],
    slide_ids: Collection[str],
) -> None:
    """Print how many slides are evaluated, how many are left out, and why.

    Parameters
    ----------
    verb: validate or test.
    slide_ids: the slides with a bag.
    """
    left_out: dict[str, list[str]] = defaultdict(list)
    count = 0
    for row in cohort:
        place = places.get(row.slide_id)
        if place is None:
            left_out["without a label"].append(row.slide_id)
        elif place.split != evaluated:
            left_out[place.why].append(place.name or row.slide_id)
        elif row.slide_id not in slide_ids:
            left_out["without a bag file"].append(row.slide_id)
        else:
            count += 1
    why = ", ".join(f"{len(ids)} {why} ({join_few(ids)})" for why, ids in left_out.items())
    print(
        f"{verb}: {count} slides are {EVALUATIONS[verb]}, "
        f"{sum(map(len, left_out.values()))} are left out" + (f": {why}" if why else "")
    )


def warn_test_is_validation(folder: Path, splits: Collection[str]) -> None:
    """Warn that the checkpoint is chosen on the test slides (D17)."""
    unused = sum(split == "val" for split in splits)
    warnings.warn(
        f"{folder}: the validation slides are the test slides (data.split.val_part: test), so "
        "metrics on them are no test metrics"
        + (f"; {unused} slide(s) of the split 'val' are not used" if unused else ""),
        stacklevel=1,  # the caller is Lightning: each process would warn
    )
