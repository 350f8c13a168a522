"""The QC picture: every tile at its place, every artefact in its colour."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from dasmil.geometry import Extent, Tiles
from dasmil.slides.pyramid import TilingParameters, lay_tiles, without_blurred
from dasmil.slides.qc import (
    ARTEFACTS,
    CAPTION_PX,
    OUTLINE,
    PANEL_PX,
    TILE,
    draw_qc,
    shrink,
    write_png,
)
from dasmil.units import Mpp

FRAME_PX = 4
SIZE_PX0 = (8000, 6400)


def lay(mask: np.ndarray, scales: tuple[str, ...], tile_px: int, **artefacts) -> Tiles:
    parameters = TilingParameters(scales, tile_px, min_tissue=0.5)
    return lay_tiles("s1", mask, Extent(SIZE_PX0, Mpp(0.5)), parameters, artefacts)


def panels(picture: np.ndarray, number: int, height: int) -> list[np.ndarray]:
    """The insides of the panels, without captions and frames."""
    row = picture[: height + CAPTION_PX + FRAME_PX]
    return [
        part[CAPTION_PX:-FRAME_PX, FRAME_PX:-FRAME_PX] for part in np.split(row, number, axis=1)
    ]


def random_mask(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((16, 20)) < 0.5


WHITE = np.full((512, 640, 3), 255, np.uint8)


def test_a_thumbnail_of_any_size_fits_a_panel() -> None:
    for height, width in ((3000, 1000), (100, 200), (1, 1), (5000, 3)):
        small = shrink(np.full((height, width, 3), 7, np.uint8))
        assert max(small.shape[:2]) == PANEL_PX
        assert small.dtype == np.uint8 and (small == 7).all()


def test_tiles_are_drawn_at_their_places() -> None:
    """Against the boxes in level-0 pixels, one by one."""
    tiles = lay(random_mask(), ("x10", "x20"), 230)  # 18.4 px of the panel
    drawn = draw_qc(WHITE, random_mask(), tiles)
    assert drawn.dtype == np.uint8
    for scale, panel in zip(("x10", "x20"), panels(drawn, 3, 512)[1:], strict=True):
        coloured = (panel != 255).any(axis=-1)
        expected = np.zeros((512, 640), bool)
        for left, top, right, bottom in tiles.boxes_px0(scale) * 0.08:
            expected[round(top) : round(bottom), round(left) : round(right)] = True
        assert 0 < expected.sum() < expected.size
        np.testing.assert_array_equal(coloured, expected)


def test_neighbours_are_parted_by_a_line_and_every_outline_is_closed() -> None:
    mask = np.zeros((16, 20), bool)
    mask[2:4, 2:6] = True  # 2 x 4 tiles of 400 px0, which are 32 px of the panel
    panel = panels(draw_qc(WHITE, mask, lay(mask, ("x20",), 400)), 2, 512)[1]
    lines = (panel == TILE).all(axis=-1)
    block = lines[64:128, 64:192]
    assert lines.sum() == block.sum()
    for y in (0, 32, 63):
        assert block[y].all()
    for x in (0, 32, 64, 96, 127):
        assert block[:, x].all()
    assert not block[10, 10] and not block[40, 50]
    assert (panel[74, 74] == np.round(np.array(TILE) * 0.35 + 255 * 0.65)).all()


def test_tiles_at_the_border_are_closed_too() -> None:
    full = np.ones((16, 20), bool)
    panel = panels(draw_qc(WHITE, full, lay(full, ("x20",), 400)), 2, 512)[1]
    lines = (panel == TILE).all(axis=-1)
    for edge in (lines[0], lines[-1], lines[:, 0], lines[:, -1]):
        assert edge.all()


def test_a_tile_that_begins_on_the_last_pixel_is_no_error() -> None:
    """128 tiles of 2048 px0 fill the panel, and 10 px0 of one more are inside the slide."""
    extent = Extent((128 * 2048 + 10, 40 * 2048), Mpp(0.25))
    parameters = TilingParameters(("x5",), 256, min_tissue=0.001)
    tiles = lay_tiles("s1", np.ones((40, 128), bool), extent, parameters)
    assert tiles.grid["x5"][:, 1].max() == 128
    draw_qc(np.full((200, 640, 3), 255, np.uint8), np.ones((40, 128), bool), tiles)


def test_tiny_tiles_do_not_become_a_blot() -> None:
    """Tiles of 2 panel pixels: lines between them would leave nothing of the slide to be seen."""
    mask = np.zeros((16, 20), bool)
    mask[4:12, 5:15] = True
    tiles = lay(mask, ("x20",), 25)
    assert tiles.num_tiles()["x20"] == 20480
    panel = panels(draw_qc(WHITE, mask, tiles), 2, 512)[1]
    lines = (panel == TILE).all(axis=-1)
    assert lines[128:384, 160].all() and lines[128, 160:480].all()
    assert not lines[129:383, 161:479].any()


def test_artefacts_have_their_colours_and_a_legend() -> None:
    pen, black = np.zeros((2, 64, 80), bool)
    pen[8:16, 16:32] = True  # at 64..128, 128..256 of the panel
    black[:, :8] = True
    mask = np.zeros((16, 20), bool)
    mask[8:14, 4:16] = True
    tiles = lay(mask, ("x20",), 400, pen=pen, black=black)
    blurred = tiles.grid["x20"][:, 0] == 8
    boxes_px0 = tiles.boxes_px0("x20")[blurred]
    tiles = without_blurred(tiles, blurred)
    drawn = draw_qc(WHITE, mask, tiles, {"pen": pen, "black": black}, boxes_px0)
    first = panels(drawn, 2, 512)[0]
    for name, (y, x) in {"pen": (96, 200), "black": (300, 20), "blur": (272, 300)}.items():
        tint = np.array(ARTEFACTS[name]) // 2 + 127
        np.testing.assert_array_equal(first[y, x], tint, err_msg=name)
    assert (first[96, 400] == 255).all()
    assert (first[256, 200] == OUTLINE).all()  # the tissue's upper edge
    legend = drawn[512 + CAPTION_PX + FRAME_PX :]
    assert len(legend) == 3 * CAPTION_PX
    for colour in ARTEFACTS.values():
        assert (legend == colour).all(axis=-1).sum() > 100, colour
    # a rule that was on and found nothing is in the legend, too; with none on there is no legend
    plain = lay(mask, ("x20",), 400)
    sharp = without_blurred(plain, np.zeros(len(plain.grid["x20"]), bool))
    none = draw_qc(WHITE, mask, sharp, {}, np.zeros((0, 4), np.int64))
    assert len(none) == len(drawn) - 2 * CAPTION_PX
    assert len(draw_qc(WHITE, mask, plain)) == len(drawn) - 3 * CAPTION_PX


def test_the_slide_is_seen_through_and_not_drawn_on() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (512, 640, 3), dtype=np.uint8)
    before = picture.copy()
    mask = random_mask()
    last = panels(draw_qc(picture, mask, lay(mask, ("x20",), 400)), 2, 512)[1]
    np.testing.assert_array_equal(picture, before)
    outside = ~cv2.resize(mask.view(np.uint8), (640, 512), interpolation=cv2.INTER_NEAREST).astype(
        bool
    )
    np.testing.assert_array_equal(last[outside], picture[outside])


@pytest.mark.parametrize("mask", [np.zeros((16, 20), bool), np.zeros((1, 1), bool)])
def test_an_empty_slide_has_a_picture(mask: np.ndarray, tmp_path: Path) -> None:
    drawn = draw_qc(WHITE, mask, lay(mask, ("x10", "x20"), 200))
    write_png(tmp_path / "qc" / "s1.png", drawn)
    found = cv2.imread(str(tmp_path / "qc" / "s1.png"))[..., ::-1]
    np.testing.assert_array_equal(found, drawn)
    for panel in panels(drawn, 3, 512):
        assert (panel == 255).all()
