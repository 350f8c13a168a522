"""How long a command takes to answer at all."""

import subprocess
import sys
from collections.abc import Iterator

from table import Row, seconds


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True, capture_output=True)


def measure(quick: bool) -> Iterator[Row]:
    for question in ("--help",) if quick else ("--help", "tile --help", "import --help"):
        ours, torch, python = seconds(
            lambda q=question: run("-m", "dasmil", *q.split()),
            lambda: run("-c", "import torch"),
            lambda: run("-c", "pass"),
            runs=1 if quick else 5,
        )
        yield Row(
            "start-up",
            f"python -m dasmil {question}",
            "s",
            ours,
            torch,
            "import torch",
            python,
            "Python itself",
            "< 1 s" if question == "--help" else "",
        )
