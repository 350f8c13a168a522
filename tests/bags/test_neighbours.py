"""Neighbour lists: what each entry says, cut and joined lists, and grids few and far between."""

import pytest
import torch
from bag_factory import as_pairs, make_bag, neighbours_of
from torch import Tensor
from torch_geometric.utils import dropout_node

from dasmil.bags import Neighbours, bag_graph, grid_neighbours
from dasmil.bags import neighbours as module
from dasmil.bags.neighbours import cut_nodes, join_neighbours, union_neighbours


def random_grid(share: float = 0.4, side: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    grid = (torch.rand(side, side, generator=generator) < share).nonzero().int()
    return grid[torch.randperm(len(grid), generator=generator)]


def check(lists: Neighbours) -> None:
    """Every promise: each node sees itself, nobody twice, and the reverse is the reverse."""
    assert {t.dtype for t in (lists.ptr, lists.index, lists.reverse)} == {torch.int32}
    assert lists.ptr[0] == 0 and lists.ptr[-1] == len(lists.index) == len(lists.reverse)
    seers = lists.seers
    pairs = list(zip(seers.tolist(), lists.index.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert {(i, i) for i in range(len(lists))} <= set(pairs)
    for entry, other in enumerate(lists.reverse.tolist()):
        assert pairs[other] == pairs[entry][::-1]


GRIDS = {"full": 1.0, "half": 0.5, "thin": 0.1}


@pytest.mark.parametrize("share", GRIDS.values(), ids=list(GRIDS))
def test_the_lists_of_a_grid_keep_their_promises(share: float) -> None:
    check(grid_neighbours(random_grid(share)))


@pytest.mark.parametrize("num_tiles", [0, 1, 7, 60])
@pytest.mark.parametrize("scales", [("x20",), ("x5", "x20"), ("x2.5", "x5", "x20")])
def test_the_lists_of_a_union_keep_their_promises(scales: tuple[str, ...], num_tiles: int) -> None:
    graph = bag_graph(make_bag(scales=scales, num_tiles=num_tiles))
    check(graph.union)
    assert len(graph.union) == sum(len(x) for x in graph.features.values())


def test_a_box_without_table_gives_the_same_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles few and far between are sorted instead of laid out."""
    grid = random_grid()
    table = grid_neighbours(grid)
    called = []
    search = torch.searchsorted
    monkeypatch.setattr(torch, "searchsorted", lambda *a: called.append(1) or search(*a))
    assert_equal(grid_neighbours(grid), table)
    assert not called
    monkeypatch.setattr(module, "DENSE_CELLS", 0)
    monkeypatch.setattr(module, "FREE_CELLS", 0)
    assert_equal(grid_neighbours(grid), table)
    assert called


def assert_equal(one: Neighbours, other: Neighbours) -> None:
    for name in ("ptr", "index", "reverse"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_a_million_by_a_million_cells_cost_only_their_tiles() -> None:
    line = torch.arange(1000, dtype=torch.int32)[:, None]
    lists = grid_neighbours(torch.cat([line * 1000, line * 1001], dim=1))  # all far from another
    assert torch.equal(lists.index, torch.arange(1000, dtype=torch.int32))
    beside = torch.tensor([[0, 0], [0, 1], [10**6, 10**6]], dtype=torch.int32)
    assert as_pairs(grid_neighbours(beside).edge_index()) == [(0, 1), (1, 0)]


def test_a_cut_node_sees_itself_and_nobody_sees_it() -> None:
    lists = grid_neighbours(random_grid())
    generator = torch.Generator().manual_seed(3)
    dropped = torch.rand(len(lists), generator=generator) < 0.4
    (left,) = cut_nodes([lists], [dropped])
    check(left)
    expected = [(i, j) for i, j in as_pairs(lists.edge_index()) if not (dropped[i] or dropped[j])]
    assert 0 < len(expected) < lists.edge_index().shape[1]
    assert as_pairs(left.edge_index()) == expected
    assert_equal(*cut_nodes([lists], [torch.zeros_like(dropped)]), lists)


def test_cutting_nodes_is_the_node_dropout_of_torch_geometric() -> None:
    lists = grid_neighbours(random_grid())
    torch.manual_seed(7)
    edges, _, mask = dropout_node(lists.edge_index(), 0.5, len(lists))
    (left,) = cut_nodes([lists], [~mask])
    assert as_pairs(left.edge_index()) == as_pairs(edges)


def test_joined_lists_are_those_of_the_joined_edges() -> None:
    grids = [random_grid(seed=1), torch.empty(0, 2, dtype=torch.int32), random_grid(0.2, seed=2)]
    parts = [grid_neighbours(grid) for grid in grids]
    joined = join_neighbours(parts)
    check(joined)
    start, edges = 0, []
    for part in parts:
        edges.append(part.edge_index() + start)
        start += len(part)
    assert as_pairs(joined.edge_index()) == as_pairs(torch.cat(edges, dim=1))


def test_the_union_of_one_scale_is_that_scale() -> None:
    lists = grid_neighbours(random_grid())
    assert union_neighbours({"x20": lists}, {}) is lists


def test_lists_from_edges_are_those_of_the_grid_in_another_order() -> None:
    """The tests' own way to make lists from any edges."""
    lists = grid_neighbours(random_grid())
    other = neighbours_of(lists.edge_index(), len(lists))
    check(other)
    assert torch.equal(other.ptr, lists.ptr)
    assert as_pairs(other.edge_index()) == as_pairs(lists.edge_index())
