"""Tiles cut from large reads are those that are read one by one, pixel by pixel."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from jpegs import damage, write_jpeg_pyramid

from dasmil.demo.slides import write_pyramid
from dasmil.geometry import Tiles
from dasmil.slides import cutting
from dasmil.slides.cohort import SlideRow
from dasmil.slides.cutting import TileCutter
from dasmil.slides.pyramid import TilingParameters, lay_tiles
from dasmil.slides.reader import Slide

SCALES = ("x5", "x10", "x20")


def texture(width: int, height: int) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2)
    return np.clip(150 + 35 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def tiles_of(
    slide: Slide, mask: np.ndarray, scales: Sequence[str] = SCALES, tile_px: int = 64
) -> Tiles:
    parameters = TilingParameters(tuple(scales), tile_px)
    return lay_tiles(slide.row.slide_id, mask, slide.extent, parameters)


def one_by_one(slide: Slide, tiles: Tiles, scale: str) -> np.ndarray:
    side = (tiles.tile_px, tiles.tile_px)
    return np.stack([slide.read(box, side) for box in tiles.boxes_px0(scale)])


def check(slide: Slide, tiles: Tiles, *, chunk: int, tolerance: int = 0) -> None:
    """Cut all tiles in chunks; every row is there, in order, with the pixels of its box."""
    cutter = TileCutter(slide, tiles)
    count = len(tiles.grid[tiles.scales[0].name])
    chunks = [cutter.cut(a, min(a + chunk, count)).pixels for a in range(0, count, chunk)]
    for scale in tiles.scales:
        found = np.concatenate([pixels[scale.name] for pixels in chunks]).astype(int)
        expected = one_by_one(slide, tiles, scale.name)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= tolerance
        assert np.abs(np.diff(expected.astype(int), axis=0)).mean() > 3  # exchanged rows would show


QUICK = [(0.5, (1, 2, 4)), (0.2425, (1, 2, 4))]


@pytest.mark.parametrize(
    ("mpp", "downsamples"),
    [
        pytest.param(mpp, down, marks=() if (mpp, down) in QUICK else pytest.mark.slow)
        for mpp in (0.25, 0.5, 0.2425, 0.499, 0.526036)
        for down in ((1,), (1, 2, 4), (1, 4))
    ],
    ids=str,
)
def test_tiles_are_those_that_are_read_one_by_one(
    tmp_path: Path, mpp: float, downsamples: tuple[int, ...]
) -> None:
    """With gaps: tissue is a random half of the slide. Where a tile begins between two pixels of
    its level, OpenSlide and OpenCV interpolate alike but for rounding."""
    write_pyramid(tmp_path / "a.tiff", texture(2200, 1600), mpp, downsamples)
    with Slide(SlideRow("a", tmp_path / "a.tiff")) as slide:
        mask = np.random.default_rng(1).random((8, 11)) < 0.5
        tiles = tiles_of(slide, mask, tile_px=32)
        assert 0.2 < len(tiles.grid["x20"]) / (16 * len(tiles.grid["x5"])) < 0.9
        exact = downsamples == (1,) or mpp in (0.25, 0.5)
        check(slide, tiles, chunk=3, tolerance=0 if exact else 2)


@pytest.mark.parametrize("writer", ["tiles", "png"])
@pytest.mark.parametrize("mpp", [0.5, 0.2425, 0.499])
def test_outside_the_slide_a_tile_is_white_and_inside_it_is_as_ever(
    tmp_path: Path, mpp: float, writer: str
) -> None:
    """The same picture on a larger white slide, where no tile reaches over the border."""
    picture = texture(700, 500)
    larger = np.full((2000, 2000, 3), 255, np.uint8)
    larger[:500, :700] = picture
    found = []
    for name, pixels in (("small", picture), ("large", larger)):
        path = tmp_path / f"{name}.{'tiff' if writer == 'tiles' else 'png'}"
        if writer == "tiles":
            write_pyramid(path, pixels, mpp, (1,))
        else:
            cv2.imwrite(str(path), cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
        mask = np.zeros((20, 20), bool)
        mask[:5, :7] = True
        with Slide(SlideRow("a", path, mpp=mpp)) as slide:
            mask = mask if name == "large" else np.ones((5, 7), bool)
            tiles = tiles_of(slide, mask, tile_px=32)
            check(slide, tiles, chunk=2)
            boxes = tiles.boxes_px0("x20")
            assert (boxes[:, 2:].max(0) > (700, 500)).all()
            found.append(TileCutter(slide, tiles).cut(0, len(tiles.grid["x5"])).pixels)
    for scale in SCALES:
        np.testing.assert_array_equal(found[0][scale], found[1][scale])
    assert (found[0]["x5"][-1][-1, -1] == 255).all()


def test_a_run_that_is_too_long_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pyramid(tmp_path / "a.tiff", texture(1536, 512), 0.5, (1,))
    with Slide(SlideRow("a", tmp_path / "a.tiff")) as slide:
        tiles = tiles_of(slide, np.ones((6, 16), bool), tile_px=32)
        reads: list[tuple[int, int]] = []
        region = slide.region
        monkeypatch.setattr(cutting, "MAX_SIDE_PX", 300)
        monkeypatch.setattr(
            slide, "region", lambda o, level, size: reads.append(size) or region(o, level, size)
        )
        TileCutter(slide, tiles).cut(0, len(tiles.grid["x5"]))
        assert set(reads) == {(256, 128)}  # two tiles of x5 side by side
        check(slide, tiles, chunk=100)


def test_no_gap_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pyramid(tmp_path / "a.tiff", texture(2048, 512), 0.5, (1,))
    mask = np.zeros((4, 16), bool)
    mask[0, 0] = mask[0, -1] = True
    with Slide(SlideRow("a", tmp_path / "a.tiff")) as slide:
        tiles = tiles_of(slide, mask, tile_px=32)
        reads: list[tuple[int, int]] = []
        region = slide.region
        monkeypatch.setattr(
            slide, "region", lambda o, level, size: reads.append(size) or region(o, level, size)
        )
        TileCutter(slide, tiles).cut(0, len(tiles.grid["x5"]))
        assert reads == [(128, 128), (128, 128)]


def test_rows_inside_are_all_descendants(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.tiff", texture(1024, 1024), 0.5, (1,))
    with Slide(SlideRow("a", tmp_path / "a.tiff")) as slide:
        tiles = tiles_of(slide, np.random.default_rng(2).random((16, 16)) < 0.4, tile_px=32)
    for start, stop in [(0, 1), (2, 5), (0, len(tiles.grid["x5"])), (3, 3)]:
        rows = tiles.rows_inside(start, stop)
        wanted = set(range(start, stop))
        for number, name in enumerate(SCALES):
            if number:
                parents = tiles.parent[name].tolist()
                wanted = {row for row, parent in enumerate(parents) if parent in wanted}
            assert set(range(*rows[name])) == wanted


# Real slides


@pytest.mark.parametrize(
    ("file", "mpp"),
    [
        ("atlas_x20/PDAC-tru-cut_HE3.svs", None),  # 0.526 µm/px, 1, 4 and 16: x10 is not stored
        ("atlas_x20/erosion_HE.tif", 0.5),  # 1, 1.9999, 3.9987
        ("native/cmu-1-small-region.svs", None),  # one level
        ("native/cmu-1-small-region-dicom", None),  # 1, 2.0003, 4.002
        ("native/tcga-cr-7395-01a-01-ts1.svs", 0.5),  # JPEG 2000, 1 and 2.0005
    ],
)
@pytest.mark.parametrize(
    "scales", [SCALES, pytest.param(("x5", "x10"), marks=pytest.mark.slow)], ids=" ".join
)
def test_tiles_of_real_slides_are_those_that_are_read_one_by_one(
    shared_data: Path, file: str, mpp: float | None, scales: tuple[str, ...]
) -> None:
    """Also at the slide's borders, where no tissue lies: a sample of all places."""
    with Slide(SlideRow("a", shared_data / "slides" / file, mpp=mpp)) as slide:
        width, height = slide.size_px0
        mask = np.random.default_rng(3).random((height // 512, width // 512)) < 0.1
        mask[-1, -2:] = mask[0, :2] = True
        tiles = tiles_of(slide, mask, scales, tile_px=256)
        cutter = TileCutter(slide, tiles)
        pixels = cutter.cut(0, len(tiles.grid[scales[0]])).pixels
        for scale in scales:
            np.testing.assert_array_equal(pixels[scale], one_by_one(slide, tiles, scale))


def test_areas_that_were_never_scanned_are_white(tmp_path: Path) -> None:
    """A picture with a hole, of which every tile of every scale is cut."""
    rgba = np.dstack([texture(512, 512), np.full((512, 512), 255, np.uint8)])
    rgba[100:300, 100:300, 3] = 0
    cv2.imwrite(str(tmp_path / "a.png"), cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGRA))
    with Slide(SlideRow("a", tmp_path / "a.png", mpp=0.5)) as slide:
        tiles = tiles_of(slide, np.ones((4, 4), bool), tile_px=64)
        check(slide, tiles, chunk=100)
        place = tiles.grid["x20"].tolist().index([2, 2])  # 128 to 192
        assert (TileCutter(slide, tiles).cut(0, 4).pixels["x20"][place] == 255).all()


def test_damaged_tiles_are_named_and_the_others_unchanged(tmp_path: Path) -> None:
    """A stored tile of 128 px at level 0 is read for four x20 tiles, but not for x10 and x5."""
    path = tmp_path / "a.tiff"
    write_jpeg_pyramid(path, 1024, 768, (1, 2, 4))
    with Slide(SlideRow("a", path)) as slide:
        tiles = tiles_of(slide, np.ones((4, 4), bool), tile_px=64)
        sound = TileCutter(slide, tiles).cut(0, 4)
        assert sound.damaged == {} and sound.reason == ""
    damage(path, 2, 3)  # 256 to 512 from the left, 0 to 128 from the top
    with Slide(SlideRow("a", path)) as slide:
        cut = TileCutter(slide, tiles).cut(0, 4)
    assert cut.reason.startswith(f"{path}: its x20 tile at 256,0 (level-0 pixels) cannot be read: ")
    assert {name: int(found.sum()) for name, found in cut.damaged.items()} == {
        "x5": 0,
        "x10": 0,
        "x20": 8,
    }
    left, top = tiles.boxes_px0("x20")[: len(cut.damaged["x20"]), :2].T
    expected = (top < 128) & (left >= 256) & (left < 512)
    np.testing.assert_array_equal(cut.damaged["x20"], expected)
    for name, pixels in cut.pixels.items():
        damaged = cut.damaged[name]
        np.testing.assert_array_equal(pixels[~damaged], sound.pixels[name][~damaged])
        assert (pixels[damaged] == 255).all()


def test_a_slide_of_which_nothing_can_be_read(shared_data: Path) -> None:
    path = shared_data / "slides" / "bad" / "unreadable.svs"
    with Slide(SlideRow("a", path, mpp=0.5)) as slide:
        cut = TileCutter(slide, tiles_of(slide, np.ones((2, 2), bool), ["x20"], tile_px=8)).cut(
            0, 1
        )
    assert cut.damaged["x20"].all() and "cannot be read" in cut.reason
