"""Files that are written whole or not at all, and where dasmil's own configs lie."""

import errno
import hashlib
import os
import re
import secrets
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

from dasmil.errors import FULL, DiskFullError, InputError

Item = TypeVar("Item")
Value = TypeVar("Value")

READING_THREADS = 16  # on a network file system each look at a file waits for an answer
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


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
