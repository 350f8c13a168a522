"""The cohort table: the file, label, patient and split of each slide."""

import hashlib
import os
import re
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import Literal, NamedTuple, get_args

from dasmil.errors import InputError, join_few
from dasmil.files import files_below, must_exist
from dasmil.names import name_fault, path_fault
from dasmil.tables import Row, read_csv, to_number, write_csv
from dasmil.work.worker import Worker

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = get_args(Part)

COLUMNS = ("slide_id", "path", "label", "patient_id", "split", "mpp", "magnification")
PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
SLIDE_SUFFIXES = PICTURE_SUFFIXES | set(
    [".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".dcm"]
)
NOT_KNOWN = re.compile(  # what other programs write for an empty cell
    r"n/?a|#n/a|<na>|nan|none|null|nil|unknown|not available|[-?]", re.IGNORECASE
)
MAX_SHOWN = 50  # characters of a cell in a sentence
MAX_ID_BYTES = 200  # a file name has at most 255, and suffixes are added

#: ``1_macro``, ``1.svs-label``, ``thumbnail``: the slide's name, and what the picture shows
PICTURE_OF_SLIDE = re.compile(
    r"(?:(.*)[-_. ])?(?:macro|label|thumb|thumbnail|overview)", re.IGNORECASE
)


class BadCell(NamedTuple):
    """A cell that makes its slide fail, not the table: its text, and why it cannot be used."""

    column: str
    text: str
    reason: str


@dataclass(frozen=True)
class SlideRow:
    """One row of the cohort table; empty and bad cells are None."""

    slide_id: str
    path: Path
    label: str | None = None
    patient_id: str | None = None
    split: str | None = None
    mpp: float | None = None
    magnification: float | None = None
    bad_cells: tuple[BadCell, ...] = ()

    @property
    def patient(self) -> str:
        """The patient_id; the slide_id if there is none."""
        return self.patient_id or self.slide_id

    @property
    def fault(self) -> str | None:
        """Why no file can have the slide's name, or its path cannot be used; None if both can."""
        if fault := name_fault(self.slide_id, MAX_ID_BYTES):
            return f"its slide_id {fault}; give it another one in a cohort table"
        for part in self.path.parts:
            if fault := path_fault(part):
                return f"its path {fault}; rename it"
        return self.fault_in("path")

    @property
    def scale_fault(self) -> str | None:
        """Why the table's mpp cannot be used, or without an mpp its magnification; else None."""
        return self.fault_in("mpp") or (None if self.mpp else self.fault_in("magnification"))

    def fault_in(self, column: str) -> str | None:
        """Why the cell of a column cannot be used; None if it can."""
        return next((cell.reason for cell in self.bad_cells if cell.column == column), None)

    @property
    def file(self) -> Path:
        """The slide's path with all links resolved, if that is possible; for comparisons."""
        try:
            return self.path.resolve()
        except (OSError, RuntimeError, ValueError):  # circular links, or an impossible name
            return self.path


def slide_name(name: str) -> str:
    """The slide_id of a file: its name without a slide's suffix and without surrounding blanks.

    Any other suffix is part of the name: ``16.1`` and ``16`` are two slides.
    """
    suffix = PurePath(name).suffix
    return readable(name.removesuffix(suffix) if suffix.lower() in SLIDE_SUFFIXES else name)


def readable(name: str) -> str:
    """A file's name as a slide_id: UTF-8, no surrounding blanks, never empty or hidden."""
    text = os.fsencode(name).decode(errors="backslashreplace").strip().lstrip(".").strip()
    return text or repr(name)


def match_names(rows: Sequence[SlideRow], slide_ids: Collection[str]) -> list[SlideRow]:
    """The rows with a slide_id that a file has: unchanged if it is known, else without suffix."""
    known = set(slide_ids)
    return [
        row
        if row.slide_id in known or (name := slide_name(row.slide_id)) not in known
        else replace(row, slide_id=name)
        for row in rows
    ]


def read_cohort(source: Path, leave_out: Path | None = None) -> list[SlideRow]:
    """Read a cohort table (CSV), or find every slide below a folder.

    Parameters
    ----------
    leave_out: output folder of dasmil, whose pictures are no slides.

    Raises
    ------
    InputError
        if there is no slide, a slide_id occurs twice, or the table cannot be read.
    """
    if source.is_dir():
        rows = _scan_folder(source, leave_out)
    elif source.is_file():
        rows = _read_table(source)
    else:
        must_exist(source, "give a cohort table or a folder of slides")
        raise InputError(f"{source}: neither a cohort table nor a folder of slides")
    if not rows:
        output = leave_out and leave_out.resolve()
        if source.is_dir() and output in (source.resolve(), *source.resolve().parents):
            raise InputError(
                f"{source}: is inside --output {leave_out}, whose pictures are no slides; choose "
                "another --output"
            )
        raise InputError(f"{source}: holds no slides; give a cohort table or a folder of slides")
    refuse_twice(source, rows)
    return rows


def refuse_twice(
    source: Path,
    rows: Iterable[SlideRow],
    advice: str = "give each slide its own slide_id in a cohort table",
) -> None:
    """Raise :class:`InputError` if two slide_ids are one file name on some file systems.

    Some of them ignore case.
    """
    seen: dict[str, SlideRow] = {}
    for row in rows:
        other = seen.setdefault(unicodedata.normalize("NFC", row.slide_id).casefold(), row)
        if other is not row:
            same = other.slide_id == row.slide_id
            what = "occurs twice" if same else f"equals {other.slide_id!r} on some disks"
            paths = f"{other.path} and {row.path}"
            raise InputError(f"{source}: slide_id {row.slide_id!r} {what} ({paths}); {advice}")


def write_cohort(path: Path, rows: Iterable[SlideRow]) -> None:
    """Write the table with absolute slide paths, so that it can be read from anywhere.

    Bad cells are written unchanged: each verb that needs one reports it.
    """

    def record(row: SlideRow) -> dict[str, object]:
        bad = {cell.column: cell.text for cell in row.bad_cells}
        values = {column: getattr(row, column) for column in COLUMNS}
        return {**values, "path": row.path.absolute(), **bad}

    write_csv(path, COLUMNS, map(record, rows))


def refuse_faulty(rows: Sequence[SlideRow], worker: Worker) -> list[SlideRow]:
    """Mark each faulty slide as failed, and return the other rows."""
    for row in rows:
        if row.fault:
            worker.note(row.slide_id, {"state": "failed", "message": row.fault})
    return [row for row in rows if not row.fault]


def slides_digest(rows: Iterable[SlideRow]) -> str:
    """Hex digest of the sorted slide_ids; paths do not count."""
    return hashlib.sha256("\n".join(sorted(row.slide_id for row in rows)).encode()).hexdigest()


def replace_cohort(path: Path, rows: Sequence[SlideRow], verb: str) -> None:
    """:func:`write_cohort`; prints which slides of an existing table are not in the new rows."""
    new = {row.slide_id for row in rows}
    before = read_cohort(path) if path.is_file() else ()
    gone = [row.slide_id for row in before if row.slide_id not in new]
    if gone:
        print(
            f"{verb}: {path}: {len(gone)} slide(s) of the previous table are no longer listed; "
            f"their files are kept: {join_few(gone)}"
        )
    write_cohort(path, rows)


def _scan_folder(folder: Path, leave_out: Path | None) -> list[SlideRow]:
    """Find slides below a folder, named after their files; a folder of DICOM is one slide."""
    rows = {}
    files = [
        path
        for path in files_below(folder, leave_out)
        if path.suffix.lower() in SLIDE_SUFFIXES
        and not path.name.strip().startswith(".")  # partly written, or a file of macOS
    ]
    pictures = _pictures_of_slides(files)
    if pictures:
        warnings.warn(
            f"{folder}: {len(pictures)} picture(s) of slides (macro, label, thumbnail) are "
            f"skipped: {join_few(sorted(path.name for path in pictures))}",
            stacklevel=2,
        )
    for path in files:
        if path in pictures:
            continue
        if path.suffix.lower() == ".dcm":
            rows[path.parent] = SlideRow(slide_name(path.parent.absolute().name), path.parent)
        else:
            rows[path] = SlideRow(slide_name(path.name), path)
    return [rows[path] for path in sorted(rows)]


def _pictures_of_slides(files: Sequence[Path]) -> set[Path]:
    """Pictures that scanners and viewers write beside a slide, recognised by their names."""
    slides = {path.with_suffix("") for path in files} | set(files)
    with_slides = {path.parent for path in files if path.suffix.lower() not in PICTURE_SUFFIXES}
    found = set()
    for path in files:
        match = PICTURE_OF_SLIDE.fullmatch(path.stem)
        if match is None or path.suffix.lower() == ".dcm":  # one of the files of a slide
            continue
        is_picture = path.suffix.lower() in PICTURE_SUFFIXES
        if path.parent / (match[1] or "") in slides or (is_picture and path.parent in with_slides):
            found.add(path)
    return found


def _read_table(path: Path) -> list[SlideRow]:
    columns, records = read_csv(path, verbatim=("path",))
    missing = {"slide_id", "path"} - set(columns)
    if missing:
        raise InputError(
            f"{path}: column {' and '.join(sorted(missing))} is missing; "
            f"a cohort table has the columns {', '.join(COLUMNS)} (the first two are required)"
        )
    rows = read_rows(path, columns, records, COLUMNS, ["patient_id"])
    for number, (row, record) in enumerate(zip(rows, records, strict=True)):
        has_path = bool(record["path"].strip())
        file = _slide_path(path.parent, record["path"] if has_path else row.slide_id)
        reason = f"{path} line {record.line}: path is empty; fill it"
        no_path = () if has_path else (BadCell("path", "", reason),)
        rows[number] = replace(row, path=file, bad_cells=(*no_path, *row.bad_cells))
    return rows


def read_rows(
    table: Path,
    columns: Sequence[str],
    records: Sequence[Row],
    known: Sequence[str],
    patient_columns: Sequence[str],
) -> list[SlideRow]:
    """The slides of a table without their paths, which are the slide_ids instead.

    Parameters
    ----------
    columns, records: of the table, from :func:`dasmil.tables.read_csv`.
    known: columns that are read; a warning names the others.
    patient_columns: those with the patient; the first that is not empty counts.
    """
    say_unknown_columns(table, columns, known)
    rows = []
    patients = read_patients(table, records, *patient_columns)
    for record, patient in zip(records, patients, strict=True):
        where = f"{table} line {record.line}"
        cells = {column: record.get(column, "") for column in known}
        slide_id, split = cells["slide_id"], cells.get("split") or None
        if not slide_id:
            raise InputError(f"{where}: slide_id is empty; fill it")
        if split not in (None, *PARTS):
            raise InputError(
                f"{where}: split {split!r} is none of {', '.join(PARTS)}; correct or empty it"
            )
        mpp, bad_mpp = positive_number(cells, "mpp", where)
        magnification, bad_magnification = positive_number(cells, "magnification", where)
        label, bad_cells = cells["label"] or None, (*bad_mpp, *bad_magnification)
        path = Path(slide_id)
        rows.append(SlideRow(slide_id, path, label, patient, split, mpp, magnification, bad_cells))
    return rows


def _slide_path(folder: Path, text: str) -> Path:
    """The path as written if it exists, since names may end with a blank; else stripped."""
    exact, stripped = folder / text, folder / text.strip()
    return exact if exact != stripped and os.path.lexists(exact) else stripped


def say_unknown_columns(path: Path, columns: Sequence[str], read: Sequence[str]) -> None:
    """Warn about columns that are not read, and suggest the one that may be meant."""
    near = {name: get_close_matches(name.lower(), read, 1) for name in columns if name not in read}
    if near:
        names = [f"{name} ({is_it[0]}?)" if is_it else name for name, is_it in near.items()]
        warnings.warn(f"{path}: columns that are not read: {join_few(names)}", stacklevel=2)


def read_patients(
    path: Path, records: Sequence[Mapping[str, str]], *columns: str
) -> list[str | None]:
    """The patient of each row, from the first of these columns that has one; None if not known.

    Warns about cells such as "n/a" that are read as not known.
    """
    cells = [[text for text in map(record.get, columns) if text] for record in records]
    known = [[text for text in texts if not NOT_KNOWN.fullmatch(text)] for texts in cells]
    patients = [texts[0] if texts else None for texts in known]
    taken = [texts[0] for texts, patient in zip(cells, patients) if texts and patient is None]
    if taken:
        warnings.warn(
            f"{path}: the patient of {len(taken)} slide(s) is read as not known: "
            f"{join_few(sorted(set(taken)))}",
            stacklevel=2,
        )
    return patients


def positive_number(
    record: Mapping[str, str], column: str, where: str
) -> tuple[float | None, tuple[BadCell, ...]]:
    """The number in a cell, with a decimal point or comma; None if the cell is empty.

    Returns
    -------
    The number, and the cell if it holds anything else.
    """
    text = record.get(column)
    if not text:
        return None, ()
    with suppress(ValueError):
        if 0 < (value := to_number(text)) < float("inf"):
            return value, ()
    reason = f"{where}: {column} {text[:MAX_SHOWN]!r} is no positive number; correct or empty it"
    return None, (BadCell(column, text, reason),)
