"""Run the steps of a sweep as processes, one after another or in parallel."""

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
    """Run the steps that are not done, and print one line per step.

    A step starts as soon as the steps that it needs are done. If a step fails, the steps that need
    it fail for the same reason; the others go on.

    Parameters
    ----------
    steps: each after the steps that it needs; of those that could start, the first one does.
    column: metric that is printed per run.
    slots: environments; as many steps run at the same time.
    """
    waiting = [step for step in steps if not step.done]
    num_reported = 0

    def report(step: Step, what: str) -> None:
        nonlocal num_reported
        num_reported += 1
        print(f"[{num_reported}/{len(steps)}] {step.name}: {what}", flush=True)

    for step in steps:
        if step not in waiting:
            report(step, "done before")
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
                    report(step, f"failed: {reason}")
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
                reason = future.result()
                if reason:
                    failed[step] = f"{step.name}: {reason}"
                    report(step, f"failed: {reason}")
                else:
                    report(step, f"{step.outcome(column)}, {time.monotonic() - start:.0f} s")


def _do(step: Step, slot: Slot, children: "Children") -> str:
    """Run one step; returns the reason if it fails, else ""."""
    log = step.folder / "log.txt"
    step.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(step.folder / LOCK, timeout=0):
            write_text(step.folder / "run.json", json.dumps(step.record(), indent=2))
            for arguments in step.commands():
                reason = children.call(arguments, log, slot)
                if reason:
                    return f"{reason}; see {log}"
            write_text(step.mark, "all its processes have succeeded\n")
    except Timeout:
        return "another sweep is running this step"
    return ""


class Children:
    """Child processes of dasmil; leaving the block ends those that still run."""

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
        """Run a verb and append its output to the log; returns the reason if it fails, else ""."""
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


def last_error(output: str, code: int) -> str:
    """The last line of the output that names an error, with the indented lines below it.

    ``tile`` and ``embed`` report a failed slide as ``failed: <slide_id>: <reason>``.
    """
    lines = output.splitlines()
    for index in reversed(range(len(lines))):
        if re.search("error:|^failed: ", lines[index], re.IGNORECASE):
            more = takewhile(lambda line: line.startswith(" "), lines[index + 1 :])
            return " ".join(line.strip() for line in (lines[index], *more))
    return f"exit code {code}"


def gpus() -> list[str]:
    """The GPUs in CUDA_VISIBLE_DEVICES if it is set, else those of the machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    output = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in output.splitlines()))]


def make_slots(jobs: int, gpus: Sequence[str], num_cores: int) -> list[Slot]:
    """The environment of each parallel step: one GPU and a share of the cores.

    Otherwise every process would start one thread per core, and the threads would wait for each
    other. OMP_NUM_THREADS is kept if it is set. A single job may use everything.
    """
    if jobs == 1:
        return [{}]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, num_cores // jobs)))
    slots = [{"OMP_NUM_THREADS": threads} for _ in range(jobs)]
    if len(gpus) > 1:
        for number, slot in enumerate(slots):
            slot["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return list(slots)
