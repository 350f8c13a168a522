"""Memory does not grow with the pixels of a slide.

The first tests hold what arrays take by pixel of the thumbnail and by chunk; the last ones run the
commands on slides of 200,000 × 200,000 px and look at their processes.
"""

import csv
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from gigapixel import CELL_PX0, peak_bytes, write_gigapixel

from dasmil.embedding.dataset import ChunkDataset
from dasmil.slides.cohort import SlideRow
from dasmil.slides.pyramid import TilingParameters
from dasmil.slides.reader import READ_BLOCK_PX, Slide
from dasmil.slides.tile_slide import tile_slide
from dasmil.slides.tile_table import read_tiles, tiles_path
from dasmil.slides.tissue import TissueParameters

GB = 1e9
LIMIT = 4 * GB
SCALES = ("x10", "x20")


def traced_peak(function, *arguments) -> int:
    """Bytes of the arrays that are alive at the same time, above what was there before."""
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16,384 px a side, a sixteenth of it tissue, without a pyramid."""
    folder = tmp_path_factory.mktemp("gigapixel")
    return write_gigapixel(folder / "a.tiff", 4 * CELL_PX0, tissue=1 / 16, downsamples=(1,))


def test_a_gigapixel_file_is_a_slide_for_both_readers(tmp_path: Path) -> None:
    """Its levels show one picture, and a tile that is stored once stands in all its places."""
    path = write_gigapixel(tmp_path / "a.tiff", 100_352, tissue=0.1, downsamples=(1, 4, 16, 64))
    assert path.stat().st_size < 8e6
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)
        assert slide.level_downsamples == (1, 4, 16, 64)
        overview = np.asarray(slide.get_thumbnail((1568, 1568)))
        row, column = np.argwhere(overview.std(2) > 10).mean(0) * 64
        corners_px0 = np.random.default_rng(0).integers(0, 90_000 // 64, (3, 2)) * 64
        for left, top in [(int(column), int(row)), *corners_px0.tolist()]:
            left, top = left // 64 * 64, top // 64 * 64
            parts = [
                np.asarray(slide.read_region((left, top), level, (2048 // down,) * 2))[..., :3]
                for level, down in enumerate((1, 4, 16, 64))
            ]
            means = np.array([part.mean((0, 1)) for part in parts])
            np.testing.assert_allclose(means, means[:1].repeat(4, 0), atol=4)
    with tifffile.TiffFile(path) as file:
        assert [page.shape for page in file.pages] == [
            (100_352 // d,) * 2 + (3,) for d in (1, 4, 16, 64)
        ]
        assert len(set(file.pages[0].dataoffsets)) < 100 < len(file.pages[0].dataoffsets)


@pytest.mark.slow
def test_tiling_takes_bytes_by_pixel_of_the_thumbnail(slide_path: Path, tmp_path: Path) -> None:
    """3 for the thumbnail, 6 for the tissue, and blocks that are read one after the other."""
    parameters = TilingParameters(SCALES, tissue=TissueParameters(mpp=1.0))
    with Slide(SlideRow("a", slide_path), cache_bytes=2**20) as slide:
        num_pixels = slide.size_px0[0] * slide.size_px0[1] / 16
        taken = traced_peak(tile_slide, slide, tmp_path, parameters)
        assert taken / num_pixels < 10
        assert taken < slide.size_px0[0] * slide.size_px0[1]  # a third of the decoded slide
    assert read_tiles(tiles_path(tmp_path, "a")).num_tiles()["x20"] > 30


@pytest.mark.slow
def test_a_thumbnail_takes_itself_and_a_block(slide_path: Path) -> None:
    block = READ_BLOCK_PX**2
    with Slide(SlideRow("a", slide_path), cache_bytes=2**20) as slide:
        slide.thumbnail(64.0)  # what is opened once
        taken = traced_peak(slide.thumbnail, 8.0)
    assert taken < 3 * (slide.size_px0[0] / 32) ** 2 + 12 * block


@pytest.mark.slow
def test_a_chunk_takes_the_same_in_a_slide_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a small slide and of one with sixteen times as many tiles; what is kept decoded apart."""
    monkeypatch.setattr("dasmil.embedding.dataset.CACHE_BYTES", 2**20)
    taken = []
    for name, tissue in (("few", 1 / 16), ("many", 1.0)):
        path = write_gigapixel(tmp_path / f"{name}.tiff", 4 * CELL_PX0, tissue=tissue)
        row = SlideRow(name, path)
        with Slide(row) as slide:
            tile_slide(slide, tmp_path, TilingParameters(SCALES))
        table = read_tiles(tiles_path(tmp_path, name))
        dataset = ChunkDataset([row], [table], max_roots=64)
        dataset[0]
        taken.append(max(traced_peak(dataset.__getitem__, n) for n in range(min(4, len(dataset)))))
    assert taken[1] < 1.5 * taken[0]
    assert max(taken) < 20 * READ_BLOCK_PX**2


# The commands


def command(verb: str, *options: object) -> list[str]:
    return [sys.executable, "-m", "dasmil", verb, *map(str, options)]


def cohort(folder: Path, **options: object) -> Path:
    path = write_gigapixel(folder / "a.tiff", **options)  # type: ignore[arg-type]
    table = folder / "cohort.csv"
    table.write_text(f"slide_id,path\na,{path}\n")
    return table


def tile_command(folder: Path, **options: object) -> list[str]:
    table = cohort(folder, **options)
    scales = "[" + ",".join(SCALES) + "]"
    return command("tile", "--cohort", table, "--output", folder / "tiles", "--scales", scales)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("options", "at_least"),
    [
        ({"mpp": 0.25}, 2_000),
        ({"mpp": 0.5}, 8_000),
        ({"mpp": 0.25, "tissue": 1.0, "tile_px": 256}, 90_000),
    ],
)
def test_tile_stays_below_4_gb(tmp_path: Path, options: dict[str, object], at_least: int) -> None:
    taken = peak_bytes(tile_command(tmp_path, **options))
    with open(tmp_path / "tiles" / "status.csv", newline="") as file:
        assert int(next(csv.DictReader(file))["tiles/x20"]) > at_least
    assert 0 < taken["largest"] <= taken["tree"] < LIMIT


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_embed_stays_below_4_gb(tmp_path: Path) -> None:
    peak_bytes(tile_command(tmp_path))
    extractors = [text for s in SCALES for text in (f"--extractors.{s}", "random:test_vit")]
    taken = peak_bytes(
        command("embed", "--tiles", tmp_path / "tiles", "--output", tmp_path / "bags", *extractors)
    )
    assert (tmp_path / "bags" / "a.safetensors").exists()
    assert 0 < taken["largest"] <= taken["tree"] < LIMIT


@pytest.mark.slow
def test_the_memory_of_a_command_is_measured() -> None:
    """300 MB in the command itself, and in a process that it starts."""
    hold = "import time; held = bytes(range(250)) * 1_200_000; time.sleep(0.5)"
    own = peak_bytes([sys.executable, "-c", hold])
    assert 300e6 < own["largest"] == own["tree"] < 400e6
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{hold}'])"
    child = peak_bytes([sys.executable, "-c", start])
    assert 300e6 < child["largest"] < child["tree"] < 450e6
    with pytest.raises(RuntimeError, match="exit code 3"):
        peak_bytes([sys.executable, "-c", "raise SystemExit(3)"])
