"""The edges of bags against search by brute force, and bags side by side."""

from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from bag_factory import (
    as_pairs,
    make_bag,
    make_graphs,
    neighbours_by_search,
    union_by_search,
)
from bags.orphans import without_first
from torch import Tensor

from dasmil.bags import UNKNOWN, BagGraph, Neighbours, bag_graph, join_graphs
from dasmil.bags.neighbours import grid_neighbours

SCALES = ("x2.5", "x5", "x20")  # ratios 2 and 4
DIMS = {"x2.5": 3, "x5": 4, "x20": 5}
SIZES = (15, 0, 1, 40)


def tensors(graph: BagGraph) -> dict[str, Tensor]:
    """All tensors of a graph by name."""
    found: dict[str, Tensor] = {}
    for field in fields(graph):
        value = getattr(graph, field.name)
        for scale, part in value.items() if isinstance(value, dict) else [("all", value)]:
            if isinstance(part, Neighbours):
                kinds = (("ptr", part.ptr), ("index", part.index), ("reverse", part.reverse))
                found |= {f"{field.name}/{scale}/{kind}": tensor for kind, tensor in kinds}
            elif isinstance(part, Tensor):
                found[f"{field.name}/{scale}"] = part
    return found


def equal(one: BagGraph, other: BagGraph) -> bool:
    ours, theirs = tensors(one), tensors(other)
    same_names = list(ours) == list(theirs) and one.slide_ids == other.slide_ids
    return same_names and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(1, 12), (12, 1), (9, 13)])
def test_neighbours_are_those_found_by_search(shape: tuple[int, int], share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    grid = (torch.rand(shape, generator=generator) <= share).nonzero().int()
    grid = grid[torch.randperm(len(grid), generator=generator)]
    edges = grid_neighbours(grid).edge_index()
    assert edges.dtype == torch.int64
    assert as_pairs(edges) == neighbours_by_search(grid)


@pytest.mark.parametrize("count", [0, 1])
def test_none_and_one_tile_have_no_edges(count: int) -> None:
    edges = grid_neighbours(torch.full((count, 2), 5, dtype=torch.int32)).edge_index()
    assert edges.shape == (2, 0)
    assert edges.dtype == torch.int64


def test_a_full_square_joins_every_pair_of_a_two_by_two_block() -> None:
    grid = torch.tensor([[4, 7], [4, 8], [5, 7], [5, 8]], dtype=torch.int32)
    assert as_pairs(grid_neighbours(grid).edge_index()) == [
        (i, j) for i in range(4) for j in range(4) if i != j
    ]


def test_the_ends_of_two_lines_are_no_neighbours() -> None:
    """Cells that would follow one another if the grid were one long line."""
    grid = torch.tensor([[0, 0], [0, 3], [1, 0], [1, 3], [2, 0]], dtype=torch.int32)
    assert as_pairs(grid_neighbours(grid).edge_index()) == [
        (0, 2),
        (1, 3),
        (2, 0),
        (2, 4),
        (3, 1),
        (4, 2),
    ]


def test_tiles_far_from_the_origin_and_from_one_another() -> None:
    far = 2_000_000_000
    grid = torch.tensor(
        [[far, far + 1500], [far + 1, far + 1501], [far + 1200, far], [far + 1201, far]],
        dtype=torch.int32,
    )
    assert as_pairs(grid_neighbours(grid).edge_index()) == [(0, 1), (1, 0), (2, 3), (3, 2)]


@pytest.mark.parametrize("num_tiles", [0, 1, 7, 60])
def test_the_union_is_that_found_by_search(num_tiles: int) -> None:
    bag = make_bag(scales=SCALES, dims=DIMS, num_tiles=num_tiles, seed=num_tiles)
    assert as_pairs(bag_graph(bag).union.edge_index()) == union_by_search(bag)


def test_the_graph_of_a_bag_has_its_content() -> None:
    bag = make_bag("a", SCALES, DIMS, num_tiles=30)
    graph = bag_graph(bag, 1)
    assert graph.scales == SCALES
    assert graph.slide_ids == ("a",)
    assert graph.num_bags == 1
    assert graph.labels.tolist() == [1]
    for name in SCALES:
        assert graph.features[name] is bag.features[name]  # as stored, float16
        assert as_pairs(graph.neighbours[name].edge_index()) == neighbours_by_search(bag.grid[name])
        assert graph.ptr[name].tolist() == [0, len(bag.grid[name])]
    for name in SCALES[1:]:
        assert graph.parent[name].dtype == torch.int64
        assert graph.parent[name].tolist() == bag.parent[name].tolist()


def test_a_slide_without_label_is_unknown() -> None:
    assert bag_graph(make_bag()).labels.tolist() == [UNKNOWN] == [-1]


def test_joined_graphs_are_the_single_ones_shifted() -> None:
    graphs = make_graphs(SIZES, labels=(1, 0, -1, 2), scales=SCALES, dims=DIMS)
    joined = join_graphs(graphs)
    assert joined.scales == SCALES
    assert joined.slide_ids == ("slide0", "slide1", "slide2", "slide3")
    assert joined.labels.tolist() == [1, 0, -1, 2]

    offsets = dict.fromkeys(SCALES, 0)
    edges: dict[str, list] = {name: [] for name in SCALES}
    parents: dict[str, list] = {name: [] for name in SCALES[1:]}
    boundaries = {name: [0] for name in SCALES}
    for graph in graphs:
        for coarser, name in zip((None, *SCALES), SCALES, strict=False):
            start = offsets[name]
            edges[name] += [
                (i + start, j + start) for i, j in as_pairs(graph.neighbours[name].edge_index())
            ]
            if coarser is not None:
                parents[name] += [row + offsets[coarser] for row in graph.parent[name].tolist()]
        for name in SCALES:
            rows = slice(offsets[name], offsets[name] + len(graph.features[name]))
            assert torch.equal(joined.features[name][rows], graph.features[name])
            offsets[name] = rows.stop
            boundaries[name].append(rows.stop)

    for name in SCALES:
        assert len(joined.features[name]) == offsets[name]
        assert as_pairs(joined.neighbours[name].edge_index()) == sorted(edges[name])
        assert joined.ptr[name].tolist() == boundaries[name]
    assert {name: rows.tolist() for name, rows in joined.parent.items()} == parents


def orphaned_graphs() -> list[BagGraph]:
    """Two of four bags have orphans, at both of the finer scales."""
    graphs = []
    for seed, (size, beheaded) in enumerate(((30, True), (0, False), (9, False), (40, True))):
        bag = make_bag(f"slide{seed}", SCALES, DIMS, num_tiles=size, seed=seed)
        if beheaded:
            bag = without_first(without_first(bag, "x2.5", 1), "x5", 2)
        graphs.append(bag_graph(bag))
    return graphs


def test_an_orphan_has_no_edge_to_another_scale() -> None:
    """In a single graph, and in joined ones, all others have theirs both ways."""
    single = orphaned_graphs()
    for graph in (*single, join_graphs(single)):
        starts = [0]
        for name in SCALES:
            starts.append(starts[-1] + len(graph.features[name]))
        scale_of = torch.repeat_interleave(torch.arange(3), torch.tensor(starts).diff())
        source, target = graph.union.edge_index()
        across = scale_of[source] != scale_of[target]
        expected = []
        for number, name in enumerate(SCALES[1:], start=1):
            for child, parent in enumerate(graph.parent[name].tolist()):
                if parent >= 0:
                    pair = (child + starts[number], parent + starts[number - 1])
                    expected += [pair, pair[::-1]]
        found = torch.stack([source, target])[:, across]
        assert as_pairs(found) == sorted(expected)


def test_orphans_stay_orphans_when_graphs_are_joined() -> None:
    graphs = orphaned_graphs()
    joined = join_graphs(graphs)
    for coarser, name in pairwise(SCALES):
        rows, start = [], 0
        for graph in graphs:
            rows += [-1 if r < 0 else r + start for r in graph.parent[name].tolist()]
            start += len(graph.features[coarser])
        assert joined.parent[name].tolist() == rows
        assert -1 in rows[len(graphs[0].parent[name]) :]  # also in the last bag
    in_steps = join_graphs([join_graphs(graphs[:2]), join_graphs(graphs[2:])])
    assert equal(in_steps, joined)


def test_a_bag_of_joined_graphs_is_the_bag_it_was() -> None:
    bags = [make_bag(f"s{n}", SCALES, DIMS, size, seed=n) for n, size in enumerate(SIZES)]
    bags.append(without_first(bags[-1], "x5", 1))
    joined = join_graphs([bag_graph(bag) for bag in bags])
    for number, expected in enumerate(bags):
        bag = joined.bag(number)
        bag.validate()
        assert bag.header == expected.header
        for kind in ("features", "grid", "parent"):
            ours, theirs = getattr(bag, kind), getattr(expected, kind)
            assert list(ours) == list(theirs)
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_is_given_features_of_its_own_precision() -> None:
    graph = bag_graph(make_bag("a", SCALES, DIMS)).in_dtype(torch.float32)
    for name in SCALES:
        assert graph.features[name].dtype == torch.float32
        assert graph.parent.get(name, graph.labels).dtype == torch.int64


def test_no_edge_joins_two_bags() -> None:
    joined = join_graphs(make_graphs(SIZES, scales=SCALES, dims=DIMS))
    bag_of = torch.cat(
        [torch.arange(len(SIZES)).repeat_interleave(joined.ptr[name].diff()) for name in SCALES]
    )
    source, target = joined.union.edge_index()
    assert len(source) > 0
    assert torch.equal(bag_of[source], bag_of[target])


def test_a_joined_bag_has_the_edges_it_had_alone() -> None:
    graphs = make_graphs(SIZES, scales=SCALES, dims=DIMS)
    joined = join_graphs(graphs)
    alone = sum(graph.union.edge_index().shape[1] for graph in graphs)
    assert joined.union.edge_index().shape[1] == alone


def test_joining_in_two_steps_is_joining_at_once() -> None:
    graphs = make_graphs(SIZES, scales=SCALES, dims=DIMS)
    in_steps = join_graphs([join_graphs(graphs[:2]), join_graphs(graphs[2:])])
    assert equal(in_steps, join_graphs(graphs))


def test_one_graph_joined_is_itself() -> None:
    (graph,) = make_graphs([9])
    assert equal(join_graphs([graph]), graph)


def test_a_graph_moves_with_all_its_tensors() -> None:
    (graph,) = make_graphs([9], scales=SCALES, dims=DIMS)
    moved = graph.to("meta")
    assert tensors(moved).keys() == tensors(graph).keys()
    for name, tensor in tensors(moved).items():  # what the host reads stays
        assert tensor.is_meta == (not name.startswith(("grid", "ptr"))), name
    assert moved.slide_ids == graph.slide_ids
