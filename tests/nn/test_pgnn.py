"""The PGNN against its parts put together by hand, for one, two and three scales."""

from dataclasses import replace

import pytest
import torch
from bag_factory import make_bag, make_graphs, neighbours_by_search, union_by_search
from torch import Tensor
from torch_geometric.nn import GATConv

from dasmil.bags import Bag, bag_graph, join_graphs
from dasmil.nn import PGNN

SCALES = [("x20",), ("x5", "x20"), ("x2.5", "x10", "x20")]
DIMS = {"x2.5": 3, "x5": 4, "x10": 6, "x20": 5}
HIDDEN, OUT, HEADS = 7, 8, 3


def make_pgnn(scales: tuple[str, ...], node_dropout: float = 0.0) -> PGNN:
    torch.manual_seed(0)
    dims = {scale: DIMS[scale] for scale in scales}
    return PGNN(dims, HIDDEN, OUT, HEADS, attention_dropout=0.0, node_dropout=node_dropout)


def make(scales: tuple[str, ...], num_tiles: int = 30, seed: int = 0) -> Bag:
    return make_bag("a", scales, {s: DIMS[s] for s in scales}, num_tiles, side=10, seed=seed)


def edge_tensor(pairs: list[tuple[int, int]]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T


def copy_of(weights: dict[str, Tensor], prefix: str, in_dim: int, out_dim: int) -> GATConv:
    """A fresh GATConv as the method has it, with the weights of one of the PGNN's."""
    conv = GATConv(in_dim, out_dim, HEADS, concat=False, negative_slope=0.2, add_self_loops=True)
    conv.load_state_dict(
        {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    )
    return conv


@pytest.mark.parametrize("scales", SCALES)
def test_it_is_one_gat_a_scale_and_one_on_their_union(scales: tuple[str, ...]) -> None:
    pgnn, bag = make_pgnn(scales).eval(), make(scales)
    weights = pgnn.state_dict()
    hidden = []
    for scale in scales:
        prefix = f"scale_gats.{scale.replace('.', '_')}.conv."
        conv = copy_of(weights, prefix, DIMS[scale], HIDDEN)
        neighbours = edge_tensor(neighbours_by_search(bag.grid[scale]))
        hidden.append(conv(bag.features[scale].float(), neighbours))
    union = copy_of(weights, "union_gat.conv.", HIDDEN, OUT)
    expected = union(torch.cat(hidden), edge_tensor(union_by_search(bag)))

    found = pgnn(bag_graph(bag))
    assert tuple(found) == scales
    assert {s: len(h) for s, h in found.items()} == bag.num_tiles()
    torch.testing.assert_close(torch.cat(list(found.values())), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scales", SCALES)
def test_it_holds_no_other_weights(scales: tuple[str, ...]) -> None:
    """W, a_src, a_dst and a bias for each of the M + 1 layers."""
    widths = [(DIMS[scale], HIDDEN) for scale in scales] + [(HIDDEN, OUT)]
    expected = sum(HEADS * out * (in_dim + 2) + out for in_dim, out in widths)
    assert sum(p.numel() for p in make_pgnn(scales).parameters()) == expected


@pytest.mark.parametrize("scales", SCALES)
def test_every_weight_learns(scales: tuple[str, ...]) -> None:
    pgnn = make_pgnn(scales)
    torch.cat(list(pgnn(bag_graph(make(scales))).values())).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pgnn.parameters())


@pytest.mark.parametrize("scales", SCALES)
def test_a_bag_without_tiles_passes(scales: tuple[str, ...]) -> None:
    found = make_pgnn(scales)(bag_graph(make(scales, num_tiles=0)))
    assert {scale: h.shape for scale, h in found.items()} == dict.fromkeys(scales, (0, OUT))


def test_batched_bags_give_what_they_give_alone() -> None:
    scales = SCALES[-1]
    pgnn = make_pgnn(scales).eval()
    graphs = make_graphs((12, 0, 1, 30), scales=scales, dims=DIMS)
    together = pgnn(join_graphs(graphs))
    alone = [pgnn(graph) for graph in graphs]
    for scale in scales:
        expected = torch.cat([h[scale] for h in alone])
        torch.testing.assert_close(together[scale], expected, rtol=0, atol=1e-5)


def test_a_tile_is_felt_by_its_parent_and_not_by_far_tiles() -> None:
    """Two layers: a fine tile reaches its neighbours' parents, and nothing beyond."""
    bag = make(("x5", "x20"), num_tiles=12, seed=3)
    pgnn = make_pgnn(("x5", "x20")).eval()
    features = {**bag.features, "x20": bag.features["x20"].clone()}
    features["x20"][0] += 1
    before, after = pgnn(bag_graph(bag)), pgnn(bag_graph(replace(bag, features=features)))

    edges = neighbours_by_search(bag.grid["x20"])
    near = {0} | {j for i, j in edges if i == 0}
    reached = {int(bag.parent["x20"][tile]) for tile in near}
    changed = (before["x5"] != after["x5"]).any(dim=1).nonzero().squeeze(1)
    assert set(changed.tolist()) == reached
    assert len(reached) < len(before["x5"])


def test_node_dropout_acts_in_training_only() -> None:
    graph = bag_graph(make(("x5", "x20")))
    plain, dropping = make_pgnn(("x5", "x20")), make_pgnn(("x5", "x20"), node_dropout=0.5)
    assert torch.equal(plain.eval()(graph)["x20"], dropping.eval()(graph)["x20"])
    assert not torch.equal(plain.train()(graph)["x20"], dropping.train()(graph)["x20"])


def test_node_dropout_acts_in_both_layers() -> None:
    """With all nodes dropped no tile is felt by another, at its own scale or the other."""
    bag = make(("x5", "x20"))
    pgnn = make_pgnn(("x5", "x20"), node_dropout=1.0).train()
    features = {**bag.features, "x20": bag.features["x20"].clone()}
    features["x20"][0] += 1
    before, after = pgnn(bag_graph(bag)), pgnn(bag_graph(replace(bag, features=features)))
    assert torch.equal(before["x5"], after["x5"])
    assert (before["x20"] != after["x20"]).any(dim=1).nonzero().tolist() == [[0]]
