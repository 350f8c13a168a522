"""Pen marks, black borders and blurred tiles: found where they were drawn, and nowhere else."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from dasmil.cli import main
from dasmil.demo.slides import write_pyramid
from dasmil.errors import InputError
from dasmil.geometry import Extent, Tiles
from dasmil.slides.artefacts import INKS, MPP, ArtefactParameters, artefact_masks, exclude
from dasmil.slides.cohort import SlideRow
from dasmil.slides.focus import blurred_tiles
from dasmil.slides.pyramid import TilingParameters, lay_tiles, without_blurred
from dasmil.slides.reader import Slide
from dasmil.slides.tile_slide import qc_path, summary, tile_slide
from dasmil.slides.tile_table import read_tiles, tiles_path
from dasmil.slides.tissue import TissueParameters, tissue_mask
from dasmil.units import Mpp

ALL_INKS = ArtefactParameters(pen=tuple(INKS))
ALL = ArtefactParameters(pen=tuple(INKS), black=True, blur=True)
PINK = (205, 140, 175)
INK_COLOURS = {
    "blue": [(37, 95, 160), (30, 70, 170), (60, 120, 190), (40, 60, 200), (0, 160, 220)],
    "green": [(20, 120, 70), (30, 75, 60), (100, 190, 120), (0, 150, 120), (10, 40, 20)],
    "red": [(215, 25, 45), (200, 20, 20), (240, 60, 40), (160, 10, 30)],
    "black": [(25, 25, 30), (60, 60, 65), (85, 80, 80), (5, 0, 8)],
}
#: Absorbance of red, green and blue (Ruifrok and Johnston 2001)
STAINS = {
    "haematoxylin": (0.650, 0.704, 0.286),
    "eosin": (0.072, 0.990, 0.105),
    "dab": (0.268, 0.570, 0.776),
}


def glass(height: int = 200, width: int = 240) -> np.ndarray:
    return np.full((height, width, 3), 243, np.uint8)


def on_glass(colour: tuple[int, int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    picture = glass()
    left, top, right, bottom = box
    picture[top:bottom, left:right] = colour
    return picture


@pytest.mark.parametrize("ink", INKS)
def test_only_the_listed_inks_are_found(ink: str) -> None:
    for colour in INK_COLOURS[ink]:
        stroke = on_glass(colour, (40, 60, 200, 100))
        found = artefact_masks(stroke, 16.0, ArtefactParameters(pen=(ink,), margin_um=0))["pen"]
        expected = (stroke != glass()).any(axis=-1)
        assert (found & ~expected).sum() == 0, colour
        assert found.sum() > 0.98 * expected.sum(), colour  # round corners
        others = ArtefactParameters(pen=tuple(name for name in INKS if name != ink))
        assert not artefact_masks(stroke, 16.0, others)["pen"].any(), colour


@pytest.mark.parametrize("stains", [("haematoxylin", "eosin"), ("haematoxylin", "dab")])
def test_tissue_of_any_staining_is_no_ink(stains: tuple[str, str]) -> None:
    first, second = (np.array(STAINS[name]) for name in stains)
    amount = np.linspace(0, 0.8, 41)[:, None, None]  # 0.8: a lymph follicle, seen at 16 µm/px
    part = np.linspace(0, 1, 41)[None, :, None]
    absorbance = amount * (part * first + (1 - part) * second)
    patches = np.round(243 * 10.0**-absorbance).astype(np.uint8)
    picture = np.kron(patches, np.ones((10, 10, 1), np.uint8))
    assert not artefact_masks(picture, 16.0, ALL_INKS)["pen"].any()


@pytest.mark.parametrize("brown", [(148, 85, 40), (180, 140, 90), (210, 185, 140), (120, 85, 55)])
def test_the_brown_of_dab_is_no_ink(brown: tuple[int, int, int]) -> None:
    assert not artefact_masks(on_glass(brown, (40, 40, 200, 160)), 16.0, ALL_INKS)["pen"].any()


@pytest.mark.parametrize("width_um, found", [(48, False), (80, False), (160, True), (320, True)])
def test_narrow_marks_are_no_pen(width_um: int, found: bool) -> None:
    for mpp in (4.0, 8.0, 16.0):
        picture = np.full((round(3200 / mpp), round(3200 / mpp), 3), 243, np.uint8)
        top = round(1600 / mpp)
        picture[top : top + round(width_um / mpp)] = (30, 70, 170)
        assert artefact_masks(picture, mpp, ALL_INKS)["pen"].any() == found, mpp


def test_the_margin_is_in_micrometres() -> None:
    stroke = on_glass((30, 70, 170), (0, 60, 240, 100))
    for margin_um, extra in ((0, 0), (16, 1), (48, 3)):
        parameters = ArtefactParameters(pen=("blue",), margin_um=margin_um)
        rows = artefact_masks(stroke, 16.0, parameters)["pen"].all(axis=1)
        assert rows.nonzero()[0].tolist() == list(range(60 - extra, 100 + extra))


def test_a_fine_thumbnail_is_looked_at_at_16_um() -> None:
    fine = cv2.resize(on_glass((20, 120, 70), (40, 60, 200, 100)), None, fx=4, fy=4)
    found = artefact_masks(fine, MPP / 4, ALL_INKS)["pen"]
    assert found.shape == (200, 240)
    assert artefact_masks(fine, 3 * MPP, ALL_INKS)["pen"].shape == fine.shape[:2]
    odd = fine[:-3, :-2]
    assert artefact_masks(odd, MPP / 4, ALL_INKS)["pen"].mean() == pytest.approx(
        found.mean(), rel=0.02
    )


def test_rounding_of_the_thumbnails_mpp_does_not_decide_how_it_is_looked_at() -> None:
    """A slide's width is no multiple of the reduction: 8 µm/px are 7.9995 as often as 8.0005."""
    picture = cv2.resize(on_glass((30, 70, 170), (40, 60, 200, 100)), None, fx=2, fy=2)
    picture[:, :30] = 0
    picture[300:309, :] = (20, 120, 70)  # 72 µm: too narrow for a pen
    expected = artefact_masks(picture, 8.0, ALL)
    assert expected["pen"].shape == (200, 240) and all(m.any() for m in expected.values())
    for mpp in (7.9995, 8.0005):
        found = artefact_masks(picture, mpp, ALL)
        assert found.keys() == expected.keys()
        for name, mask in found.items():
            np.testing.assert_array_equal(mask, expected[name], err_msg=f"{name} at {mpp}")


@pytest.mark.parametrize("mpp, factor", [(2.0, 8), (5.0, 3), (10.0, 2), (10.6, 2), (11.0, 1)])
def test_a_thumbnail_is_reduced_to_about_16_um(mpp: float, factor: int) -> None:
    assert artefact_masks(glass(240, 240), mpp, ALL)["pen"].shape == (240 // factor,) * 2


@pytest.mark.parametrize(
    "box, found",
    [
        ((0, 0, 12, 200), True),  # a border on the left
        ((228, 0, 240, 200), True),
        ((0, 0, 240, 12), True),
        ((100, 188, 140, 200), True),  # at the lower border
        ((100, 60, 130, 90), False),  # 0.23 mm² inside
        ((60, 60, 140, 140), True),  # 1.6 mm² inside
        ((0, 0, 2, 200), False),  # 32 µm: narrower than anything sought
    ],
)
def test_black_is_left_out_at_the_border_or_if_it_is_large(
    box: tuple[int, int, int, int], found: bool
) -> None:
    for colour, black in (((0, 0, 0), True), ((50, 10, 40), True), ((60, 50, 58), False)):
        masks = artefact_masks(
            on_glass(colour, box), 16.0, ArtefactParameters(black=True, margin_um=0)
        )
        assert list(masks) == ["black"]
        assert masks["black"].any() == (found and black), colour


def test_black_and_pen_share_no_pixel() -> None:
    picture = on_glass((0, 0, 0), (0, 0, 40, 200))
    picture[90:130, 20:200] = (30, 70, 170)
    picture[20:60, 100:130] = (25, 25, 30)  # a black stroke inside the slide
    masks = artefact_masks(picture, 16.0, replace(ALL, margin_um=80))
    assert not (masks["pen"] & masks["black"]).any()
    assert masks["black"][50, 20] and not masks["pen"][50, 20]
    assert masks["pen"][40, 115] and masks["pen"][110, 150]


def test_nothing_is_looked_for_unless_asked() -> None:
    picture = on_glass((0, 0, 0), (0, 0, 40, 200))
    assert artefact_masks(picture, 16.0, ArtefactParameters()) == {}
    assert artefact_masks(picture, 16.0, ArtefactParameters(blur=True)) == {}
    assert set(artefact_masks(picture, 16.0, ALL)) == {"pen", "black"}


def test_left_out_areas_are_painted_white_in_place() -> None:
    picture = cv2.resize(on_glass((30, 70, 170), (40, 60, 200, 100)), (480, 400))
    before = picture.copy()
    masks = {"pen": np.zeros((200, 240), bool), "black": np.zeros((200, 240), bool)}
    masks["pen"][60:100, 40:200] = True
    masks["black"][:, :10] = True
    painted = exclude(masks, picture)
    expected = np.zeros((400, 480), bool)
    expected[120:200, 80:400] = expected[:, :20] = True
    np.testing.assert_array_equal(painted, expected)
    assert (picture[painted] == 255).all()
    np.testing.assert_array_equal(picture[~painted], before[~painted])


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"pen": ("blue", "violet")},
            r"artefacts: pen \('blue', 'violet'\) is not .* each one of blue, green, red, black",
        ),
        ({"max_share": 1.1}, "artefacts: max_share 1.1 is not a "),
        ({"max_black": 256}, "artefacts: max_black 256 is not a "),
        ({"min_width_um": -1}, "artefacts: min_width_um -1 is not a "),
        ({"margin_um": -2.5}, "artefacts: margin_um -2.5 is not a "),
        ({"min_black_mm2": -1}, "artefacts: min_black_mm2 -1 is not a "),
        ({"blur_mpp": 0}, "artefacts: blur_mpp 0 is not a "),
        ({"min_detail": 0}, "artefacts: min_detail 0 is not a "),
    ],
)
def test_senseless_parameters_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ArtefactParameters(**change)


def pyramid(max_share: float, artefacts: dict[str, np.ndarray] | None) -> Tiles:
    """8 x 8 tiles of x10 and 4 x 4 of x5, all tissue, 64 px each; a mask pixel is 16 µm."""
    parameters = TilingParameters(
        ("x5", "x10"), 64, artefacts=ArtefactParameters(max_share=max_share)
    )
    mask = np.ones((32, 32), bool)
    return lay_tiles("s1", mask, Extent((1024, 1024), Mpp(0.5)), parameters, artefacts)


def test_a_tile_with_too_much_artefact_is_left_out() -> None:
    pen, black = np.zeros((2, 64, 64), bool)  # of another resolution than the tissue
    pen[0:8, 0:4] = True  # half of tile (0, 0)
    black[0:8, 8:10] = True  # a quarter of tile (0, 1)
    black[8:16, 8:14] = True  # three quarters of tile (1, 1)
    pen[8:16, 14:16] = True  # and the rest of it
    for max_share, lost in (
        (0, {(0, 0), (0, 1), (1, 1)}),
        (0.25, {(0, 0), (1, 1)}),
        (0.8, {(1, 1)}),
    ):
        tiles = pyramid(max_share, {"pen": pen, "black": black})
        kept = set(map(tuple, tiles.grid["x10"].tolist()))
        assert {(row, col) for row in range(8) for col in range(8)} - kept == lost
    assert tiles.tissue.excluded == {"pen": pen.mean(), "black": black.mean()}
    assert pyramid(0, None).num_tiles() == {"x5": 16, "x10": 64}


def test_the_area_of_the_tissue_is_in_square_millimetres() -> None:
    parameters = TilingParameters(("x20",), 64)
    mask = np.zeros((30, 50), bool)
    mask[:10] = True
    tiles = lay_tiles("s1", mask, Extent((5000, 3000), Mpp(0.25)), parameters)
    assert tiles.tissue.mm2 == pytest.approx(1.25 * 0.25)
    assert summary(tiles)["tissue_mm2"] == 0.312


def test_a_coarse_tile_goes_with_its_last_child() -> None:
    tiles = pyramid(1, None)
    fine = tiles.grid["x10"]
    blurred = (fine[:, 0] < 2) & (fine[:, 1] < 2)  # all four of (0, 0)
    blurred |= (fine == (2, 2)).all(axis=1)  # and one of four of (1, 1)
    kept = without_blurred(tiles, blurred)
    np.testing.assert_array_equal(kept.grid["x10"], fine[~blurred])
    expected = [(row, col) for row in range(4) for col in range(4) if (row, col) != (0, 0)]
    assert kept.grid["x5"].tolist() == list(map(list, expected))
    parents = kept.grid["x5"][kept.parent["x10"]]
    np.testing.assert_array_equal(parents, kept.grid["x10"] // 2)
    assert (np.diff(kept.parent["x10"]) >= 0).all()
    assert kept.tissue.excluded == {"blur": 5 / 64}
    assert kept.tissue.mm2 == tiles.tissue.mm2
    none = without_blurred(kept, np.ones(59, bool))
    assert none.num_tiles() == {"x5": 0, "x10": 0}
    assert without_blurred(none, np.zeros(0, bool)).tissue.excluded == {"blur": 0.0}


def draw_slide(path: Path) -> Path:
    """4 mm wide at 1 µm/px: sharp tissue above, blurred below, a stroke, a border on the left."""
    pixels = np.full((4096, 4096, 3), 243, np.uint8)
    noise = np.random.default_rng(0).normal(0, 40, (2048, 2048, 1))
    sharp = np.clip(PINK + cv2.GaussianBlur(noise, (0, 0), 0.8)[..., None] * 2, 0, 255)
    sharp[1024:] = cv2.GaussianBlur(sharp[1024:], (0, 0), 4)
    pixels[1024:3072, 1024:3072] = sharp
    pixels[1320:1800] = (30, 70, 170)
    pixels[:, :300] = 0
    write_pyramid(path, pixels, 1.0)
    return path


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_slide(tmp_path_factory.mktemp("drawn") / "drawn.tiff")


def test_a_slide_loses_what_was_drawn_on_it(drawn: Path, tmp_path: Path) -> None:
    tables = {}
    for name, artefacts in (("off", ArtefactParameters()), ("on", ALL)):
        parameters = TilingParameters(("x5", "x10"), 128, artefacts=artefacts)
        with Slide(SlideRow("s1", drawn)) as slide:
            status = tile_slide(slide, tmp_path / name, parameters)
        tables[name] = read_tiles(tiles_path(tmp_path / name, "s1"))
        assert status["tissue_mm2"] == round(tables[name].tissue.mm2, 3)
        assert status["message"].startswith("left out: pen ") == (name == "on")
    # without the rules the stroke is tissue from border to border
    assert tables["off"].tissue.mm2 > 5
    assert tables["off"].tissue.excluded == {}
    # 2.048² mm, but for the stroke of 0.48 mm and its two margins of 0.05 mm
    assert tables["on"].tissue.mm2 == pytest.approx(2.048 * (2.048 - 0.58), rel=0.02)
    assert tables["on"].tissue.excluded["pen"] == pytest.approx(0.58 * 3.75 / 4.096**2, rel=0.02)
    assert tables["on"].tissue.excluded["black"] == pytest.approx(0.35 / 4.096, rel=0.05)
    rows, columns = tables["on"].grid["x10"].T  # a tile is 128 µm, sharp tissue 8..15
    assert set(rows) == {8, 9, 15}  # 9 loses a twelfth; 10 to 14 lose half and more
    assert set(columns) == set(range(8, 24))
    blurred_rows = 8  # 16 to 23
    # the picture was made before anything was painted over
    picture = cv2.imread(str(qc_path(tmp_path / "on", "s1")))[..., ::-1]
    second = picture[26:666, 652:]  # 640 px of 6.4 µm
    np.testing.assert_allclose(second[250, 600], (30, 70, 170), atol=2)
    assert tables["on"].tissue.excluded["blur"] == pytest.approx(blurred_rows / (3 + blurred_rows))


def tissue_mm2_of(pixels: np.ndarray, folder: Path, artefacts: ArtefactParameters) -> float:
    """Of a slide of 8 µm/px."""
    write_pyramid(folder / "s.tiff", pixels, 8.0, (1,))
    parameters = TilingParameters(("x1.25",), 32, artefacts=artefacts)
    with Slide(SlideRow("s1", folder / "s.tiff")) as slide:
        return float(tile_slide(slide, folder, parameters)["tissue_mm2"])


def test_a_dot_of_ink_is_no_hole_to_be_filled(tmp_path: Path) -> None:
    pixels = np.full((400, 400, 3), 243, np.uint8)
    pixels[100:300, 100:300] = PINK
    pixels[192:208, 192:208] = (30, 70, 170)  # 128 µm, of which a disc is left out
    parameters = replace(ALL_INKS, margin_um=0)
    whole = tissue_mm2_of(pixels, tmp_path, ArtefactParameters())
    assert whole == pytest.approx(1.6**2, abs=0.002)
    lost = whole - tissue_mm2_of(pixels, tmp_path, parameters)
    assert 0.7 * 0.128**2 < lost <= 0.128**2 + 0.001


def test_ink_does_not_hide_pale_tissue(tmp_path: Path) -> None:
    """Otsu would part ink from all else; tissue of a saturation below 40 would be glass."""
    pixels = np.full((400, 400, 3), 243, np.uint8)
    pixels[50:150, 100:300] = (235, 212, 225)  # saturation 25
    pixels[250:350] = (30, 70, 170)
    assert tissue_mm2_of(pixels, tmp_path, ALL_INKS) == pytest.approx(0.8 * 1.6, rel=0.01)


def test_a_slide_that_is_wholly_out_of_focus_is_empty_and_says_why(tmp_path: Path) -> None:
    pixels = np.full((1024, 1024, 3), 243, np.uint8)
    pixels[256:768, 256:768] = PINK
    write_pyramid(tmp_path / "soft.tiff", cv2.GaussianBlur(pixels, (0, 0), 5), 1.0)
    parameters = TilingParameters(("x10",), 128, artefacts=ArtefactParameters(blur=True))
    with Slide(SlideRow("s1", tmp_path / "soft.tiff")) as slide:
        status = tile_slide(slide, tmp_path, parameters)
    assert (status["state"], status["tiles/x10"]) == ("empty", 0)
    assert status["message"] == "every tile is blurred; left out: blur 100.00% of the tiles"


def test_the_command_takes_the_rules_and_refuses_a_folder_made_with_others(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort = tmp_path / "cohort.csv"
    cohort.write_text(f"slide_id,path\ns1,{drawn}\n")
    command = ["tile", "--cohort", str(cohort), "--output", str(tmp_path / "out")]
    command += ["--scales", "[x5,x10]", "--tile_px", "128", "--workers", "1"]
    rules = ["--artefacts.pen", "[blue,black]", "--artefacts.blur", "true"]
    assert main([*command, *rules]) == 0
    tiles = read_tiles(tiles_path(tmp_path / "out", "s1"))
    assert json.loads(tiles.tiling)["artefacts"]["pen"] == ["blue", "black"]
    assert set(tiles.tissue.excluded) == {"pen", "blur"}
    assert main(command) == 2
    assert "made with other parameters than asked for now" in capsys.readouterr().err


@pytest.mark.slow
def test_real_slides_without_pen_lose_next_to_nothing(shared_data: Path) -> None:
    """19 H&E slides of 14 cases, all of them sharp, with every rule on."""
    slides = shared_data / "slides"
    found = sorted(slides.glob("atlas_x5/*.tif")) + sorted(slides.glob("atlas_x20/*"))
    assert len(found) == 19
    for path in found:
        finest = "x20" if path.parent.name == "atlas_x20" else "x5"
        mpp = {"x20": 0.5, "x5": 2.0}[finest]
        with Slide(SlideRow(path.stem, path, mpp=mpp)) as slide:
            thumbnail = slide.thumbnail(8.0)
            thumbnail_mpp = slide.mpp * slide.size_px0[0] / thumbnail.shape[1]
            before = tissue_mask(thumbnail, thumbnail_mpp, TissueParameters())
            masks = artefact_masks(thumbnail, thumbnail_mpp, ALL)
            painted = exclude(masks, thumbnail)
            after = tissue_mask(thumbnail, thumbnail_mpp, TissueParameters()) & ~painted
            assert (before & ~after).sum() < 0.001 * before.sum(), path
            parameters = TilingParameters((finest,), artefacts=ALL)
            tiles = lay_tiles("s1", after, slide.extent, parameters, masks)
            assert blurred_tiles(slide, tiles, ALL).mean() <= 0.01, path
