"""The status of a cohort: one row per slide, from its files and the records of the workers."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dasmil.errors import InputError, escape_controls
from dasmil.names import name_fault
from dasmil.tables import write_csv
from dasmil.work.board import WAITING, Board

MAX_NAMED = 10  # slides per state that a summary names
STATES = ("done", "empty", "failed", "not tiled", "running", "waiting")


@dataclass
class Status:
    """The state of every slide.

    ``done`` and ``empty`` (no tile) slides have a file, ``failed`` ones a reason, and ``running``
    ones a living worker. All others are ``waiting``.

    Parameters
    ----------
    folder: the output of the verb.
    slide_ids: the cohort, in its order.
    columns: of the table, between ``state`` and ``seconds``.
    path: returns the file of a slide.
    describe: returns the row of a file that no worker has recorded.
    """

    folder: Path
    slide_ids: Sequence[str]
    columns: Sequence[str]
    path: Callable[[str], Path]
    describe: Callable[[Path], Mapping[str, Any]]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._board = Board(self.folder)
        self._described: dict[str, Mapping[str, Any]] = {}
        self._paths = {s: self.path(s) for s in self.slide_ids if not name_fault(s)}

    @property
    def table(self) -> Path:
        return self.folder / "status.csv"

    def update(self) -> list[dict[str, Any]]:
        """Read files and records again, and return the rows."""
        board = self._board
        running = board.held(time.time())
        files = self._files()
        self.rows = []
        for slide_id in self.slide_ids:
            row = board.record(slide_id)
            if slide_id in running:
                row = {"state": "running", "message": board.describe(running[slide_id])}
            elif str(self._paths.get(slide_id)) in files:
                if row["state"] == "waiting":  # its worker was killed before it recorded the slide
                    row = dict(self._describe(slide_id))
            elif row["state"] in ("done", "empty"):
                row = {**WAITING, "message": "its file is gone; the next run re-creates it"}
            self.rows.append({**row, "slide_id": slide_id})
        return self.rows

    def write(self) -> None:
        """Write ``status.csv`` if a row has changed."""
        columns = ["slide_id", "state", *self.columns, "seconds", "message"]
        before, rows = self.rows, self.update()
        if rows == before and self.table.exists():
            return
        write_csv(self.table, columns, ({c: _cell(r.get(c)) for c in columns} for r in rows))

    def summary(self, verb: str) -> str:
        """A line per slide that is not done, then a line with the number of slides per state."""
        return "\n".join([*self.complaints(), self.counts(verb)])

    def counts(self, verb: str) -> str:
        num_slides = Counter(row["state"] for row in self.rows)
        named = [s for s in STATES if num_slides[s] or s == "done"]
        words = [f"{num_slides[state]} {state}" for state in named]
        if not num_slides["failed"]:
            words.append("0 failed")
        return f"{verb}: {', '.join(words)}; see {self.table}"

    def complaints(self) -> Iterator[str]:
        """A line per warning and per slide that is not done, at most ten per state."""
        warnings = [row for row in self.rows if row.get("warning")]
        yield from self._named("warning", warnings, "warning")
        for state in STATES[1:-1]:
            yield from self._named(state, [row for row in self.rows if row["state"] == state])

    @staticmethod
    def _named(
        kind: str, rows: Sequence[Mapping[str, Any]], column: str = "message"
    ) -> Iterator[str]:
        for row in rows[:MAX_NAMED]:
            yield escape_controls(f"{kind}: {row['slide_id']}: {row.get(column) or ''}").rstrip(
                ": "
            )
        if len(rows) > MAX_NAMED:
            yield f"{kind}: and {len(rows) - MAX_NAMED} more"

    def _files(self) -> set[str]:
        """One listing: checking files one by one is slow on network file systems."""
        folders = {path.parent for path in self._paths.values()}
        return {file.path for folder in folders if folder.is_dir() for file in os.scandir(folder)}

    def _describe(self, slide_id: str) -> Mapping[str, Any]:
        if slide_id not in self._described:
            try:
                self._described[slide_id] = self.describe(self._paths[slide_id])
            except InputError as error:
                self._described[slide_id] = {**WAITING, "message": str(error)}
        return self._described[slide_id]


def _cell(value: Any) -> Any:
    return escape_controls(value) if isinstance(value, str) else value
