"""Processes: which of them run, and a child process whose death costs one task."""

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path
from typing import Any

import psutil

from dasmil.endings import signals_held

CONTEXT = get_context("spawn")
MAX_CLOCK_DRIFT_S = 5.0  # of the start time of a process, which follows the system's clock


class ChildProcess:
    """Run ``function(task)`` in a process of its own, which only :meth:`kill` ends.

    ``ProcessPoolExecutor`` does not report which task killed a worker, and it breaks; this class
    survives.

    Parameters
    ----------
    function: can be pickled; so can its tasks and results.
    """

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function
        self._start()

    def _start(self) -> None:
        self.connection, child = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(child, self.function), daemon=True)
        ensure_running()  # the resource tracker unblocks the signals when it starts
        with signals_held():
            self.process.start()
        child.close()

    def begin(self, task: Any) -> None:
        """Hand over a task; :attr:`connection` is ready when there is a result."""
        self.task, self._begun = task, time.monotonic()
        if not self.process.is_alive():  # it was killed between two tasks
            self._start()
        self.connection.send(task)

    def seconds(self) -> float:
        """Since the task began."""
        return time.monotonic() - self._begun

    def result(self) -> Any:
        """Return what the function returned, or raise what it raised.

        Raises
        ------
        EOFError
            if the task killed the process; a new process has replaced it.
        """
        try:
            succeeded, value = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode or 0
            self._start()
            how = f"by signal {-code}" if code < 0 else f"with code {code}"
            raise EOFError(f"its process was ended {how}") from None
        if not succeeded:
            raise value
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except EOFError:  # the parent has ended
            return
        try:
            answer = True, function(task)
        except Exception as error:  # raised again in the parent
            answer = False, error
        connection.send(answer)


def _exit_with_parent() -> None:
    """Else this process could overwrite a slide that another worker has taken over."""
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


@lru_cache(maxsize=1)
def machine_name() -> str:
    """A text that two processes share exactly if each can see whether the other runs."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))  # a container sees only its own
    return " ".join(parts)


def is_running(pid: int, started: float) -> bool:
    """Whether a process of this machine runs, and not a later one with its number.

    Parameters
    ----------
    started: its start, in seconds since 1970.
    """
    try:
        process = psutil.Process(pid)
        is_same = abs(process.create_time() - started) < MAX_CLOCK_DRIFT_S
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
