"""Files that are written whole or not at all, and where dasmil's own configs lie."""

import codecs
import csv
import errno
import hashlib
import io
import json
import os
import re
import secrets
import warnings
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeVar

from dasmil.errors import FULL, DiskFullError, InputError, some_of

Item = TypeVar("Item")
Value = TypeVar("Value")

READING_THREADS = 16  # on a network file system each look at a file waits for an answer
DELIMITERS = ",;\t"  # of tables; the first of those that a header has equally many of
SPREADSHEETS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # how .xlsx and .ods files begin, and .xls
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
SAMPLES = 24  # blocks that tell one slide from another: the first, the last and those between
SAMPLE_BYTES = 4096
MAX_DEPTH = 64  # of JSON that others may have written; ours has at most 5
EXECUTED = re.compile(r"'*[=@\t\r]")  # how cells begin that a spreadsheet would execute
SLIDE_PART = re.compile(r"[^.].*\.(dcm|dat)|slidedat\.ini", re.IGNORECASE)  # of DICOM, of MIRAX


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to ``path`` when the block ends well.

    The content has reached the disk before the name does, so that also a machine that loses its
    power leaves the whole file or none.

    Raises
    ------
    DiskFullError
        when nothing more can be written there.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(6)}.tmp{path.suffix}")
    try:
        with said_when_full(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode  # as the user's umask has it
            yield temporary
            _flush(temporary)
            if (
                temporary.stat().st_mode != mode
            ):  # safetensors makes files that only their owner reads
                with suppress(OSError):  # a disk without modes
                    temporary.chmod(mode)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def said_when_full(path: Path) -> Iterator[None]:
    """Tells a full disk from all other errors of writing a file."""
    try:
        yield
    except Exception as error:
        if _is_full(error):
            raise DiskFullError(
                f"{path}: its disk is full; free some space and run the same command again, what "
                "is done is kept"
            ) from error
        raise


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    said = str(error)  # of safetensors: "(os error 28)", older ones "Os { code: 28, ..."
    return any(f"os error {n})" in said or f"code: {n}," in said for n in FULL)


def left_behind(folder: Path) -> list[Path]:
    """Files that a process had begun in this folder, and not ended."""
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if re.match(r"\..*\.[0-9a-f]{12}\.tmp(\.|$)", p.name)]


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def link_once(source: Path, path: Path) -> None:
    """Make ``path`` a copy of a small file where nothing of its name is.

    It comes whole and at once; on a disk without hard links it is empty for a moment.

    Raises
    ------
    FileExistsError
        when something is; a file system lets one process alone succeed.
    DiskFullError
        when nothing more can be written there.
    """
    with said_when_full(path):
        try:
            os.link(source, path)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            with open(path, "x", encoding="utf-8") as file:  # the next best that such a disk has
                file.write(source.read_text(encoding="utf-8"))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def map_files(function: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Value]:
    """Call a function that reads a file for each item, in threads; results are in order.

    The threads stay idle afterwards. Python 3.11 may hang in a process that is forked while a
    thread of its parent ends, and DataLoader forks soon after the bags have been opened.
    """
    return _readers().map(function, items)


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READING_THREADS, "map_files")


os.register_at_fork(after_in_child=_readers.cache_clear)  # threads do not survive a fork


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows as dictionaries; a missing value or None becomes an empty cell.

    An apostrophe is set before a text that a spreadsheet would execute; :func:`read_csv` takes it
    off.
    """
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        _write_rows(file, columns, chain([dict(zip(columns, columns, strict=True))], rows))


def append_csv(path: Path, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """One more row of a table of :func:`write_csv`; it is whole or not there."""
    text = io.StringIO(newline="")
    _write_rows(text, columns, [row])
    line = text.getvalue().encode(errors="backslashreplace")
    with said_when_full(path), open(path, "ab", buffering=0) as file:
        file.write(line)


def _write_rows(file: IO[str], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    quoted = ({key: _quoted(value) for key, value in row.items()} for row in rows)
    csv.DictWriter(file, columns, restval="").writerows(quoted)


def _quoted(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and EXECUTED.match(cell) else cell


def _unquoted(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and EXECUTED.match(cell) else cell


class Row(dict[str, str]):
    """Column → cell of one row of a table, and the number of its line in the file."""

    def __init__(self, cells: Iterable[tuple[str, str]], line: int):
        super().__init__(cells)
        self.line = line


def read_csv(path: Path, verbatim: Collection[str] = ()) -> tuple[list[str], list[Row]]:
    """Column names, and the rows with every value stripped.

    Cells are separated by commas, semicolons or tabs, whichever the header has most of; a first
    line such as ``sep=;`` decides, as in Excel. The text is UTF-8, or UTF-16 with its mark. Rows
    and columns without any text are skipped.

    Parameters
    ----------
    verbatim: columns whose values are not stripped.

    Raises
    ------
    InputError
        if there is no such table, it is a spreadsheet, its text is in another encoding, a column
        name stands twice, or a row has more or fewer cells than the header.
    """
    lines = _read_lines(path)
    told = re.fullmatch(r"sep=(.)\s*", lines[0]) if lines else None
    header = re.sub(r'"[^"]*"', "", lines[0]) if lines else ""
    delimiter = told[1] if told else max(DELIMITERS, key=header.count)
    reader = csv.reader(lines, delimiter=delimiter)
    rows = []
    try:
        if told:
            next(reader)
        columns = [_unquoted(name).strip() for name in next(reader, [])]
        while columns and not columns[-1]:
            columns.pop()
        if twice := [name for name, times in Counter(columns).items() if times > 1]:
            raise InputError(
                f"{path}: the column {some_of(twice)} stands twice; remove or rename one of them"
            )
        for cells in reader:
            if not any(map(str.strip, cells)):
                continue
            if len(cells) < len(columns) or any(map(str.strip, cells[len(columns) :])):
                raise InputError(
                    f"{path} line {reader.line_num}: it has not the {len(columns)} cells of the "
                    "header"
                )
            pairs = zip(columns, cells, strict=False)
            stripped = ((k, _unquoted(v if k in verbatim else v.strip())) for k, v in pairs)
            rows.append(Row(stripped, reader.line_num))
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num}: not a CSV table ({error})") from error
    return columns, rows


def _read_lines(path: Path) -> list[str]:
    """Lines of a table with their ends, from its encoding."""
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
    """The number in a cell, with a point or a decimal comma; ValueError if it is none."""
    return float(text if "." in text else text.replace(",", "."))


def files_below(folder: Path, leave_out: Path | None = None) -> Iterator[Path]:
    """Files in a folder and all folders below it; each folder once, also if links lead to it."""
    seen = set()
    folders, links = deque([folder]), deque[Path]()  # a folder keeps its own name before a link's
    while folders or links:
        current = folders.popleft() if folders else links.popleft()
        resolved = current.resolve()
        is_ours = leave_out is not None and leave_out.resolve() in (resolved, *resolved.parents)
        if is_ours or resolved in seen:
            continue
        seen.add(resolved)
        try:
            entries = list(os.scandir(current))
        except OSError as error:
            warnings.warn(f"{current}: its files are left out: {error.strerror}", stacklevel=2)
            continue
        for entry in entries:
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError as error:  # of a link that leads to itself or into a closed folder
                warnings.warn(f"{entry.path}: is left out: {error.strerror}", stacklevel=2)
                continue
            if is_folder:
                (links if entry.is_symlink() else folders).append(Path(entry.path))
            elif is_file:
                yield Path(entry.path)


def sample_digest(path: Path) -> str:
    """A digest by which a slide is recognised, wherever it lies and whatever its name is.

    It covers the sizes of the slide's files and :data:`SAMPLES` evenly spaced blocks of them, laid
    end to end in the order of their names. So it costs the same few reads for any slide.

    Parameters
    ----------
    path: a file; a folder stands for the DICOM files in it; a MIRAX file (.mrxs) also stands for
        those of MIRAX in the folder of its name beside it.

    Returns
    -------
    64 hexadecimal digits.

    Raises
    ------
    InputError
        if the file does not exist, or cannot be read.
    """
    try:
        parts = [(part, part.stat().st_size) for part in _parts_of(path)]
        total = sum(size for _, size in parts)
        digest = hashlib.sha256(json.dumps([size for _, size in parts]).encode())
        last = max(0, total - SAMPLE_BYTES)
        starts = sorted({last * number // (SAMPLES - 1) for number in range(SAMPLES)})
        begin = 0  # of a part among all
        for part, size in parts:
            inside = [s - begin for s in starts if begin <= s < begin + size]
            if inside:
                with open(part, "rb", buffering=0) as file:
                    for start in inside:
                        file.seek(start)
                        digest.update(file.read(SAMPLE_BYTES))
            begin += size
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def file_state(path: Path) -> str:
    """Size and latest time of a slide's files. If these are as before, so is :func:`sample_digest`.

    Raises
    ------
    InputError
        if the file does not exist.
    """
    try:
        stats = [part.stat() for part in _parts_of(path)]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    size, time_ns = (sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0))
    return f"{size} bytes of {time_ns} ns"


def _parts_of(path: Path) -> list[Path]:
    """The files of a slide, sorted; not what else lies in its folder, such as notes."""
    if path.is_dir():
        return [p for p in sorted(path.iterdir()) if SLIDE_PART.fullmatch(p.name) and p.is_file()]
    if not path.exists():
        raise InputError(f"{path}: no such file")
    beside = path.with_suffix("")
    is_mirax = path.suffix.lower() == ".mrxs" and beside.is_dir()
    return [path, *(_parts_of(beside) if is_mirax else ())]


def pack_metadata(entries: Mapping[str, str]) -> dict[str, str]:
    """Entries as one: safetensors writes several in random order, and equal files must be equal."""
    return {"dasmil": json.dumps(dict(entries), sort_keys=True)}


def unpack_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """The inverse of :func:`pack_metadata`; nothing where a file is not one of ours.

    Raises
    ------
    ValueError
        if the entry is damaged.
    """
    entries = parse_json((metadata or {}).get("dasmil", "{}"))
    if not isinstance(entries, dict) or not all(isinstance(v, str) for v in entries.values()):
        raise ValueError("its entries are no texts by name")
    return entries


def parse_json(text: str | bytes, most_deep: int = MAX_DEPTH) -> Any:
    """The plain value that a JSON text from outside stands for.

    Raises
    ------
    ValueError
        if it is damaged, nested more than ``most_deep`` times, or holds a number that is not
        finite.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        value = DECODER.decode(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if text.count("{") + text.count("[") > most_deep:
        _refuse_deep(value, most_deep)
    return value


def read_json_object(path: Path, advice: str) -> dict[str, Any]:
    """The object in a JSON file of ours.

    Raises
    ------
    InputError
        if there is no such file, or it is damaged; with advice.
    """
    must_be_file(path, advice)
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {advice}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no object; {advice}")
    return value


def _refuse_deep(value: Any, levels: int) -> None:
    if levels < 0:
        raise ValueError("its JSON is nested too deeply")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _refuse_deep(inner, levels - 1)


def _refuse_number(text: str) -> float:
    raise ValueError(f"its JSON holds the number {text}")


def _finite(text: str) -> float:
    number = float(text)
    return number if abs(number) < float("inf") else _refuse_number(text)


DECODER = json.JSONDecoder(parse_constant=_refuse_number, parse_float=_finite)


def describe_changes(found: str, wanted: str, also_new: bool = True) -> str:
    """How two sets of parameters, both as JSON, differ: ``tile_px 64 → 32, tissue.mpp 8 → 4``.

    Parameters
    ----------
    also_new: whether it counts if ``found`` lacks a parameter, as an older version's set may.
    """
    old, new = (_flat(json.loads(text)) for text in (found, wanted))
    keys = [k for k in {**old, **new} if old.get(k) != new.get(k) and (also_new or k in old)]
    return some_of([f"{key} {old.get(key, 'unknown')} → {new.get(key, 'unknown')}" for key in keys])


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            flat[prefix + key] = f"[{', '.join(map(str, value))}]"
        else:
            flat[prefix + key] = str(value)
    return flat


def must_exist(path: Path, advice: str) -> None:
    """Raise :class:`InputError` with advice if a path does not exist."""
    if not os.path.exists(path):  # noqa: PTH110 - of a name that no file can have Path raises
        raise InputError(f"{path}: does not exist; {advice}")


def must_be_file(path: Path, advice: str) -> None:
    """Raise :class:`InputError` with advice unless a path is a regular file, or a link to one.

    Opening a FIFO waits for ever, and a device has no end.
    """
    must_exist(path, advice)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; {advice}")
    if not path.is_file():
        raise InputError(f"{path}: is no regular file; {advice}")


def configs_folder() -> Path:
    """``configs/``: in the installed package, or beside it in a clone."""
    package = Path(__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise InputError(f"{package}: the configs folder is missing; install dasmil again")


def find_config(name: str) -> Path:
    """A config where it is given, else in dasmil's own folder ``configs/``."""
    short = name.removeprefix("configs/")
    for path in (Path(name), configs_folder() / short):
        if path.is_file():
            return path.resolve()
    if short == "dasmil.yaml":
        raise InputError(f"{name}: it is configs/mil.yaml now, see .github/changes.md")
    if short.startswith("ablation/"):
        raise InputError(
            f"{name}: an ablation is an option of a row now, such as "
            "set: {model.objective.temperature: 2.0}; see configs/sweep/ and .github/changes.md"
        )
    raise InputError(f"{name}: no such config, neither here nor in {configs_folder()}")
