"""Slides per second of a training step, with 1, 4 and 16 slides in it."""

from collections.abc import Iterator

import torch
from cases import THOUSAND, make_graph, make_model, training_step
from table import Row, seconds

from dasmil.bags import join_graphs


def measure(quick: bool) -> Iterator[Row]:
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for num_tiles in (256,) if quick else (256, 3 * THOUSAND):
            model = make_model("gather", dropout=True, device=device)
            graph = make_graph(num_tiles)
            sizes = (1, 4, 16)
            batches = [join_graphs([graph] * size).to(device) for size in sizes]
            steps = [training_step(model, batch) for batch in batches]
            taken = seconds(*steps, runs=1 if quick else 5)
            rates = [size / each for size, each in zip(sizes, taken, strict=True)]
            for size, rate in zip(sizes, rates, strict=True):
                tiles = len(graph.features["x20"])
                yield Row(
                    "batches",
                    f"training, {size} slide(s) of {tiles} tiles a step, {device}",
                    "slides/s",
                    rate,
                    None if size == 1 else rates[0],
                    "1 slide a step",
                    more_is_better=True,
                )
