"""JPEGs of a TIFF laid side by side are what OpenSlide reads, pixel by pixel."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import tifffile
from jpegs import SIDE, damage, write_jpeg_pyramid

from dasmil.errors import InputError
from dasmil.slides import reader
from dasmil.slides.cohort import SlideRow
from dasmil.slides.reader import DamagedError, Slide


def regions(slide: Slide) -> Iterator[tuple[tuple[int, int], int, tuple[int, int]]]:
    """Parts of every level that can be read without interpolation, some beyond its borders."""
    for level, size in enumerate(slide._handle.level_dimensions):
        if slide.is_whole(level):
            stored, (width, height) = round(slide.downsamples[level]), size
            for left, top, w, h in [
                (0, 0, min(width, 700), min(height, 700)),
                (width // 3, height // 3, max(1, width // 2), max(1, min(height // 2, 900))),
                (width - 50, height - 40, 50, 40),
                (width - 50, height - 40, 90, 90),
                (-30, -20, 100, 100),
            ]:
                yield (left * stored, top * stored), level, (w, h)


def check(slide: Slide) -> int:
    """How many levels are read as JPEGs; whatever is read equals OpenSlide's pixels."""
    for origin_px0, level, size_px in regions(slide):
        jpegs = slide._jpeg_level(level)
        stored = round(slide.downsamples[level])
        if jpegs is not None and min(origin_px0) >= 0:  # also beyond the lower right border
            assert jpegs.read(*(edge // stored for edge in origin_px0), *size_px) is not None
        found = slide.region(origin_px0, level, size_px)
        expected = slide._openslide_region(origin_px0, level, size_px)
        np.testing.assert_array_equal(found, expected)
    return sum(jpegs is not None for jpegs in slide._jpegs.values())


@pytest.mark.parametrize("size_px0", [(1024, 768), (1000, 700)], ids=str)
def test_a_drawn_pyramid_of_jpegs(tmp_path: Path, size_px0: tuple[int, int]) -> None:
    """The last JPEGs of 1000 x 700 px are black beyond the slide, where all is white."""
    write_jpeg_pyramid(tmp_path / "a.tiff", *size_px0, (1, 2))
    with Slide(SlideRow("a", tmp_path / "a.tiff")) as slide:
        assert check(slide) == 2


@pytest.mark.parametrize(
    ("file", "levels"),
    [
        ("atlas_x20/PDAC-tru-cut_HE3.svs", 2),  # YCbCr
        ("atlas_x20/erosion_HE.tif", 1),
        ("native/cmu-1-small-region.svs", 1),  # RGB, with tables of its own for all JPEGs
        ("native/cmu-1-wrong-mpp.tiff", 1),
        ("native/tcga-cr-7395-01a-01-ts1.svs", 0),  # JPEG 2000
        ("native/boxes.tiff", 0),  # deflated
        ("native/cmu-1-small-region-dicom", 0),
    ],
)
def test_real_slides(shared_data: Path, file: str, levels: int) -> None:
    with Slide(SlideRow("a", shared_data / "slides" / file, mpp=0.5)) as slide:
        assert check(slide) == levels


def test_if_the_two_differ_openslide_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jpeg_pyramid(tmp_path / "a.tiff", 1024, 768, (1,))
    real = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda data: real(data) ^ 1)
    with Slide(SlideRow("a", tmp_path / "a.tiff")) as slide:
        assert check(slide) == 0


def test_a_jpeg_that_is_not_there_is_left_to_openslide(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    write_jpeg_pyramid(path, 1024, 768, (1,))
    with tifffile.TiffFile(path) as tiff:
        start, length = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    content = bytearray(path.read_bytes())
    content[start : start + length] = bytes(length)
    path.write_bytes(content)
    with Slide(SlideRow("a", path)) as slide:
        assert slide.region((512, 512), 0, (64, 64)).std() > 10
        with pytest.raises(InputError, match="pixels at 64,64 cannot be read"):
            slide.region((64, 64), 0, (128, 128))


def test_a_damaged_jpeg_is_refused_by_its_place_and_the_others_are_read(tmp_path: Path) -> None:
    """OpenCV returns pixels of it, and OpenSlide nothing more once it has refused one."""
    path = tmp_path / "a.tiff"
    write_jpeg_pyramid(path, 1024, 768, (1,))
    damage(path, 9, 20)  # of 8 in a row: the second has a sample of the check in it
    with Slide(SlideRow("a", path)) as slide:
        for _ in range(2):
            with pytest.raises(
                DamagedError, match="pixels at 128,128 cannot be read: Corrupt JPEG"
            ):
                slide.region((128, 128), 0, (SIDE, SIDE))
        for number in {*range(48)} - {9, 20}:
            place = (number % 8 * SIDE, number // 8 * SIDE)
            found = slide.region(place, 0, (SIDE, SIDE))
            np.testing.assert_array_equal(found, slide._openslide_region(place, 0, (SIDE, SIDE)))
        assert slide._jpegs[0] is not None


def test_decoded_jpegs_are_kept_within_bounds(tmp_path: Path) -> None:
    write_jpeg_pyramid(tmp_path / "a.tiff", 1024, 768, (1,))
    with Slide(SlideRow("a", tmp_path / "a.tiff"), cache_bytes=5 * 3 * SIDE**2) as slide:
        slide.region((0, 0), 0, (1024, 768))
        jpegs = slide._jpegs[0]
        assert jpegs is not None and jpegs._decode.cache_info().currsize == 5
        assert reader.CACHE_BYTES > 5 * 3 * SIDE**2
