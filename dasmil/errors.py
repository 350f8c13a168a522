"""The one exception that means "your input is wrong", as opposed to "our code is wrong"."""


class InputError(ValueError):
    """Bad input, said in one sentence: which file, what is wrong, what to do.

    The command line prints the sentence without a traceback and exits with code 2.
    """


class DiskFullError(InputError):
    """Nothing more can be written; no fault of the slide that was being worked on."""
