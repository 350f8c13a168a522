"""How long the networks wait for pixels, on the CPU and on a GPU."""

import time
from collections import deque

import torch


class Waiting:
    """The time during which the next chunk is not read yet and the device has nothing to do.

    A GPU still computes when the process asks for the next chunk. There, events in the queue of the
    GPU measure the time between the end of its work and the arrival of the chunk.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._start: float | torch.cuda.Event | None = None
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def begin(self, device: torch.device) -> None:
        """The device has been given all work on the chunks so far."""
        self._start = _record_event() if device.type == "cuda" else time.monotonic()

    def end(self) -> None:
        """The next chunk is here; call it before the chunk is copied to the device."""
        if isinstance(self._start, float):
            self._seconds += time.monotonic() - self._start
        elif self._start is not None:
            self._events.append((self._start, _record_event()))
            while self._events and self._events[0][1].query():
                self._add_first()

    def seconds(self) -> float:
        """Wait for the device, and return the seconds so far."""
        while self._events:
            self._events[0][1].synchronize()
            self._add_first()
        return self._seconds

    def _add_first(self) -> None:
        start, end = self._events.popleft()
        self._seconds += start.elapsed_time(end) / 1000


def _record_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
