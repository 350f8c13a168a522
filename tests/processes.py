"""Commands with two processes on the CPU (gloo)."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

TWO = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
FORKED = str(Path(__file__).with_name("forked.py"))
FIRST_PORT, NUM_PORTS = 10_000, 20_000  # below the ports that systems hand out themselves


def _free_ports() -> Iterator[int]:
    """Ports that no process listens to, from a place that is this process's own.

    A port that the system hands out as free may be handed to another test before it is used.
    """
    for number in count(97 * os.getpid()):
        port = FIRST_PORT + number % NUM_PORTS
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) != 0:
                yield port


_PORTS = _free_ports()


def run_in_two(arguments: Iterable[object], code: int = 0, forked: bool = False) -> str:
    """Run a command in two processes; returns what it prints, or its errors if it must fail.

    Parameters
    ----------
    code: its expected exit code; if it is another one, its output is shown.
    forked: torch is imported once, by ``forked.py``; otherwise they start as a user starts them.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(next(_PORTS))}
    environment["MASTER_ADDR"] = "127.0.0.1"
    program = [FORKED] if forked else ["-m", "dasmil"]
    command = [sys.executable, *program, *map(str, arguments), *TWO]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    assert "sync_dist" not in done.stderr and "\r" not in done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith(("warning: ", "error: "))]
    assert len(set(said)) == len(said), done.stderr
    return done.stderr if code else done.stdout
