"""The one exception that means "your input is wrong", as opposed to "our code is wrong"."""

from collections.abc import Collection

MAX_NAMED = 5


class InputError(ValueError):
    """Bad input, said in one sentence: which file, what is wrong, what to do.

    The command line prints the sentence without a traceback and exits with code 2.
    """


class DiskFullError(InputError):
    """Nothing more can be written; no fault of the slide that was being worked on."""


def some_of(texts: Collection[object]) -> str:
    """The first few, and how many more there are; for sentences about slides or keys of a file."""
    named = ", ".join(list(map(str, texts))[:MAX_NAMED])
    return named + (f" and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else "")
