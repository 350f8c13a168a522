from pathlib import Path

import cv2
import numpy as np
import pytest
from bag_factory import make_bag, with_changes

from dasmil.demo.slides import write_pyramid
from dasmil.reports.heatmap import OPACITY, draw_heatmap, relative_attention, slide_canvas
from dasmil.slides.cohort import SlideRow
from dasmil.slides.digest import sample_digest
from dasmil.slides.qc import CAPTION_PX

EDGE = 4  # white frame of a panel


@pytest.fixture
def bag():
    return make_bag(num_tiles=12)


def turbo(value):
    level = np.array([[round(value * 255)]], np.uint8)
    return cv2.applyColorMap(level, cv2.COLORMAP_TURBO)[0, 0, ::-1].astype(int)


def test_a_tile_has_the_colour_of_its_score_only_in_its_place(bag):
    width_px0, height_px0 = bag.header.extent.size_px0
    canvas = np.full((height_px0 // 16, width_px0 // 16, 3), 200, np.uint8)
    values = np.linspace(0, 1, bag.num_tiles()["x20"])
    picture = draw_heatmap(canvas, bag, "x20", {"score": values}, "slide").astype(int)
    panel = picture[CAPTION_PX:, canvas.shape[1] + 3 * EDGE :]
    covered = np.zeros(canvas.shape[:2], bool)
    for (left, top, right, bottom), value in zip(bag.boxes_px0("x20") // 16, values, strict=True):
        covered[top:bottom, left:right] = True
        middle = panel[(top + bottom) // 2, (left + right) // 2]
        expected = (1 - OPACITY) * 200 + OPACITY * turbo(value)
        assert np.abs(middle - expected).max() <= 1
    beside = panel[: canvas.shape[0], : canvas.shape[1]][~covered]
    assert (beside == 200).all()


def test_attention_that_singles_no_tile_out_is_drawn_flat_and_not_as_the_largest(bag):
    flat = np.full(1000, 1e-3, np.float32)
    assert relative_attention(flat) == pytest.approx(np.full(1000, 0.5))
    assert relative_attention(flat + 1e-9 * np.arange(1000)) == pytest.approx(0.5, abs=1e-3)
    peaked = np.array([0.9, 0.09, 0.01])
    assert relative_attention(peaked) == pytest.approx(peaked / 0.9)
    assert relative_attention(np.zeros(3)).tolist() == [0, 0, 0]
    assert relative_attention(np.zeros(0)).tolist() == []


def test_a_tile_that_reaches_over_the_border_is_drawn_as_far_as_the_slide_goes(bag):
    right, bottom = (int(edge) - 16 for edge in bag.boxes_px0("x20")[:, 2:].max(0).values)
    cut = with_changes(bag, size_px0=(right, bottom))
    canvas = np.full((bottom // 4, right // 4, 3), 200, np.uint8)
    values = np.linspace(0, 1, bag.num_tiles()["x20"])
    picture = draw_heatmap(canvas, cut, "x20", {"score": values}, "slide").astype(int)
    panel = picture[CAPTION_PX:, canvas.shape[1] + 3 * EDGE :][: bottom // 4, : right // 4]
    last = int(bag.boxes_px0("x20")[:, 2].argmax())
    expected = (1 - OPACITY) * 200 + OPACITY * turbo(values[last])
    top = int(bag.boxes_px0("x20")[last, 1]) // 4
    assert np.abs(panel[top + 2, -1] - expected).max() <= 1


@pytest.mark.slow
def test_the_canvas_is_the_slide_or_says_why_not(bag, tmp_path):
    width_px0, height_px0 = bag.header.extent.size_px0
    missing = SlideRow("slide", Path("nowhere.svs"))
    canvas, reason = slide_canvas(missing, bag)
    assert (canvas == 255).all() and "nowhere.svs: no such file" in reason
    pixels = np.zeros((height_px0, width_px0, 3), np.uint8)
    pixels[: height_px0 // 2, :, 0] = 250  # the upper half is red
    write_pyramid(tmp_path / "slide.tiff", pixels, 0.5)
    picture, reason = slide_canvas(SlideRow("slide", tmp_path / "slide.tiff"), bag)
    assert picture.shape == canvas.shape and reason == ""
    quarter = picture.shape[0] // 4
    assert picture[quarter].mean((0,))[0] > 240 and picture[3 * quarter].max() < 10


def test_scores_are_never_drawn_over_another_slide(bag, tmp_path):
    """A digest of an imported bag is of its features, not of the slide file."""
    path = tmp_path / "slide.tiff"
    write_pyramid(path, np.full((640, 640, 3), 100, np.uint8), 0.5)
    row = SlideRow("slide", path)
    for reader, digest, drawn in (
        ("2", sample_digest(path), True),
        ("2", "", True),
        ("2", "of another", False),
        ("", "of features", True),
    ):
        changed = with_changes(bag, reader=reader, slide_digest=digest)
        canvas, reason = slide_canvas(row, changed)
        assert ("not the slide file of the bag" not in reason) == drawn == (canvas.max() < 255)
