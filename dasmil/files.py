"""Files that are written whole or not at all, and where dasmil's own configs lie."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dasmil.errors import InputError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to ``path`` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows as dictionaries; a missing value or None becomes an empty cell."""
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names, and one dictionary a row with every value stripped."""
    if not path.is_file():
        raise InputError(f"{path}: no such table")
    rows = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [name.strip() for name in reader.fieldnames or []]
            for values in reader:
                if None in values or None in values.values():
                    raise InputError(
                        f"{path} line {reader.line_num}: it has not the {len(columns)} cells "
                        "of the header"
                    )
                rows.append({k.strip(): v.strip() for k, v in values.items()})
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV table in UTF-8 ({error})") from error
    return columns, rows


def pack_metadata(entries: Mapping[str, str]) -> dict[str, str]:
    """Entries as one: safetensors writes several in random order, and equal files must be equal."""
    return {"dasmil": json.dumps(dict(entries), sort_keys=True)}


def unpack_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """The inverse of :func:`pack_metadata`; nothing where a file is not one of ours."""
    return dict(json.loads((metadata or {}).get("dasmil", "{}")))


def configs_folder() -> Path:
    """``configs/``: in the installed package, or beside it in a clone."""
    package = Path(__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise InputError(f"{package}: the configs folder is missing; install dasmil again")
