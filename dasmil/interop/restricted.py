"""Pickled torch files of other tools, read without running anything that is in them."""

import gzip
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from dasmil.errors import InputError

GZIP_MAGIC = b"\x1f\x8b"
MAX_UNPACKED_BYTES = 16 * 2**30
BLOCK_BYTES = 2**20


def load_restricted(
    path: Path, allowed: Iterable[type | tuple[Any, str]] = (), kind: str = "torch file"
) -> Any:
    """The content of a file that ``torch.save`` wrote, on the CPU; gzip-compressed or not.

    Parameters
    ----------
    path: the file.
    allowed: classes it may hold beside tensors and plain values; ``(stand_in, "module.name")``
        puts a class of ours in the place of a named one.
    kind: what the file should be, for the messages.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with (
            open(path, "rb") as file,
            tempfile.TemporaryFile() as unpacked,
            _only(allowed),
            warnings.catch_warnings(action="ignore"),
        ):
            return torch.load(_unpacked(file, unpacked), map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch and gzip raise many kinds for a file that is none of theirs
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise InputError(
                f"{path}: is not loaded: it asks for {asked[1]}, which no {kind} needs and which "
                "could run foreign code"
            ) from error
        raise InputError(f"{path}: truncated, or no {kind} at all ({_reason(error)})") from error


@contextmanager
def _only(allowed: Iterable[type | tuple[Any, str]]) -> Iterator[None]:
    """Allow these classes, and none that other libraries have allowed in this process."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(allowed))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _unpacked(file: IO[bytes], unpacked: IO[bytes]) -> IO[bytes]:
    """``file`` itself, or where it is gzip-compressed its content, written to ``unpacked``."""
    is_compressed = file.read(2) == GZIP_MAGIC
    file.seek(0)
    if not is_compressed:
        return file
    with gzip.open(file) as content:
        while block := content.read(BLOCK_BYTES):
            unpacked.write(block)
            if unpacked.tell() > MAX_UNPACKED_BYTES:
                raise InputError(
                    f"{file.name}: unpacks to more than {MAX_UNPACKED_BYTES // 2**30} GiB; "
                    "no checkpoint is that large"
                )
    unpacked.seek(0)
    return unpacked


def _reason(error: Exception) -> str:
    """The sentence of torch's message that says what is wrong, without its advice."""
    message = str(error).rsplit("WeightsUnpickler error: ", 1)[-1].strip()
    sentence = re.split(r"\. |\n", message)[0]
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__
