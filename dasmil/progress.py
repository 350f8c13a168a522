"""How far a long work is: a bar on a terminal, and now and then a line in a log."""

import math
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LINE_S = 120.0  # between two lines
tqdm.monitor_interval = 0  # no thread that ends while DataLoader forks: see files.map_files


class Lines(tqdm):
    """A ``tqdm`` that prints a line every two minutes, and nothing of what takes less."""

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
    """A ``tqdm`` that suits where standard error goes.

    Parameters
    ----------
    items: to go through; None if ``update`` is called instead.
    options: of ``tqdm``.
    """
    return (tqdm if sys.stderr.isatty() else Lines)(items, desc, **options)
