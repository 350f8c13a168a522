"""Split a cohort into train, val and test: by patient, stratified by label.

A split depends only on the rows, the options and the seed, so all verbs get the same one.
"""

import random
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dasmil.config_files import configs_folder
from dasmil.errors import InputError, join_few
from dasmil.slides.cohort import PARTS, SlideRow
from dasmil.tables import read_csv

SPLIT_COLUMNS = ("slide_id", "patient_id", "label", "split")


def split_cohort(
    rows: Sequence[SlideRow],
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    num_folds: int | None = None,
    fold: int | None = None,
    split_table: Path | str | None = None,
) -> dict[str, str]:
    """Assign train, val or test to every labelled slide.

    The split column, or a split table instead of it, has priority. The rest is drawn by patient and
    stratified by label: a cohort without any split is divided into all three; a cohort with test
    but no val slides gives ``val_fraction`` of its train patients to val (paper, section 4: 9:1).

    With folds, each patient is held out in exactly one. A cohort without any split is tested on the
    fold, and gives ``val_fraction`` of the other patients to val. A cohort with test slides keeps
    them and is validated on the fold.

    Parameters
    ----------
    val_fraction, test_fraction: of the patients of each label.
    seed: of every draw.
    num_folds: K of a K-fold cross-validation.
    fold: number of the fold, from 0 to K - 1.
    split_table: instead of the split column; see :func:`placed`.

    Returns
    -------
    train, val or test per slide_id.

    Raises
    ------
    InputError
        if a patient or a file is in two splits, or only some labelled slides have one.
    """
    _check_fold(num_folds, fold)
    if split_table is not None:
        rows = placed(rows, split_table)
    labelled = [row for row in rows if row.label is not None]
    given = {row.slide_id: row.split for row in labelled if row.split is not None}
    if given and len(given) < len(labelled):
        names = join_few([row.slide_id for row in labelled if row.split is None])
        raise InputError(f"split: only some slides have one; fill it for {names} too")
    if not given:
        by_patient = [replace(row, split="train") for row in labelled]
        if num_folds is not None and fold is not None:
            by_patient = _hold_out(by_patient, "test", num_folds, fold, seed)
        else:
            by_patient = _move(by_patient, "test", test_fraction, seed)
        by_patient = _move(by_patient, "val", val_fraction, seed + 1)
    elif "val" not in given.values():
        refuse_overlap(labelled)  # before all slides of a patient move together
        if num_folds is not None and fold is not None:
            by_patient = _hold_out(labelled, "val", num_folds, fold, seed)
        else:
            by_patient = _move(labelled, "val", val_fraction, seed + 1)
    elif num_folds is not None:
        raise InputError(
            "data.split.num_folds: the split column already names val slides; empty the split "
            "column of these slides, or leave num_folds out"
        )
    else:
        by_patient = labelled
    refuse_overlap(by_patient)
    return {row.slide_id: row.split for row in by_patient if row.split is not None}


def _check_fold(num_folds: int | None, fold: int | None) -> None:
    if (num_folds is None) != (fold is None):
        raise InputError("data.split.fold and data.split.num_folds: give both, or neither")
    if num_folds is not None and num_folds < 2:
        raise InputError(f"data.split.num_folds: {num_folds} is no number of folds; give 2 or more")
    if num_folds is not None and fold is not None and not 0 <= fold < num_folds:
        raise InputError(
            f"data.split.fold: there is no fold {fold} of {num_folds}; give a number from 0 to "
            f"{num_folds - 1}"
        )


def _strata(rows: Iterable[SlideRow], seed: int) -> list[list[str]]:
    """The train patients of each label in random order.

    Patients with the same two labels form a stratum of their own.
    """
    labels: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.split == "train":
            labels[row.patient].add(row.label or "")
    strata: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for patient in sorted(labels):
        strata[tuple(sorted(labels[patient]))].append(patient)
    for stratum in sorted(strata):
        random.Random(f"{seed} {stratum}").shuffle(strata[stratum])
    return [strata[stratum] for stratum in sorted(strata)]


def _move(rows: Sequence[SlideRow], part: str, fraction: float, seed: int) -> list[SlideRow]:
    """Move ``fraction`` of the train patients of each label to ``part``."""
    chosen: set[str] = set()
    for patients in _strata(rows, seed):
        if len(patients) > 1 and fraction > 0:
            wanted = max(1, round(fraction * len(patients)))
            chosen.update(patients[: min(wanted, len(patients) - 1)])  # one stays in train
    return [replace(r, split=part) if r.patient in chosen else r for r in rows]


def _hold_out(
    rows: Sequence[SlideRow], part: str, num_folds: int, fold: int, seed: int
) -> list[SlideRow]:
    """Move one fold of the train patients to ``part``.

    Patients are dealt to the folds in turn, label after label without a break: neither the folds
    nor the patients per label in them differ by more than one.
    """
    patients = [patient for stratum in _strata(rows, seed) for patient in stratum]
    if len(patients) < num_folds:
        raise InputError(
            f"data.split.num_folds: {len(patients)} patients cannot be divided into {num_folds} "
            "folds"
        )
    chosen = set(patients[fold::num_folds])
    return [replace(r, split=part) if r.patient in chosen else r for r in rows]


def refuse_overlap(rows: Sequence[SlideRow], digests: Mapping[str, str] | None = None) -> None:
    """Raise :class:`InputError` if a patient, a file or its content is in several splits.

    Parameters
    ----------
    digests: of the slides' content, as far as known.
    """
    patients = _in_several_parts((row.patient, row) for row in rows)
    if patients:
        raise InputError(
            f"split: patient {join_few(patients)} has slides in more than one split "
            f"({join_few(patients.values())}); keep all slides of a patient together"
        )
    for path, places in _in_several_parts((str(row.file), row) for row in rows).items():
        raise InputError(f"split: {places} are one file, {path}; keep it in one split")
    known = ((digest, row) for row in rows if (digest := (digests or {}).get(row.slide_id)))
    for places in _in_several_parts(known).values():
        raise InputError(f"split: {places} are the same slide under two names; keep it in one part")


def _in_several_parts(keyed: Iterable[tuple[str, SlideRow]]) -> dict[str, str]:
    """Keys with slides in several splits → one slide of each: ``s1 in train and s2 in test``."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for key, row in keyed:
        if row.split is not None:
            found[key].setdefault(row.split, f"{row.slide_id} in {row.split}")
    return {key: " and ".join(found[key].values()) for key in sorted(found) if len(found[key]) > 1}


def placed(rows: Sequence[SlideRow], table: Path | str) -> list[SlideRow]:
    """The slides that a split table names, each with its split there.

    Slides that it does not name are left out of the study: an official list omits duplicates, which
    must be neither trained nor tested on. A warning names them, and the slides of the table that
    are not in the cohort.

    Parameters
    ----------
    table: CSV with slide_id and split, such as a run's ``split.csv`` or an official list of
        ``configs/splits``; see :func:`read_split_table`.

    Raises
    ------
    InputError
        if it names no slide of the cohort, or a slide has another label there.
    """
    entries = read_split_table(table)
    named = [row for row in rows if row.slide_id in entries]
    if not named:
        raise InputError(f"{table}: names no slide of the cohort; give the table of this cohort")
    _refuse_other_labels(named, entries, table)
    left_out = [row.slide_id for row in rows if row.slide_id not in entries]
    if left_out:
        warnings.warn(
            f"{table}: does not name {len(left_out)} slide(s) of the cohort, which are left out: "
            f"{join_few(left_out)}",
            stacklevel=3,
        )
    absent = sorted(set(entries) - {row.slide_id for row in named})
    if absent:
        warnings.warn(
            f"{table}: {len(absent)} of its {len(entries)} slides are not in the cohort: "
            f"{join_few(absent)}",
            stacklevel=3,
        )
    return [replace(row, split=entries[row.slide_id][0]) for row in named]


def read_split_table(path: Path | str) -> dict[str, tuple[str, str | None]]:
    """Split and label (None if the table has none) of each slide.

    Two kinds are read: tables with the columns slide_id, split and optionally label, as runs write
    them, and mil4wsi's lists with image, label and phase, whose images are named by slide and class
    (``normal_085_normal``).

    Parameters
    ----------
    path: of the table; if there is no such file, its path below dasmil's own configs.
    """
    found = next((p for p in (Path(path), configs_folder() / path) if p.is_file()), None)
    if found is None:
        raise InputError(f"data.split.table: {path}: no such file, nor among dasmil's configs")
    columns, records = read_csv(found)
    if {"slide_id", "split"} <= set(columns):
        entries = [(r.line, r["slide_id"], r["split"], r.get("label") or None) for r in records]
    elif {"image", "phase"} <= set(columns):
        names = [r["image"].rsplit("_", 1) for r in records]
        entries = [(r.line, name[0], r["phase"], name[-1]) for name, r in zip(names, records)]
    else:
        raise InputError(f"{found}: lacks the columns slide_id and split; add them")
    table: dict[str, tuple[str, str | None]] = {}
    for line, slide_id, part, label in entries:
        if part not in PARTS:
            raise InputError(f"{found} line {line}: split {part!r} is none of {', '.join(PARTS)}")
        if slide_id in table:
            raise InputError(f"{found} line {line}: slide {slide_id} occurs twice; keep one row")
        table[slide_id] = part, label
    return table


def _refuse_other_labels(
    rows: Sequence[SlideRow], table: Mapping[str, tuple[str, str | None]], path: Path | str
) -> None:
    """If table and cohort use the same class names, they must agree on each slide."""
    labelled = [row for row in rows if row.label is not None]
    if not {row.label for row in labelled} <= {label for _, label in table.values()}:
        return
    for row in labelled:
        label = table[row.slide_id][1]
        if label is not None and label != row.label:
            raise InputError(
                f"{path}: slide {row.slide_id} is {label} there and {row.label} in the cohort; "
                "correct the cohort table"
            )
