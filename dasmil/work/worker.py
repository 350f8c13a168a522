"""A process that shares the slides of a cohort with others, on this machine or on any other.

:mod:`dasmil.work.board` describes the files by which the processes know each other.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil

from dasmil.errors import DiskFullError
from dasmil.files import link_once, list_unfinished, report_full_disk
from dasmil.work.board import STALE_AFTER_S, Board, Record, file_may_be_gone, slide_and_number
from dasmil.work.process import machine_name

HEARTBEAT_S = 5.0

Item = TypeVar("Item")


class Worker:
    """Claim slides of a folder, and record their states.

    Use it as a context manager; meanwhile one thread keeps its heartbeat and another one writes the
    status.

    Parameters
    ----------
    folder: what all workers share, the output of the verb.
    stale_after_s: silence after which other workers take this one for dead.
    write_status: called repeatedly by the status thread, and once at the end.
    wants: settings that all workers of the folder must share, as text; see :meth:`refused_by`.
    """

    def __init__(
        self,
        folder: Path,
        stale_after_s: float = STALE_AFTER_S,
        write_status: Callable[[], None] | None = None,
        wants: Mapping[str, str] | None = None,
    ):
        self.folder = folder
        self.stale_after_s = stale_after_s
        self.write_status = write_status
        self.wants = dict(wants or {})
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.path = folder / "work" / f"{self.name}.jsonl"
        self.board = Board(folder)
        self._owner = self.path.with_suffix(".owner")
        self._claims: dict[str, int] = {}  # slide → number of this worker's claim
        self._stop_heartbeat, self._stop_status = threading.Event(), threading.Event()
        self._heartbeat_thread = threading.Thread(
            target=self._keep_heartbeat, name="heartbeat", daemon=True
        )
        self._status_thread = threading.Thread(target=self._keep_status, name="status", daemon=True)

    def __enter__(self) -> "Worker":
        with report_full_disk(self.path):
            (self.folder / "work" / "claims").mkdir(parents=True, exist_ok=True)
        self._introduce()
        self.board.forget_settled()
        self._clean_up()
        self._heartbeat_thread.start()
        self._status_thread.start()
        return self

    def _introduce(self) -> None:
        """Fail if the folder was removed: what this worker wrote into it is lost."""
        introduction = {
            "worker": self.name,
            "stale_after_s": self.stale_after_s,
            "wants": self.wants,
            "host": socket.gethostname(),
            "machine": machine_name(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
        }
        with report_full_disk(self.path):
            self._append(introduction)
            self._owner.write_text(self.name)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop_status.set()
        self._status_thread.join()
        for slide_id in list(self._claims):
            self.release(slide_id)
        # On a full disk this worker cannot record that it has ended. Others see it by the missing
        # heartbeat, and the error that ends the block must not be replaced.
        try:
            with suppress(OSError, DiskFullError) if kind is not None else nullcontext():
                if self.write_status is not None:
                    self.write_status()
                if not self._clean_up(with_own_files=True):
                    self._append({"ended": True})
                    self._owner.unlink(missing_ok=True)
        finally:
            self._stop_heartbeat.set()
            self._heartbeat_thread.join()

    def claim(self, slide_id: str) -> bool:
        """Claim a slide; False if another living worker has it."""
        owners = self.board.claims_of(slide_id)
        number = max(owners, default=0)
        if number and self.board.living([owners[number]], self._now()):
            return False
        path = self.board.claim_path(slide_id, number + 1)
        if not self._owner.exists():  # another worker took this one for dead and removed its files
            self._introduce()
        try:
            link_once(self._owner, path)
        except FileExistsError:
            # a network disk may repeat what it has done, so the claim may be this worker's
            if self.board.claims_of(slide_id).get(number + 1) != self.name:
                return False
        self._claims[slide_id] = number + 1
        return True

    def claim_next(
        self,
        waiting: deque[Item],
        slide_id_of: Callable[[Item], str],
        is_done: Callable[[Item], bool] = lambda item: False,
    ) -> Item | None:
        """Claim a slide from a queue and take it out; None if no slide can be claimed.

        Slides that other workers hold go to the end of the queue. Slides that are settled or done
        leave it.

        Parameters
        ----------
        slide_id_of: the slide_id of an item of the queue.
        is_done: whether the file of a slide that was claimed exists already.
        """
        held = self.held_by_others() if waiting else {}
        for _ in range(len(waiting)):
            item = waiting.popleft()
            slide_id = slide_id_of(item)
            if self.is_settled(slide_id):
                continue
            if slide_id in held or not self.claim(slide_id):
                waiting.append(item)
            elif self.is_settled(slide_id) or is_done(item):  # before it was claimed
                self.release(slide_id)
            else:
                return item
        return None

    def still_holds(self, slide_id: str) -> bool:
        """False if another worker took this one for dead and has claimed its slide."""
        owners = self.board.claims_of(slide_id)
        return bool(owners) and owners[max(owners)] == self.name

    def release(self, slide_id: str) -> None:
        """Give a claim back: the slide is settled, or left to other workers."""
        own = self._claims.pop(slide_id)
        for number, owner in sorted(self.board.claims_of(slide_id).items(), reverse=True):
            if number < own or owner == self.name:  # dead workers left the lower numbers
                self.board.claim_path(slide_id, number).unlink(missing_ok=True)

    def settle(self, slide_id: str, record: Mapping[str, Any]) -> None:
        """Record the state of a claimed slide, and release it."""
        self._append({"slide_id": slide_id, "time": self._now(), "settled": True, **record})
        self.release(slide_id)

    def note(self, slide_id: str, record: Mapping[str, Any]) -> None:
        """Record what is known of a slide, unless it is recorded; this does not settle it."""
        known = self.last_record(slide_id)
        if any(known.get(key) != value for key, value in record.items()):
            self._append({"slide_id": slide_id, "time": self._now(), **record})

    def last_record(self, slide_id: str) -> Record:
        """The last record of a slide that was read; its state is ``waiting`` if there is none."""
        return self.board.record(slide_id)

    def claimed(self) -> list[str]:
        """The slides that this worker holds."""
        return list(self._claims)

    def others(self) -> list[str]:
        """The names of the other living workers."""
        living = self.board.living(self.board.workers(), self._now())
        return sorted(living - {self.name})

    def refused_by(self, setting: str) -> str | None:
        """Describe a living worker that started earlier and wants another value of a setting.

        If two workers start together with different settings, exactly one proceeds: the one whose
        file is older.
        """
        for name in self.others():
            differs = self.board.wants(name).get(setting) != self.wants.get(setting)
            if differs and self._started_after(name):
                return self.board.describe(name)
        return None

    def _started_after(self, name: str) -> bool:
        """Compare the ages of the ``.owner`` files; a worker without one counts as older."""
        with file_may_be_gone():
            other = (self.folder / "work" / f"{name}.owner").stat().st_mtime_ns
            return (other, name) < (self._owner.stat().st_mtime_ns, self.name)
        return True

    def is_settled(self, slide_id: str) -> bool:
        """Whether any worker has settled a slide since this worker began."""
        self.board.update()
        return slide_id in self.board.settled

    def held_by_others(self) -> dict[str, str]:
        """Slides that other living workers have claimed, and the name of each."""
        held = self.board.held(self._now())
        return {slide_id: owner for slide_id, owner in held.items() if slide_id not in self._claims}

    def _append(self, entry: Mapping[str, Any]) -> None:
        """Begin a new line, whatever a full disk has left of the last one."""
        with report_full_disk(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(entry))

    def _keep_heartbeat(self) -> None:
        while not self._stop_heartbeat.wait(HEARTBEAT_S):
            with suppress(OSError):  # if the folder is lost, the work itself fails and reports it
                os.utime(self.path)

    def _keep_status(self) -> None:
        pause_s = HEARTBEAT_S
        reported = set()
        while not self._stop_status.wait(pause_s):
            start = time.monotonic()
            try:
                if self.write_status is not None:
                    self.write_status()
            except Exception as error:  # the work goes on, and the next attempt may succeed
                if str(error) not in reported:
                    print(f"the status was not written: {error}", file=sys.stderr)
                reported.add(str(error))
            pause_s = max(HEARTBEAT_S, 20 * (time.monotonic() - start))  # large cohorts less often

    def _now(self) -> float:
        """The time by the clock of the file system, to which all heartbeats are compared."""
        with suppress(FileNotFoundError):
            os.utime(self.path)
            return self.path.stat().st_mtime
        return time.time()

    def _clean_up(self, with_own_files: bool = False) -> bool:
        """Remove unfinished files and old claims, and move records of dead workers to the log.

        Nothing is removed, and False returned, if another worker is alive. The files are listed
        first: a worker that joins in between cannot own anything on the list, since it introduces
        itself before it writes anything else.
        """
        folders = [self.folder, *(p for p in self.folder.iterdir() if p.is_dir())]
        unfinished = [path for folder in folders for path in list_unfinished(folder)]
        claims = list((self.folder / "work" / "claims").iterdir())
        workers = self.board.workers()
        if self.others():
            return False
        for path in unfinished + [p for p in claims if not self._keeps(p)]:
            path.unlink(missing_ok=True)
        self.board.move_to_log([name for name in workers if with_own_files or name != self.name])
        return True

    def _keeps(self, claim: Path) -> bool:
        slide_id, number = slide_and_number(claim)
        return not slide_id or self._claims.get(slide_id) == number
