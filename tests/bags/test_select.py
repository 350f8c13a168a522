"""A bag with some of its scales: parents become ancestors, and nothing else changes."""

from itertools import pairwise

import pytest
import torch
from bag_factory import make_bag, with_changes
from bags.orphans import without_first

from dasmil.bags import Bag, ancestor_rows, bag_graph, bag_path, read_bag, write_bag
from dasmil.errors import InputError

SCALES = ("x2.5", "x5", "x10", "x20")
DIMS = {"x2.5": 3, "x5": 4, "x10": 6, "x20": 5}
CHOICES = [("x20",), ("x2.5",), ("x10", "x20"), ("x5", "x20"), ("x2.5", "x20"), ("x5", "x10"),
           ("x2.5", "x10", "x20"), ("x2.5", "x5", "x20"), SCALES]  # fmt: skip


def make(num_tiles: int = 60, orphans: bool = False) -> Bag:
    bag = make_bag("S-3", SCALES, DIMS, num_tiles, seed=3)
    if orphans:  # of x10 and of x20
        bag = without_first(without_first(bag, "x5", 2), "x10", 3)
        bag.validate()
    return bag


def ancestor_by_search(bag: Bag, coarse: str, fine: str) -> list[int]:
    """Row of the coarse tile reached from each fine one, parent by parent; -1 for none."""
    rows = []
    for row in range(len(bag.grid[fine])):
        for scale in reversed(bag.scales[bag.scales.index(coarse) + 1 :]):
            if bag.scales.index(scale) <= bag.scales.index(fine) and row >= 0:
                row = int(bag.parent[scale][row])
        rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("num_tiles", "orphans"), [(0, False), (1, False), (60, False), (60, True)]
)
@pytest.mark.parametrize("scales", CHOICES, ids="+".join)
def test_the_scales_left_are_whole_and_linked(
    scales: tuple[str, ...], num_tiles: int, orphans: bool
) -> None:
    bag = make(num_tiles, orphans)
    left = bag.select(scales)
    left.validate()
    assert left.scales == scales
    assert left.slide_id == "S-3"
    for scale in scales:
        assert torch.equal(left.features[scale], bag.features[scale])
        assert torch.equal(left.grid[scale], bag.grid[scale])
    assert set(left.parent) == set(scales[1:])
    for coarse, fine in pairwise(scales):
        assert left.parent[fine].dtype == torch.int32
        assert left.parent[fine].tolist() == ancestor_by_search(bag, coarse, fine)


def test_an_ancestor_is_the_cell_around_the_tile() -> None:
    """x5 → x20 is a ratio of 4, x2.5 → x20 one of 8."""
    bag = make()
    for coarse, ratio in (("x5", 4), ("x2.5", 8)):
        left = bag.select((coarse, "x20"))
        above = left.grid[coarse][left.parent["x20"].long()]
        assert torch.equal(above, bag.grid["x20"] // ratio)
        boxes, outer = left.boxes_px0("x20"), left.boxes_px0(coarse)[left.parent["x20"].long()]
        assert bool((outer[:, :2] <= boxes[:, :2]).all() and (boxes[:, 2:] <= outer[:, 2:]).all())


def test_who_loses_an_ancestor_on_the_way_is_an_orphan() -> None:
    """x10 tiles without parent, and x20 tiles without parent or grandparent."""
    bag = make(orphans=True)
    left = bag.select(("x5", "x20"))
    direct = (bag.parent["x20"] < 0).sum()
    assert 0 < direct < (left.parent["x20"] < 0).sum() < len(left.parent["x20"])


def test_the_order_of_the_names_does_not_matter() -> None:
    bag = make()
    assert bag.select(("x20", "x5")).scales == bag.select(["x5", "x20"]).scales == ("x5", "x20")


def test_the_header_is_that_of_the_scales_left() -> None:
    bag = make()
    header = bag.select(("x5", "x10")).header
    assert [scale.name for scale in header.scales] == ["x5", "x10"]
    assert header.scales == bag.header.scales[1:3]
    assert set(header.extractors) == {"x5", "x10"}
    assert header.num_tiles == len(bag.grid["x10"]) != bag.header.num_tiles
    same = ("slide_id", "tile_px", "extent", "tiling")
    assert all(getattr(header, name) == getattr(bag.header, name) for name in same)
    assert header.bag_format() == bag.header.bag_format(("x10", "x5"))
    assert list(header.bag_format()["scales"]) == ["x5", "x10"]


def test_all_scales_are_the_bag_itself() -> None:
    bag = make(orphans=True)
    left = bag.select(SCALES)
    assert left.header == bag.header
    assert all(torch.equal(left.parent[s], bag.parent[s]) for s in SCALES[1:])


def test_selecting_twice_is_selecting_once() -> None:
    bag = make(orphans=True)
    twice, once = (
        bag.select(("x2.5", "x5", "x20")).select(("x2.5", "x20")),
        bag.select(("x2.5", "x20")),
    )
    assert twice.header == once.header
    assert torch.equal(twice.parent["x20"], once.parent["x20"])


@pytest.mark.parametrize("scales", [("x40",), ("x10", "x40"), (), ("x2",)])
def test_a_scale_that_the_bag_lacks_is_refused(scales: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"^bag S-3: asked for the scales .*x2\.5.*x20"):
        make().select(scales)


def test_a_selected_bag_survives_its_file_and_becomes_a_graph(tmp_path) -> None:
    left = make(orphans=True).select(("x5", "x20"))
    write_bag(bag_path(tmp_path, "S-3"), left)
    found = read_bag(bag_path(tmp_path, "S-3"))
    assert found.header == left.header
    graph = bag_graph(found, 1)
    assert graph.scales == ("x5", "x20")
    assert graph.parent["x20"].tolist() == left.parent["x20"].tolist()


def test_ancestors_follow_parent_by_parent() -> None:
    middle, fine = torch.tensor([-1, 0, 0, 2]), torch.tensor([-1, 0, 1, 3, 3])
    assert ancestor_rows([fine]).tolist() == fine.tolist()
    assert ancestor_rows([middle, fine]).tolist() == [-1, -1, 0, 2, 2]
    top = torch.tensor([5, -1, 7])
    assert ancestor_rows([top, middle, fine]).tolist() == [-1, -1, 5, 7, 7]
    none = torch.empty(0, dtype=torch.int64)
    assert ancestor_rows([none, none]).shape == (0,)
    assert ancestor_rows([none, torch.tensor([-1, -1])]).tolist() == [-1, -1]


def test_the_bag_that_is_selected_from_stays_as_it_was() -> None:
    bag = make()
    before = with_changes(bag, parent={s: t.clone() for s, t in bag.parent.items()})
    bag.select(("x5", "x20"))
    assert bag.scales == SCALES
    assert all(torch.equal(bag.parent[s], before.parent[s]) for s in SCALES[1:])
