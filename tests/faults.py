"""Runs a command of dasmil again and again, each time killed at another of its file operations.

``python faults.py SEED KILLS LAST REFERENCE COMMAND...``: forks a process for each run, so that
torch is imported once. Every change of the file system counts as a point; a run is killed (SIGKILL)
before the point that was drawn (of the first LAST ones), and in the middle where it writes a
safetensors file. After each kill all files that have their final name must have the bytes of the
reference, and in the end so must all files.
"""

import contextlib
import io
import os
import random
import signal
import sys
import time
from multiprocessing import Pipe
from pathlib import Path

import torch

import dasmil.embedding.embed  # here, since each forked run would take seconds to import it
import dasmil.slides.tile
from dasmil.bags import store
from dasmil.cli import main
from dasmil.slides import tile_table

torch.set_num_threads(1)

CHANGES = ("replace", "link", "unlink", "fsync", "mkdir", "utime")
VARYING = ("status.csv", "work/")  # of their bytes nothing is promised


class InThisProcess:
    """Stands in for a child process: what it does is counted, too."""

    def __init__(self, function):
        self.function = function
        self.connection, self._answers = Pipe()

    def begin(self, task):
        self.task, self.begun = task, time.monotonic()
        self._answers.send(self.function(task))

    def seconds(self):
        return time.monotonic() - self.begun

    def result(self):
        return self.connection.recv()

    def kill(self):
        self.connection.close()


class Points:
    """Counts the changes of files, and ends the process at one of them."""

    def __init__(self, last: int):
        self.left = last

    def pass_one(self, half=lambda: None):
        self.left -= 1
        if self.left == 0:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        for name in CHANGES:
            setattr(os, name, self._watched(getattr(os, name)))
        for module in (store, tile_table):
            module.save_file = self._watched_save(module.save_file)

    def _watched(self, function):
        def watched(*args, **kwargs):
            self.pass_one()
            return function(*args, **kwargs)

        return watched

    def _watched_save(self, save_file):
        def watched(tensors, path, *args):
            def half():
                save_file(tensors, path, *args)
                os.truncate(path, Path(path).stat().st_size // 2)

            self.pass_one(half)
            return save_file(tensors, path, *args)

        return watched


def run(args: list[str], kill_at: int) -> int:
    """The exit code of a run, negative when it was killed."""
    pid = os.fork()
    if pid == 0:
        dasmil.slides.tile.ChildProcess = InThisProcess
        Points(kill_at).watch()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = main(args)
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def promised(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: b for name, b in files.items() if not name.startswith(VARYING)}


def check_whole(folder: Path, reference: dict[str, bytes]) -> None:
    for name, found in promised(contents(folder)).items():
        if ".tmp" not in name:
            assert found == reference[name], f"{name} is not whole"


if __name__ == "__main__":
    seed, kills, last, reference, *args = sys.argv[1:]
    random.seed(int(seed))
    output = Path(args[args.index("--output") + 1])
    wanted = promised(contents(Path(reference)))
    codes = []
    for _ in range(int(kills)):
        codes.append(run(args, kill_at=random.randint(1, int(last))))
        check_whole(output, wanted)
    codes += [run(args, kill_at=10**9) for _ in range(2)]  # the second has nothing to do
    assert codes[-2:] == [0, 0], codes
    found = contents(output)
    assert promised(found) == wanted, sorted(promised(found).keys() ^ wanted.keys())
    assert [n for n in found if n.startswith("work/")] == ["work/log.jsonl"], sorted(found)
    print(codes.count(-signal.SIGKILL))
