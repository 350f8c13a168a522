"""A child process that does one task after the other, and whose death costs one task."""

import os
import threading
from collections.abc import Callable
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.resource_tracker import ensure_running
from typing import Any

from dasmil.endings import signals_held

CONTEXT = get_context("spawn")


class ChildProcess:
    """Runs ``function(task)`` in a process of its own, which only :meth:`kill` ends.

    An executor of the standard library does not say which task a process died of, and ends with it.

    Parameters
    ----------
    function: can be pickled, as its tasks and results can.
    """

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function
        self._start()

    def _start(self) -> None:
        self.connection, child = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_serve, args=(child, self.function), daemon=True)
        ensure_running()  # it would let the signals through again
        with signals_held():
            self._process.start()
        child.close()

    def begin(self, task: Any) -> None:
        """Hand it a task; :attr:`connection` is ready when there is a result."""
        if not self._process.is_alive():  # it was killed between two tasks
            self._start()
        self.connection.send(task)

    def result(self) -> Any:
        """What the function returned; what it raised is raised.

        Raises
        ------
        EOFError
            when the process has died of the task; another one has then taken its place.
        """
        try:
            well, value = self.connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode or 0
            self._start()
            how = f"by signal {-code}" if code < 0 else f"with code {code}"
            raise EOFError(f"its process was ended {how}") from None
        if not well:
            raise value
        return value

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
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


def _die_with_parent() -> None:
    """What it writes would come after another worker has begun with the same slide."""
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
