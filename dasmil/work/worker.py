"""A process that shares the slides of a cohort with others, on this machine or on any other.

All that the processes know of each other are files in ``FOLDER/work``:

==================================== =============================================================
``<worker>.jsonl``                    who it is, then one line for every slide that it settled; the
                                      time of the file is its heartbeat
``<worker>.owner``                    its name
``claims/<slide_id>.<number>``        a slide that it works on: a hard link to ``<worker>.owner``
``log.jsonl``                         the lines of workers that have ended
==================================== =============================================================

A link is made whole, and only where nothing of its name is: a file system grants a claim to one
process alone. The claim of a worker that died is left where it lies: who takes over makes the next
number. A claim never says that a slide is done: whoever has claimed one looks at its file first.
"""

import errno
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from dasmil.errors import DiskFullError
from dasmil.files import atomic_path, left_behind, link_once, said_when_full
from dasmil.json_text import parse_json
from dasmil.names import name_fault, path_inside

HEARTBEAT_S = 5.0
STALE_AFTER_S = 120.0  # network file systems may show a file's time a minute late
SIGNED_AFTER_S = 2.0  # a claim; with hard links at once
CUT_LINE = re.compile(rb"(\{.*)?", re.DOTALL)

Record = dict[str, Any]


class Worker:
    """Claims slides of a folder, and tells what became of them.

    Use it as a context; a thread beats for it meanwhile.

    Parameters
    ----------
    folder: what all workers share, the output of the verb.
    stale_after_s: silence after which others take this worker for dead.
    on_beat: called again and again by a thread of its own, and once at the end.
    wants: what all workers of the folder must have the same, as text; see :meth:`refused_by`.
    """

    def __init__(
        self,
        folder: Path,
        stale_after_s: float = STALE_AFTER_S,
        on_beat: Callable[[], None] | None = None,
        wants: Mapping[str, str] | None = None,
    ):
        self.folder = folder
        self.stale_after_s = stale_after_s
        self.on_beat = on_beat
        self.wants = dict(wants or {})
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.path = folder / "work" / f"{self.name}.jsonl"
        self.board = Board(folder)
        self._owner = self.path.with_suffix(".owner")
        self._mine: dict[str, int] = {}  # slide → number of the claim
        self._ended, self._told = threading.Event(), threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._teller = threading.Thread(target=self._tell, name="status", daemon=True)

    def __enter__(self) -> "Worker":
        with said_when_full(self.path):
            (self.folder / "work" / "claims").mkdir(parents=True, exist_ok=True)
        self._introduce()
        self.board.ignore_what_is_known()
        self._clear_away()
        self._heart.start()
        self._teller.start()
        return self

    def _introduce(self) -> None:
        """Fails if the folder was removed: what was written into it before is lost."""
        with said_when_full(self.path):
            about = {"worker": self.name, "stale_after_s": self.stale_after_s, "wants": self.wants}
            self._append({**about, **_this_process()})
            self._owner.write_text(self.name)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._told.set()
        self._teller.join()
        for slide_id in list(self._mine):
            self.release(slide_id)
        # On a full disk there is no room to say that this worker has ended: that it is seen no more
        # says so, too, and the error on its way is to be heard.
        try:
            with suppress(OSError, DiskFullError) if kind is not None else nullcontext():
                if self.on_beat is not None:
                    self.on_beat()
                if not self._clear_away(also_own=True):
                    self._append({"ended": True})
                    self._owner.unlink(missing_ok=True)
        finally:
            self._ended.set()
            self._heart.join()

    def claim(self, slide_id: str) -> bool:
        """Whether the slide is this worker's now; not when another one that lives has it."""
        claims = self.board.claims(slide_id).get(slide_id, {})
        number = max(claims, default=0)
        if number and self.board.living([claims[number]], self._now()):
            return False
        path = self._claim(slide_id, number + 1)
        if not self._owner.exists():  # it was taken for dead, and cleared away
            self._introduce()
        try:
            link_once(self._owner, path)
        except FileExistsError:
            owner = ""
            with _may_be_gone():
                owner = path.read_text()
            if owner != self.name:  # a network may repeat what it has done
                return False  # another one was faster, and may be done already
        self._mine[slide_id] = number + 1
        return True

    def still_holds(self, slide_id: str) -> bool:
        """False when others took this worker for dead, and one of them took over."""
        claims = self.board.claims(slide_id).get(slide_id, {})
        return bool(claims) and claims[max(claims)] == self.name

    def release(self, slide_id: str) -> None:
        """Give a claim back: the slide is settled, or left to others."""
        own = self._mine.pop(slide_id)
        claims = self.board.claims(slide_id).get(slide_id, {})
        for number in sorted(claims, reverse=True):
            if number < own or claims[number] == self.name:  # the lower ones are of the dead
                self._claim(slide_id, number).unlink(missing_ok=True)

    def settle(self, slide_id: str, record: Mapping[str, Any]) -> None:
        """Write down what became of a claimed slide, and give it back."""
        self._append({"slide_id": slide_id, "time": self._now(), "settled": True, **record})
        self.release(slide_id)

    def note(self, slide_id: str, record: Mapping[str, Any]) -> None:
        """Write down what is known of a slide, once; it is not settled by this."""
        known = self.last(slide_id)
        if any(known.get(key) != value for key, value in record.items()):
            self._append({"slide_id": slide_id, "time": self._now(), **record})

    def last(self, slide_id: str) -> Record:
        """What was last written down of a slide; of one that nobody has come to, that it waits."""
        return {"state": "waiting", **self.board.records.get(slide_id, {})}

    def claimed(self) -> list[str]:
        """The slides that this worker holds."""
        return list(self._mine)

    def others(self) -> list[str]:
        """Other workers that live."""
        living = self.board.living(self.board.workers(), self._now())
        return sorted(living - {self.name})

    def refused_by(self, what: str) -> str | None:
        """A worker that lives, came before this one, and wants another ``what``; in words.

        Of two that begin together and want different things one goes on: both know the other.
        """
        for name in self.others():
            if self.board.wants(name).get(what) != self.wants.get(what) and self._was_before(name):
                return self.board.where(name)
        return None

    def _was_before(self, name: str) -> bool:
        """By the times of their names' files; one that has none yet may have looked before this."""
        with _may_be_gone():
            theirs = (self.folder / "work" / f"{name}.owner").stat().st_mtime_ns
            return (theirs, name) < (self._owner.stat().st_mtime_ns, self.name)
        return True

    def is_settled(self, slide_id: str) -> bool:
        """Whether a worker, this one or another, has settled it since this one began."""
        self.board.update()
        return slide_id in self.board.settled

    def held_by_others(self) -> dict[str, str]:
        """Slides that another living worker has claimed, and its name."""
        held = self.board.held(self._now())
        return {slide_id: owner for slide_id, owner in held.items() if slide_id not in self._mine}

    def _claim(self, slide_id: str, number: int) -> Path:
        return path_inside(self.folder / "work" / "claims", f"{slide_id}.{number}")

    def _append(self, entry: Mapping[str, Any]) -> None:
        """A line of its own, whatever a full disk has left of the line before."""
        with said_when_full(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(entry))

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            with suppress(OSError):  # where the folder is lost, the work itself fails, and says so
                os.utime(self.path)

    def _tell(self) -> None:
        pause = HEARTBEAT_S
        said = set()
        while not self._told.wait(pause):
            start = time.monotonic()
            try:
                if self.on_beat is not None:
                    self.on_beat()
            except Exception as error:  # the work goes on, and it is tried again
                if str(error) not in said:
                    print(f"the status was not written: {error}", file=sys.stderr)
                said.add(str(error))
            pause = max(HEARTBEAT_S, 20 * (time.monotonic() - start))  # a large cohort less often

    def _now(self) -> float:
        """The time of the machine that keeps the files, by which all heartbeats are judged."""
        with suppress(FileNotFoundError):
            os.utime(self.path)
            return self.path.stat().st_mtime
        return time.time()

    def _clear_away(self, also_own: bool = False) -> bool:
        """Where no other worker lives: half-written files, old claims; lines become one file.

        What is removed has been listed before it was asked who lives, so it is nothing that one
        who comes meanwhile has begun: a worker is seen before it writes anything else.
        """
        folders = [self.folder, *(p for p in self.folder.iterdir() if p.is_dir())]
        rests = [path for folder in folders for path in left_behind(folder)]
        claims = list((self.folder / "work" / "claims").iterdir())
        logs = self.board.workers()
        if self.others():
            return False
        for path in rests + [p for p in claims if self._is_not_mine(p)]:
            path.unlink(missing_ok=True)
        self.board.fold([name for name in logs if also_own or name != self.name])
        return True

    def _is_not_mine(self, claim: Path) -> bool:
        parts = _parts(claim)
        return parts is not None and self._mine.get(parts[0]) != parts[1]


class Board:
    """What the files of ``FOLDER/work`` say.

    Files of workers only grow, so each is read on from where it was read to.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "work"
        self.records: dict[str, Record] = {}  # the last of each slide
        self.settled: set[str] = set()  # since ignore_what_is_known
        self._about: dict[str, Record] = {}  # worker → its first line
        self._ended: set[str] = set()
        self._read_to: dict[str, int] = {}
        self._log: tuple[int, int] | None = None  # the state of log.jsonl that has been read

    def workers(self) -> list[str]:
        """Names of all that have a file, dead or alive."""
        if not self.folder.is_dir():
            return []
        files = [path for path in self.folder.glob("*.jsonl") if path.is_file()]
        names = [path.name.removesuffix(".jsonl") for path in files]
        return [name for name in names if name != "log" and not name.startswith(".")]

    def update(self) -> None:
        """Read the lines that have been added."""
        for name in ["log", *self.workers()]:
            for entry in self._added_lines(name):
                self._take(name, entry)

    def ignore_what_is_known(self) -> None:
        self.update()
        self.settled = set()

    def claims(self, of: str | None = None) -> dict[str, dict[int, str]]:
        """Per slide the numbers of its claims and their owners; of one slide, or of all."""
        found: dict[str, dict[int, str]] = {}
        folder = self.folder / "claims"
        for path in folder.iterdir() if folder.is_dir() else ():
            parts = _parts(path)
            if parts is not None and of in (None, parts[0]):
                with _may_be_gone():  # given back meanwhile
                    owner = _owner_of(path)
                    found.setdefault(parts[0], {})[parts[1]] = owner
        return found

    def held(self, now: float) -> dict[str, str]:
        """Slides that a living worker has claimed, and its name; ``now`` as in :meth:`living`."""
        newest = {slide_id: found[max(found)] for slide_id, found in self.claims().items()}
        living = self.living(newest.values(), now)
        return {slide_id: owner for slide_id, owner in newest.items() if owner in living}

    def living(self, names: Iterable[str], now: float) -> set[str]:
        """Those of these workers that beat.

        Parameters
        ----------
        now: the time by the clock of the file system.
        """
        self.update()
        return {name for name in set(names) if self._lives(name, now)}

    def _lives(self, name: str, now: float) -> bool:
        beat = None
        if name_fault(name):  # of a claim that no worker of dasmil has signed
            return False
        with _may_be_gone(), open(self.folder / f"{name}.jsonl", "rb") as file:
            beat = os.fstat(file.fileno()).st_mtime  # of an open file it is asked of the server
        if beat is None or name in self._ended:
            return False
        about = self._about.get(name, {})
        if about.get("machine") == _machine() and not _runs(about["pid"], about["started"]):
            return False
        return now - beat <= float(about.get("stale_after_s", STALE_AFTER_S))

    def where(self, name: str) -> str:
        """A worker in words."""
        about = self._about.get(name, {})
        return f"process {about['pid']} on {about['host']}" if about else "another process"

    def wants(self, name: str) -> Mapping[str, str]:
        """What a worker wants all to have the same."""
        return dict(self._about.get(name, {}).get("wants", {}))

    def fold(self, names: Iterable[str]) -> None:
        """Put the lines of dead workers into ``log.jsonl``, and remove their files."""
        self.update()
        with atomic_path(self.folder / "log.jsonl") as temporary:
            lines = (json.dumps(self.records[slide_id]) for slide_id in sorted(self.records))
            temporary.write_text("\n".join(lines), encoding="utf-8")
        for name in names:
            (self.folder / f"{name}.owner").unlink(missing_ok=True)
            (self.folder / f"{name}.jsonl").unlink(missing_ok=True)

    def _added_lines(self, name: str) -> list[Record]:
        added = b""
        with _may_be_gone(), open(self.folder / f"{name}.jsonl", "rb") as file:
            if name == "log":  # it is replaced as a whole
                state = os.fstat(file.fileno())
                if self._log == (state.st_ino, state.st_mtime_ns):
                    return []
                self._log = (state.st_ino, state.st_mtime_ns)
            file.seek(0 if name == "log" else self._read_to.get(name, 0))
            added = file.read()
        *lines, last = added.split(b"\n")
        entries = [_parse(line) for line in lines]
        self._say_skipped(name, [line for line, e in zip(lines, entries) if e is None])
        # the last line may be half there: then it is read again
        entries.append(_parse(last))
        length = sum(len(line) + 1 for line in lines) + (len(last) if entries[-1] else 0)
        self._read_to[name] = self._read_to.get(name, 0) + length
        return [entry for entry in entries if entry]

    def _say_skipped(self, name: str, lines: Sequence[bytes]) -> None:
        if lines:
            warnings.warn(
                f"{self.folder / name}.jsonl: {len(lines)} line(s) are skipped, since no worker of "
                f"dasmil wrote them: {str(lines[0][:60])[1:]}",
                stacklevel=2,
            )

    def _take(self, name: str, entry: Record) -> None:
        if "worker" in entry:
            self._about[name] = entry
        elif "ended" in entry:
            self._ended.add(name)
        else:
            known = self.records.get(entry["slide_id"])
            if known is None or known["time"] < entry["time"]:
                self.records[entry["slide_id"]] = entry
                if entry.get("settled"):
                    self.settled.add(entry["slide_id"])


@contextmanager
def _may_be_gone() -> Iterator[None]:
    """Ends the block where a file is not there, or goes while a network file system reads it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise


def _parts(claim: Path) -> tuple[str, int] | None:
    """Slide and number of a claim; None of a file that the system put there, as NFS does."""
    slide_id, _, number = claim.name.rpartition(".")
    is_claim = number.isdecimal() and len(number) < 10 and claim.is_file()
    return (slide_id, int(number)) if is_claim else None


def _owner_of(claim: Path) -> str:
    """Who made a claim; "" where its maker died before it signed, on a disk without links."""
    while not (owner := claim.read_text(errors="replace")):
        if time.time() - claim.stat().st_mtime >= SIGNED_AFTER_S:
            break
        time.sleep(0.05)
    return owner


def _parse(line: bytes) -> Record | None:
    """The record of a line; empty for an empty or a cut line, None for what is no record.

    A worker that is killed, or whose disk is full, leaves a line that is cut off.
    """
    try:
        entry = parse_json(line)
    except ValueError:
        return {} if CUT_LINE.fullmatch(line.strip()) else None
    known = isinstance(entry, dict) and (
        _is_introduction(entry) if "worker" in entry else "ended" in entry or _is_settlement(entry)
    )
    return entry if known else None


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


def _is_settlement(entry: Record) -> bool:
    """What became of a slide: plain values, and numbers where tables count on them."""
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


@lru_cache(maxsize=1)
def _machine() -> str:
    """What two processes share exactly when each can see whether the other runs."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))  # a container sees its own only
    return " ".join(parts)


def _this_process() -> Record:
    started = psutil.Process().create_time()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": started,
    }


def _runs(pid: int, started: float) -> bool:
    """Whether this very process runs, and no later one with its number."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < 5  # it drifts with the clock
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
