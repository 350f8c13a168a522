"""Runs as processes: one after another or in parallel, ended together."""

import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import takewhile
from pathlib import Path

from filelock import FileLock, Timeout

from dasmil.files import write_text
from dasmil.sweep.runs import Run

Slots = queue.SimpleQueue[str | None]


def fit_and_test(runs: Sequence[Run], column: str, slots: Sequence[str | None]) -> bool:
    """Whether all runs are done; prints a line a run, with its figure of this column."""
    done = [run for run in runs if run.done]
    todo = [run for run in runs if run not in done]
    for count, run in enumerate(done, 1):
        print(f"[{count}/{len(runs)}] {run.name}: done before", flush=True)
    free: Slots = queue.SimpleQueue()
    for slot in slots:
        free.put(slot)
    with ThreadPoolExecutor(len(slots)) as pool, Children() as children:
        futures = [pool.submit(_fit_and_test, run, column, free, children) for run in todo]
        try:
            for count, future in enumerate(as_completed(futures), len(done) + 1):
                print(f"[{count}/{len(runs)}] {future.result()}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return all(run.done for run in runs)


def _fit_and_test(run: Run, column: str, free: Slots, children: "Children") -> str:
    """The line that says what became of the run."""
    start = time.monotonic()
    log = run.folder / "log.txt"
    run.folder.mkdir(parents=True, exist_ok=True)
    slot = free.get()
    try:
        with FileLock(run.folder / "run.lock", timeout=0):
            fit = [*run.fit(), *run.resume()]
            write_text(run.folder / "run.json", json.dumps(run.record(), indent=2))
            wrong = children.call(fit, log, slot) or children.call(run.test(), log, slot)
    except Timeout:
        wrong = "another sweep is at this run"
    finally:
        free.put(slot)
    if wrong:
        return f"{run.name}: failed: {wrong}; see {log}"
    value = run.figure(column)
    figure = "not defined" if value is None else f"{value:.3f}"
    return f"{run.name}: {column} {figure}, {time.monotonic() - start:.0f} s"


class Children:
    """Processes of dasmil; those that still run when the block is left are ended."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.ended = False
        self.lock = threading.Lock()

    def __enter__(self) -> "Children":
        if threading.current_thread() is threading.main_thread():
            # `kill` is as Ctrl-C
            self.before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.ended = True
            left = list(self.running)
        for child in left:
            child.terminate()
        for child in left:
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.before)

    def call(self, arguments: Sequence[str], log: Path, gpu: str | None) -> str:
        """Run a verb, its output at the end of the log; what went wrong, or nothing."""
        environment = {**os.environ, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})}
        with open(log, "ab") as file:
            file.write(f"$ python -m dasmil {shlex.join(arguments)}\n".encode())
            file.flush()
            start = file.tell()
            with self.lock:
                if self.ended:
                    return "stopped"
                child = subprocess.Popen(
                    [sys.executable, "-m", "dasmil", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
                self.running.add(child)
            code = child.wait()
            with self.lock:
                self.running.discard(child)
        return last_error(log.read_bytes()[start:].decode(errors="replace"), code) if code else ""


def last_error(said: str, code: int) -> str:
    """The last line that names an error, with the indented lines that belong to it."""
    lines = said.splitlines()
    for index in reversed(range(len(lines))):
        if "error:" in lines[index].lower():
            more = takewhile(lambda line: line.startswith(" "), lines[index + 1 :])
            return " ".join(line.strip() for line in (lines[index], *more))
    return f"exit code {code}"


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES says, else what is in the machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in said.splitlines()))]


def gpu_slots(jobs: int, gpus: Sequence[str]) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each parallel run; None leaves the environment as it is."""
    if jobs == 1 or len(gpus) < 2:
        return [None] * jobs
    return [gpus[slot % len(gpus)] for slot in range(jobs)]
