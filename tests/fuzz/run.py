"""Give thousands of mutated files to the functions that read them, in processes that are watched.

``python tests/fuzz/run.py`` prints a Markdown table: 3,000 mutations of each kind of file, in about
an hour on two cores. ``--count`` takes fewer, ``--kind`` some kinds, ``--seed`` others.
"""

import argparse
import itertools
import logging
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fuzz.watch import Watch

HANG_S = 60.0
MEMORY_BYTES = 2 * 2**30  # that reading one file may take, beyond what the process had
TESTS = Path(__file__).parents[1]


class Outcome(NamedTuple):
    """What became of a mutated file.

    Parameters
    ----------
    kind, number: which mutation it is.
    result: accepted, refused (a sentence), or what went wrong.
    detail: the sentence, or the traceback.
    """

    kind: str
    number: int
    result: str
    detail: str

    @property
    def is_wrong(self) -> bool:
        return self.result not in ("accepted", "refused")


def fuzz(tasks: Sequence[tuple[str, int]], seed: int, folder: Path) -> Iterator[Outcome]:
    """The outcome of each of these mutations; a child process that dies or hangs is replaced.

    Parameters
    ----------
    tasks: kind of file and number of the mutation; those of a kind lie side by side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    waiting = list(tasks)
    while waiting:
        ours, theirs = context.Pipe()
        arguments = (theirs, list(waiting), seed, folder)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        limit = 10 * HANG_S  # for the imports
        while waiting:
            if not ours.poll(limit):
                yield Outcome(*waiting.pop(0), "hang", f"more than {HANG_S:g} s")
                break
            try:
                outcome = Outcome(*ours.recv())
            except EOFError:
                process.join()
                yield Outcome(*waiting.pop(0), "died", f"exit code {process.exitcode}")
                break
            limit = HANG_S
            waiting.pop(0)
            yield outcome
        process.kill()
        process.join()


def _serve(connection: Connection, tasks: list[tuple[str, int]], seed: int, folder: Path) -> None:
    sys.path.insert(0, str(TESTS))
    import torch

    from fuzz.kinds import KINDS
    from fuzz.watch import Watch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    tempfile.tempdir = str(folder / "tmp")
    Path(tempfile.tempdir).mkdir(exist_ok=True)
    watch = Watch([folder])
    for name, group in itertools.groupby(tasks, key=lambda task: task[0]):
        place = folder / name.replace(" ", "_")
        sound, output = place / "sound", place / "output"
        for path in (sound, output):
            path.mkdir(parents=True, exist_ok=True)
        paths = KINDS[name].make(sound)
        contents = [path.read_bytes() for path in paths]
        for path in paths:
            KINDS[name].read(path, output)  # all that is sound is accepted
        before = _peak_bytes()
        for _, number in group:
            rng = random.Random(f"{name} {seed} {number}")
            which = rng.randrange(len(paths))
            path = place / paths[which].name  # a table of another name would be refused at once
            path.write_bytes(KINDS[name].mutate(contents[which], rng))
            result, detail = _try(watch, lambda: KINDS[name].read(path, output))  # noqa: B023
            if [path.read_bytes() for path in paths] != contents:
                result = "changed another file"
            if (grown := _peak_bytes() - before) > MEMORY_BYTES:
                result, detail = "memory", f"{grown / 2**30:.1f} GB; {detail}"
                before += grown
            connection.send((name, number, result, detail))


def _try(watch: "Watch", read: Callable[[], None]) -> tuple[str, str]:
    """The result of reading a file, and its sentence or traceback."""
    from dasmil.errors import InputError

    result, detail = "accepted", ""
    watch.is_on = True
    try:
        read()
    except InputError as error:
        result, detail = "refused", str(error)
    except Exception as error:
        result, detail = type(error).__name__, traceback.format_exc()
    watch.is_on = False
    if watch.told:
        result, detail = watch.told[0].split(":")[0], "; ".join(watch.told)
        watch.told.clear()
    return result, detail


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    sys.path.insert(0, str(TESTS))
    from fuzz.kinds import KINDS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000, help="mutations of each kind")
    parser.add_argument("--kind", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("| kind of file | tried | accepted | refused by a sentence | wrong | seconds |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    wrong = 0
    for kind in arguments.kind:
        start, found = time.monotonic(), Counter[str]()
        tasks = [(kind, number) for number in range(arguments.count)]
        with tempfile.TemporaryDirectory() as folder:
            for outcome in fuzz(tasks, arguments.seed, Path(folder)):
                found["wrong" if outcome.is_wrong else outcome.result] += 1
                if outcome.is_wrong:
                    print(
                        f"{kind} {outcome.number}: {outcome.result}\n{outcome.detail}",
                        file=sys.stderr,
                        flush=True,
                    )
        wrong += found["wrong"]
        cells = [kind, found.total(), *(found[n] for n in ("accepted", "refused", "wrong"))]
        cells.append(f"{time.monotonic() - start:.0f}")
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
