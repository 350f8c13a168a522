"""Bags of any size, the models that are compared on them, and the memory of a step."""

import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from math import isqrt
from pathlib import Path

import torch
from bag_factory import make_card
from models import make_network, with_gatconv
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dasmil.bags import Bag, BagGraph, bag_graph
from dasmil.geometry import Extent, Tiles
from dasmil.methods.dasmil import DASMILNetwork, ObjectiveOptions, objective
from dasmil.nn.gat import GAT
from dasmil.units import Mpp, TilePx, parse_scales

WIDTH = 384
THOUSAND = 1024


def grids(num_tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """A square of x20 tiles in the order of their parents: grids of x10 and x20, parents."""
    side = isqrt(num_tiles // 4)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    coarse = torch.stack([rows.flatten(), columns.flatten()], dim=1)  # (N / 4, 2)
    inner = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    fine = (coarse[:, None] * 2 + inner).flatten(0, 1)  # (N, 2)
    parent = torch.arange(len(coarse)).repeat_interleave(4)
    return coarse.int(), fine.int(), parent.int()


def make_bag(num_tiles: int, width: int = WIDTH, slide_id: str = "slide") -> Bag:
    """About ``num_tiles`` x20 tiles, without a hole, and a fourth as many of x10; float16."""
    generator = torch.Generator().manual_seed(0)
    coarse, fine, parent = grids(num_tiles)
    tiles = Tiles(
        slide_id=slide_id,
        extent=Extent((200_000, 200_000), Mpp(0.5)),
        scales=parse_scales(["x10", "x20"]),
        tile_px=TilePx(256),
        grid={"x10": coarse.numpy(), "x20": fine.numpy()},
        parent={"x20": parent.numpy()},
    )
    features = {
        "x10": torch.randn(len(coarse), width, generator=generator).half(),
        "x20": torch.randn(len(fine), width, generator=generator).half(),
    }
    return Bag(tiles, features, {scale: make_card(width) for scale in ("x10", "x20")})


def make_graph(num_tiles: int, label: int = 1) -> BagGraph:
    return bag_graph(make_bag(num_tiles), label)


class ProjectionOnly(GAT):
    """The layer with the neighbour sum left out: what remains is the limit of any sum."""

    def _attend(self, x: Tensor, neighbours: object) -> Tensor:
        conv = self.conv
        projected = conv.lin(x).view(-1, conv.heads, conv.out_channels)
        return projected.mean(1) + conv.bias


def make_model(kind: str, dropout: bool = False, device: str = "cpu") -> DASMILNetwork:
    """The default model with the layer ``gather``, ``gatconv`` or ``projection`` (the limit)."""
    torch.manual_seed(0)
    rates = {} if dropout else {"attention_dropout": 0.0, "node_dropout": 0.0}
    model = make_network({"x10": WIDTH, "x20": WIDTH}, **rates)
    if kind == "gatconv":
        with_gatconv(model)
    if kind == "projection":
        for module in model.modules():
            if isinstance(module, GAT):
                module.__class__ = ProjectionOnly
    return model.to(device)


def training_step(model: DASMILNetwork, graph: BagGraph) -> Callable[[], None]:
    """Forward, losses, backward; gradients are thrown away."""
    options = ObjectiveOptions()

    def step() -> None:
        model.zero_grad()
        output = model(graph)
        total, _ = objective(output, graph.parent, graph.ptr, graph.labels, options)
        total.mean().backward()
        if graph.labels.is_cuda:
            torch.cuda.synchronize()

    return step


def extra_memory(step: Callable[[], object], device: str = "cpu") -> float:
    """MiB of tensors at the peak of the step, beside those there were before it.

    As torch's allocator counts them, on the CPU by its profiler: the same at every run.
    """
    step()  # gradients and the like are made once
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(accumulate((size for _, size in events), initial=0)) / 2**20
