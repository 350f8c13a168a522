"""Progress of a long task: a bar on a terminal, a line every two minutes in a log."""

import math
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

LINE_S = 120.0  # between two lines
SILENCE_S = 60.0  # after which a watchdog prints a line
tqdm.monitor_interval = 0  # no monitor thread that could end while DataLoader forks


class Lines(tqdm):
    """A ``tqdm`` that prints a line every two minutes, and nothing for a shorter task."""

    def __init__(self, *args: Any, **kwargs: Any):
        form = "{desc}: {n_fmt} of {total_fmt} {unit}s after {elapsed}, {remaining} to go{postfix}"
        slow = {"mininterval": LINE_S, "maxinterval": math.inf, "miniters": 0, "delay": LINE_S}
        super().__init__(*args, **{**kwargs, **slow, "bar_format": form})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        print(str(self) if msg is None else msg, file=self.fp, flush=True)
        return True

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        super().set_postfix_str(s, refresh=False)

    def close(self) -> None:
        self.disable = True


def progress(items: Iterable[Any] | None = None, desc: str = "", **options: Any) -> Any:
    """A ``tqdm`` bar if standard error is a terminal, else :class:`Lines`.

    Parameters
    ----------
    items: iterable to wrap; None if ``update`` is called instead.
    desc: text before the numbers.
    options: of ``tqdm``.
    """
    return (tqdm if sys.stderr.isatty() else Lines)(items, desc, **options)


class Watchdog:
    """Print what the run waits for whenever nothing has happened for a minute.

    Parameters
    ----------
    describe: returns what the run waits for now.
    """

    def __init__(self, describe: Callable[[], str]):
        self._describe = describe
        self._moved = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def touch(self) -> None:
        """Report that something has happened."""
        self._moved.set()

    def stop(self) -> None:
        self._ended = True
        self._moved.set()
        if self._thread.is_alive():  # a run may end before the thread has started
            self._thread.join()

    def _watch(self) -> None:
        silent_s = 0.0
        while not self._ended:
            if self._moved.wait(SILENCE_S):
                self._moved.clear()
                silent_s = 0.0
            else:
                silent_s += SILENCE_S
                text = f"nothing for {silent_s:.0f} s; waiting for {self._describe()}"
                print(text, file=sys.stderr, flush=True)
