"""Scales and the integer grid, against exact fractions."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest

from dasmil.errors import InputError
from dasmil.geometry import PyramidGrid
from dasmil.units import Mpp, Scale, TilePx, parse_scales

AWKWARD_MPPS = ["0.2425", "0.499", "0.526036", "0.55"]
PYRAMIDS = [("x10", "x20"), ("x5", "x20"), ("x5", "x10", "x20"), ("x1.25", "x5", "x10")]
TRUE_MPP = {"x20": "0.5", "x10": "1", "x5": "2", "x2.5": "4", "x1.25": "8"}


def exact_edge(index: int, tile_px: int, scale: str, slide_mpp: str) -> int:
    """round(index · tile_px · mpp_scale / mpp_slide) without floats; no case here is a tie."""
    position = index * tile_px * Fraction(TRUE_MPP[scale]) / Fraction(slide_mpp)
    return floor(position + Fraction(1, 2))


def make_grid(names: tuple[str, ...], tile_px: int, slide_mpp: str) -> PyramidGrid:
    return PyramidGrid(parse_scales(names), TilePx(tile_px), Mpp(float(slide_mpp)))


@pytest.mark.parametrize(
    ("text", "mpp"), [("x40", 0.25), ("x20", 0.5), ("x10", 1), ("x5", 2), ("x2.5", 4), ("x1.25", 8)]
)
def test_a_scale_is_ten_over_its_magnification(text: str, mpp: float) -> None:
    scale = Scale.parse(text)
    assert (scale.name, scale.mpp) == (text, mpp)


@pytest.mark.parametrize("text", ["", "20", "x", "x0", "x0.0", "X20", "x-5", "x20 ", "20x", "x1e1"])
def test_a_name_that_is_no_magnification_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="write a magnification such as x20") as caught:
        Scale.parse(text)
    assert repr(text) in str(caught.value)


def test_scales_come_out_coarse_to_fine() -> None:
    names = [scale.name for scale in parse_scales(["x20", "x2.5", "x10", "x5"])]
    assert names == ["x2.5", "x5", "x10", "x20"]
    assert [scale.mpp for scale in parse_scales(["x20", "x5"])] == [2, 0.5]


def test_a_single_scale_is_a_pyramid() -> None:
    assert parse_scales(["x20"]) == (Scale("x20", Mpp(0.5)),)


@pytest.mark.parametrize(
    ("names", "coarse", "fine", "ratio"),
    [
        (["x15", "x10"], "x10", "x15", "1.5"),
        (["x20", "x5", "x8"], "x5", "x8", "1.6"),
        (["x20", "x20"], "x20", "x20", "1"),
        (["x20", "x20.1"], "x20", "x20.1", "1.005"),
        (["x20.5", "x10"], "x10", "x20.5", "2.05"),
    ],
)
def test_scales_that_do_not_nest_are_refused(
    names: list[str], coarse: str, fine: str, ratio: str
) -> None:
    with pytest.raises(InputError) as caught:
        parse_scales(names)
    assert str(caught.value).startswith(f"scales {coarse} and {fine}: the ratio {ratio} ")
    assert "cannot nest" in str(caught.value)


def test_no_scale_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="give at least one"):
        parse_scales([])


def test_ratio_counts_tiles_along_a_side() -> None:
    grid = make_grid(("x5", "x10", "x20"), 256, "0.499")
    assert (grid.ratio(0, 1), grid.ratio(1, 2), grid.ratio(0, 2), grid.ratio(2, 2)) == (2, 2, 4, 1)


@pytest.mark.parametrize("slide_mpp", AWKWARD_MPPS)
@pytest.mark.parametrize("names", PYRAMIDS)
@pytest.mark.parametrize("tile_px", [256, 224, 7])
def test_edges_follow_from_the_integers(
    slide_mpp: str, names: tuple[str, ...], tile_px: int
) -> None:
    grid = make_grid(names, tile_px, slide_mpp)
    for number, name in enumerate(names):
        expected = [exact_edge(index, tile_px, name, slide_mpp) for index in range(400)]
        assert grid.edges_px0(number, np.arange(400)).tolist() == expected


def test_boxes_are_left_top_right_bottom_of_row_and_col() -> None:
    grid = make_grid(("x5", "x20"), 256, "0.499")
    boxes = grid.boxes_px0(1, np.array([[3, 10], [0, 0]], dtype=np.int32))
    edge = [exact_edge(index, 256, "x20", "0.499") for index in range(12)]
    assert boxes.tolist() == [[edge[10], edge[3], edge[11], edge[4]], [0, 0, edge[1], edge[1]]]


@pytest.mark.parametrize("slide_mpp", AWKWARD_MPPS)
@pytest.mark.parametrize("names", [("x10", "x20"), ("x5", "x20")], ids=["ratio 2", "ratio 4"])
def test_children_fill_their_parent_exactly_once(slide_mpp: str, names: tuple[str, ...]) -> None:
    ratio = {"x10": 2, "x5": 4}[names[0]]
    grid = make_grid(names, 24, slide_mpp)
    for row, col in [(0, 0), (1, 2), (7, 3), (12, 31)]:
        left, top, right, bottom = grid.boxes_px0(0, np.array([[row, col]]))[0]
        children = [
            (row * ratio + down, col * ratio + along)
            for down in range(ratio)
            for along in range(ratio)
        ]
        hits = np.zeros((bottom + 5, right + 5), dtype=int)
        for x0, y0, x1, y1 in grid.boxes_px0(1, np.array(children)):
            hits[y0:y1, x0:x1] += 1
        assert (hits[top:bottom, left:right] == 1).all()
        assert hits.sum() == (bottom - top) * (right - left)


@pytest.mark.parametrize("slide_mpp", AWKWARD_MPPS)
@pytest.mark.parametrize("names", PYRAMIDS)
def test_shape_counts_the_tiles_that_touch_the_slide(
    slide_mpp: str, names: tuple[str, ...]
) -> None:
    grid = make_grid(names, 64, slide_mpp)
    for number, name in enumerate(names):
        edges = [exact_edge(index, 64, name, slide_mpp) for index in range(60)]
        lengths = [1, *range(edges[1] - 2, edges[1] + 3), edges[8] - 1, edges[8], edges[8] + 1]
        lengths += np.random.default_rng(0).integers(1, edges[-2], 40).tolist()
        for length in lengths:
            touching = sum(edge < length for edge in edges)
            assert grid.shape(number, (length, edges[3])) == (3, touching)
            assert grid.shape(number, (edges[3], length)) == (touching, 3)
