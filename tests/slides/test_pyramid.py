"""The tile pyramid on random masks, against fractions and brute force, and its file."""

import json
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import pairwise
from math import floor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dasmil.errors import InputError
from dasmil.geometry import Extent, Tiles
from dasmil.json_text import pack_metadata
from dasmil.slides.pyramid import TilingParameters, covered_share, lay_tiles
from dasmil.slides.tile_table import TABLE, read_tiles, write_tiles
from dasmil.slides.tissue import TissueParameters
from dasmil.units import Mpp

TRUE_MPP = {"x40": "0.25", "x20": "0.5", "x10": "1", "x5": "2", "x2.5": "4"}
PYRAMIDS = [("x20",), ("x10", "x20"), ("x5", "x20"), ("x5", "x10", "x20")]
AWKWARD_MPPS = ["0.2425", "0.499", "0.526036", "0.55"]


@cache
def exact_edge(index: int, tile_px: int, scale: str, slide_mpp: str) -> int:
    position = index * tile_px * Fraction(TRUE_MPP[scale]) / Fraction(slide_mpp)
    return floor(position + Fraction(1, 2))


def ratio(coarse: str, fine: str) -> int:
    return int(Fraction(TRUE_MPP[coarse]) / Fraction(TRUE_MPP[fine]))


def random_mask(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Blobs of every size."""
    coarse = rng.random((shape[0] // 9 + 1, shape[1] // 9 + 1)) < rng.uniform(0.1, 0.9)
    blobs = np.kron(coarse, np.ones((9, 9), bool))[: shape[0], : shape[1]]
    return blobs ^ (rng.random(shape) < 0.1)


def make_random(
    seed: int, names: tuple[str, ...], slide_mpp: str, tile_px: int = 64, min_tissue: float = 0.25
) -> Tiles:
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(300, 4000, 2))
    mask = random_mask(rng, (height // 15 + 1, width // 15 + 1))
    parameters = TilingParameters(names, tile_px, min_tissue)
    return lay_tiles("s1", mask, Extent((width, height), Mpp(float(slide_mpp))), parameters)


@pytest.fixture(
    scope="module", params=[f"{'-'.join(n)}@{m}" for n in PYRAMIDS for m in AWKWARD_MPPS]
)
def pyramids(request: pytest.FixtureRequest) -> list[Tiles]:
    names, mpp = request.param.split("@")
    found = [make_random(seed, tuple(names.split("-")), mpp) for seed in range(12)]
    assert sum(any(tiles.num_tiles().values()) for tiles in found) > 6
    return found


def test_every_tile_touches_the_slide_at_its_exact_place(pyramids: list[Tiles]) -> None:
    for tiles in pyramids:
        width, height = tiles.extent.size_px0
        for scale in tiles.scales:
            boxes = tiles.boxes_px0(scale.name)
            assert boxes.shape == (len(tiles.grid[scale.name]), 4)
            for (row, col), (left, top, right, bottom) in zip(
                tiles.grid[scale.name].tolist(), boxes.tolist(), strict=True
            ):
                mpp = str(tiles.extent.mpp)
                assert left == exact_edge(col, 64, scale.name, mpp)
                assert top == exact_edge(row, 64, scale.name, mpp)
                assert right == exact_edge(col + 1, 64, scale.name, mpp)
                assert bottom == exact_edge(row + 1, 64, scale.name, mpp)
                assert 0 <= left < width and left < right
                assert 0 <= top < height and top < bottom


def test_every_child_is_inside_its_parent(pyramids: list[Tiles]) -> None:
    for tiles in pyramids:
        names = list(tiles.num_tiles())
        assert set(tiles.parent) == set(names[1:])
        for coarse, fine in pairwise(names):
            parents = tiles.boxes_px0(coarse)[tiles.parent[fine]]
            children = tiles.boxes_px0(fine)
            assert (children[:, :2] >= parents[:, :2]).all()
            assert (children[:, 2:] <= parents[:, 2:]).all()
            by_hand = tiles.grid[coarse][tiles.parent[fine]] == tiles.grid[fine] // ratio(
                coarse, fine
            )
            assert by_hand.all()


def test_no_parent_is_childless_and_tiles_lie_in_the_order_of_their_parents(
    pyramids: list[Tiles],
) -> None:
    for tiles in pyramids:
        names = list(tiles.num_tiles())
        for coarse, fine in pairwise(names):
            parent = tiles.parent[fine]
            assert parent.shape == (len(tiles.grid[fine]),)
            assert (np.diff(parent) >= 0).all()
            assert set(parent.tolist()) == set(range(len(tiles.grid[coarse])))


def test_tiles_are_unique_int32_and_coarsest_ones_in_reading_order(
    pyramids: list[Tiles],
) -> None:
    for tiles in pyramids:
        for name, grid in tiles.grid.items():
            assert grid.dtype == np.int32
            assert grid.shape == (len(grid), 2)
            assert len({tuple(place) for place in grid.tolist()}) == len(grid), name
        assert all(parent.dtype == np.int32 for parent in tiles.parent.values())
        coarsest = tiles.grid[tiles.scales[0].name].tolist()
        assert coarsest == sorted(coarsest)


@pytest.mark.parametrize("names", PYRAMIDS)
@pytest.mark.parametrize("min_tissue", [0.01, 0.25, 0.5, 1.0])
def test_the_finest_tiles_are_those_with_enough_tissue_pixels(
    names: tuple[str, ...], min_tissue: float
) -> None:
    """At 0.5 µm/px a x20 tile of 64 px is 4 × 4 pixels of a mask at 8 µm/px: no edge cuts one."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        mask = random_mask(rng, (int(rng.integers(20, 90)), int(rng.integers(20, 90))))
        size_px0 = (mask.shape[1] * 16, mask.shape[0] * 16)
        tiles = lay_tiles(
            "s1", mask, Extent(size_px0, Mpp(0.5)), TilingParameters(names, 64, min_tissue)
        )
        rows, columns = (-(-side // 4) for side in mask.shape)  # the last ones reach over
        expected = {
            (row, col)
            for row in range(rows)
            for col in range(columns)
            if int(mask[4 * row : 4 * row + 4, 4 * col : 4 * col + 4].sum()) >= 16 * min_tissue
        }
        assert {tuple(place) for place in tiles.grid["x20"].tolist()} == expected
        for name in names:
            step = ratio(name, "x20")
            ancestors = {(row // step, col // step) for row, col in expected}
            assert {tuple(place) for place in tiles.grid[name].tolist()} == ancestors


def overlap(start: float, end: float, length: int) -> np.ndarray:
    pixels = np.arange(length)
    return np.clip(np.minimum(end, pixels + 1) - np.maximum(start, pixels), 0, None)


@pytest.mark.parametrize("slide_mpp", AWKWARD_MPPS)
def test_the_share_of_tissue_is_exact_if_edges_cut_mask_pixels(slide_mpp: str) -> None:
    rng = np.random.default_rng(5)
    width, height = 1501, 1203
    mask = random_mask(rng, (75, 94))
    tiles = lay_tiles(
        "s1",
        mask,
        Extent((width, height), Mpp(float(slide_mpp))),
        TilingParameters(("x20",), 64, 0.4),
    )
    expected = []
    edges = [exact_edge(index, 64, "x20", slide_mpp) for index in range(60)]
    for row in range(59):
        for col in range(59):
            y, bottom = np.array(edges[row : row + 2]) * 75 / height
            x, right = np.array(edges[col : col + 2]) * 94 / width
            found = overlap(y, bottom, 75) @ mask @ overlap(x, right, 94)
            if found / ((bottom - y) * (right - x)) >= 0.4:  # of the tile, also what is outside
                expected.append([row, col])
    assert 10 < len(expected) < 400
    assert tiles.grid["x20"].tolist() == expected


@pytest.mark.parametrize("slide_mpp", AWKWARD_MPPS)
def test_a_tile_that_is_all_tissue_is_kept_at_the_strictest_rule(slide_mpp: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        width, height = (int(side) for side in rng.integers(3000, 9000, 2))
        mask = np.ones((height // 16, width // 16), bool)
        tiles = lay_tiles(
            "s1",
            mask,
            Extent((width, height), Mpp(float(slide_mpp))),
            TilingParameters(("x20",), 256, 1.0),
        )
        edges = [exact_edge(index, 256, "x20", slide_mpp) for index in range(1, 99)]
        assert len(tiles.grid["x20"]) == sum(e <= height for e in edges) * sum(
            e <= width for e in edges
        )


def test_an_empty_mask_gives_a_legal_empty_pyramid(tmp_path: Path) -> None:
    parameters = TilingParameters(("x5", "x10", "x20"), 64)
    tiles = lay_tiles("s1", np.zeros((80, 90), bool), Extent((1440, 1280), Mpp(0.5)), parameters)
    write_tiles(tmp_path / "s1.safetensors", tiles)
    for found in (tiles, read_tiles(tmp_path / "s1.safetensors")):
        assert found.num_tiles() == {"x5": 0, "x10": 0, "x20": 0}
        assert {name: grid.shape for name, grid in found.grid.items()} == {
            "x5": (0, 2),
            "x10": (0, 2),
            "x20": (0, 2),
        }
        assert {name: p.shape for name, p in found.parent.items()} == {"x10": (0,), "x20": (0,)}
        assert found.boxes_px0("x20").shape == (0, 4)


@pytest.mark.parametrize("size_px0", [(1501, 1203), (700, 60), (100, 100)])
@pytest.mark.parametrize("slide_mpp", AWKWARD_MPPS)
def test_all_tissue_that_min_tissue_allows_is_covered_at_every_scale(
    slide_mpp: str, size_px0: tuple[int, int]
) -> None:
    """Only strips at the border that fill less than a quarter of a tile are lost."""
    width, height = size_px0
    mask = np.ones((height, width), bool)
    finest = []
    for names in (("x20",), ("x10", "x20"), ("x5", "x10", "x20"), ("x2.5", "x20")):
        parameters = TilingParameters(names, 64)
        tiles = lay_tiles("s1", mask, Extent(size_px0, Mpp(float(slide_mpp))), parameters)
        covered = {name: np.zeros((height, width), bool) for name in names}
        for name in names:
            for left, top, right, bottom in tiles.boxes_px0(name):
                covered[name][top:bottom, left:right] = True
        edges = [exact_edge(index, 64, "x20", slide_mpp) for index in range(50)]
        for row, (y, bottom) in enumerate(pairwise(e for e in edges)):
            for col, (x, right) in enumerate(pairwise(e for e in edges)):
                inside = max(0, min(bottom, height) - y) * max(0, min(right, width) - x)
                if inside >= 0.25 * (bottom - y) * (right - x):
                    for name in names:
                        assert covered[name][y:bottom, x:right].all(), (name, row, col)
        assert covered_share(mask, tiles) == pytest.approx(covered["x20"].mean())
        finest.append(sorted(map(tuple, tiles.grid["x20"].tolist())))
    assert all(grid == finest[0] for grid in finest)  # whatever else is asked for


def test_tiles_that_are_left_out_take_their_children_and_leave_no_parent_childless(
    pyramids: list[Tiles],
) -> None:
    """By brute force, from the cells of the finest tiles that are left."""
    rng = np.random.default_rng(0)
    for tiles in pyramids:
        names = [scale.name for scale in tiles.scales]
        out = {name: rng.random(len(tiles.grid[name])) < 0.1 for name in names}
        left = {tuple(cell) for cell in tiles.grid[names[-1]][~out[names[-1]]].tolist()}
        for number, name in enumerate(names):
            ratio = tiles.geometry.ratio(number, len(names) - 1)
            gone = {tuple(cell) for cell in tiles.grid[name][out[name]].tolist()}
            left = {(row, col) for row, col in left if (row // ratio, col // ratio) not in gone}
        kept = tiles.select_rows(tiles.kept_rows(out))
        for number, name in enumerate(names):
            ratio = tiles.geometry.ratio(number, len(names) - 1)
            expected = {(row // ratio, col // ratio) for row, col in left}
            in_order = [cell for cell in map(tuple, tiles.grid[name].tolist()) if cell in expected]
            assert [tuple(cell) for cell in kept.grid[name].tolist()] == in_order
            if number > 0:
                step = tiles.geometry.ratio(number - 1, number)
                parents = kept.grid[names[number - 1]][kept.parent[name]]
                np.testing.assert_array_equal(parents, kept.grid[name] // step)


def test_the_covered_share_is_of_the_tissue() -> None:
    mask = np.zeros((20, 20), bool)  # tiles of 4 x 4 pixels
    mask[0:4, 0:4] = mask[8, 8] = mask[17:20, 17:20] = True
    tiles = lay_tiles("s1", mask, Extent((320, 320), Mpp(0.5)), TilingParameters(("x20",), 64))
    assert tiles.grid["x20"].tolist() == [[0, 0], [4, 4]]
    assert covered_share(mask, tiles) == pytest.approx(25 / 26)
    assert covered_share(np.zeros((20, 20), bool), tiles) == 0


def test_a_slide_smaller_than_one_tile_has_a_tile_if_enough_is_tissue() -> None:
    parameters = TilingParameters(("x5", "x20"), 64)
    mask = np.ones((16, 16), bool)
    for size_px0, found in [((33, 33), (1, 1)), ((31, 31), (0, 0)), ((255, 256), (1, 16))]:
        tiles = lay_tiles("s1", mask, Extent(size_px0, Mpp(0.5)), parameters)
        assert tuple(tiles.num_tiles().values()) == found


def test_a_scale_finer_than_the_slide_is_refused_with_the_slides_name() -> None:
    mask = np.ones((100, 100), bool)
    parameters = TilingParameters(("x10", "x20"), 64)
    lay_tiles("s1", mask, Extent((2000, 2000), Mpp(0.55)), parameters)  # 0.5 · 1.15 = 0.575
    with pytest.raises(InputError) as caught:
        lay_tiles("biopsy 7", mask, Extent((2000, 2000), Mpp(0.58)), parameters)
    message = str(caught.value)
    assert message.startswith("slide biopsy 7: it holds 0.58 µm/px, too coarse for x20 (0.5 µm/px")
    assert "column mpp" in message
    generous = TilingParameters(("x10", "x20"), 64, max_upsampling=1.2)
    assert lay_tiles("s1", mask, Extent((2000, 2000), Mpp(0.58)), generous).num_tiles()["x20"] > 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"scales": ("x10", "x15")}, "cannot nest"),
        ({"scales": ("twenty",)}, "'twenty'"),
        ({"scales": ()}, "give at least one"),
        ({"tile_px": 0}, "tile_px: 0 is not"),
        ({"min_tissue": 0.0}, "min_tissue: 0.0 is outside"),
        ({"min_tissue": 1.01}, "min_tissue: 1.01 is outside"),
    ],
)
def test_senseless_parameters_are_refused(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        TilingParameters(**{"scales": ("x20",), **change})


def test_parameters_that_differ_in_anything_differ_as_json() -> None:
    sets = [
        TilingParameters(("x10", "x20")),
        TilingParameters(("x5", "x20")),
        TilingParameters(("x10", "x20"), tile_px=224),
        TilingParameters(("x10", "x20"), min_tissue=0.5),
        TilingParameters(("x10", "x20"), max_upsampling=1.2),
        TilingParameters(("x10", "x20"), tissue=TissueParameters(closing_um=16.0)),
    ]
    assert len({parameters.as_json() for parameters in sets}) == len(sets)
    assert json.loads(sets[0].as_json())["tissue"]["closing_um"] == 32.0


def test_tiles_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "tiles" / "s1.safetensors"
    for seed, names in enumerate(PYRAMIDS):
        tiles = make_random(seed, names, "0.526036")
        assert tiles.num_tiles()[names[-1]] > 0
        tiles = replace(
            tiles,
            extent=replace(tiles.extent, bounds_px0=(3, 4)),
            tissue=replace(tiles.tissue, covered=0.875),
            slide_digest="ab",
            slide_state="1 of 2",
        )
        write_tiles(path, tiles)
        found = read_tiles(path)
        assert found.header_fields() == tiles.header_fields()
        assert (found.tissue, found.slide_state) == (tiles.tissue, tiles.slide_state)
        for attribute in ("grid", "parent"):
            ours, theirs = getattr(tiles, attribute), getattr(found, attribute)
            assert set(ours) == set(theirs)
            for name, array in ours.items():
                assert theirs[name].dtype == np.int32
                np.testing.assert_array_equal(theirs[name], array)
        for name in names:
            np.testing.assert_array_equal(found.boxes_px0(name), tiles.boxes_px0(name))
    assert [p.name for p in path.parent.iterdir()] == ["s1.safetensors"]


def test_a_truncated_table_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "s1.safetensors"
    write_tiles(path, make_random(0, ("x10", "x20"), "0.499"))
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="no readable tile table") as caught:
            read_tiles(path)
        assert str(path) in str(caught.value)
        assert "run tile again" in str(caught.value)


def test_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    text = tmp_path / "text.safetensors"
    text.write_text("slide_id,path\n")
    plain = tmp_path / "plain.safetensors"
    save_file({"grid/x20": np.zeros((1, 2), np.int32)}, plain)
    older = tmp_path / "older.safetensors"
    save_file(
        {"grid/x20": np.zeros((1, 2), np.int32)}, older, pack_metadata({"format": "dasmil-tiles-2"})
    )
    short = tmp_path / "short.safetensors"
    save_file(
        {"grid/x20": np.zeros((1, 2), np.int32)}, short, pack_metadata({"format": TABLE.format})
    )
    for path in (text, plain, older, short, tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(InputError) as caught:
            read_tiles(path)
        assert str(caught.value).startswith(f"{path}: ")
    with pytest.raises(InputError, match=f"another version .dasmil-tiles-2, .* {TABLE.format}"):
        read_tiles(older)
