"""Plant each mutant of ``mutants.md`` in a copy of the repository and run its tests.

    python tests/mutants.py [PATTERN]

PATTERN limits the run to the rows that contain it. A row names a file, a piece of its code that
occurs once, what replaces it, the test files that must fail, and the test that failed first; this
program fills in the last column. It ends with the survivors: each shows a missing test.
"""

import importlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".md")
PARTS = ("dasmil", "tests", "configs", "pyproject.toml")
PYTEST = [
    "-q",
    "-x",
    "-p",
    "no:xdist",
    "-p",
    "no:cacheprovider",
    "-o",
    "addopts=",
    "-m",
    "not slow",
]
SURVIVED = "none"


@dataclass(frozen=True)
class Mutant:
    """One row of the table."""

    file: str
    old: str
    new: str
    tests: str
    killed_by: str

    @classmethod
    def parse(cls, line: str) -> "Mutant":
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        file, old, new, tests, killed_by = (cell.replace("\\|", "|") for cell in cells)
        return cls(file, old.strip("`"), new.strip("`"), tests, killed_by)

    def __str__(self) -> str:
        codes = (f"`{code}`".replace("|", "\\|") for code in (self.old, self.new))
        return f"| {' | '.join([self.file, *codes, self.tests, self.killed_by])} |"

    def test_files(self) -> list[str]:
        return [f"tests/{name}" for name in self.tests.split()]

    def plant(self, repository: Path) -> None:
        """Replace the code in a copy of the repository; raises ValueError unless it occurs once."""
        path = repository / self.file
        code = path.read_text()
        if code.count(self.old) != 1:
            raise ValueError(f"{self.file}: {self.old} occurs {code.count(self.old)} times")
        path.write_text(code.replace(self.old, self.new))


def read_mutants() -> list[Mutant]:
    """All rows of the table."""
    return [Mutant.parse(line) for line in TABLE.read_text().splitlines() if _is_row(line)]


def _is_row(line: str) -> bool:
    return line.startswith("| dasmil/")


def run_tests(arguments: Sequence[str], repository: Path) -> tuple[int, str]:
    """Exit code and output of pytest in a fork of this process, which has imported torch."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.chdir(repository)
            sys.path[0] = str(repository)  # instead of the folder of this file
            sys.dont_write_bytecode = True
            code = pytest.main([*PYTEST, *arguments])
            sys.stdout.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()


def first_failure(mutant: Mutant, repository: Path) -> str:
    """The name of the first test that fails under a mutant, or ``none``."""
    original = (repository / mutant.file).read_text()
    mutant.plant(repository)
    try:
        known = [] if mutant.killed_by in ("", SURVIVED) else [["-k", mutant.killed_by]]
        for selection in [*known, []]:  # first the test that failed before, then all
            code, output = run_tests([*selection, *mutant.test_files()], repository)
            failure = re.search(r"^(?:FAILED|ERROR) \S+?(?:::(\w+)|$|\s)", output, re.MULTILINE)
            if code == 1 and failure:
                return failure[1] or "import"
            if code not in (0, 1, 5):
                raise RuntimeError(f"pytest could not run:\n{output}")
        return SURVIVED
    finally:
        (repository / mutant.file).write_text(original)


def run(pattern: str = "") -> list[Mutant]:
    """Run all mutants whose row contains the pattern; returns the survivors."""
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in PARTS:
            source = REPOSITORY / part
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, copy / part, ignore=ignored)
            else:
                shutil.copy(source, copy / part)
        for mutant in read_mutants():
            if pattern not in str(mutant):
                continue
            result = replace(mutant, killed_by=first_failure(mutant, copy))
            print(result, flush=True)
            _write_row(mutant, result)
            if result.killed_by == SURVIVED:
                survivors.append(result)
    return survivors


def _write_row(mutant: Mutant, result: Mutant) -> None:
    lines = TABLE.read_text().splitlines()
    rows = [str(result) if _is_row(x) and Mutant.parse(x) == mutant else x for x in lines]
    TABLE.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    for heavy in ("lightning.pytorch", "matplotlib.figure", "timm", "torch_geometric.nn"):
        importlib.import_module(heavy)  # once for all mutants
    alive = run(*sys.argv[1:])
    print(f"{len(alive)} survivors", *alive, sep="\n")
    sys.exit(bool(alive))
