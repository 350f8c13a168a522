"""Names that come from files: which of them can be names of files, and the paths made of them."""

import re
from pathlib import Path

from dasmil.errors import InputError

MAX_NAME_BYTES = 255  # of file systems
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # and bytes that are not UTF-8
EXECUTED = ("=", "@")  # how cells begin that a spreadsheet executes, beside control characters


def path_fault(part: str, most_bytes: int = MAX_NAME_BYTES) -> str:
    """Why a part of a path can be no file, as the end of a sentence; "" if it can."""
    if CONTROLS.search(part):
        return f"{part!a} holds control characters or is not UTF-8"
    size = len(part.encode())
    if size > most_bytes:
        return f"has {size} bytes, too many for the names of its files (at most {most_bytes})"
    return ""


def name_fault(name: str, most_bytes: int = MAX_NAME_BYTES) -> str:
    """Why no file can be named after a name, as the end of a sentence; "" if one can.

    Names that begin with a plus or a minus are left alone: a spreadsheet takes them for numbers.
    """
    if fault := path_fault(name, most_bytes):
        return fault
    if "/" in name or name.startswith(".") or not name.strip():
        return f"{name!r} cannot be a file name"
    if name.startswith(EXECUTED):
        return f"{name!r} begins with {name[0]!r}, which a spreadsheet would execute"
    return ""


def path_inside(folder: Path, *names: str) -> Path:
    """A path below a folder: the one place where names that come from files become paths.

    Raises
    ------
    InputError
        if it would lie elsewhere, or be hidden, or no file can have such a name.
    """
    for name in names:
        if fault := name_fault(name):
            raise InputError(f"{folder}: nothing is written or read there: the name {fault}")
    return folder.joinpath(*names)
