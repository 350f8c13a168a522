"""What a benchmark yields, how it is timed, and the table of it."""

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

WAY = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table: what ours takes, beside a peer and a limit of the same run.

    Parameters
    ----------
    area: what is measured, for example ``PGNN``.
    case: the input, for example ``training step, 16k tiles``.
    unit: of the figures, for example ``ms``, ``tiles/s``.
    ours: our figure.
    peer, peer_is: the figure of the usual way, and what that is.
    limit, limit_is: the figure that cannot be beaten, or that may not be passed, and what it is.
    target: what the project asks of it, in words.
    more_is_better: for rates; False for times and memory.
    """

    area: str
    case: str
    unit: str
    ours: float
    peer: float | None = None
    peer_is: str = ""
    limit: float | None = None
    limit_is: str = ""
    target: str = ""
    more_is_better: bool = False

    @property
    def gain(self) -> float | None:
        """How many times better than the peer."""
        if self.peer is None:
            return None
        return self.ours / self.peer if self.more_is_better else self.peer / self.ours

    @property
    def of_limit(self) -> float | None:
        """Ours in units of the limit."""
        return None if self.limit is None else self.ours / self.limit


def seconds(*ways: WAY, runs: int = 5, warmup: int = 1) -> list[float]:
    """Median seconds of each way; they take turns, so that a noisy machine hits them alike."""
    for _ in range(warmup):
        for way in ways:
            way()
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(runs):
        for way, taken in zip(ways, times, strict=True):
            gc.collect()
            start = time.perf_counter()
            way()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def markdown(rows: Iterable[Row]) -> str:
    """The table, as printed in ``.github/docs/speed.md``."""
    lines = [
        "| | | ours | peer | times better | limit | of the limit | target |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        peer = "" if row.peer is None else f"{_figure(row.peer)} ({row.peer_is})"
        limit = "" if row.limit is None else f"{_figure(row.limit)} ({row.limit_is})"
        gain = "" if row.gain is None else f"{row.gain:.2f} ×"
        share = "" if row.of_limit is None else f"{row.of_limit:.2f}"
        cells = (row.area, row.case, f"{_figure(row.ours)} {row.unit}", peer, gain, limit, share)
        lines.append("| " + " | ".join((*cells, row.target)) + " |")
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
