"""The table of slides: where each lies, its label, its patient and the part it plays."""

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from dasmil.errors import InputError
from dasmil.files import read_csv, write_csv

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = get_args(Part)

COLUMNS = ("slide_id", "path", "label", "patient_id", "split", "mpp", "magnification")
SLIDE_SUFFIXES = frozenset(
    [
        ".svs",
        ".tif",
        ".tiff",
        ".ndpi",
        ".vms",
        ".vmu",
        ".scn",
        ".mrxs",
        ".svslide",
        ".bif",
        ".dcm",
        ".png",
        ".jpg",
        ".jpeg",
    ]
)


@dataclass(frozen=True)
class SlideRow:
    """One row of the cohort table; empty cells are None."""

    slide_id: str
    path: Path
    label: str | None = None
    patient_id: str | None = None
    split: str | None = None
    mpp: float | None = None
    magnification: float | None = None

    @property
    def patient(self) -> str:
        """The patient; a slide without one is its own patient."""
        return self.patient_id or self.slide_id


def read_cohort(source: Path, leave_out: Path | None = None) -> list[SlideRow]:
    """Rows of a cohort table (CSV), or one row for every slide found below a folder.

    Pictures below ``leave_out``, our own output, are no slides.
    """
    if source.is_dir():
        rows = _scan_folder(source, leave_out)
    elif source.is_file():
        rows = _read_table(source)
    else:
        raise InputError(f"{source}: neither a cohort table nor a folder of slides")
    if not rows:
        raise InputError(f"{source}: no slides in it")
    seen: dict[str, Path] = {}
    for row in rows:
        if row.slide_id in seen:
            raise InputError(
                f"{source}: slide_id {row.slide_id!r} stands twice ({seen[row.slide_id]} and "
                f"{row.path}); give each slide a slide_id of its own in a cohort table"
            )
        seen[row.slide_id] = row.path
    return rows


def write_cohort(path: Path, rows: Iterable[SlideRow]) -> None:
    """Write the table with absolute slide paths, so that it can be read from anywhere."""
    records = ({**vars(row), "path": row.path.absolute()} for row in rows)
    write_csv(path, COLUMNS, records)


def _scan_folder(folder: Path, leave_out: Path | None) -> list[SlideRow]:
    """Slides below a folder, named by their stem; a folder of DICOM files is one slide."""
    rows = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SLIDE_SUFFIXES or not path.is_file():
            continue
        if leave_out is not None and leave_out.resolve() in path.resolve().parents:
            continue
        if path.name.startswith("."):  # a file half written, or what macOS leaves on foreign disks
            continue
        if path.suffix.lower() == ".dcm":
            rows[path.parent] = SlideRow(path.parent.name, path.parent)
        else:
            rows[path] = SlideRow(path.stem, path)
    return list(rows.values())


def _read_table(path: Path) -> list[SlideRow]:
    columns, records = read_csv(path)
    missing = {"slide_id", "path"} - set(columns)
    if missing:
        raise InputError(
            f"{path}: column {' and '.join(sorted(missing))} is missing; "
            f"a cohort table has the columns {', '.join(COLUMNS)} (the first two are required)"
        )
    rows = []
    for line, record in enumerate(records, start=2):
        where = f"{path} line {line}"
        if not record["slide_id"] or not record["path"]:
            raise InputError(f"{where}: slide_id or path is empty")
        if "/" in record["slide_id"] or record["slide_id"].startswith("."):
            raise InputError(f"{where}: slide_id {record['slide_id']!r} cannot be a file name")
        split = record.get("split") or None
        if split not in (None, *PARTS):
            raise InputError(f"{where}: split {split!r} is none of {', '.join(PARTS)}")
        rows.append(
            SlideRow(
                slide_id=record["slide_id"],
                path=path.parent / record["path"],
                label=record.get("label") or None,
                patient_id=record.get("patient_id") or None,
                split=split,
                mpp=_number(record, "mpp", where),
                magnification=_number(record, "magnification", where),
            )
        )
    return rows


def _number(record: Mapping[str, str], column: str, where: str) -> float | None:
    text = record.get(column)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{where}: {column} {text!r} is not a number") from None
    if not 0 < value < float("inf"):
        raise InputError(f"{where}: {column} {text!r} is not a positive number")
    return value


def split_cohort(
    rows: Sequence[SlideRow],
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> dict[str, str]:
    """Part (train, val or test) of every labelled slide.

    A split column is obeyed. What it leaves open is drawn by patient and stratified by label: a
    cohort without any part is divided into all three; a cohort with test but no val slides gives
    ``val_fraction`` of its train patients to validation (paper, section 4: 9:1).
    Only the rows and the seed decide, so every verb that calls this sees the same parts.

    Raises
    ------
    InputError
        when a patient has slides in two parts, or only some labelled slides have a part.
    """
    labelled = [row for row in rows if row.label is not None]
    given = {row.slide_id: row.split for row in labelled if row.split is not None}
    if given and len(given) < len(labelled):
        names = ", ".join(sorted(row.slide_id for row in labelled if row.split is None)[:5])
        raise InputError(f"split: it is filled for some slides only; fill it for {names} too")
    if not given:
        by_patient = [replace(row, split="train") for row in labelled]
        by_patient = _move(by_patient, "test", test_fraction, seed)
        by_patient = _move(by_patient, "val", val_fraction, seed + 1)
    elif "val" not in given.values():
        _refuse_shared_patients(labelled)  # before a patient is moved with all his slides
        by_patient = _move(labelled, "val", val_fraction, seed + 1)
    else:
        by_patient = labelled
    _refuse_shared_patients(by_patient)
    return {row.slide_id: row.split for row in by_patient if row.split is not None}


def _move(rows: Sequence[SlideRow], part: str, fraction: float, seed: int) -> list[SlideRow]:
    """Move ``fraction`` of the train patients of each label to ``part``."""
    labels: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.split == "train":
            labels[row.patient].add(row.label or "")
    strata: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for patient in sorted(labels):  # a patient with two labels is a stratum of its own kind
        strata[tuple(sorted(labels[patient]))].append(patient)
    chosen: set[str] = set()
    for stratum in sorted(strata):
        patients = strata[stratum]
        random.Random(f"{seed} {stratum}").shuffle(patients)
        if len(patients) > 1 and fraction > 0:
            wanted = max(1, round(fraction * len(patients)))
            chosen.update(patients[: min(wanted, len(patients) - 1)])  # one stays to learn from
    return [replace(r, split=part) if r.patient in chosen else r for r in rows]


def _refuse_shared_patients(rows: Iterable[SlideRow]) -> None:
    parts: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.split is not None:
            parts[row.patient].add(row.split)
    shared = sorted(patient for patient, found in parts.items() if len(found) > 1)
    if shared:
        raise InputError(
            f"split: patient {', '.join(shared[:5])} has slides in more than one part; "
            "keep all slides of a patient together"
        )
