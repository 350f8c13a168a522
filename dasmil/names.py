"""Check names that come from files before they become file names and paths."""

import re
from pathlib import Path

from dasmil.errors import InputError

MAX_NAME_BYTES = 255  # of file systems
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # and bytes that are not UTF-8
EXECUTED = ("=", "@")  # a spreadsheet executes cells that begin so


def path_fault(part: str, most_bytes: int = MAX_NAME_BYTES) -> str:
    """Why a part of a path is no file name, as the end of a sentence; "" if it is one."""
    if CONTROLS.search(part):
        return f"{part!a} holds control characters or is not UTF-8"
    size = len(part.encode())
    if size > most_bytes:
        return f"has {size} bytes, too many for the names of its files (at most {most_bytes})"
    return ""


def name_fault(name: str, most_bytes: int = MAX_NAME_BYTES) -> str:
    """Why no file can have this name, as the end of a sentence; "" if one can.

    Names may begin with a plus or a minus, although a spreadsheet reads them as numbers.
    """
    if fault := path_fault(name, most_bytes):
        return fault
    if "/" in name or name.startswith(".") or not name.strip():
        return f"{name!r} cannot be a file name"
    if name.startswith(EXECUTED):
        return f"{name!r} begins with {name[0]!r}, which a spreadsheet would execute"
    return ""


def path_inside(folder: Path, *names: str) -> Path:
    """The path of names below a folder; only this function makes paths of names from files.

    Raises
    ------
    InputError
        if the path would be outside the folder or hidden, or no file can have such a name.
    """
    for name in names:
        if fault := name_fault(name):
            raise InputError(f"{folder}: cannot read or write there: the name {fault}; rename it")
    return folder.joinpath(*names)
