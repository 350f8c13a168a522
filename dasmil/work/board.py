"""What the workers of a folder know of each other: the files of ``FOLDER/work``.

==================================== =============================================================
``<worker>.jsonl``                    its introduction, then one record per slide that it settled;
                                      the file's time is the worker's heartbeat
``<worker>.owner``                    its name
``claims/<slide_id>.<number>``        a slide that it works on: a hard link to ``<worker>.owner``
``log.jsonl``                         the records of workers that have ended
==================================== =============================================================

Creating a hard link is atomic and fails if the name exists, so exactly one process gets the claim.
The claim of a dead worker stays: the worker that takes over creates the claim with the next number.
A claim never means that a slide is done: the worker that gets it looks at the slide's file first.
"""

import errno
import json
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dasmil.files import atomic_path
from dasmil.json_text import parse_json
from dasmil.names import name_fault, path_inside
from dasmil.work.process import is_running, machine_name

STALE_AFTER_S = 120.0  # network file systems may show a file's time a minute late
SIGNED_AFTER_S = 2.0  # after which a claim without an owner is a dead worker's
CUT_LINE = re.compile(rb"(\{.*)?", re.DOTALL)
WAITING = {"state": "waiting"}  # the record of a slide that no worker has come to

Record = dict[str, Any]


class Board:
    """Read the files of ``FOLDER/work``.

    The files of workers only grow, so each reading continues where the last one stopped.

    Parameters
    ----------
    folder: FOLDER.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "work"
        self.records: dict[str, Record] = {}  # the last one per slide
        self.settled: set[str] = set()  # slides that were settled since forget_settled
        self._introductions: dict[str, Record] = {}  # by worker
        self._ended: set[str] = set()
        self._read_to: dict[str, int] = {}  # bytes, by worker
        self._log: tuple[int, int] | None = None  # inode and time of the log.jsonl that was read

    def workers(self) -> list[str]:
        """The names of all workers that have a file, dead or alive."""
        if not self.folder.is_dir():
            return []
        files = [path for path in self.folder.glob("*.jsonl") if path.is_file()]
        names = [path.name.removesuffix(".jsonl") for path in files]
        return [name for name in names if name != "log" and not name.startswith(".")]

    def update(self) -> None:
        """Read the lines that were added since the last call."""
        for name in ["log", *self.workers()]:
            for entry in self._added_entries(name):
                if "worker" in entry:
                    self._introductions[name] = entry
                elif "ended" in entry:
                    self._ended.add(name)
                else:
                    self._add_record(entry)

    def _add_record(self, record: Record) -> None:
        slide_id = record["slide_id"]
        if slide_id not in self.records or self.records[slide_id]["time"] < record["time"]:
            self.records[slide_id] = record
            if record.get("settled"):
                self.settled.add(slide_id)

    def forget_settled(self) -> None:
        """Count only slides that are settled from now on."""
        self.update()
        self.settled = set()

    def record(self, slide_id: str) -> Record:
        """The last record of a slide that was read; its state is ``waiting`` if there is none."""
        return {**WAITING, **self.records.get(slide_id, {})}

    def claim_path(self, slide_id: str, number: int) -> Path:
        return path_inside(self.folder / "claims", f"{slide_id}.{number}")

    def claims(self, of: str | None = None) -> dict[str, dict[int, str]]:
        """Per slide the numbers and owners of its claims; of all slides, or only of one."""
        claims: dict[str, dict[int, str]] = {}
        folder = self.folder / "claims"
        for path in folder.iterdir() if folder.is_dir() else ():
            slide_id, number = slide_and_number(path)
            if slide_id and of in (None, slide_id):
                with file_may_be_gone():  # its owner released it meanwhile
                    claims.setdefault(slide_id, {})[number] = _owner_of(path)
        return claims

    def claims_of(self, slide_id: str) -> dict[int, str]:
        """Owner by number of the claims of one slide."""
        return self.claims(slide_id).get(slide_id, {})

    def held(self, now: float) -> dict[str, str]:
        """Slides that a living worker has claimed, and its name.

        Parameters
        ----------
        now: the time by the clock of the file system.
        """
        newest = {slide_id: owners[max(owners)] for slide_id, owners in self.claims().items()}
        living = self.living(newest.values(), now)
        return {slide_id: owner for slide_id, owner in newest.items() if owner in living}

    def living(self, names: Iterable[str], now: float) -> set[str]:
        """Those of these workers that are alive; ``now`` as in :meth:`held`."""
        self.update()
        return {name for name in set(names) if self._is_alive(name, now)}

    def _is_alive(self, name: str, now: float) -> bool:
        heartbeat = None
        if name_fault(name):  # the owner of a claim that dasmil did not write
            return False
        with file_may_be_gone(), open(self.folder / f"{name}.jsonl", "rb") as file:
            # NFS asks its server for the time of an open file, not its cache
            heartbeat = os.fstat(file.fileno()).st_mtime
        if heartbeat is None or name in self._ended:
            return False
        process = self._introductions.get(name, {})
        if process.get("machine") == machine_name() and not is_running(
            process["pid"], process["started"]
        ):
            return False
        return now - heartbeat <= float(process.get("stale_after_s", STALE_AFTER_S))

    def describe(self, name: str) -> str:
        """The process and host of a worker, for messages."""
        process = self._introductions.get(name)
        return f"process {process['pid']} on {process['host']}" if process else "another process"

    def wants(self, name: str) -> Mapping[str, str]:
        """The settings that a worker wants all workers of the folder to share."""
        return dict(self._introductions.get(name, {}).get("wants", {}))

    def move_to_log(self, names: Iterable[str]) -> None:
        """Write the records of dead workers into ``log.jsonl`` and remove their files."""
        self.update()
        with atomic_path(self.folder / "log.jsonl") as temporary:
            lines = (json.dumps(self.records[slide_id]) for slide_id in sorted(self.records))
            temporary.write_text("\n".join(lines), encoding="utf-8")
        for name in names:
            (self.folder / f"{name}.owner").unlink(missing_ok=True)
            (self.folder / f"{name}.jsonl").unlink(missing_ok=True)

    def _added_entries(self, name: str) -> list[Record]:
        added = b""
        with file_may_be_gone(), open(self.folder / f"{name}.jsonl", "rb") as file:
            if name == "log":  # the whole file is replaced
                state = os.fstat(file.fileno())
                if self._log == (state.st_ino, state.st_mtime_ns):
                    return []
                self._log = (state.st_ino, state.st_mtime_ns)
            file.seek(0 if name == "log" else self._read_to.get(name, 0))
            added = file.read()
        *lines, last = added.split(b"\n")
        entries = [_parse(line) for line in lines]
        self._warn_skipped(name, [line for line, e in zip(lines, entries) if e is None])
        # the last line may be incomplete: then it is read again
        entries.append(_parse(last))
        length = sum(len(line) + 1 for line in lines) + (len(last) if entries[-1] else 0)
        self._read_to[name] = self._read_to.get(name, 0) + length
        return [entry for entry in entries if entry]

    def _warn_skipped(self, name: str, lines: Sequence[bytes]) -> None:
        if lines:
            warnings.warn(
                f"{self.folder / name}.jsonl: {len(lines)} line(s) are skipped, since dasmil did "
                f"not write them: {str(lines[0][:60])[1:]}",
                stacklevel=2,
            )


@contextmanager
def file_may_be_gone() -> Iterator[None]:
    """End the block if a file does not exist, or disappears while a network disk reads it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise


def slide_and_number(claim: Path) -> tuple[str, int]:
    """Slide and number of a claim; ``"", 0`` for other files, which systems such as NFS create."""
    slide_id, _, number = claim.name.rpartition(".")
    is_claim = number.isdecimal() and len(number) < 10 and claim.is_file()
    return (slide_id, int(number)) if is_claim else ("", 0)


def _owner_of(claim: Path) -> str:
    """The worker that created a claim; "" if it died before it signed, on a disk without links."""
    while not (owner := claim.read_text(errors="replace")):
        if time.time() - claim.stat().st_mtime >= SIGNED_AFTER_S:
            break
        time.sleep(0.05)
    return owner


def _parse(line: bytes) -> Record | None:
    """The entry of a line; empty for an empty or cut line, None if dasmil did not write the line.

    A worker that is killed, or whose disk is full, leaves a cut line.
    """
    try:
        entry = parse_json(line)
    except ValueError:
        return {} if CUT_LINE.fullmatch(line.strip()) else None
    is_known = isinstance(entry, dict) and (
        _is_introduction(entry) if "worker" in entry else "ended" in entry or _is_record(entry)
    )
    return entry if is_known else None


def _is_introduction(entry: Record) -> bool:
    wants, seconds = entry.get("wants", {}), entry.get("stale_after_s", STALE_AFTER_S)
    return (
        all(isinstance(entry.get(key), str) for key in ("worker", "host", "machine"))
        and type(entry.get("pid")) is int
        and 0 < entry["pid"] < 2**31
        and all(type(value) in (int, float) for value in (entry.get("started"), seconds))
        and isinstance(wants, dict)
        and all(isinstance(value, str) for value in wants.values())
    )


def _is_record(entry: Record) -> bool:
    """Whether all values are plain, and those that tables add up are numbers."""
    return (
        isinstance(entry.get("slide_id"), str)
        and isinstance(entry.get("state", ""), str)
        and type(entry.get("time")) in (int, float)
        and all(value is None or isinstance(value, str | int | float) for value in entry.values())
        and all(
            type(value) in (int, float, type(None))
            for key, value in entry.items()
            if key == "seconds" or key.startswith("tiles/")
        )
    )
