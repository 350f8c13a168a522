"""Focus: a ratio that falls with blur and with nothing else."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from dasmil.demo.slides import write_pyramid
from dasmil.geometry import Extent
from dasmil.slides.artefacts import ArtefactParameters
from dasmil.slides.cohort import SlideRow
from dasmil.slides.focus import RUN_TILES, blurred_tiles, detail
from dasmil.slides.pyramid import TilingParameters, lay_tiles
from dasmil.slides.reader import Slide
from dasmil.units import Mpp

BLUR = ArtefactParameters(blur=True)


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Grey noise with details of 1 pixel and of several."""
    noise = np.random.default_rng(seed).normal(0, 1, (height, width))
    mixed = sum(2 * s * cv2.GaussianBlur(noise, (0, 0), s) for s in (0.7, 1.5, 3.0))
    return np.clip(150 + 25 * mixed, 0, 255)[..., None].repeat(3, axis=2).astype(np.uint8)


def test_a_blur_removes_detail_and_the_threshold_is_between() -> None:
    tile = texture(128, 128)
    found = [detail(tile, 1)[0]]
    found += [detail(cv2.GaussianBlur(tile, (0, 0), sigma), 1)[0] for sigma in (1, 2, 4)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 2 * BLUR.min_detail
    assert found[2] < BLUR.min_detail


def test_contrast_and_stain_leave_it_alone() -> None:
    tile = texture(128, 128).astype(float)
    sharp = detail(tile.astype(np.uint8), 1)[0]
    pale = detail((200 + (tile - 150) / 3).astype(np.uint8), 1)[0]
    pink = detail((tile * (1.0, 0.6, 0.8)).astype(np.uint8), 1)[0]
    assert pale == pytest.approx(sharp, rel=0.1)
    assert pink == pytest.approx(sharp, rel=0.1)


def test_each_tile_of_a_strip_is_measured_alone() -> None:
    parts = [texture(64, 64, seed) for seed in range(5)]
    parts[1] = cv2.GaussianBlur(parts[1], (0, 0), 4)
    parts[3][...] = 120
    found = detail(np.concatenate(parts, axis=1), 5)
    assert found.shape == (5,)
    # a little comes from the neighbours, which the filters see
    np.testing.assert_allclose(
        found[[0, 2, 4]], [detail(parts[i], 1)[0] for i in (0, 2, 4)], rtol=0.2
    )
    assert (found[[1, 3]] < BLUR.min_detail).all()


def test_an_even_tile_has_none() -> None:
    assert detail(np.full((32, 64, 3), 200, np.uint8), 2).tolist() == [0, 0]
    noise = np.random.default_rng(0).integers(199, 201, (64, 64, 3), dtype=np.uint8)
    assert detail(noise, 1)[0] < BLUR.min_detail  # of one grey level


@pytest.mark.parametrize("mpp", [0.5, 1.0, 0.33])
def test_blurred_tiles_of_a_slide_are_listed_by_position(tmp_path: Path, mpp: float) -> None:
    """A slide of one row more than a run, with two blurred places and a gap in the tissue."""
    columns, side_um = 2 * RUN_TILES + 6, 64
    rng = np.random.default_rng(1)
    side_px0 = round(side_um / mpp)
    um = np.concatenate([texture(6 * side_um, side_um, seed) for seed in range(columns)], axis=1)
    pixels = cv2.resize(um, (columns * side_px0, 6 * side_px0), interpolation=cv2.INTER_CUBIC)
    blurred = rng.random((6, columns)) < 0.2
    soft = cv2.GaussianBlur(pixels, (0, 0), 4 / mpp)
    where = np.kron(blurred, np.ones((side_px0, side_px0), bool))
    pixels[where] = soft[where]
    write_pyramid(tmp_path / "s.tiff", pixels, mpp)
    tissue = np.ones((6, columns), bool)
    tissue[2, 5:9] = False
    parameters = TilingParameters(("x5", "x10"), side_um, artefacts=BLUR)
    with Slide(SlideRow("s", tmp_path / "s.tiff", mpp=mpp)) as slide:
        tiles = lay_tiles("s", tissue, Extent(slide.size_px0, Mpp(mpp)), parameters)
        found = blurred_tiles(slide, tiles, BLUR)
    assert len(found) > 200
    np.testing.assert_array_equal(found, blurred[tuple(tiles.grid["x10"].T)])


def test_the_edge_to_the_outside_of_a_slide_is_no_detail(tmp_path: Path) -> None:
    """Tiles that reach over the border are judged by what they show of the slide."""
    sharp = texture(180, 230)
    soft = cv2.GaussianBlur(sharp, (0, 0), 4)
    parameters = TilingParameters(("x10",), 64, artefacts=BLUR)
    for pixels, blurred in ((sharp, False), (soft, True)):
        write_pyramid(tmp_path / "s.tiff", pixels, 1.0)
        with Slide(SlideRow("s", tmp_path / "s.tiff")) as slide:
            tiles = lay_tiles("s", np.ones((9, 9), bool), slide.extent, parameters)
            assert tiles.num_tiles() == {"x10": 3 * 4}
            assert blurred_tiles(slide, tiles, BLUR).tolist() == [blurred] * 12


def test_a_slide_without_tiles_has_no_blurred_ones(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "s.tiff", texture(256, 256), 1.0)
    parameters = TilingParameters(("x10",), 64)
    with Slide(SlideRow("s", tmp_path / "s.tiff")) as slide:
        tiles = lay_tiles("s", np.zeros((4, 4), bool), slide.extent, parameters)
        assert blurred_tiles(slide, tiles, BLUR).shape == (0,)


def test_real_tiles_differ_from_their_blurred_copies(shared_data: Path) -> None:
    """200 quarters of 50 images of colon at 0.55 µm/px; a Gaussian of 2 µm, then 1 µm/px."""
    sharp, soft = [], []
    for path in sorted((shared_data / "crchisto").glob("*.png")):
        whole = cv2.imread(str(path))
        for picture, into in ((whole, sharp), (cv2.GaussianBlur(whole, (0, 0), 2 / 0.55), soft)):
            at_1_um = cv2.resize(picture, (276, 276), interpolation=cv2.INTER_AREA)
            into.extend(detail(np.ascontiguousarray(at_1_um[:138]), 2))
            into.extend(detail(np.ascontiguousarray(at_1_um[138:]), 2))
    assert len(sharp) == 200
    assert np.mean(np.array(sharp) < BLUR.min_detail) <= 0.01
    assert np.mean(np.array(soft) < BLUR.min_detail) >= 0.99
