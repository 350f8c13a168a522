"""The table of slides: where each lies, its label, its patient and the part it plays."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dasmil.errors import InputError, some_of
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


def slides_digest(rows: Iterable[SlideRow]) -> str:
    """The same for tables that name the same slides, wherever these lie."""
    return hashlib.sha256("\n".join(sorted(row.slide_id for row in rows)).encode()).hexdigest()


def describe_leaving(path: Path, rows: Iterable[SlideRow]) -> str:
    """Which slides of the table at ``path``, if there is one, are not among those of the new."""
    if not path.is_file():
        return ""
    new = {row.slide_id for row in rows}
    gone = [row.slide_id for row in read_cohort(path) if row.slide_id not in new]
    if not gone:
        return ""
    return f"{path}: {len(gone)} slide(s) of before leave it, their files stay: {some_of(gone)}"


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
                mpp=positive_number(record, "mpp", where),
                magnification=positive_number(record, "magnification", where),
            )
        )
    return rows


def positive_number(record: Mapping[str, str], column: str, where: str) -> float | None:
    """The number in a column of a row; None of an empty cell, or where there is no such column."""
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
