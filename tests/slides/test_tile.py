"""The verb ``tile`` on drawn slides and on all real ones."""

import csv
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from faults import InThisProcess

from dasmil.cli import main
from dasmil.demo.slides import write_pyramid
from dasmil.errors import InputError
from dasmil.geometry import Tiles
from dasmil.slides.cohort import SlideRow, read_cohort, slides_digest
from dasmil.slides.pyramid import TilingParameters
from dasmil.slides.reader import Slide
from dasmil.slides.tile import tile
from dasmil.slides.tile_table import TABLE, read_tiles, tiles_path
from dasmil.slides.tissue import TissueParameters
from dasmil.work.worker import Worker

REPOSITORY = Path(__file__).parents[2]
SCALES = ("x5", "x20")


@dataclass(frozen=True)
class Run:
    """What a call of the verb left behind."""

    code: int
    output: Path

    @property
    def status(self) -> dict[str, dict[str, str]]:
        with open(self.output / "status.csv", newline="", encoding="utf-8") as file:
            return {row["slide_id"]: row for row in csv.DictReader(file)}

    def tiles(self, slide_id: str) -> Tiles:
        return read_tiles(self.output / "tiles" / f"{slide_id}.safetensors")


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, ["slide_id", "path", "label", "mpp", "magnification"], restval=""
        )
        writer.writeheader()
        writer.writerows(rows)
    return path


def draw_slide(width: int, height: int, *, tissue: tuple[int, int, int, int]) -> np.ndarray:
    """White glass with a textured pink rectangle (left, top, right, bottom)."""
    pixels = np.full((height, width, 3), 245, np.uint8)
    left, top, right, bottom = tissue
    texture = np.random.default_rng(0).integers(-15, 15, (bottom - top, right - left, 1))
    pixels[top:bottom, left:right] = np.array((205, 140, 175)) + texture
    return pixels


def write_slides(folder: Path) -> list[dict[str, object]]:
    """A good slide, a blank one, one that is no slide, one smaller than a tile, one without mpp."""
    folder.mkdir()
    # at 0.5 µm/px a x20 tile of 64 px is 64 px0, a x5 tile 256 px0; tissue: columns 4-7, rows 0-7
    write_pyramid(folder / "good.tiff", draw_slide(1100, 600, tissue=(256, 0, 512, 512)), 0.5)
    write_pyramid(folder / "blank.tiff", np.full((600, 600, 3), 250, np.uint8), 0.5)
    (folder / "broken.svs").write_text("this is no slide")
    write_pyramid(folder / "tiny.tiff", draw_slide(240, 600, tissue=(0, 0, 240, 600)), 0.5)
    picture = draw_slide(600, 600, tissue=(0, 0, 300, 512))
    cv2.imwrite(str(folder / "photo.png"), picture[..., ::-1])
    return [
        {"slide_id": "good", "path": "slides/good.tiff", "label": "tumour"},
        {"slide_id": "blank", "path": "slides/blank.tiff", "label": "normal"},
        {"slide_id": "broken", "path": "slides/broken.svs"},
        {"slide_id": "tiny", "path": "slides/tiny.tiff"},
        {"slide_id": "photo", "path": "slides/photo.png", "mpp": 0.5},
        {"slide_id": "lost", "path": "slides/lost.svs"},
    ]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("first run")
    table = write_table(folder / "cohort.csv", write_slides(folder / "slides"))
    code = tile(table, folder / "TILES", SCALES, tile_px=64, workers=2)
    return Run(code, folder / "TILES")


@pytest.fixture
def two_slides(tmp_path: Path) -> Path:
    """The table of a good slide and a blank one."""
    return write_table(tmp_path / "cohort.csv", write_slides(tmp_path / "slides")[:2])


def test_odd_names_cost_no_more_than_their_row_and_are_done_once(tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    write_pyramid(folder / "good.tiff", draw_slide(600, 600, tissue=(0, 0, 300, 512)), 0.5)
    for name in (" b.tiff", "c\u00a0.tiff", "two\nlines.tiff", os.fsdecode(b"caf\xe9.tiff")):
        shutil.copy(folder / "good.tiff", folder / name)
    (folder / ("x" * 240 + ".tiff")).touch()
    for _ in range(2):  # nothing waits, also at a second look
        run = Run(
            tile(folder, tmp_path / "TILES", SCALES, tile_px=64, workers=1), tmp_path / "TILES"
        )
        assert run.code == 1
        states = {slide_id: row["state"] for slide_id, row in run.status.items()}
        failed = dict.fromkeys(["caf\\xe9", "two\nlines", "x" * 240], "failed")
        assert states == {"good": "done", "b": "done", "c": "done", **failed}
    assert "has 240 bytes, too many" in run.status["x" * 240]["message"]
    assert main(["contact-sheet", str(run.output)]) == 0


def test_bad_cells_of_a_table_cost_their_slides_in_every_verb(tmp_path: Path) -> None:
    rows = write_slides(tmp_path / "slides")[:2]
    slide = rows[0]["path"]
    cells = {"zero": 0, "negative": -0.5, "nan": "nan", "inf": "inf", "text": "0.5x"}
    bad = [{"slide_id": name, "path": slide, "mpp": mpp} for name, mpp in cells.items()]
    bad += [{"slide_id": "nowhere", "path": ""}, {"slide_id": "nul", "path": "a\0.tiff"}]
    bad += [{"slide_id": "long", "path": "x" * 300}]
    bad += [{"slide_id": "20x", "path": slide, "magnification": "20x"}]
    table = write_table(tmp_path / "cohort.csv", [*bad, *rows])
    run = Run(tile(table, tmp_path / "TILES", SCALES, tile_px=64, workers=1), tmp_path / "TILES")
    assert run.code == 1
    states = {slide_id: row["state"] for slide_id, row in run.status.items()}
    assert states == {
        **{row["slide_id"]: "failed" for row in bad},
        "good": "done",
        "blank": "empty",
    }
    said = {slide_id: row["message"] for slide_id, row in run.status.items()}
    for line, (name, mpp) in enumerate(cells.items(), start=2):
        words = f"mpp {str(mpp)!r} is no positive number; correct or empty it"
        assert said[name] == f"{table} line {line}: {words}"
    assert said["nowhere"] == f"{table} line 7: path is empty; fill it"
    assert said["20x"].startswith(f"{table} line 10: magnification '20x' is no positive number")

    random = [w for s in SCALES for w in (f"--extractors.{s}", "random:test_vit")]
    places = ["--tiles", str(run.output), "--output", str(tmp_path / "BAGS")]
    quiet = ["--num_workers", "0", "--trainer.enable_progress_bar", "false"]
    assert main(["embed", *places, *random, *quiet]) == 0
    found = Run(0, tmp_path / "BAGS").status
    states = {slide_id: row["state"] for slide_id, row in found.items()}
    bad_states = {row["slide_id"]: "not tiled" for row in bad}
    assert states == {**bad_states, "good": "done", "blank": "empty"}


def test_a_slide_whose_mpp_becomes_none_fails_although_it_was_tiled(two_slides: Path) -> None:
    output = two_slides.parent / "TILES"
    assert tile(two_slides, output, SCALES, tile_px=64, workers=1) == 0
    rows = write_slides(two_slides.parent / "again")[:2]
    write_table(two_slides, [{**rows[0], "mpp": "x"}, rows[1]])
    assert tile(two_slides, output, SCALES, tile_px=64, workers=1) == 1
    assert "line 2: mpp 'x'" in Run(1, output).status["good"]["message"]


def test_a_status_has_one_row_a_slide_in_the_order_of_the_table(first_run: Run) -> None:
    assert list(first_run.status) == ["good", "blank", "broken", "tiny", "photo", "lost"]
    assert {slide_id: row["state"] for slide_id, row in first_run.status.items()} == {
        "good": "done",
        "blank": "empty",
        "broken": "failed",
        "tiny": "done",
        "photo": "done",
        "lost": "failed",
    }


def test_a_status_says_how_many_tiles_and_whence_the_mpp(first_run: Run) -> None:
    good = first_run.status["good"]
    assert list(good) == [
        "slide_id",
        "state",
        "tiles/x5",
        "tiles/x20",
        "tissue_mm2",
        "covered",
        "mpp",
        "mpp_source",
        "seconds",
        "message",
    ]
    assert (good["tiles/x5"], good["tiles/x20"]) == ("2", "32")
    assert 0.98 < float(good["covered"]) <= 1
    assert first_run.status["blank"]["covered"] == ""  # no tissue, no share
    assert (float(good["mpp"]), good["mpp_source"], good["message"]) == (0.5, "slide", "")
    assert float(good["seconds"]) > 0
    assert first_run.status["photo"]["mpp_source"] == "table"


def test_a_status_says_why_a_slide_has_no_tiles(first_run: Run) -> None:
    slides = first_run.output.parent / "slides"
    message = {slide_id: row["message"] for slide_id, row in first_run.status.items()}
    assert message["blank"] == "no tissue found"
    assert message["tiny"] == ""  # smaller than one tile of x5, and tiled all the same
    assert message["lost"] == f"{slides / 'lost.svs'}: no such file"
    assert message["broken"].startswith(f"{slides / 'broken.svs'}: OpenSlide does not know")


def test_tiles_cover_the_drawn_tissue(first_run: Run) -> None:
    tiles = first_run.tiles("good")
    expected = {(row, col) for row in range(8) for col in range(4, 8)}
    assert {tuple(place) for place in tiles.grid["x20"].tolist()} == expected
    assert tiles.grid["x5"].tolist() == [[0, 1], [1, 1]]
    assert tiles.parent["x20"].tolist() == [0] * 16 + [1] * 16
    assert (tiles.slide_id, tiles.tile_px, tiles.extent.mpp) == ("good", 64, 0.5)
    assert tiles.extent.size_px0 == (1100, 600)
    assert tiles.tiling == TilingParameters(SCALES, 64).as_json()


def test_a_bad_slide_costs_its_row_and_the_exit_code(first_run: Run) -> None:
    assert first_run.code == 1
    written = sorted(path.stem for path in (first_run.output / "tiles").iterdir())
    assert written == ["blank", "good", "photo", "tiny"]
    assert first_run.tiles("blank").num_tiles() == {"x5": 0, "x20": 0}


def test_every_opened_slide_has_a_picture_for_quality_control(first_run: Run) -> None:
    pictures = {path.stem: cv2.imread(str(path)) for path in (first_run.output / "qc").iterdir()}
    assert set(pictures) == {"good", "blank", "photo", "tiny"}
    outline, coarse, fine = np.split(pictures["good"].astype(int), 3, axis=1)  # side by side
    assert np.abs(outline - coarse).mean() > 1
    assert np.abs(coarse - fine).mean() > 1


def test_the_output_holds_the_whole_cohort_with_absolute_paths(first_run: Run) -> None:
    rows = read_cohort(first_run.output / "cohort.csv")
    assert rows == read_cohort(first_run.output.parent / "cohort.csv")
    assert all(row.path.is_absolute() for row in rows)
    assert rows[0].label == "tumour"
    assert not list(first_run.output.rglob(".*"))  # no temporary file is left


def test_a_second_run_skips_what_is_done(
    two_slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "TILES"
    assert tile(two_slides, output, SCALES, tile_px=64, workers=1) == 0
    first = Run(0, output)
    before = {path: path.stat().st_mtime_ns for path in (output / "tiles").iterdir()}
    before_rows = first.status
    capsys.readouterr()
    assert tile(two_slides, output, SCALES, tile_px=64, workers=1) == 0
    second = first.status
    assert {path: path.stat().st_mtime_ns for path in (output / "tiles").iterdir()} == before
    assert float(first.status["good"]["seconds"]) > 0
    assert second == before_rows  # also the seconds that it took, and why a slide is empty
    assert second["good"]["tiles/x20"] != "0"
    assert "empty: blank: no tissue found" in capsys.readouterr().out

    shutil.rmtree(output / "work")  # then the tables tell all but the time
    assert tile(two_slides, output, SCALES, tile_px=64, workers=1) == 0
    third = Run(0, output).status
    assert third["blank"] == {**second["blank"], "seconds": ""}
    assert third["good"] == {**second["good"], "seconds": ""}


def test_a_slide_that_failed_is_tried_again(two_slides: Path, tmp_path: Path) -> None:
    good = tmp_path / "slides" / "good.tiff"
    hidden = good.rename(good.with_suffix(".away"))
    run = Run(
        tile(two_slides, tmp_path / "TILES", SCALES, tile_px=64, workers=1), tmp_path / "TILES"
    )
    assert (run.code, run.status["good"]["state"]) == (1, "failed")
    hidden.rename(good)
    assert tile(two_slides, tmp_path / "TILES", SCALES, tile_px=64, workers=1) == 0
    assert (run.status["good"]["state"], run.status["good"]["message"]) == ("done", "")


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"mpp": 0.25}, {"magnification": 40}])
def test_a_changed_mpp_in_the_table_means_tiling_again(
    two_slides: Path,
    tmp_path: Path,
    change: dict[str, float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "TILES"
    tissue = TissueParameters(min_tissue_um2=5_000.0)  # 256 × 512 px0 at 0.25 are 8192 µm²
    tile(two_slides, output, SCALES, tile_px=64, tissue=tissue, workers=1)
    rows = [
        {"slide_id": "good", "path": "slides/good.tiff", **change},
        {"slide_id": "blank", "path": "slides/blank.tiff", "mpp": 0.5},
    ]
    write_table(two_slides, rows)
    run = Run(tile(two_slides, output, SCALES, tile_px=64, tissue=tissue, workers=1), output)
    good, blank = run.status["good"], run.status["blank"]
    assert (good["mpp"], good["mpp_source"]) == ("0.25", "table")
    words = "the table's 0.25 µm/px is used, the file has 0.5"
    again = "its resolution changed from 0.5 to 0.25 µm/px: tiled again"
    assert good["message"] == f"{again}; {words}"
    assert f"warning: good: {again}; {words}" in capsys.readouterr().out.splitlines()
    # tissue is 2 columns by 4 rows of x20 tiles of 128 px0, all in one of x5
    assert (good["tiles/x5"], good["tiles/x20"]) == ("1", "8")
    assert run.tiles("good").extent.mpp == 0.25
    assert blank["message"] == "no tissue found"
    tile(two_slides, output, SCALES, tile_px=64, tissue=tissue, workers=1)  # nothing is done again,
    assert run.status["good"]["message"] == words  # but it is said again


@pytest.mark.parametrize("other_slides", [False, True])
def test_other_parameters_are_refused_and_nothing_is_touched(
    two_slides: Path, tmp_path: Path, other_slides: bool
) -> None:
    output = tmp_path / "TILES"
    tile(two_slides, output, SCALES, tile_px=64, workers=1)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    write_table(two_slides, [{"slide_id": "good", "path": "slides/good.tiff", "label": "new"}])
    if other_slides:
        path = tmp_path / "slides" / "good.tiff"
        write_table(two_slides, [{"slide_id": "another", "path": path}])
    for change, words in (
        ({"scales": ("x10", "x20")}, r"\(scales \[x5, x20\] → \[x10, x20\]\)"),
        ({"tile_px": 32}, r"\(tile_px 64 → 32\)"),
        ({"min_tissue": 0.5, "tile_px": 32}, r"\(.*min_tissue 0.25 → 0.5.*\)"),
        ({"tissue": TissueParameters(closing_um=16.0)}, r"\(tissue.closing_um 32.0 → 16.0\)"),
    ):
        with pytest.raises(InputError, match=f"made with other parameters .*{words}") as caught:
            tile(two_slides, output, **{"scales": SCALES, "tile_px": 64, "workers": 1, **change})
        assert str(output / "tiles") in str(caught.value)
        assert "--output" in str(caught.value)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_slides_that_another_command_needs_are_kept(two_slides, tmp_path) -> None:
    output = tmp_path / "TILES"
    rows = read_cohort(two_slides)
    wants = {"parameters": TilingParameters(SCALES, 64).as_json(), "cohort": slides_digest(rows)}
    with Worker(output, wants=wants):  # its process is this one
        with pytest.raises(
            InputError, match=r"process \d+ on .* tiles into it now with other para"
        ):
            tile(two_slides, output, SCALES, tile_px=32, workers=1)
        half = write_table(tmp_path / "half.csv", [{"slide_id": "good", "path": rows[0].path}])
        with pytest.raises(InputError, match=r"process \d+ on .* tiles other slides into it now"):
            tile(half, output, SCALES, tile_px=64, workers=1)
        assert not (output / "cohort.csv").exists()
        assert tile(two_slides, output, SCALES, tile_px=64, workers=1) == 0


def test_slides_that_leave_the_cohort_are_named(two_slides, tmp_path, capsys) -> None:
    output = tmp_path / "TILES"
    assert tile(two_slides, output, SCALES, tile_px=64, workers=1) == 0
    assert "of before" not in capsys.readouterr().out
    good = read_cohort(two_slides)[0]
    half = write_table(tmp_path / "half.csv", [{"slide_id": good.slide_id, "path": good.path}])
    assert tile(half, output, SCALES, tile_px=64, workers=1) == 0
    assert (
        "1 slide(s) of the previous table are no longer listed; their files are kept: blank"
        in capsys.readouterr().out
    )
    assert tiles_path(output, "blank").exists()


def test_a_damaged_tile_table_is_named_and_recreated(
    two_slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "TILES"
    tile(two_slides, output, SCALES, tile_px=64, workers=1)
    path = output / "tiles" / "good.safetensors"
    whole = path.read_bytes()
    other = whole.replace(TABLE.format.encode(), TABLE.format.replace("dasmil", "daskid").encode())
    parameters = (output / "tiling.json").read_text()
    for damaged in (whole[:50], whole[:-1], b"", other):
        path.write_bytes(damaged)
        if damaged is other:  # whose parameters had other names
            (output / "tiling.json").write_text("{}")
        times = {p: p.stat().st_mtime_ns for p in output.glob("tiles/blank*")}
        capsys.readouterr()
        assert tile(two_slides, output, SCALES, tile_px=64, workers=1) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if "re-creating" in line]
        assert len(said) == 1 and str(path) in said[0]
        assert path.read_bytes() == whole
        assert (output / "tiling.json").read_text() == parameters
        assert {p: p.stat().st_mtime_ns for p in output.glob("tiles/blank*")} == times


def test_a_table_whose_tiles_are_damaged_is_recreated(
    two_slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "TILES"
    tile(two_slides, output, SCALES, tile_px=64, workers=1)
    path = output / "tiles" / "good.safetensors"
    whole = path.read_bytes()
    other = whole.replace(b"good", b"gaad")
    assert len(other) == len(whole) and other != whole
    for damaged in (whole[:-4] + b"\xff" * 4, other):
        path.write_bytes(damaged)
        capsys.readouterr()
        assert tile(two_slides, output, SCALES, tile_px=64, workers=1) == 0
        text = capsys.readouterr().out
        assert "warning: good: its tile table was damaged: tiled again" in text
        assert path.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["as it was", "by an older version"])
def test_a_slide_that_was_replaced_is_tiled_again_and_a_copied_one_is_not(
    two_slides: Path, tmp_path: Path, stored: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By another one of the same size and resolution; with the same file a new time alone."""
    output, slides = tmp_path / "TILES", tmp_path / "slides"
    tile(two_slides, output, SCALES, tile_px=64, workers=1)
    path = tiles_path(output, "good")
    before, first = path.stat().st_mtime_ns, Run(0, output).tiles("good")
    content = (slides / "good.tiff").read_bytes()
    (slides / "good.tiff").unlink()
    (slides / "good.tiff").write_bytes(content)
    assert tile(two_slides, output, SCALES, tile_px=64, workers=1) == 0
    assert path.stat().st_mtime_ns == before
    moved = draw_slide(1100, 600, tissue=(512, 0, 768, 512))
    write_pyramid(slides / "good.tiff", moved, 0.5)
    if stored == "by an older version":
        path.write_bytes(path.read_bytes().replace(TABLE.format.encode(), b"dasmil-tiles-2"))
    capsys.readouterr()
    assert tile(two_slides, output, SCALES, tile_px=64, workers=1) == 0
    second, said = Run(0, output), capsys.readouterr().out
    assert second.tiles("good").grid["x20"][:, 1].min() == 8 != first.grid["x20"][:, 1].min()
    assert second.tiles("good").slide_digest not in ("", first.slide_digest)
    if stored == "as it was":
        assert second.status["good"]["message"] == "its file was replaced: tiled again"
        assert "warning: good: its file was replaced: tiled again" in said.splitlines()
    else:
        assert f"{path}: a tile table of another version (dasmil-tiles-2" in said
    assert tile(two_slides, output, SCALES, tile_px=64, workers=1) == 0
    assert second.status["good"]["message"] == ""  # it is told once


def test_the_same_file_under_two_names_is_said(
    two_slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "slides" / "good.tiff"
    shutil.copy(good, good.with_name("copy.tiff"))
    rows = [{"slide_id": name, "path": f"slides/{name}.tiff"} for name in ("good", "blank", "copy")]
    write_table(two_slides, rows)
    assert tile(two_slides, tmp_path / "TILES", SCALES, tile_px=64, workers=1) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert said == ["warning: good, copy are the same slide file; keep one row per file"]


class DyingOfGood(InThisProcess):
    """A process that the slide ``good`` kills, as a decoder would that reads where it must not."""

    def result(self) -> object:
        if self.task.slide_id == "good":
            super().result()
            raise EOFError("its process was ended by signal 11")
        return super().result()


def test_a_slide_that_kills_its_process_costs_its_row(
    two_slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dasmil.slides.tile.ChildProcess", DyingOfGood)
    run = Run(tile(two_slides, tmp_path / "T", SCALES, tile_px=64, workers=1), tmp_path / "T")
    assert run.code == 1
    assert run.status["good"]["state"] == "failed"
    assert "good.tiff: its process was ended by signal 11" in run.status["good"]["message"]
    assert run.status["blank"]["state"] == "empty"


class HangingOnGood(InThisProcess):
    """A child process that is never done with one slide."""

    def begin(self, task: SlideRow) -> None:
        if task.slide_id == "good":
            self.task, self.begun = task, time.monotonic()
        else:
            super().begin(task)


def test_a_slide_that_takes_for_ever_costs_its_row(
    two_slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dasmil.slides.tile.ChildProcess", HangingOnGood)
    monkeypatch.setattr("dasmil.slides.tile.NAMED_AFTER_S", 0.0)
    output = tmp_path / "T"
    code = tile(two_slides, output, SCALES, tile_px=64, workers=1, slide_timeout=1.5)
    run = Run(code, output)
    assert (code, run.status["good"]["state"], run.status["blank"]["state"]) == (
        1,
        "failed",
        "empty",
    )
    assert "good.tiff: not done after 1.5 s; it may be damaged" in run.status["good"]["message"]


def test_a_scale_the_slide_does_not_hold_costs_its_row(two_slides: Path, tmp_path: Path) -> None:
    run = Run(
        tile(two_slides, tmp_path / "T", ("x20", "x40"), tile_px=64, workers=1), tmp_path / "T"
    )
    assert run.code == 1
    assert "slide good: it holds 0.5 µm/px, too coarse for x40" in run.status["good"]["message"]


# The command line


def test_the_command_line_counts_failures_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path / "cohort.csv", write_slides(tmp_path / "slides")[:4])
    command = ["tile", "--config", str(REPOSITORY / "configs" / "tile.yaml")]
    command += ["--cohort", str(table), "--output", str(tmp_path / "TILES")]
    command += ["--scales", "[x5,x20]", "--tile_px", "64", "--workers", "1"]
    assert main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == (
        f"tile: 2 done, 1 empty, 1 failed; see {tmp_path / 'TILES' / 'status.csv'}"
    )
    assert "empty: blank: no tissue found" in lines
    assert any(line.startswith("failed: broken: ") for line in lines)
    assert Run(1, tmp_path / "TILES").status["good"]["tiles/x20"] == "32"


def test_the_command_line_says_bad_input_in_one_line(
    tmp_path: Path, two_slides: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "TILES")]
    missing = tmp_path / "none.csv"
    assert main(["tile", "--cohort", str(missing), *output, "--scales", "[x20]"]) == 2
    assert capsys.readouterr().err == (
        f"error: {missing}: does not exist; give a cohort table or a folder of slides\n"
    )
    assert main(["tile", "--cohort", str(two_slides), *output, "--scales", "[x20,x15]"]) == 2
    assert capsys.readouterr().err.startswith("error: scales x15 and x20: the ratio 1.33333 ")
    assert not (tmp_path / "TILES").exists()


def test_the_module_runs_as_a_program(two_slides: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dasmil", "tile", "--cohort", str(two_slides)]
    command += ["--output", str(tmp_path / "TILES"), "--scales", "[x5,x20]", "--tile_px", "64"]
    done = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("tile: 1 done, 1 empty, 0 failed")


def test_a_folder_of_slides_needs_no_table(tmp_path: Path) -> None:
    write_slides(tmp_path / "slides")
    run = Run(tile(tmp_path / "slides", tmp_path / "T", SCALES, tile_px=64), tmp_path / "T")
    assert run.code == 1
    assert run.status["good"]["tiles/x20"] == "32"
    assert "fill the column mpp" in run.status["photo"]["message"]


# Real slides


def check_pyramid(tiles: Tiles) -> None:
    """On the slide; nested; no orphan in either direction."""
    names = list(tiles.num_tiles())
    for name in names:
        boxes = tiles.boxes_px0(name)
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, :2] < tiles.extent.size_px0).all()
    for coarse, fine in pairwise(names):
        parents = tiles.boxes_px0(coarse)[tiles.parent[fine]]
        children = tiles.boxes_px0(fine)
        assert (children[:, :2] >= parents[:, :2]).all()
        assert (children[:, 2:] <= parents[:, 2:]).all()
        assert set(tiles.parent[fine].tolist()) == set(range(len(tiles.grid[coarse])))


def check_pixels(row: SlideRow, tiles: Tiles, *, num: int = 3) -> None:
    """A few tiles of every scale have their size and show something."""
    size = (tiles.tile_px, tiles.tile_px)
    with Slide(row) as slide:
        for name in tiles.num_tiles():
            boxes = tiles.boxes_px0(name)
            for box in boxes[np.linspace(0, len(boxes) - 1, num).astype(int)]:
                pixels = slide.read(box, size)
                assert pixels.shape == (*size, 3)
                assert pixels.dtype == np.uint8
                assert pixels.std() > 4, (row.slide_id, name, box)
                assert 40 < pixels.mean() < 254  # one at the border may be mostly white


def tile_real(
    tmp_path: Path, rows: list[dict[str, object]], scales: tuple[str, ...], **options: object
) -> Run:
    table = write_table(tmp_path / "cohort.csv", rows)
    return Run(tile(table, tmp_path / "TILES", scales, workers=2, **options), tmp_path / "TILES")


def check_real(run: Run) -> None:
    for row in read_cohort(run.output / "cohort.csv"):
        if run.status[row.slide_id]["state"] == "done":
            tiles = run.tiles(row.slide_id)
            check_pyramid(tiles)
            check_pixels(row, tiles)


def test_real_slides_at_x20_are_tiled_at_three_scales(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "slides" / "atlas_x20"
    rows = [
        {"slide_id": "pdac", "path": folder / "PDAC-tru-cut_HE3.svs"},
        {"slide_id": "erosion", "path": folder / "erosion_HE.tif", "mpp": 0.5},
    ]
    run = tile_real(tmp_path, rows, ("x5", "x10", "x20"))
    assert run.code == 0
    assert run.status["pdac"]["mpp_source"] == "slide"
    assert run.status["erosion"]["mpp_source"] == "table"
    for slide_id, (width, height), mpp in [
        ("pdac", (11396, 11408), 0.526036),
        ("erosion", (6598, 8433), 0.5),
    ]:
        tiles = run.tiles(slide_id)
        assert tiles.extent.size_px0 == (width, height)
        count = tiles.num_tiles()
        assert 20 < count["x5"] < count["x10"] < count["x20"]
        assert count["x20"] <= 16 * count["x5"]
        on_glass = (width * mpp / 128) * (height * mpp / 128)
        assert 0.01 < count["x20"] / on_glass < 0.5  # both slides are mostly glass
    check_real(run)


@pytest.mark.slow
def test_real_slides_at_x5_are_tiled_as_a_cohort(shared_data: Path, tmp_path: Path) -> None:
    with open(shared_data / "slides" / "atlas_labels.csv", newline="", encoding="utf-8") as file:
        labels = [row for row in csv.DictReader(file) if row["file"].startswith("atlas_x5/")]
    assert len(labels) == 17
    rows = [
        {
            "slide_id": Path(row["file"]).stem,
            "path": shared_data / "slides" / row["file"],
            "label": row["label_malignant"],
            "mpp": "" if row["mpp"] else 2.0,
        }
        for row in labels
    ]
    run = tile_real(tmp_path, rows, ("x2.5", "x5"))
    assert run.code == 0
    for row in labels:
        status = run.status[Path(row["file"]).stem]
        assert (status["state"], status["message"]) == ("done", "")
        assert float(status["mpp"]) == float(row["mpp"] or 2.0)
        assert status["mpp_source"] == ("slide" if row["mpp"] else "table")
        assert int(status["tiles/x5"]) >= 10
    check_real(run)


def test_native_files_are_tiled(shared_data: Path, tmp_path: Path) -> None:
    native = shared_data / "slides" / "native"
    rows = [
        {"slide_id": "svs", "path": native / "cmu-1-small-region.svs"},
        {"slide_id": "dicom", "path": native / "cmu-1-small-region-dicom"},
        {"slide_id": "wrong", "path": native / "cmu-1-wrong-mpp.tiff", "mpp": 0.499},
        {"slide_id": "tcga", "path": native / "tcga-cr-7395-01a-01-ts1.svs", "mpp": 0.5},
        {"slide_id": "small", "path": native / "small.svs"},
        {"slide_id": "boxes", "path": native / "boxes.tiff", "mpp": 0.5},
    ]
    run = tile_real(tmp_path, rows, ("x10", "x20"))
    assert run.code == 0
    state = {slide_id: row["state"] for slide_id, row in run.status.items()}
    assert state == {
        "svs": "done",
        "dicom": "done",
        "wrong": "done",
        "tcga": "done",
        "small": "empty",
        "boxes": "empty",
    }
    same = [{tuple(place) for place in run.tiles(s).grid["x20"].tolist()} for s in ("svs", "wrong")]
    assert len(same[0] ^ same[1]) <= 0.1 * len(same[0])  # the same region, re-encoded
    assert run.tiles("dicom").extent.size_px0 == run.tiles("svs").extent.size_px0 == (2220, 2967)
    check_real(run)


def test_images_of_colon_are_tiled_with_smaller_areas(shared_data: Path, tmp_path: Path) -> None:
    rows = [
        {
            "slide_id": f"img{i:03d}",
            "path": shared_data / "crchisto" / f"img{i:03d}.png",
            "mpp": 0.55,
        }
        for i in (1, 2, 3, 4, 30)
    ]
    tissue = TissueParameters(mpp=4.0, min_tissue_um2=2_000.0, min_hole_um2=2_000.0)
    run = tile_real(tmp_path, rows, ("x10", "x20"), tile_px=128, tissue=tissue)
    assert run.code == 0
    for row in run.status.values():
        assert row["state"] == "done"
        assert int(row["tiles/x20"]) >= 2
        assert int(row["tiles/x10"]) <= 9  # 3 × 3 tiles of 128 µm cover 500 px · 0.55 µm
    check_real(run)


def test_bad_files_fail_one_by_one_each_with_its_reason(shared_data: Path, tmp_path: Path) -> None:
    slides = shared_data / "slides"
    rows = [
        {"slide_id": "broken", "path": slides / "bad" / "broken.svs"},
        {"slide_id": "unopenable", "path": slides / "bad" / "unopenable.tiff"},
        {"slide_id": "unreadable", "path": slides / "bad" / "unreadable.svs"},
        {"slide_id": "boxes", "path": slides / "native" / "boxes.tiff"},
        {"slide_id": "wrong", "path": slides / "native" / "cmu-1-wrong-mpp.tiff"},
        {"slide_id": "tcga", "path": slides / "native" / "tcga-cr-7395-01a-01-ts1.svs"},
        {"slide_id": "fine", "path": slides / "native" / "cmu-1-small-region.svs"},
    ]
    run = tile_real(tmp_path, rows, ("x10", "x20"))
    assert run.code == 1
    reasons = {
        "broken": "OpenSlide does not know this format",
        "unopenable": "cannot be opened as a slide: Unsupported TIFF compression",
        "unreadable": "pixels at 0,0 cannot be read",
        "boxes": "352.778 µm/px (from the slide) is outside the plausible",
        "wrong": "0.00499 µm/px (from the slide) is outside the plausible",
        "tcga": "neither mpp nor objective power",
    }
    for row in rows[:-1]:
        status = run.status[row["slide_id"]]
        assert status["state"] == "failed"
        assert str(row["path"]) in status["message"]
        assert reasons[row["slide_id"]] in status["message"]
    assert run.status["fine"]["state"] == "done"
