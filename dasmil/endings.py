"""SIGTERM and Ctrl-C end a run; they are no failure of the slide that is being read.

A scheduler sends SIGTERM to all processes of a job, and a terminal sends Ctrl-C to all of them.
Only the main process acts on it. Its child processes ignore it until the main process ends them.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ENDING_S = 10.0  # in which further signals are ignored, so that the run can end in order

_last_signal_s = float("-inf")


def end_on_sigterm() -> None:
    """Let SIGTERM raise ``SystemExit(143)`` in the main thread.

    Lightning replaces the handler while a Trainer runs. Its own handler waits for all processes in
    the middle of their work and may hang, so a callback calls this function again.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    global _last_signal_s
    if time.monotonic() - _last_signal_s > ENDING_S:
        _last_signal_s = time.monotonic()
        raise SystemExit(128 + number)


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """:func:`end_on_sigterm` for a block."""
    before = signal.getsignal(signal.SIGTERM)
    end_on_sigterm()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def leave_signals_to_parent(*_: object) -> None:
    """Ignore the signals; called when a child process starts."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def signals_held() -> Iterator[None]:
    """Block the signals; a process that is started within the block never gets them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def signal_of(error: BaseException) -> signal.Signals | None:
    """The signal that ended a run; None if it ended by something else."""
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        return signal.SIGINT  # Lightning raises SystemExit(1) for it
    by_lightning = type(error).__name__ == "SIGTERMException"
    ended = by_lightning or getattr(error, "code", None) == 128 + signal.SIGTERM
    return signal.SIGTERM if ended else None
