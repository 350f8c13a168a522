"""Every benchmark, one table: ``python tests/benchmarks/run.py``.

Each benchmark is a module ``bench_<name>.py`` beside this file with
``measure(quick: bool) -> Iterable[Row]``, and runs in a process of its own.
"""

import argparse
import importlib
import multiprocessing
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]  # also in the processes that are spawned

from table import Row, markdown  # noqa: E402

PACKAGES = ("torch", "torch-geometric", "lightning", "lightly", "openslide-python", "safetensors")


def measured(name: str, quick: bool) -> list[Row]:
    rows = []
    for row in importlib.import_module(f"bench_{name}").measure(quick):
        print(markdown([row]).splitlines()[-1], file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def machine() -> str:
    """What the figures were made on."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    cores = multiprocessing.cpu_count()
    return (
        f"{_processor()}, {cores} cores, {device}; Python {platform.python_version()}, {versions}"
    )


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(args: Sequence[str] | None = None) -> int:
    names = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    parser.add_argument("--quick", action="store_true", help="tiny inputs: does it run at all?")
    parser.add_argument("--picture", type=Path, help="draw the cost from 1k to 256k tiles, no more")
    options = parser.parse_args(args)
    if options.picture is not None:
        importlib.import_module("bench_cost").draw(options.picture)
        return 0

    rows: list[Row] = []
    context = multiprocessing.get_context("spawn")
    for name in options.only:
        with ProcessPoolExecutor(1, context) as pool:  # may have reading processes of its own
            rows += pool.submit(measured, name, options.quick).result()
    text = f"{markdown(rows)}\n\n{machine()}\n"
    print(text)
    if options.output is not None:
        options.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
