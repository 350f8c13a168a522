"""Every benchmark runs, on tiny inputs; what it measures there means nothing."""

import importlib
from math import isfinite
from pathlib import Path

import pytest

from dasmil.bags import bag_graph, write_bag
from dasmil.bags.store import step_bytes

FOLDER = Path(__file__).parent / "benchmarks"
QUICK = ("bench_edges",)
NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in sorted(path.stem for path in FOLDER.glob("bench_*.py"))
]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_yields_rows(name: str) -> None:
    from table import markdown

    rows = list(importlib.import_module(name).measure(quick=True))
    assert rows
    for row in rows:
        figures = [value for value in (row.ours, row.peer, row.limit) if value is not None]
        assert all(isfinite(value) and value >= 0 for value in figures), row
    assert len(markdown(rows).splitlines()) == len(rows) + 2


def test_gains_are_those_of_a_rate_or_of_a_time() -> None:
    from table import Row, markdown

    faster = Row("a", "time", "ms", 2.0, 6.0, "peer", 1.0, "limit")
    more = Row("a", "rate", "tiles/s", 6.0, 2.0, "peer", 8.0, "limit", more_is_better=True)
    assert (faster.gain, faster.of_limit) == (3.0, 2.0)
    assert (more.gain, more.of_limit) == (3.0, 0.75)
    assert "| 2 ms | 6 (peer) | 3.00 × | 1 (limit) | 2.00 |" in markdown([faster])


@pytest.mark.parametrize("width", [384, pytest.param(1536, marks=pytest.mark.slow)])
def test_the_memory_of_a_training_step_is_what_a_cache_leaves_free(
    tmp_path: Path, width: int
) -> None:
    """Of the default model: no more, and no less than half."""
    from cases import extra_memory, make_bag, training_step
    from models import make_network

    bag = make_bag(4096, width)
    write_bag(tmp_path / "slide.safetensors", bag)
    model = make_network({"x10": width, "x20": width})
    step = training_step(model, bag_graph(bag, 1))
    share = extra_memory(step) * 2**20 / step_bytes(tmp_path / "slide.safetensors")
    assert 0.5 < share < 1
