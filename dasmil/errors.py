"""The one exception that means "your input is wrong", as opposed to "our code is wrong"."""

import errno
import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from pathlib import Path

MAX_NAMED = 5
NO_FOLDER = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL = (errno.ENOSPC, errno.EDQUOT)
UNSHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # controls but line ends and tabs


def shown(text: str) -> str:
    """A text for a terminal: control characters, which may be a stranger's, as ``\\x1b``."""
    return UNSHOWN.sub(lambda found: ascii(found[0])[1:-1], text)


class InputError(ValueError):
    """Bad input, said in one sentence: which file, what is wrong, what to do.

    The command line prints the sentence without a traceback and exits with code 2. It may name
    files of strangers, so control characters are shown as text.
    """

    def __str__(self) -> str:
        return shown(super().__str__())


class DiskFullError(InputError):
    """Nothing more can be written; no fault of the slide that was being worked on."""


def say_error(error: Exception) -> str:
    """What a row of a table says of an error: its sentence, or that of a library with its kind."""
    is_sentence = isinstance(error, InputError)
    return shown(str(error) if is_sentence else f"{type(error).__name__}: {error}")


def some_of(texts: Collection[object]) -> str:
    """The first few, and how many more there are; for sentences about slides or keys of a file."""
    named = shown(", ".join(list(map(str, texts))[:MAX_NAMED]))
    return named + (f" and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else "")


def near(name: str, options: Iterable[str]) -> str:
    """The option that looks like a mistyped one, as the end of a sentence."""
    found = get_close_matches(name, list(options), n=1, cutoff=0.7)
    return f"; did you mean {found[0]}?" if found else ", see --help"


def input_error_in(error: BaseException | None) -> str:
    """The sentence of the :class:`InputError` that caused an error; "" if none did."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return str(error or "")


def os_error_in(error: BaseException | None) -> str:
    """What the system refused, as a sentence with the file; "" if no :class:`OSError` is a cause.

    A disk that is read-only, or a folder that was removed, is no fault of our code.
    """
    while error is not None and not (isinstance(error, OSError) and error.filename):
        error = error.__cause__
    if error is None:
        return ""
    path = Path(str(error.filename2 or error.filename))
    if re.match(r"\..*\.tmp", path.name):  # of a file that was being written
        path = path.parent
    advice = "run the same command again"
    if error.errno in NO_FOLDER:
        advice = "name another place: a file lies where a folder is needed, or the reverse"
    elif error.errno in CLOSED:
        advice = "name another place, or let it be read and written"
    elif error.errno in FULL:
        advice = "free some space and run the same command again"
    elif error.errno == errno.ENOENT:
        advice = "name another place, or if its folder was removed meanwhile, run it again"
    return f"{path}: {error.strerror}; {advice}"
