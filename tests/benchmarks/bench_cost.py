"""Time and memory from 1k to 256k tiles: straight lines, if the cost is linear.

``python tests/benchmarks/run.py --picture OUT.png`` draws them; ``measure`` says
the slope.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cases import THOUSAND, extra_memory, make_bag, make_model, training_step
from table import Row, seconds

from dasmil.bags import bag_graph

SIZES = tuple(THOUSAND * 4**power for power in range(5))  # 1k to 256k
WHAT = ("edges", "forward", "training step")


@dataclass(frozen=True)
class Cost:
    """Of one bag: seconds and MiB, each for edges, forward and training step."""

    num_tiles: int
    seconds: tuple[float, ...]
    memory: tuple[float, ...]


def costs(sizes: Sequence[int]) -> Iterator[Cost]:
    for size in sizes:
        bag = make_bag(size)
        graph = bag_graph(bag, 1)
        model = make_model("gather", dropout=True)

        @torch.inference_mode()
        def forward(model=model, graph=graph) -> None:  # type: ignore[no-untyped-def]
            model(graph)

        def edges(bag=bag) -> None:  # type: ignore[no-untyped-def]
            """On one core, as in a reading process."""
            cores = torch.get_num_threads()
            torch.set_num_threads(1)
            bag_graph(bag)
            torch.set_num_threads(cores)

        ways: list[Callable[[], object]] = [edges, forward, training_step(model, graph)]
        runs = 3 if size > 100_000 else 7
        taken = [seconds(way, runs=runs)[0] for way in ways]
        memory = [extra_memory(way) for way in ways]
        yield Cost(len(graph.features["x20"]), tuple(taken), tuple(memory))


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """p of cost ~ tiles^p, by least squares in the logarithms; 1 is linear."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def draw(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    found = list(costs(SIZES))
    sizes = [cost.num_tiles for cost in found]
    for axes, kind, unit in zip(figure.subplots(1, 2), ("seconds", "memory"), ("s", "MiB")):
        for number, name in enumerate(WHAT):
            values = [getattr(cost, kind)[number] for cost in found]
            line = axes.plot(sizes, values, "o-", label=name)[0]
            linear = [values[-1] * size / sizes[-1] for size in sizes]
            axes.plot(sizes, linear, ":", color=line.get_color(), linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="tiles of x20 in the bag", ylabel=unit)
        axes.set_title("time" if kind == "seconds" else "memory at the peak")
        axes.set_xticks(sizes, [f"{size // THOUSAND}k" for size in sizes], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].plot([], [], ":", color="grey", label="linear")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def measure(quick: bool) -> Iterator[Row]:
    found = list(costs(SIZES[:2] if quick else SIZES))
    big = [cost for cost in found if cost.num_tiles >= 4 * THOUSAND] or found
    for number, name in enumerate(WHAT):
        for kind, unit in (("seconds", "s"), ("memory", "MiB")):
            values = [max(getattr(cost, kind)[number], 1e-9) for cost in big]
            power = exponent([c.num_tiles for c in big], values) if len(big) > 1 else 1.0
            case = (
                f"{name}, {'time' if kind == 'seconds' else 'memory'} of {big[-1].num_tiles} tiles"
            )
            target = f"linear: measured tiles^{power:.2f}"
            yield Row("cost", case, unit, values[-1], target=target)
