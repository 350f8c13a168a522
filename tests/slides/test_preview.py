"""``tile --preview``: the picture, and what the options beside each outline do."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from dasmil.cli import main
from dasmil.demo.slides import write_pyramid
from dasmil.slides.cohort import read_cohort
from dasmil.slides.preview import sensitivities
from dasmil.slides.tissue import TissueParameters


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    pixels = np.full((512, 700, 3), 244, np.uint8)
    pixels[100:400, 100:400] = (214, 150, 180)
    path = tmp_path / "slides" / "biopsy.tiff"
    path.parent.mkdir()
    write_pyramid(path, pixels, 2.0)
    return path


def test_a_slide_file_needs_no_cohort_and_no_tiles_are_made(
    slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "TILES"
    assert main(["tile", "--preview", str(slide), "--output", str(output)]) == 0
    assert [path.relative_to(output) for path in output.rglob("*.png")] == [
        Path("preview/biopsy.png")
    ]
    assert [path for path in output.rglob("*") if path.is_file()] == [output / "preview/biopsy.png"]
    assert str(output / "preview/biopsy.png") in capsys.readouterr().out
    picture = cv2.imread(str(output / "preview/biopsy.png"))[..., ::-1]
    height, width = picture.shape[0] // 2, picture.shape[1] // 3  # six panels of one size
    panels = [
        picture[row * height : (row + 1) * height, column * width : (column + 1) * width]
        for row in range(2)
        for column in range(3)
    ]
    outlined = [(panel == (0, 120, 0)).all(2).any() for panel in panels]
    assert outlined == [False, True, True, True, True, True]


def test_ids_of_the_cohort_are_taken_and_one_bad_slide_costs_one_line(
    slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (slide.parent / "broken.svs").write_text("this is no slide")
    table = tmp_path / "cohort.csv"
    table.write_text("slide_id,path\nfirst,slides/broken.svs\nsecond,slides/biopsy.tiff\n")
    common = ["tile", "--config", "configs/tile.yaml", "--output", str(tmp_path / "TILES")]
    code = main([*common, "--cohort", str(table), "--preview", "first", "second"])
    said = capsys.readouterr().out
    assert code == 1
    assert "failed: first: " in said
    assert (tmp_path / "TILES/preview/second.png").exists()
    assert main([*common, "--cohort", str(table), "--preview", "third"]) == 2
    assert "--preview third: no such file, and the cohort" in capsys.readouterr().err
    assert main([*common, "--preview", "third"]) == 2
    assert "--cohort is needed" in capsys.readouterr().err


def test_the_options_printed_at_a_panel_reproduce_it() -> None:
    given = TissueParameters(min_saturation=20, min_texture=4.0, closing_um=16.0)
    for choice, text in sensitivities(given):
        options = dict(re.findall(r"--tissue\.(\w+) ([\d.]+)", text))
        assert options
        for name in ("min_saturation", "min_texture"):
            assert getattr(choice, name) == float(options.get(name, getattr(given, name)))
        assert choice.closing_um == 16.0
    assert [choice for choice, text in sensitivities(given) if "(as set)" in text] == [given]


def test_previews_keep_given_options_and_stay_in_range() -> None:
    given = TissueParameters(min_saturation=200, min_texture=2.25)
    choices = dict((text, choice) for choice, text in sensitivities(given))
    assert choices["--tissue.min_saturation 200 --tissue.min_texture 2.25  (as set)"] == given
    assert max(choice.min_saturation for choice in choices.values()) == 255


def test_a_picture_has_the_name_that_the_slide_has_in_a_cohort(slide: Path, tmp_path: Path) -> None:
    other = slide.rename(slide.with_name(" 16.1 .tiff"))
    assert main(["tile", "--preview", str(other), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "preview/16.1.png").exists()
    assert read_cohort(other.parent)[0].slide_id == "16.1"


def test_two_slides_of_one_name_are_refused(
    slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = tmp_path / "more" / slide.name
    twin.parent.mkdir()
    twin.write_bytes(slide.read_bytes())
    command = ["tile", "--output", str(tmp_path / "TILES"), "--preview"]
    assert main([*command, str(slide), str(twin)]) == 2
    assert "'biopsy' occurs twice" in capsys.readouterr().err
    assert main([*command, str(slide), str(slide)]) == 0


def test_a_slide_that_fails_in_any_way_costs_one_line(
    slide: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr("dasmil.slides.preview.draw_preview", fail)
    long = slide.rename(slide.with_name("x" * 201 + ".tiff"))
    odd = tmp_path / "odd.tiff"
    odd.write_bytes(long.read_bytes())
    command = ["tile", "--preview", str(odd), str(long), "--output", str(tmp_path / "TILES")]
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "failed: odd: RuntimeError: out of order" in said
    assert "has 201 bytes, too many for the names of its files" in said
