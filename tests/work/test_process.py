"""A child process answers task by task; its death costs one task, its parent's death ends it."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from dasmil.work.process import ChildProcess


def double_or_die(task: int) -> int:
    if task == 0:
        os.kill(os.getpid(), signal.SIGSEGV)
    if task < 0:
        raise ValueError(f"negative: {task}")
    return 2 * task


@pytest.fixture
def child():
    process = ChildProcess(double_or_die)
    yield process
    process.kill()


def ask(child: ChildProcess, task: int) -> int:
    child.begin(task)
    return child.result()


def test_results_and_errors_come_back(child: ChildProcess) -> None:
    assert ask(child, 3) == 6
    with pytest.raises(ValueError, match="negative: -1"):
        ask(child, -1)
    assert ask(child, 4) == 8


def test_a_dead_process_is_reported_and_replaced(child: ChildProcess) -> None:
    assert ask(child, 3) == 6
    with pytest.raises(EOFError, match=f"by signal {signal.SIGSEGV}"):
        ask(child, 0)
    assert ask(child, 4) == 8


PARENT = """
import time
from dasmil.work.process import ChildProcess
if __name__ == "__main__":
    child = ChildProcess(time.sleep)
    child.begin(60)
    print(child.process.pid, flush=True)
    time.sleep(60)
"""


def test_the_death_of_the_parent_ends_it_in_the_middle_of_a_task(tmp_path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    time.sleep(1.0)  # its task has begun
    parent.kill()
    parent.wait()
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    pytest.fail("the child goes on without its parent")


def test_a_death_between_two_tasks_costs_none(child: ChildProcess) -> None:
    assert ask(child, 3) == 6
    os.kill(child.process.pid, signal.SIGKILL)  # as by the system where memory is short
    child.process.join()
    assert ask(child, 4) == 8
