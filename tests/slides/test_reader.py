"""Pixels and physical scale of slides, on drawn pyramids and on real files."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
import tifffile
from dicoms import write_dicom
from gigapixel import write_gigapixel
from PIL import Image

from dasmil.demo.slides import write_pyramid
from dasmil.errors import InputError
from dasmil.geometry import PyramidGrid
from dasmil.slides import opening, reader
from dasmil.slides.cohort import SlideRow
from dasmil.slides.reader import Slide
from dasmil.units import Mpp, TilePx, parse_scales

RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)


@cache
def draw_picture(width: int, height: int, *, grain_px: float) -> np.ndarray:
    """(height, width, 3) uint8, a random texture of one grain size."""
    noise = np.random.default_rng(0).normal(size=(height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), grain_px)
    return np.clip(150 + 35 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def halve(picture: np.ndarray, times: int) -> np.ndarray:
    """Means of blocks, as floats."""
    height, width = picture.shape[:2]
    return picture.reshape(height // times, times, width // times, times, 3).mean(axis=(1, 3))


def difference(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape
    return float(np.abs(first.astype(float) - second).mean())


def moved(picture: np.ndarray) -> np.ndarray:
    """The picture one pixel further to the right."""
    return np.roll(picture, 1, axis=1)


def write_levels(path: Path, colours: list[tuple[int, int, int]], side: int = 1024) -> None:
    """A pyramid of mpp 0.5 whose levels (1, 2, 4, ...) tell themselves by their colour."""
    with tifffile.TiffWriter(path) as tiff:
        for number, colour in enumerate(colours):
            shape = (side >> number, side >> number, 3)
            tiff.write(
                np.broadcast_to(np.array(colour, np.uint8), shape),
                photometric="rgb",
                tile=(256, 256),
                subfiletype=int(number > 0),
                resolution=(20000 / 2**number,) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
            )


def write_aperio(path: Path, description: str, side: int = 300) -> None:
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            np.full((side, side, 3), 200, np.uint8),
            photometric="rgb",
            tile=(256, 256),
            description=f"Aperio Image Library v11\r\n{side}x{side} (256x256)|{description}",
            metadata=None,
        )


def write_tiff(path: Path, mpp_x: float, mpp_y: float) -> None:
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            np.full((300, 300, 3), 200, np.uint8),
            photometric="rgb",
            tile=(256, 256),
            resolution=(1e4 / mpp_x, 1e4 / mpp_y),
            resolutionunit="CENTIMETER",
            metadata=None,
        )


def refusal(row: SlideRow) -> str:
    with pytest.raises(InputError) as caught:
        Slide(row)
    return str(caught.value)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Slide]:
    """One piece of glass, 512 × 384 µm, in the files of several scanners."""
    folder = tmp_path_factory.mktemp("scans")
    at_40x = draw_picture(2048, 1536, grain_px=6)
    at_20x = halve(at_40x, 2).round().astype(np.uint8)
    at_25x = cv2.resize(at_40x, (1280, 960), interpolation=cv2.INTER_AREA)
    write_pyramid(folder / "20x.tiff", at_20x, 0.5, (1, 2, 4))
    write_pyramid(folder / "40x.tiff", at_40x, 0.25, (1, 2, 4, 8))
    write_pyramid(folder / "40x single level.tiff", at_40x, 0.25, (1,))
    write_pyramid(folder / "25x.tiff", at_25x, 0.4, (1, 4))
    Image.fromarray(at_20x).save(folder / "20x.png")
    return {
        path.name: Slide(SlideRow(path.stem, path, mpp=0.5 if path.suffix == ".png" else None))
        for path in sorted(folder.iterdir())
    }


@pytest.fixture(scope="module")
def rainbow(tmp_path_factory: pytest.TempPathFactory) -> Slide:
    path = tmp_path_factory.mktemp("rainbow") / "rainbow.tiff"
    write_levels(path, [RED, GREEN, BLUE])
    return Slide(SlideRow("rainbow", path))


# Physical scale


def test_mpp_comes_from_the_file(scans: dict[str, Slide]) -> None:
    assert scans["40x.tiff"].mpp == pytest.approx(0.25)
    assert scans["25x.tiff"].mpp == pytest.approx(0.4)
    assert scans["40x.tiff"].physical_scale.source == "slide"
    assert scans["40x.tiff"].size_px0 == (2048, 1536)
    assert scans["40x.tiff"].downsamples == (1, 2, 4, 8)


@pytest.mark.parametrize(("power", "mpp"), [(20, 0.5), (40, 0.25)])
def test_mpp_follows_from_objective_power_if_the_file_has_none(
    tmp_path: Path, power: int, mpp: float
) -> None:
    write_aperio(tmp_path / "a.svs", f"AppMag = {power}")
    scale = Slide(SlideRow("a", tmp_path / "a.svs")).physical_scale
    assert (scale.mpp, scale.source) == (mpp, "objective power")


def test_mpp_of_the_file_goes_before_its_objective_power(tmp_path: Path) -> None:
    write_aperio(tmp_path / "a.svs", "AppMag = 40|MPP = 0.2425")
    scale = Slide(SlideRow("a", tmp_path / "a.svs")).physical_scale
    assert (scale.mpp, scale.source) == (0.2425, "slide")


def test_the_table_goes_before_all_else(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    write_aperio(path, "AppMag = 40|MPP = 0.2425")
    by_mpp = Slide(SlideRow("a", path, mpp=0.5)).physical_scale
    assert (by_mpp.mpp, by_mpp.source) == (0.5, "table")
    by_power = Slide(SlideRow("a", path, magnification=10)).physical_scale
    assert (by_power.mpp, by_power.source) == (1.0, "table")
    assert Slide(SlideRow("a", path, mpp=0.3, magnification=10)).mpp == 0.3


@pytest.mark.parametrize(
    ("description", "columns", "own"),
    [
        ("MPP = 0.25", {"mpp": 0.5}, "0.25"),
        ("MPP = 0.25", {"mpp": 0.3001}, "0.25"),
        ("MPP = 0.25", {"mpp": 0.29}, ""),  # within a fifth
        ("MPP = 0.25", {"mpp": 0.2}, "0.25"),
        ("AppMag = 40", {"magnification": 20}, "0.25"),
        ("AppMag = 40|MPP = 0.5", {"magnification": 20}, ""),
        ("MPP = 350", {"mpp": 0.5}, ""),  # nonsense is there to be corrected
        ("Date = 1", {"mpp": 0.5}, ""),
    ],
)
def test_a_table_that_contradicts_the_file_is_obeyed_and_said(
    tmp_path: Path, description: str, columns: dict[str, float], own: str
) -> None:
    write_aperio(tmp_path / "a.svs", description)
    scale = Slide(SlideRow("a", tmp_path / "a.svs", **columns)).physical_scale
    assert scale.source == "table"
    used = columns.get("mpp", 0.5)
    assert scale.mpp == used
    said = f"the table's {used:g} µm/px is used, the file has {own}" if own else ""
    assert scale.warning == said


@pytest.mark.parametrize("description", ["Date = 1", "MPP = 0", "MPP = 0|AppMag = 0"])
def test_a_file_without_scale_is_refused_with_slide_and_column(
    tmp_path: Path, description: str
) -> None:
    path = tmp_path / "a.svs"
    write_aperio(path, description)
    message = refusal(SlideRow("biopsy 7", path))
    assert f"slide biopsy 7 ({path})" in message
    assert "neither mpp nor objective power" in message
    assert "fill the column mpp (or magnification)" in message


def test_a_zero_for_mpp_means_objective_power_decides(tmp_path: Path) -> None:
    write_aperio(tmp_path / "a.svs", "MPP = 0|AppMag = 20")
    assert Slide(SlideRow("a", tmp_path / "a.svs")).mpp == 0.5


@pytest.mark.parametrize("mpp", [0.004, 352.8])
def test_an_implausible_mpp_is_refused_and_can_be_overridden(tmp_path: Path, mpp: float) -> None:
    path = tmp_path / "a.tiff"
    write_tiff(path, mpp, mpp)
    message = refusal(SlideRow("biopsy 7", path))
    assert f"slide biopsy 7 ({path}): {mpp:g} µm/px (from the slide)" in message
    assert "fill the column mpp" in message
    assert Slide(SlideRow("biopsy 7", path, mpp=0.5)).mpp == 0.5


def test_an_implausible_mpp_of_the_table_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    write_tiff(path, 0.5, 0.5)
    assert "500 µm/px (from the table)" in refusal(SlideRow("a", path, mpp=500))


def test_pixels_that_are_not_square_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    write_tiff(path, 0.5, 0.6)
    message = refusal(SlideRow("biopsy 7", path))
    assert f"slide biopsy 7 ({path}): its pixels are not square (0.5 by 0.6 µm)" in message
    assert Slide(SlideRow("a", path, mpp=0.55)).mpp == 0.55
    write_tiff(path, 0.5, 0.51)
    assert Slide(SlideRow("a", path)).mpp == pytest.approx(0.505)


# What cannot be opened


def test_files_that_cannot_be_opened_say_why(tmp_path: Path) -> None:
    (tmp_path / "notes.svs").write_text("not a slide")
    (tmp_path / "folder").mkdir()
    missing = refusal(SlideRow("a", tmp_path / "none.svs", mpp=0.5))
    foreign = refusal(SlideRow("a", tmp_path / "notes.svs", mpp=0.5))
    folder = refusal(SlideRow("a", tmp_path / "folder", mpp=0.5))
    long = refusal(SlideRow("a", tmp_path / f"{'x' * 300}.svs", mpp=0.5))
    assert long.endswith("x.svs: cannot be opened: File name too long")
    assert missing == f"{tmp_path / 'none.svs'}: no such file"
    assert foreign.startswith(f"{tmp_path / 'notes.svs'}: OpenSlide does not know this format")
    without_dicom = "a folder without DICOM (.dcm) files is no slide; name a file"
    assert folder == f"{tmp_path / 'folder'}: {without_dicom}"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_a_truncated_picture_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    Image.fromarray(draw_picture(300, 300, grain_px=1)).save(path)
    path.write_bytes(path.read_bytes()[:20_000])
    assert refusal(SlideRow("a", path, mpp=0.5)).startswith(f"{path}: ")


@pytest.mark.parametrize("compression", [None, "jpeg"])
def test_a_picture_of_damaged_jpegs_is_refused(tmp_path: Path, compression: str | None) -> None:
    """Pillow returns pixels of it, as do OpenCV and viewers."""
    path = tmp_path / ("a.jpg" if compression is None else "a.tif")
    picture = Image.fromarray(draw_picture(300, 300, grain_px=1))
    picture.save(path, **({} if compression is None else {"compression": compression}))
    Slide(SlideRow("a", path, mpp=0.5)).close()
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2] = b"\xff\xd9"  # it ends here
    path.write_bytes(data)
    with Image.open(path) as image:
        image.load()
    assert refusal(SlideRow("a", path, mpp=0.5)).startswith(f"{path}: a damaged JPEG")


def test_other_formats_are_no_slides(tmp_path: Path) -> None:
    """Pillow reads dozens by their content; PostScript it gives to Ghostscript."""
    picture = Image.fromarray(draw_picture(64, 64, grain_px=3))
    formats = ("GIF", "PPM", "WEBP", "TGA", "ICO", "PCX", "EPS", "SGI", "DDS", "MSP")
    for kind in formats:
        path = tmp_path / f"{kind}.png"
        picture.convert("1" if kind == "MSP" else "RGB").save(path, kind)
        assert "OpenSlide does not know this format" in refusal(SlideRow("a", path, mpp=0.5)), kind


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """Opening a FIFO would wait for ever, and OpenSlide opens all that lies in some folders."""
    fifo = tmp_path / "fifo.svs"
    os.mkfifo(fifo)
    link = tmp_path / "link.svs"
    link.symlink_to("/dev/zero")
    for name in ("mirax", "dicom"):
        (tmp_path / name).mkdir()
        os.mkfifo(tmp_path / name / "Data0000.dat")
    (tmp_path / "mirax.mrxs").write_bytes(b"")
    for path in (fifo, link, tmp_path / "mirax.mrxs", tmp_path / "dicom"):
        assert "is no regular file" in refusal(SlideRow("a", path, mpp=0.5))


def test_files_with_giant_parts_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gigapixel(tmp_path / "a.tiff", 4096, downsamples=(1,), tile_px=(1024, 512))
    monkeypatch.setattr(opening, "MAX_STORED_TILE_PX", 1024 * 512)
    Slide(SlideRow("a", path)).close()
    monkeypatch.setattr(opening, "MAX_STORED_TILE_PX", 1024 * 512 - 1)
    message = refusal(SlideRow("a", path))
    assert message.startswith(f"{path}: stored in tiles of 1024 × 512 px")
    assert "vips tiffsave" in message


@pytest.mark.parametrize("tile", [None, (256, 256)])
def test_a_min_is_white_picture_is_inverted(tmp_path: Path, tile: tuple[int, int] | None) -> None:
    grey = draw_picture(300, 300, grain_px=3)[..., 0]
    tifffile.imwrite(tmp_path / "a.tif", 255 - grey, photometric="miniswhite", tile=tile)
    with Slide(SlideRow("a", tmp_path / "a.tif", mpp=0.5)) as slide:
        assert np.array_equal(slide.read((0, 0, 300, 300), (300, 300))[..., 1], grey)


def test_a_picture_too_large_to_be_decoded_as_a_whole_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(draw_picture(300, 300, grain_px=1)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300 * 300 // 2 - 1)
    message = refusal(SlideRow("a", path, mpp=0.5))
    assert message.startswith(f"{path}: a picture without tiles, too large")
    assert "vips tiffsave" in message


# Pixels


def test_unscaled_pixels_are_those_of_the_picture(scans: dict[str, Slide]) -> None:
    picture = draw_picture(2048, 1536, grain_px=6)
    found = scans["40x.tiff"].read((700, 333, 828, 397), (128, 64))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, picture[333:397, 700:828])


@pytest.mark.parametrize("name", ["40x.tiff", "40x single level.tiff"])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_reduced_pixels_are_means(scans: dict[str, Slide], name: str, factor: int) -> None:
    picture = draw_picture(2048, 1536, grain_px=6)[512:1024, 1024:1536]
    found = scans[name].read((1024, 512, 1536, 1024), (512 // factor, 512 // factor))
    assert np.abs(found - halve(picture, factor)).max() <= 1


def test_a_finer_scale_than_stored_is_interpolated(scans: dict[str, Slide]) -> None:
    picture = draw_picture(2048, 1536, grain_px=6)[512:576, 512:576]
    found = scans["40x.tiff"].read((512, 512, 576, 576), (70, 70))
    expected = np.asarray(Image.fromarray(picture).resize((70, 70), Image.Resampling.BILINEAR))
    assert np.abs(found.astype(int) - expected).max() <= 3


@pytest.mark.parametrize(
    ("side_px0", "colour"),
    [
        (32, RED),
        (64, RED),
        (127, RED),
        (128, GREEN),
        (255, GREEN),
        (256, BLUE),
        (600, BLUE),
    ],
)
def test_the_coarsest_level_that_is_fine_enough_is_read(
    rainbow: Slide, side_px0: int, colour: tuple[int, int, int]
) -> None:
    tile = rainbow.read((100, 100, 100 + side_px0, 100 + side_px0), (64, 64))
    assert tile.shape == (64, 64, 3)
    assert (tile == np.array(colour)).all()


def test_a_level_that_is_coarser_by_rounding_alone_is_read(rainbow: Slide) -> None:
    tile = rainbow.read((0, 0, 1023, 1023), (512, 512))  # 1.998 asked, 2 stored
    assert (tile == np.array(GREEN)).all()


@pytest.mark.parametrize("name", ["20x.tiff", "20x.png"])
def test_outside_the_slide_is_white(scans: dict[str, Slide], name: str) -> None:
    picture = halve(draw_picture(2048, 1536, grain_px=6), 2).round().astype(np.uint8)
    height, width = picture.shape[:2]
    canvas = np.full((height + 200, width + 200, 3), 255, np.uint8)
    canvas[100:-100, 100:-100] = picture
    for left, top in [(-40, -60), (width - 30, -10), (-64, 300), (width - 64, height - 1)]:
        found = scans[name].read((left, top, left + 64, top + 64), (64, 64))
        expected = canvas[top + 100 : top + 164, left + 100 : left + 164]
        np.testing.assert_array_equal(found, expected)
    beyond = scans[name].read((width + 500, 0, width + 564, 64), (64, 64))
    assert (beyond == 255).all()


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    rgba = np.zeros((64, 96, 4), np.uint8)
    rgba[..., :3] = (200, 100, 0)
    rgba[:, :32, 3], rgba[:, 32:64, 3], rgba[:, 64:, 3] = 255, 51, 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    found = Slide(SlideRow("a", tmp_path / "a.png", mpp=0.5)).read((0, 0, 96, 64), (96, 64))
    assert (found[:, :32] == (200, 100, 0)).all()
    assert (found[:, 32:64] == (244, 224, 204)).all()  # a fifth of the colour, the rest white
    assert (found[:, 64:] == 255).all()


# The same glass


@pytest.mark.parametrize("other", ["40x.tiff", "40x single level.tiff", "25x.tiff", "20x.png"])
def test_every_scanner_gives_the_same_physical_tiles(scans: dict[str, Slide], other: str) -> None:
    scales = parse_scales(["x5", "x10", "x20"])
    ours, theirs = scans["20x.tiff"], scans[other]
    our_grid = PyramidGrid(scales, TilePx(48), ours.mpp)
    their_grid = PyramidGrid(scales, TilePx(48), theirs.mpp)
    for number in range(3):
        rows, columns = 4 * 2**number, 5 * 2**number  # wholly on the slide; of 96 µm each at x5
        places = np.argwhere(np.ones((rows, columns), bool))[::3]
        same, shifted = [], []
        for our_box, their_box in zip(
            our_grid.boxes_px0(number, places), their_grid.boxes_px0(number, places), strict=True
        ):
            np.testing.assert_allclose(our_box * ours.mpp, their_box * theirs.mpp, atol=0.5)
            our_tile, their_tile = ours.read(our_box, (48, 48)), theirs.read(their_box, (48, 48))
            same.append(difference(our_tile, their_tile))
            shifted.append(difference(moved(our_tile)[:, 1:], their_tile[:, 1:]))
        exact = theirs.mpp in (0.25, 0.5)
        assert np.mean(same) < (0.6 if exact else np.mean(shifted) / 4)
        assert np.max(same) < (1.0 if exact else np.mean(shifted) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("downsamples", [(1,), (1, 2, 4, 8)], ids=["one level", "four levels"])
@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.2425, 0.499, 0.526036, 0.55])
def test_a_coarse_tile_is_its_children_put_together(
    tmp_path: Path, mpp: float, downsamples: tuple[int, ...]
) -> None:
    write_pyramid(tmp_path / "a.tiff", draw_picture(1600, 1200, grain_px=6), mpp, downsamples)
    slide = Slide(SlideRow("a", tmp_path / "a.tiff"))
    grid = PyramidGrid(parse_scales(["x5", "x10", "x20"]), TilePx(32), Mpp(mpp))
    for coarse, fine, ratio in [(0, 1, 2), (1, 2, 2), (0, 2, 4)]:
        places = np.argwhere(np.ones(grid.shape(coarse, slide.size_px0), bool))[::5]
        assert len(places) > 3
        same, shifted = [], []
        for place, box in zip(places, grid.boxes_px0(coarse, places), strict=True):
            tile = slide.read(box, (32, 32))
            steps = np.argwhere(np.ones((ratio, ratio), bool))
            whole = np.zeros((32 * ratio, 32 * ratio, 3), np.uint8)
            for (down, along), child in zip(
                steps, grid.boxes_px0(fine, place * ratio + steps), strict=True
            ):
                whole[32 * down : 32 * down + 32, 32 * along : 32 * along + 32] = slide.read(
                    child, (32, 32)
                )
            together = halve(whole, ratio)
            same.append(difference(tile, together))
            shifted.append(difference(moved(together)[:, 1:], tile[:, 1:]))
        exact = mpp in (0.25, 0.5)
        assert np.mean(same) < (0.6 if exact else np.mean(shifted) / 3)


# Thumbnail


def area_weights(count: int, length: int) -> np.ndarray:
    """(count, length): share of each pixel in each of ``count`` equal intervals, rows sum to 1."""
    edges = np.linspace(0, length, count + 1)
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    overlap = overlap.clip(0)
    return overlap / overlap.sum(axis=1, keepdims=True)


def area_average(picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    down, along = area_weights(shape[0], picture.shape[0]), area_weights(shape[1], picture.shape[1])
    reduced = np.tensordot(down, picture.astype(float), axes=(1, 0))  # (h, W, 3)
    return np.moveaxis(np.tensordot(along, reduced, axes=(1, 1)), 0, 1)  # (h, w, 3)


@pytest.mark.parametrize("mpp", [0.5, 0.499, 0.2425])
def test_a_thumbnail_is_the_area_average_of_the_picture(tmp_path: Path, mpp: float) -> None:
    picture = draw_picture(1500, 1100, grain_px=2)
    write_pyramid(tmp_path / "a.tiff", picture, mpp, (1,))
    found = Slide(SlideRow("a", tmp_path / "a.tiff")).thumbnail(4.0)
    assert found.shape == (round(1100 * mpp / 4), round(1500 * mpp / 4), 3)
    expected = area_average(picture, found.shape[:2])
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("downsamples", [(1,), (1, 2, 4)], ids=["one level", "three levels"])
@pytest.mark.parametrize("mpp", [0.5, 0.499])
def test_a_thumbnail_read_in_blocks_has_no_seams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mpp: float, downsamples: tuple[int, ...]
) -> None:
    picture = draw_picture(1500, 1100, grain_px=16)
    write_pyramid(tmp_path / "a.tiff", picture, mpp, downsamples)
    slide = Slide(SlideRow("a", tmp_path / "a.tiff"))
    at_once = slide.thumbnail(4.0)
    reads = []
    monkeypatch.setattr(reader, "READ_BLOCK_PX", 64)
    monkeypatch.setattr(
        slide, "_read", lambda *args: reads.append(args[1]) or Slide._read(slide, *args)
    )
    in_blocks = slide.thumbnail(4.0)
    assert len(reads) > 20
    assert sum(width * height for width, height in reads) == in_blocks.shape[0] * in_blocks.shape[1]
    expected = area_average(picture, in_blocks.shape[:2])
    one_pixel = difference(moved(expected)[:, 1:], expected[:, 1:])
    error = np.abs(in_blocks - expected).mean(axis=2)
    side = max(size[0] for size in reads)
    assert side == (16 if len(downsamples) == 1 else 64 * 4 // (4 / mpp))  # 64 stored pixels
    for profile in (error.mean(axis=0), error.mean(axis=1)):
        at_seams = np.arange(len(profile)) % side
        seams = profile[(at_seams == 0) | (at_seams == side - 1)]
        assert seams.mean() < 0.75 * one_pixel
        assert seams.mean() < 1.5 * profile.mean() + 0.5
    assert difference(at_once, in_blocks) < 0.5 * one_pixel


def test_a_thumbnail_reads_a_coarse_level_and_is_never_finer_than_stored(rainbow: Slide) -> None:
    assert (rainbow.thumbnail(8.0) == np.array(BLUE)).all()
    assert rainbow.thumbnail(8.0).shape == (64, 64, 3)
    assert (rainbow.thumbnail(1.0) == np.array(GREEN)).all()
    assert rainbow.thumbnail(0.1).shape == (1024, 1024, 3)


def test_a_thumbnail_of_a_slide_that_says_it_is_endless_is_refused(tmp_path: Path) -> None:
    (path,) = write_dicom(tmp_path, np.full((128, 128, 3), 200, np.uint8), 0.5, (1,))
    level = pydicom.dcmread(path)
    level.TotalPixelMatrixRows = 2**31
    level.save_as(path)
    with (
        Slide(SlideRow("a", tmp_path)) as slide,
        pytest.raises(InputError, match=r"128 × 2,147,483,648 px, .* at 8 µm/px .* 3 GB; export"),
    ):
        slide.thumbnail(8.0)


def test_a_thumbnail_of_a_slide_smaller_than_its_pixel_is_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (9, 5), RED).save(tmp_path / "a.png")
    thumbnail = Slide(SlideRow("a", tmp_path / "a.png", mpp=0.25)).thumbnail(8.0)
    assert thumbnail.tolist() == [[list(RED)]]


def test_threads_may_share_a_slide(scans: dict[str, Slide]) -> None:
    slide = scans["40x.tiff"]
    boxes = [(x, y, x + 256, y + 256) for x in range(0, 1700, 170) for y in range(0, 1200, 300)]
    one_by_one = [slide.read(box, (64, 64)) for box in boxes]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda box: slide.read(box, (64, 64)), boxes))
    np.testing.assert_array_equal(one_by_one, together)


# Real files


def test_real_aperio_and_dicom_agree(shared_data: Path) -> None:
    """The DICOM's colours are wrong, its red is not; what matters here is that nothing is moved."""
    native = shared_data / "slides" / "native"
    aperio = Slide(SlideRow("svs", native / "cmu-1-small-region.svs"))
    dicom = Slide(SlideRow("dicom", native / "cmu-1-small-region-dicom"))
    for slide in (aperio, dicom):
        assert slide.size_px0 == (2220, 2967)
        assert (slide.mpp, slide.physical_scale.source) == (0.499, "slide")
    assert (len(aperio.downsamples), len(dicom.downsamples)) == (1, 12)
    for box, size in [
        ((700, 1200, 956, 1456), (256, 256)),
        ((500, 500, 1524, 1524), (256, 256)),
        ((0, 0, 2220, 2967), (222, 297)),
    ]:
        ours, theirs = aperio.read(box, size)[..., 0], dicom.read(box, size)[..., 0]
        match = {
            (down, along): np.corrcoef(
                np.roll(ours, (down, along), (0, 1)).ravel(), theirs.ravel()
            )[0, 1]
            for down in (-1, 0, 1)
            for along in (-1, 0, 1)
        }
        assert max(match, key=match.get) == (0, 0)
        assert match[0, 0] > 0.9


def test_two_dicom_slides_in_one_folder_are_refused(shared_data: Path, tmp_path: Path) -> None:
    """One of them would be read, and nobody hear of the other."""
    folder = shared_data / "slides" / "native" / "cmu-1-small-region-dicom"
    (level,) = folder.glob("level-2-*.dcm")
    content = level.read_bytes()
    series = b"1.2.276.0.7230010.3.1.3.2425734838.4124713.1626788322.499658"
    assert series in content
    for name, last in (("a", b"8"), ("b", b"8"), ("c", b"9")):
        (tmp_path / f"{name}.dcm").write_bytes(content.replace(series, series[:-1] + last))
    assert "holds 2 DICOM slides; give each its own folder" in refusal(SlideRow("d", tmp_path))
    assert Slide(SlideRow("c", tmp_path / "c.dcm")).size_px0 == (555, 741)
    (tmp_path / "c.dcm").write_bytes(b"a label that OpenSlide cannot read")
    assert Slide(SlideRow("d", tmp_path)).size_px0 == (555, 741)


def test_a_real_slide_with_a_wrong_mpp_needs_the_table(shared_data: Path) -> None:
    native = shared_data / "slides" / "native"
    path = native / "cmu-1-wrong-mpp.tiff"
    assert "slide w (" in refusal(SlideRow("w", path))
    assert "0.00499 µm/px (from the slide) is outside" in refusal(SlideRow("w", path))
    corrected = Slide(SlideRow("w", path, mpp=0.499))
    aperio = Slide(SlideRow("svs", native / "cmu-1-small-region.svs"))
    box = (700, 1200, 1212, 1712)
    assert difference(corrected.read(box, (256, 256)), aperio.read(box, (256, 256))) < 5


def test_a_real_slide_without_any_scale_needs_the_table(shared_data: Path) -> None:
    path = shared_data / "slides" / "native" / "tcga-cr-7395-01a-01-ts1.svs"
    assert "neither mpp nor objective power" in refusal(SlideRow("t", path))
    assert Slide(SlideRow("t", path, magnification=20)).mpp == 0.5


def test_a_scale_that_is_not_stored_is_made_from_a_finer_level(shared_data: Path) -> None:
    """PDAC-tru-cut_HE3.svs holds 1, 4 and 16: x10 comes from level 0, x5 from level 0 too."""
    path = shared_data / "slides" / "atlas_x20" / "PDAC-tru-cut_HE3.svs"
    slide = Slide(SlideRow("p", path))
    assert slide.mpp == pytest.approx(0.526036)
    grid = PyramidGrid(parse_scales(["x5", "x10", "x20"]), TilePx(256), slide.mpp)
    thumbnail = slide.thumbnail(16.0)
    middle = np.argwhere(thumbnail.std(axis=2) > 12).mean(axis=0) * 16.0 / (256 * 2)
    place = middle.astype(int)[None]
    coarse = slide.read(grid.boxes_px0(0, place)[0], (256, 256))
    whole = np.zeros((1024, 1024, 3), np.uint8)
    for down in range(4):
        for along in range(4):
            box = grid.boxes_px0(2, place * 4 + [[down, along]])[0]
            whole[256 * down : 256 * down + 256, 256 * along : 256 * along + 256] = slide.read(
                box, (256, 256)
            )
    assert coarse.std() > 10
    together = halve(whole, 4)
    assert difference(coarse, together) < difference(moved(together), coarse) / 3
