"""Our figures before and after a change: two checkouts in turn, without peers.

    python tests/benchmarks/paired.py OTHER_CHECKOUT --only tile edges --pairs 5

Each benchmark runs in a process of its own, in this checkout and in the other one, so that a noisy
machine hits both alike. The table has the median of the ratios; below 1 this checkout is better.
"""

import argparse
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve()
ALL_OURS = ("bags", "batches", "cost")  # every timed way is ours; elsewhere the first one alone
Key = tuple[str, str, str, bool]  # area, case, unit, whether more is better


def measure_ours(name: str) -> None:
    """Print the rows of a benchmark of the current folder's checkout as JSON."""
    sys.path[:0] = [str(Path("tests/benchmarks").resolve()), str(Path("tests").resolve())]
    import table

    def seconds(*ways: Callable[[], object], runs: int = 3, **_: object) -> list[float]:
        return [
            _median(way, runs) if name in ALL_OURS or not n else 1 for n, way in enumerate(ways)
        ]

    table.seconds = seconds
    for row in importlib.import_module(f"bench_{name}").measure(quick=False):
        print(json.dumps([row.area, row.case, row.unit, row.more_is_better, row.ours]), flush=True)


def _median(way: Callable[[], object], runs: int) -> float:
    way()
    taken = []
    for _ in range(runs):
        gc.collect()
        start = time.perf_counter()
        way()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def rows_of(checkout: Path, name: str) -> Iterator[tuple[Key, float]]:
    command = [sys.executable, str(HERE), "--measure", name]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    run = subprocess.run(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    for line in run.stdout.splitlines():
        if line.startswith("["):
            *key, value = json.loads(line)
            yield tuple(key), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, nargs="?", help="checkout of the version before")
    parser.add_argument("--only", nargs="+", default=["startup", "edges", "bags", "tile"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure_ours(options.measure)
        return
    if options.other is None:
        parser.error("give the checkout of the version before")
    checkouts = {"after": HERE.parents[2], "before": options.other.resolve()}
    found: dict[Key, dict[str, list[float]]] = {}
    for name in options.only:
        for pair in range(options.pairs):
            for version in sorted(checkouts, reverse=bool(pair % 2)):
                for key, value in rows_of(checkouts[version], name):
                    found.setdefault(key, {}).setdefault(version, []).append(value)
    print("| | | before | after | after / before |\n| --- | --- | ---: | ---: | ---: |")
    for (area, case, unit, more_is_better), of in found.items():
        if set(of) != set(checkouts):
            continue  # a row of one version alone
        ratios = [a / b for a, b in zip(of["after"], of["before"])]
        ratio = statistics.median(1 / r if more_is_better else r for r in ratios)
        before, after = (statistics.median(of[version]) for version in ("before", "after"))
        print(f"| {area} | {case} | {before:.4g} {unit} | {after:.4g} {unit} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
