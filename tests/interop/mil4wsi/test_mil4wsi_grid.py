import numpy as np
import pytest

from dasmil.errors import InputError
from dasmil.interop.features.common_grid import place_on_grid
from dasmil.interop.mil4wsi.grid import find_side_px0, require_nested

SIDES = np.array([512, 256])
NO_EDGES = np.empty((2, 0), dtype=int)


def place_tiles(*tiles, sides=SIDES):
    """Each tile is scale, x, y and row of its parent."""
    scale, x, y, parent = np.array(tiles).T
    place = np.stack([x, y], axis=1)
    require_nested(place, scale, parent, sides)
    cells, moved = place_on_grid(place, scale, parent, sides)
    assert (cells[:, ::-1] * sides[scale, None] == place + moved).all()
    return cells.tolist(), moved.tolist()


def find_side(place, scale, parent=None, edges=(), ratios=(2, 1), default=300):
    parent = np.full(len(place), -1) if parent is None else np.array(parent)
    edges = np.array(edges).T if edges else NO_EDGES
    return find_side_px0(
        np.array(place), np.array(scale), parent, edges, np.array(ratios), default=default
    )


def test_tiles_on_the_grid_of_the_origin_stay_where_they_are():
    cells, moved = place_tiles((0, 512, 1024, -1), (1, 768, 1024, 0), (0, 1024, 1024, -1))
    assert cells == [[2, 1], [4, 3], [2, 2]]
    assert moved == [[0, 0]] * 3


def test_a_piece_of_tissue_moves_as_a_whole_to_the_nearest_cell():
    cells, moved = place_tiles(
        (0, 5220, 700, -1), (1, 5476, 956, 0), (0, 5732, 700, -1), (0, 512, 512, -1)
    )
    assert cells == [[1, 10], [3, 21], [1, 11], [1, 1]]
    assert moved == [[-100, -188]] * 3 + [[0, 0]]


@pytest.mark.parametrize(("offset", "shift"), [(255, -255), (256, 256), (300, 212)])
def test_the_nearest_cell_may_lie_on_either_side(offset, shift):
    _, moved = place_tiles((0, offset, 0, -1))
    assert moved == [[shift, 0]]


def test_the_smaller_piece_makes_room_for_the_larger():
    large = [(0, 512 * i, 0, -1) for i in range(3)]
    cells, moved = place_tiles((0, 1000, 100, -1), *large)
    assert moved[1:] == [[0, 0]] * 3
    # at row 1 it would touch the others: two rows down is the nearest free cell
    assert cells[0] == [2, 2]
    assert moved[0] == [24, 924]


def test_a_piece_that_would_touch_another_keeps_its_distance():
    cells, _ = place_tiles((0, 0, 0, -1), (0, 512, 0, -1), (0, 1034, 0, -1))
    (row, col), others = cells[2], cells[:2]
    assert all(max(abs(row - r), abs(col - c)) > 1 for r, c in others)


def test_fine_tiles_of_two_pieces_do_not_meet_either():
    cells, _ = place_tiles(
        *((0, 0, 0, -1), (1, 256, 0, 0), (0, 512, 0, -1)),
        *((1, 1290, 10, -1), (1, 1290, 266, -1)),
    )
    assert not {tuple(cell) for cell in cells[3:]} & {(0, 1), (0, 2), (1, 2)}


def test_two_tiles_in_one_place_are_both_kept():
    cells, moved = place_tiles(
        *((0, 512, 0, -1), (1, 512, 0, 0), (0, 0, 0, -1)),
        *((0, 512, 0, -1), (1, 512, 0, 3)),
    )
    assert moved[:3] == [[0, 0]] * 3
    assert moved[3] == moved[4] != [0, 0]
    assert len(set(map(tuple, [cells[0], cells[2], cells[3]]))) == 3


def test_two_tiles_in_one_place_inside_one_parent_are_refused():
    with pytest.raises(InputError, match="two tiles inside the one at 512,0 lie in the same place"):
        place_tiles((0, 512, 0, -1), (1, 512, 0, 0), (1, 512, 0, 0))


def test_a_tile_without_parent_moves_with_the_piece_of_its_grid():
    cells, moved = place_tiles(
        *((0, 100, 100, -1), (1, 100, 356, 0), (0, 5330, 170, -1)), (1, 612, 356, -1)
    )
    assert moved[3] == moved[0] == [-100, -100]
    assert cells[3] == [1, 2]


def test_of_two_pieces_that_fit_the_nearer_one_takes_the_tile():
    far, near = (0, 0, 0, -1), (0, 5376, 256, -1)  # the grids of both have a cell at 5888,0
    cells, moved = place_tiles(far, near, (1, 5888, 0, -1))
    assert moved[2] == moved[1] == [256, 256]
    assert cells[2] == [1, 24]


def test_a_tile_without_parent_whose_cell_is_taken_joins_another_piece_or_none():
    cells, moved = place_tiles((0, 0, 0, -1), (1, 256, 0, 0), (1, 256, 0, -1))
    assert moved[:2] == [[0, 0]] * 2
    assert moved[2] == [0, 512]  # no nearer cell is at two steps from 0,1
    assert cells[2] == [2, 1]


def test_tiles_without_parents_that_fit_no_piece_stay_together():
    cells, moved = place_tiles((0, 0, 0, -1), (1, 2100, 50, -1), (1, 2356, 50, -1))
    assert moved[1] == moved[2] == [-52, -50]
    assert cells[1:] == [[0, 8], [0, 9]]


def test_children_move_with_a_parent_that_has_none():
    sides = np.array([1024, 512, 256])
    cells, moved = place_tiles(*((0, 0, 0, -1), (1, 3000, 0, -1), (2, 3256, 256, 1)), sides=sides)
    assert moved[1] == moved[2] == [72, 0]
    assert cells[1:] == [[0, 6], [1, 13]]


def test_cells_are_never_negative():
    cells, moved = place_tiles((0, -1024, 0, -1), (1, -768, 256, 0), (0, 512, -512, -1))
    assert cells == [[1, 0], [3, 1], [0, 3]]
    assert moved == [[1024, 512]] * 3


@pytest.mark.parametrize("seed", range(5))
def test_pieces_anywhere_give_every_tile_its_own_cell(seed):
    rng = np.random.default_rng(seed)
    tiles, piece_of = [], []
    for piece in range(12):
        left, top = rng.integers(0, 6000, 2)
        for i, j in np.ndindex(3, 3):
            row, x, y = len(tiles), left + 512 * i, top + 512 * j
            tiles += [(0, x, y, -1), (1, x + 256, y, row), (1, x, y + 256, row)]
            piece_of += [piece] * 3
    scale, _, _, parent = np.array(tiles).T
    found, moved = place_tiles(*tiles)
    cells, moved, piece_of = np.array(found), np.array(moved), np.array(piece_of)
    assert (cells >= 0).all()
    assert (cells[parent[scale == 1]] == cells[scale == 1] // 2).all()
    for number in (0, 1):
        own, piece = cells[scale == number], piece_of[scale == number]
        apart = np.abs(own[:, None] - own[None]).max(2)
        assert (apart[piece[:, None] != piece[None]] > 1).all()
        assert (apart + np.eye(len(own)) > 0).all()
    for piece in range(12):
        assert len(np.unique(moved[piece_of == piece], axis=0)) == 1


def test_neighbours_tell_the_side():
    place = [(0, 0), (600, 0), (600, 300)]
    assert find_side(place, [0, 0, 1], edges=[(0, 1), (1, 0), (1, 2)]) == 300
    assert find_side(place, [1, 1, 1], edges=[(1, 2)]) == 300
    assert find_side([(0, 0), (5, 5)], [1, 1], edges=[(0, 1)]) == 5


def test_without_neighbours_the_children_tell_the_side_or_the_default_does():
    place, scale = [(0, 0), (256, 0), (0, 0)], [0, 1, 1]
    assert find_side(place, scale, parent=[-1, 0, 0]) == 256
    assert find_side(place, scale) == 300


@pytest.mark.parametrize(
    "place", [[(0, 0), (256, 0), (300, 256)], [(0, 0), (256, 100), (512, 0)], [(0, 0), (301, 301)]]
)
def test_neighbours_at_different_distances_are_refused(place):
    scale = [1, 1, 1] if len(place) == 3 else [0, 0]
    with pytest.raises(InputError, match="its neighbours lie"):
        find_side(place, scale, edges=[(0, 1), (1, len(place) - 1)])


@pytest.mark.parametrize("child", [(512, 0), (-256, 0), (100, 0), (0, 512)])
def test_children_outside_their_parent_are_refused(child):
    with pytest.raises(InputError, match="1 of its tiles"):
        place_tiles((0, 0, 0, -1), (1, *child, 0))
