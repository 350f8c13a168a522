"""The slide at low power: without colour, with more than 8 bits, with a black background."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from dicoms import write_dicom
from jpegs import picture

from dasmil.errors import InputError
from dasmil.slides.artefacts import ArtefactParameters
from dasmil.slides.cohort import SlideRow
from dasmil.slides.reader import Slide
from dasmil.slides.tile_slide import Look, look_at
from dasmil.slides.tissue import TissueParameters

GREY = np.full((400, 400), 240, np.uint8)
GREY[100:300, 100:300] = np.random.default_rng(0).integers(110, 170, (200, 200))


def look(path: Path, pixels: np.ndarray, artefacts: ArtefactParameters | None = None) -> Look:
    photometric = "rgb" if pixels.ndim == 3 else "minisblack"
    tifffile.imwrite(path, pixels, tile=(128, 128), photometric=photometric)
    with Slide(SlideRow("s", path, mpp=8.0)) as slide:
        return look_at(slide, 8.0, artefacts or ArtefactParameters())


def test_a_grey_slide_holds_tissue(tmp_path: Path) -> None:
    mask = look(tmp_path / "grey.tiff", GREY).find_tissue(TissueParameters())
    assert mask[105:295, 105:295].all()
    assert not mask[:95].any()


@pytest.mark.parametrize("factor", [16, 257], ids=["12 bits", "16 bits"])
def test_more_than_8_bits_are_refused(tmp_path: Path, factor: int) -> None:
    """OpenSlide keeps the upper 8 of 16, and pads the last tiles with black."""
    with pytest.raises(InputError, match=r"grey\.tiff: stored with 16 bits .* store them with 8"):
        look(tmp_path / "grey.tiff", GREY.astype(np.uint16) * factor)


@pytest.mark.parametrize("shape", [(400, 400), (400, 400, 3)], ids=["grey", "colour"])
def test_a_png_of_more_than_8_bits_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Pillow cuts grey values above 255 off: the slide would be white throughout."""
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.full(shape, 30000, np.uint16))
    with (
        Slide(SlideRow("a", path, mpp=8.0)) as slide,
        pytest.raises(InputError, match=r"a\.png: stored with 16 bits"),
    ):
        look_at(slide, 8.0, ArtefactParameters())


def test_a_folder_of_dicom_is_looked_at(tmp_path: Path) -> None:
    write_dicom(tmp_path / "slide", picture(400, 400), 8.0, (1, 2))
    with Slide(SlideRow("s", tmp_path / "slide")) as slide:
        thumbnail = look_at(slide, 8.0, ArtefactParameters()).thumbnail
    assert np.abs(thumbnail.astype(float) - picture(400, 400)).mean() < 3


def test_a_black_background_is_refused_unless_it_is_left_out(tmp_path: Path) -> None:
    pixels = np.full((400, 400, 3), 4, np.uint8)
    pixels[150:250, 150:250] = (20, 110, 60)
    with pytest.raises(InputError, match="background is black, as in fluorescence"):
        look(tmp_path / "glow.tiff", pixels)
    pixels[150:250, 150:250] = (214, 150, 180)
    left_out = look(tmp_path / "padded.tiff", pixels, ArtefactParameters(black=True))
    assert left_out.find_tissue(TissueParameters())[170:230, 170:230].all()
