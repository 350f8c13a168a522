"""CSV tables: read as spreadsheets save them, written whole or not at all."""

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

from dasmil.errors import InputError, join_few
from dasmil.files import atomic_path, report_full_disk

DELIMITERS = ",;\t"  # the one that the header has most of, else the first
SPREADSHEETS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # first bytes of .xlsx and .ods, and of .xls
EXECUTED = re.compile(r"'*[=@\t\r]")  # start of cells that a spreadsheet would execute


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows, whole or not at all; a missing value or None becomes an empty cell.

    A text that a spreadsheet would execute gets a leading apostrophe, which :func:`read_csv`
    removes.
    """
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        _write_rows(file, columns, chain([dict(zip(columns, columns, strict=True))], rows))


def append_csv(path: Path, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Add one row to a table of :func:`write_csv`, whole or not at all."""
    text = io.StringIO(newline="")
    _write_rows(text, columns, [row])
    line = text.getvalue().encode(errors="backslashreplace")
    with report_full_disk(path), open(path, "ab", buffering=0) as file:
        file.write(line)


def _write_rows(file: IO[str], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    quoted = ({key: _quoted(value) for key, value in row.items()} for row in rows)
    csv.DictWriter(file, columns, restval="").writerows(quoted)


def _quoted(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and EXECUTED.match(cell) else cell


def _unquoted(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and EXECUTED.match(cell) else cell


class Row(dict[str, str]):
    """One row of a table: column → cell, and the number of its line in the file."""

    def __init__(self, cells: Iterable[tuple[str, str]], line: int):
        super().__init__(cells)
        self.line = line


def read_csv(path: Path, verbatim: Collection[str] = ()) -> tuple[list[str], list[Row]]:
    """Read column names, and rows whose values are stripped.

    Commas, semicolons or tabs separate cells, whichever the header has most of; a first line such
    as ``sep=;`` overrides that, as in Excel. The text is UTF-8, or UTF-16 with a byte order mark.
    Rows and columns without any text are skipped.

    Parameters
    ----------
    verbatim: columns whose values are not stripped.

    Raises
    ------
    InputError
        if the file does not exist, is a spreadsheet or has another encoding, a column name occurs
        twice, or a row has more or fewer cells than the header.
    """
    lines = _read_lines(path)
    separator = re.fullmatch(r"sep=(.)\s*", lines[0]) if lines else None
    header = re.sub(r'"[^"]*"', "", lines[0]) if lines else ""
    delimiter = separator[1] if separator else max(DELIMITERS, key=header.count)
    reader = csv.reader(lines, delimiter=delimiter)
    rows = []
    try:
        if separator:
            next(reader)
        columns = [_unquoted(name).strip() for name in next(reader, [])]
        while columns and not columns[-1]:
            columns.pop()
        if twice := [name for name, times in Counter(columns).items() if times > 1]:
            raise InputError(
                f"{path}: the column {join_few(twice)} occurs twice; remove or rename one of them"
            )
        for cells in reader:
            if not any(map(str.strip, cells)):
                continue
            if len(cells) < len(columns) or any(map(str.strip, cells[len(columns) :])):
                raise InputError(
                    f"{path} line {reader.line_num}: it does not have the {len(columns)} cells of "
                    "the header"
                )
            pairs = zip(columns, cells, strict=False)
            stripped = ((k, _unquoted(v if k in verbatim else v.strip())) for k, v in pairs)
            rows.append(Row(stripped, reader.line_num))
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num}: not a CSV table ({error})") from error
    return columns, rows


def _read_lines(path: Path) -> list[str]:
    """Decode a table into lines, with their line ends."""
    if not path.is_file():
        raise InputError(f"{path}: no such table")
    data = path.read_bytes()
    if data.startswith(SPREADSHEETS):
        raise InputError(f"{path}: a spreadsheet; save it as CSV (UTF-8) and give that file")
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} line {line}: not a CSV table in UTF-8 ({error.reason}); save it as UTF-8"
        ) from error
    lines = list(io.StringIO(text, newline=""))
    if lines and "\0" in lines[0]:
        raise InputError(f"{path}: not a CSV table in UTF-8; save it as UTF-8")
    return lines


def to_number(text: str) -> float:
    """The number in a cell, with a decimal point or comma; ValueError if it holds none."""
    return float(text if "." in text else text.replace(",", "."))
