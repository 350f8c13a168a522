"""Limits of an annotation file: reading one takes at most 1 GB of memory and 10 s.

The limits count contents, not seconds, so a file is refused on every machine or on none.
"""

import gzip
import reprlib
import sys
import zlib
from pathlib import Path

from dasmil.errors import InputError, explaining

MAX_FILE_BYTES = 200_000_000  # unpacked
MAX_OBJECTS_BYTES = 700_000_000  # of the Python objects parsed from a text
MAX_CORNERS = 2_000_000  # of all polygons together; of points too
MAX_RINGS = 100_000  # outlines and holes, each some 30 µs
ADVICE = "export only the annotations, or simplify their outlines"

# bytes that Python (3.11, 64 bits) needs per character of JSON or CSV, beside the text itself
JSON_BYTES = {"[": 100, "{": 240, ",": 40, '"': 30}
TABLE_BYTES = {"\n": 700, "\r": 700, ",": 80, ";": 80, "\t": 80}


def read_file(path: Path) -> bytes:
    """The content of a file, unpacked if its name ends with ``.gz``.

    Raises
    ------
    InputError
        if it is larger than :data:`MAX_FILE_BYTES`, or cannot be read or unpacked.
    """
    is_packed = path.suffix.lower() == ".gz"
    with (
        explaining(f"{path}: cannot be read", "export it again", OSError, EOFError, zlib.error),
        gzip.open(path) if is_packed else open(path, "rb") as file,
    ):
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"{path}: larger than {MAX_FILE_BYTES // 1_000_000} MB unpacked; {ADVICE}")
    return data


def refuse_costly_text(path: Path, text: str, bytes_of: dict[str, int]) -> None:
    """Raise :class:`InputError` if parsing a text would take too much memory."""
    needed = sys.getsizeof(text) + sum(text.count(mark) * num for mark, num in bytes_of.items())
    if needed > MAX_OBJECTS_BYTES:
        raise InputError(
            f"{path}: would take {needed / 1e9:.1f} GB of memory, more than the limit of "
            f"{MAX_OBJECTS_BYTES / 1e9:.1f} GB; {ADVICE}"
        )


def refuse_many(path: Path, num_rings: int, num_corners: int) -> None:
    """Raise :class:`InputError` if there are more outlines or corners than the limits allow."""
    for number, limit, what in (
        (num_rings, MAX_RINGS, "outlines"),
        (num_corners, MAX_CORNERS, "corners"),
    ):
        if number > limit:
            raise InputError(f"{path}: has more than {limit:,} {what}; {ADVICE}")


def shorten(value: object) -> str:
    """A value of a file, or an error, for a sentence: short, without control characters."""
    if isinstance(value, Exception):
        return repr(str(value)[:160])[1:-1]
    text = repr(value[:60]) if isinstance(value, str) else reprlib.repr(value)
    whole = len(text) <= 62 and not (isinstance(value, str) and len(value) > 60)
    return text if whole else f"{text[:62]}…"
