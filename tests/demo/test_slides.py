"""The demo's slides: same picture from the same seed, lesions that only fine detail gives away."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest

from dasmil.demo.drawing import SyntheticSlide, draw_slide
from dasmil.demo.slides import write_cohort, write_pyramid
from dasmil.errors import InputError

SMALL = (768, 768)
TINY = (512, 512)  # used at 1 um/px


@pytest.fixture(scope="module")
def pairs() -> list[tuple[SyntheticSlide, SyntheticSlide]]:
    """Tumour and normal slide of the same seed, which differ inside the lesions alone."""
    return [
        (
            draw_slide(seed=seed, tumour=True, size_px0=(1280, 1280)),
            draw_slide(seed=seed, tumour=False, size_px0=(1280, 1280)),
        )
        for seed in range(4)
    ]


def block_means(field: np.ndarray, side_px: int) -> np.ndarray:
    """(H, W[, C]) to the means of its blocks, (rows, cols, C)."""
    height, width = field.shape[:2]
    blocks = field.reshape(height // side_px, side_px, width // side_px, side_px, -1)
    return blocks.mean(axis=(1, 3))


def wholly(mask: np.ndarray, side_px: int) -> np.ndarray:
    """Blocks that lie wholly inside a mask, (rows, cols) bool."""
    return block_means(mask, side_px)[..., 0] == 1


def area_under_curve(positive: np.ndarray, negative: np.ndarray) -> float:
    return float(np.mean(positive[:, None] > negative[None, :]))


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_seed_decides_the_picture() -> None:
    first = draw_slide(seed=3, tumour=True, size_px0=SMALL)
    again = draw_slide(seed=3, tumour=True, size_px0=SMALL)
    other = draw_slide(seed=4, tumour=True, size_px0=SMALL)
    np.testing.assert_array_equal(first.pixels, again.pixels)
    np.testing.assert_array_equal(first.tumour, again.tumour)
    assert (first.pixels != other.pixels).mean() > 0.3


def test_size_is_width_and_height() -> None:
    slide = draw_slide(seed=0, tumour=True, size_px0=(640, 512))
    assert slide.pixels.shape == (512, 640, 3)
    assert slide.pixels.dtype == np.uint8
    assert slide.tumour.shape == slide.tissue.shape == (512, 640)


@pytest.mark.slow
def test_lesions_lie_in_the_tissue_of_tumour_slides(pairs) -> None:
    for tumour, normal in pairs:
        assert not normal.tumour.any()
        assert tumour.tumour.any()
        assert not (tumour.tumour & ~tumour.tissue).any()


@pytest.mark.slow
def test_shares_of_tissue_and_lesions_at_the_default_size() -> None:
    for seed in range(3):
        slide = draw_slide(seed=seed, tumour=True)
        assert 0.35 < slide.tissue.mean() < 0.6
        assert 0.03 < slide.tumour.sum() / slide.tissue.sum() < 0.125


def test_tissue_is_darker_than_background(pairs) -> None:
    for slide, _ in pairs:
        assert slide.pixels[~slide.tissue].min(axis=1).mean() > 225
        assert slide.pixels[slide.tissue].min(axis=1).mean() < 190


def test_label_changes_nothing_outside_the_lesions(pairs) -> None:
    for tumour, normal in pairs:
        near = cv2.dilate(tumour.tumour.astype(np.uint8), np.ones((61, 61), np.uint8)) > 0
        np.testing.assert_array_equal(tumour.pixels[~near], normal.pixels[~near])
        np.testing.assert_array_equal(tumour.tissue, normal.tissue)


def test_lesions_vanish_in_block_means(pairs) -> None:
    """Over 16 um, vesicular and solid nuclei differ by far less than tissue and slides vary."""
    side_px = 32
    change, spread, level = [], [], []
    for tumour, normal in pairs:
        with_lesion = block_means(tumour.pixels, side_px)
        without = block_means(normal.pixels, side_px)
        inside = wholly(tumour.tumour, side_px)
        elsewhere = wholly(tumour.tissue & ~tumour.tumour, side_px)
        change.append((with_lesion - without)[inside].mean(axis=0))
        spread.append(without[elsewhere].std(axis=0))
        level.append(without[elsewhere].mean(axis=0))
    difference = np.abs(np.mean(change, axis=0))
    assert (difference < 0.2 * np.mean(spread, axis=0)).all()
    assert (difference < 0.3 * np.std(level, axis=0)).all()


def test_lesions_show_at_full_resolution(pairs) -> None:
    """Pixel by pixel, a lesion is not what it would be with solid nuclei."""
    for tumour, normal in pairs:
        difference = np.abs(tumour.pixels.astype(int) - normal.pixels)[tumour.tumour]
        assert (difference.max(axis=1) > 30).mean() > 0.15


@pytest.mark.slow
def test_mean_colour_does_not_tell_the_label() -> None:
    saturation = []
    for seed in range(20):
        slide = draw_slide(seed=seed, tumour=seed % 2 == 1, size_px0=TINY, mpp=1.0)
        hsv = cv2.cvtColor(slide.pixels, cv2.COLOR_RGB2HSV)
        saturation.append(hsv[..., 1][slide.tissue].mean())
    normal, tumour = np.array(saturation[::2]), np.array(saturation[1::2])
    assert 0.2 < area_under_curve(tumour, normal) < 0.8


def test_finer_pixels_show_the_same_picture() -> None:
    coarse = draw_slide(seed=5, tumour=True, size_px0=SMALL, mpp=0.5)
    fine = draw_slide(seed=5, tumour=True, size_px0=(1536, 1536), mpp=0.25)
    reduced = block_means(fine.pixels, 2)
    assert np.abs(reduced - coarse.pixels).mean() < 3
    assert np.corrcoef(reduced.ravel(), coarse.pixels.ravel())[0, 1] > 0.98
    for name in ("tumour", "tissue"):
        a, b = getattr(coarse, name), block_means(getattr(fine, name), 2)[..., 0] >= 0.5
        assert (a & b).sum() / (a | b).sum() > 0.98


def test_pyramid_opens_in_openslide(tmp_path: Path) -> None:
    pixels = draw_slide(seed=1, tumour=False, size_px0=(1024, 768)).pixels
    path = tmp_path / "slide.tiff"
    write_pyramid(path, pixels, mpp=0.25)
    with openslide.OpenSlide(path) as slide:
        assert slide.properties[openslide.PROPERTY_NAME_VENDOR] == "generic-tiff"
        assert slide.level_dimensions == ((1024, 768), (512, 384), (256, 192), (128, 96))
        assert slide.level_downsamples == pytest.approx((1, 2, 4, 8))
        for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y):
            assert float(slide.properties[name]) == pytest.approx(0.25, rel=1e-4)
        region = np.asarray(slide.read_region((0, 0), 0, (1024, 768)))[..., :3]
        coarse = np.asarray(slide.read_region((0, 0), 2, (256, 192)))[..., :3]
    np.testing.assert_array_equal(region, pixels)
    assert np.abs(block_means(pixels, 4) - coarse).max() <= 1
    assert list(tmp_path.iterdir()) == [path]


def test_cohort(tmp_path: Path) -> None:
    splits = {"train": 4, "val": 2, "test": 2}
    table = write_cohort(tmp_path, num_slides=splits, seed=2, size_px0=TINY, mpp=1.0)
    rows = read_table(table)
    assert list(rows[0]) == ["slide_id", "path", "label", "patient_id", "split"]
    assert [row["slide_id"] for row in rows] == [f"demo_{number:03d}" for number in range(8)]
    assert len({row["patient_id"] for row in rows}) == 8
    for split, count in splits.items():
        labels = [row["label"] for row in rows if row["split"] == split]
        assert sorted(labels) == ["normal"] * (count // 2) + ["tumour"] * (count // 2)
    for row in rows:
        assert (tmp_path / row["path"]).is_file()
        truth = cv2.imread(str(tmp_path / "truth" / f"{row['slide_id']}.png"), cv2.IMREAD_UNCHANGED)
        assert truth.shape == (128, 128)
        assert set(np.unique(truth)) <= {0, 255}
        assert truth.any() == (row["label"] == "tumour")


def test_cohort_is_kept_only_with_the_same_parameters(tmp_path: Path) -> None:
    kind = {"num_slides": {"train": 2}, "size_px0": (256, 256), "mpp": 1.0}
    table = write_cohort(tmp_path, **kind, seed=0)
    slides = sorted(tmp_path.glob("slides/*"))
    written = [path.stat().st_mtime_ns for path in slides]
    first = slides[0].read_bytes()

    write_cohort(tmp_path, **kind, seed=0)
    assert [path.stat().st_mtime_ns for path in slides] == written

    slides[0].unlink()
    write_cohort(tmp_path, **kind, seed=0)
    assert slides[0].read_bytes() == first
    assert slides[1].stat().st_mtime_ns == written[1]

    write_cohort(tmp_path, **kind, seed=1)
    assert slides[0].read_bytes() != first
    assert json.loads((tmp_path / "demo.json").read_text())["seed"] == 1
    assert len(read_table(table)) == 2


def test_processes_draw_the_same_cohort(tmp_path: Path) -> None:
    kind = {"num_slides": {"train": 2}, "size_px0": (256, 256), "mpp": 1.0}
    for workers in (1, 2):
        write_cohort(tmp_path / str(workers), **kind, workers=workers)
    for name in ("slides/demo_000.tiff", "slides/demo_001.tiff", "cohort.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_cohort_that_is_no_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "cohort.csv").write_text("slide_id\nmine\n")
    with pytest.raises(InputError, match="another folder"):
        write_cohort(tmp_path, num_slides={"train": 2}, size_px0=(256, 256), mpp=1.0)
    assert (tmp_path / "cohort.csv").read_text() == "slide_id\nmine\n"
