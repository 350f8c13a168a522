"""Errors in the user's input, as opposed to errors in the code, and their messages."""

import errno
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

MAX_NAMED = 5
MAX_REASON = 200  # characters
MAX_NAME = 60  # letters that are compared; finding similar names takes their square
NO_FOLDER = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL = (errno.ENOSPC, errno.EDQUOT)
UNSHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all controls except \n and \t


def escape_controls(text: str) -> str:
    """Escape control characters for a terminal, as in ``\\x1b``; file names may hold them."""
    return UNSHOWN.sub(lambda match: ascii(match[0])[1:-1], text)


class InputError(ValueError):
    """Bad input, in one sentence: which file, what is wrong, what to do.

    The command line prints the sentence without a traceback and exits with code 2. Control
    characters are escaped, because the sentence may name files from unknown sources.
    """

    def __str__(self) -> str:
        return escape_controls(super().__str__())


class DiskFullError(InputError):
    """The disk is full; no failure of the slide that was being processed."""


def error_text(error: Exception) -> str:
    """The text of an error for a table: its sentence, for other libraries with its type."""
    is_sentence = isinstance(error, InputError)
    return escape_controls(str(error) if is_sentence else f"{type(error).__name__}: {error}")


@contextmanager
def explaining(problem: str, advice: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn other libraries' errors of these kinds, or of any, into one sentence with the reason."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not isinstance(error, kinds or Exception):
            raise
        reason = " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
        raise InputError(f"{problem} ({reason}); {advice}") from error


def join_few(texts: Collection[object]) -> str:
    """Join the first few items and count the rest, for error messages."""
    named = escape_controls(", ".join(list(map(str, texts))[:MAX_NAMED]))
    return named + (f" and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else "")


def near(name: str, options: Iterable[str]) -> str:
    """Suggest the name closest to a mistyped one, as the end of a sentence; "" if none is.

    Only the part after the last dot decides: ``--data.`` alone makes no two options similar.
    """
    ends = {option: option.rpartition(".")[2] for option in options}
    end = get_close_matches(name.rpartition(".")[2][:MAX_NAME], ends.values(), n=1, cutoff=0.7)
    alike = [option for option in ends if ends[option] in end]
    matches = get_close_matches(name[:MAX_NAME], alike, n=1, cutoff=0)
    return f"; did you mean {matches[0]}?" if matches else ""


def input_error_in(error: BaseException | None) -> str:
    """The message of the :class:`InputError` that caused an error; "" if none did."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return str(error or "")


def os_error_in(error: BaseException | None) -> str:
    """A sentence with the file if an :class:`OSError` caused an error; "" if none did.

    A read-only disk or a removed folder is no error in the code.
    """
    while error is not None and not (isinstance(error, OSError) and error.filename):
        error = error.__cause__
    if error is None:
        return ""
    path = Path(str(error.filename2 or error.filename))
    if re.match(r"\..*\.tmp", path.name):  # temporary name of a file being written
        path = path.parent
    advice = "run the same command again"
    if error.errno in NO_FOLDER:
        advice = "name another place: there is a file where a folder is needed, or the reverse"
    elif error.errno in CLOSED:
        advice = "name another place, or allow reading and writing there"
    elif error.errno in FULL:
        advice = "free some space and run the same command again"
    elif error.errno == errno.ENOENT:
        advice = "name another place, or run it again if its folder was removed meanwhile"
    return f"{path}: {error.strerror}; {advice}"
