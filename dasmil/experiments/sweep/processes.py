"""Steps as processes: one after another or in parallel, ended together."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import takewhile
from pathlib import Path

from filelock import FileLock, Timeout

from dasmil.experiments.sweep.steps import LOCK, Step
from dasmil.files import write_text

Slot = Mapping[str, str]  # environment variables of a process, beside those of the sweep


def do_steps(steps: Sequence[Step], column: str, slots: Sequence[Slot]) -> None:
    """Do what is not done, each step as soon as what it needs is; prints a line a step.

    A step that fails takes those along that need it, with its reason; the others go on.

    Parameters
    ----------
    steps: each after what it needs; of those that could begin, the first one does.
    column: whose figure of each run is printed.
    slots: as many steps are done at the same time.
    """
    waiting = [step for step in steps if not step.done]
    num_said = 0

    def say(step: Step, what: str) -> None:
        nonlocal num_said
        num_said += 1
        print(f"[{num_said}/{len(steps)}] {step.name}: {what}", flush=True)

    for step in steps:
        if step not in waiting:
            say(step, "done before")
    free = list(slots)
    running: dict[Future[str], tuple[Step, Slot, float]] = {}
    failed: dict[Step, str] = {}
    with ThreadPoolExecutor(len(slots)) as pool, Children() as children:
        while True:
            for step in list(waiting):
                reason = next((failed[need] for need in step.needs if need in failed), "")
                if reason:
                    waiting.remove(step)
                    failed[step] = reason
                    say(step, f"failed: {reason}")
                elif free and all(need.done for need in step.needs):
                    waiting.remove(step)
                    slot = free.pop(0)
                    future = pool.submit(_do, step, slot, children)
                    running[future] = step, slot, time.monotonic()
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                step, slot, start = running.pop(future)
                free.append(slot)
                wrong = future.result()
                if wrong:
                    failed[step] = f"{step.name}: {wrong}"
                    say(step, f"failed: {wrong}")
                else:
                    say(step, f"{step.outcome(column)}, {time.monotonic() - start:.0f} s")


def _do(step: Step, slot: Slot, children: "Children") -> str:
    """What went wrong, or nothing."""
    log = step.folder / "log.txt"
    step.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(step.folder / LOCK, timeout=0):
            write_text(step.folder / "run.json", json.dumps(step.record(), indent=2))
            for arguments in step.commands():
                wrong = children.call(arguments, log, slot)
                if wrong:
                    return f"{wrong}; see {log}"
            write_text(step.mark, "all its processes have ended well\n")
    except Timeout:
        return "another sweep is at this"
    return ""


class Children:
    """Processes of dasmil; those that still run when the block is left are ended."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.ended = False
        self.lock = threading.Lock()

    def __enter__(self) -> "Children":
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

    def call(self, arguments: Sequence[str], log: Path, slot: Slot) -> str:
        """Run a verb, its output at the end of the log; what went wrong, or nothing."""
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
                    env={**os.environ, **slot},
                )
                self.running.add(child)
            code = child.wait()
            with self.lock:
                self.running.discard(child)
        return last_error(log.read_bytes()[start:].decode(errors="replace"), code) if code else ""


def last_error(said: str, code: int) -> str:
    """The last line that names an error, with the indented lines that belong to it.

    ``tile`` and ``embed`` name a slide that failed so: ``failed: <slide_id>: <why>``.
    """
    lines = said.splitlines()
    for index in reversed(range(len(lines))):
        if re.search("error:|^failed: ", lines[index], re.IGNORECASE):
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


def make_slots(jobs: int, gpus: Sequence[str], num_cores: int) -> list[Slot]:
    """The environment of each parallel step: a GPU of its own, its share of the cores.

    Without a share, each process would start a thread for every core, and they would wait for each
    other. OMP_NUM_THREADS is left as it is where it is set; one step at a time may use everything.
    """
    if jobs == 1:
        return [{}]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, num_cores // jobs)))
    slots = [{"OMP_NUM_THREADS": threads} for _ in range(jobs)]
    if len(gpus) > 1:
        for number, slot in enumerate(slots):
            slot["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return list(slots)
