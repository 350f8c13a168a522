"""A process that is watched: what it writes, connects to, starts and unpickles is told."""

import os
import sys
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGING = {
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
}
STARTING = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn"}
ASKING = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}


class Watch:
    """An audit hook; it stays for the life of the process, and tells only while it is on.

    Parameters
    ----------
    inside: folders in which may be written.
    """

    def __init__(self, inside: list[Path]):
        self.inside = [str(folder.resolve()) for folder in (*inside, Path("/dev"), Path("/proc"))]
        self.is_on = False
        self.told: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        # an address that is a path is of another process here: torch shares tensors by them
        local = event == "socket.connect" and isinstance(arguments[1], str | bytes)
        if event in ASKING and not local:
            self.told.append(f"request: {event} {arguments[1:]}")
            raise ConnectionRefusedError("the watch lets nothing out")
        if event in STARTING:
            self.told.append(f"process: {event} {arguments[:2]}")
        elif event == "pickle.find_class":
            self.told.append(f"unpickled: {arguments}")
        elif (event == "open" and self._writes(*arguments[1:3])) or event in CHANGING:
            self._look(arguments[0])

    def _writes(self, mode: Any, flags: Any) -> bool:
        by_mode = isinstance(mode, str) and any(letter in mode for letter in "wax+")
        return by_mode or (isinstance(flags, int) and bool(flags & WRITING))

    def _look(self, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # an open file
        place = os.path.realpath(os.fsdecode(path))
        if not any(place == folder or place.startswith(f"{folder}/") for folder in self.inside):
            self.told.append(f"wrote outside: {place}")
