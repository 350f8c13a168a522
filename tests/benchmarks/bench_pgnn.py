"""The training step of DAS-MIL: gathered neighbour sums against GATConv and against none at all."""

from collections.abc import Callable, Iterator

import torch
from cases import THOUSAND, extra_memory, make_graph, make_model, training_step
from table import Row, seconds

PEER, LIMIT = "GATConv", "no neighbour sum"
KINDS = ("gather", "gatconv", "projection")


def measure(quick: bool) -> Iterator[Row]:
    sizes = (THOUSAND,) if quick else (16 * THOUSAND, 64 * THOUSAND)
    for num_tiles in sizes:
        yield from measure_on("cpu", num_tiles, quick)
    if torch.cuda.is_available():
        for num_tiles in sizes if quick else (*sizes, 250 * THOUSAND):
            yield from measure_on("cuda", num_tiles, quick)
    if not quick:
        yield whole_training(250_000, "16 GiB GPU")


def measure_on(device: str, num_tiles: int, quick: bool) -> Iterator[Row]:
    graph = make_graph(num_tiles).to(device).in_dtype(torch.float32)
    tiles = f"{num_tiles // THOUSAND}k tiles, {device}"
    for dropout in (False, True):
        steps = [training_step(make_model(kind, dropout, device), graph) for kind in KINDS]
        if not fits(steps[1]):  # that of the peer
            del steps[1]
        runs = 1 if quick else 5 if num_tiles < 20_000 else 3
        ours, *peer, limit = seconds(*steps, runs=runs)
        times = "5 ×" if device == "cuda" else "3 ×"
        yield Row(
            "PGNN",
            f"training step, {tiles}" + (", default dropout" if dropout else ""),
            "ms",
            1e3 * ours,
            1e3 * peer[0] if peer else None,
            PEER,
            1e3 * limit,
            LIMIT,
            f"≥ {times} peer, ≤ 1.6 of the limit",
        )
        if not dropout and not quick:
            ours, *peer, limit = (extra_memory(step, device) for step in steps)
            yield Row(
                "PGNN",
                f"memory of the step, {tiles}",
                "MiB",
                ours,
                peer[0] if peer else None,
                PEER,
                limit,
                LIMIT,
                "≤ 1/4 of the peer",
            )


def fits(step: Callable[[], object]) -> bool:
    """Whether a step fits into the memory of the GPU."""
    try:
        step()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def whole_training(num_tiles: int, card: str) -> Row:
    """All tensors of a training of the default model with Adam on one huge bag, in float32.

    Counted on the CPU where there is no GPU; a GPU adds some hundred MiB for its context.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    graph = make_graph(num_tiles).to(device)
    model = make_model("gather", dropout=True, device=device)
    optimizer = torch.optim.Adam(model.parameters())
    learn = training_step(model, graph)

    def step() -> None:
        learn()
        optimizer.step()

    step()
    held = [*model.parameters(), *graph.features.values()]
    held += [p.grad for p in model.parameters() if p.grad is not None]
    held += [t for state in optimizer.state.values() for t in state.values()]
    for part in (*graph.neighbours.values(), graph.union):
        held += [part.ptr, part.index, part.reverse]
    resting = sum(tensor.nbytes for tensor in held) / 2**20
    return Row(
        "PGNN",
        f"memory of training on {num_tiles // 1000}k x20 tiles, float32",
        "MiB",
        resting + extra_memory(step, device),
        limit=16 * 1024,
        limit_is=card,
        target="fits",
    )
