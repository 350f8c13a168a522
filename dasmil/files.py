"""Files: written whole or not at all, listed, and checked before they are opened."""

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
from itertools import chain
from pathlib import Path
from typing import TypeVar

from dasmil.errors import FULL, DiskFullError, InputError

Item = TypeVar("Item")
Value = TypeVar("Value")

READING_THREADS = 16  # network file systems answer slowly, but many requests at once
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to ``path`` if the block succeeds.

    The content reaches the disk before the name does, so even a power failure leaves the whole file
    or none.

    Raises
    ------
    DiskFullError
        if the disk is full.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(6)}.tmp{path.suffix}")
    try:
        with report_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode  # given by the user's umask
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            # safetensors creates files that only their owner may read
            if temporary.stat().st_mode != mode:
                with suppress(OSError):  # a disk without modes
                    temporary.chmod(mode)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def report_full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left" errors into :class:`DiskFullError`; re-raise all others."""
    try:
        yield
    except Exception as error:
        if _is_full(error):
            raise DiskFullError(
                f"{path}: its disk is full; free some space and run the same command again, what "
                "is done is kept"
            ) from error
        raise


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    text = str(error)  # of safetensors: "(os error 28)", in older versions "Os { code: 28, ..."
    return any(f"os error {n})" in text or f"code: {n}," in text for n in FULL)


def list_unfinished(folder: Path) -> list[Path]:
    """Temporary files of :func:`atomic_path` that a killed process has left in a folder."""
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if re.match(r"\..*\.[0-9a-f]{12}\.tmp(\.|$)", p.name)]


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def link_once(source: Path, path: Path) -> None:
    """Make ``path`` a hard link to a small file if no file has its name.

    Creating the link is atomic. On a disk without hard links the file is copied, and is empty for a
    moment.

    Raises
    ------
    FileExistsError
        if ``path`` exists; of several processes exactly one succeeds.
    DiskFullError
        if the disk is full.
    """
    with report_full_disk(path):
        try:
            os.link(source, path)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            with open(path, "x", encoding="utf-8") as file:
                file.write(source.read_text(encoding="utf-8"))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def map_files(function: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Value]:
    """Call a function that reads a file on each item, in threads; results keep the order.

    The threads stay idle afterwards: Python 3.11 may hang in a process that is forked while a
    thread of its parent ends, and DataLoader forks soon after the bags are opened.
    """
    listed = list(items)
    size = max(1, len(listed) // (4 * READING_THREADS))  # a task per file takes longer than a file
    parts = [listed[start : start + size] for start in range(0, len(listed), size)]
    return chain.from_iterable(_readers().map(lambda part: list(map(function, part)), parts))


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READING_THREADS, "map_files")


os.register_at_fork(after_in_child=_readers.cache_clear)  # threads do not survive a fork


def files_below(folder: Path, leave_out: Path | None = None) -> Iterator[Path]:
    """List the files in a folder and all folders below it, each folder once.

    Folders and files that cannot be read are skipped with a warning.

    Parameters
    ----------
    leave_out: a folder whose files are not listed.
    """
    seen = set()
    folders, links = deque([folder]), deque[Path]()  # links last: a folder goes by its own name
    while folders or links:
        current = folders.popleft() if folders else links.popleft()
        resolved = current.resolve()
        is_left_out = leave_out is not None and leave_out.resolve() in (resolved, *resolved.parents)
        if is_left_out or resolved in seen:
            continue
        seen.add(resolved)
        try:
            entries = list(os.scandir(current))
        except OSError as error:
            warnings.warn(f"{current}: its files are skipped: {error.strerror}", stacklevel=2)
            continue
        for entry in entries:
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError as error:  # a link to itself or into a folder that cannot be read
                warnings.warn(f"{entry.path}: skipped: {error.strerror}", stacklevel=2)
                continue
            if is_folder:
                (links if entry.is_symlink() else folders).append(Path(entry.path))
            elif is_file:
                yield Path(entry.path)


def must_exist(path: Path, advice: str) -> None:
    """Raise :class:`InputError` with advice if a path does not exist."""
    if not os.path.exists(path):  # noqa: PTH110 - Path raises if no file can have the name
        raise InputError(f"{path}: does not exist; {advice}")


def must_be_file(path: Path, advice: str) -> None:
    """Raise :class:`InputError` with advice unless a path is a regular file, or a link to one.

    Opening a FIFO would wait forever, and a device has no end.
    """
    must_exist(path, advice)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; {advice}")
    if not path.is_file():
        raise InputError(f"{path}: is no regular file; {advice}")
