"""Tissue on drawn pictures, and the share of it in boxes against brute force."""

import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import cv2
import numpy as np
import pytest

from dasmil.errors import InputError
from dasmil.slides import tissue
from dasmil.slides.tissue import (
    TissueParameters,
    has_dark_background,
    tissue_fraction,
    tissue_mask,
)

WHITE = (244, 244, 244)
PINK = (214, 150, 180)  # saturation 76
PALE = (232, 214, 222)  # saturation 20
SIDE = 400
MPP = 8.0  # areas below: a pixel is 64 µm², so 20 000 µm² are 312.5 pixels
PARAMETERS = TissueParameters()
COLOUR_ALONE = TissueParameters(min_texture=255)  # texture fills gaps and holes of up to 150 µm


def disc(x: float, y: float, radius: float, side: int = SIDE) -> np.ndarray:
    """(side, side) bool."""
    at_y, at_x = np.mgrid[:side, :side]
    return (at_x - x) ** 2 + (at_y - y) ** 2 <= radius**2


def paint(tissue: np.ndarray, colour: tuple[int, int, int] = PINK) -> np.ndarray:
    """White glass, coloured tissue, and a little noise of the sensor."""
    picture = np.where(tissue[..., None], np.array(colour), np.array(WHITE)).astype(float)
    noise = np.random.default_rng(0).normal(0, 1.5, tissue.shape)[..., None]  # grey: no colour
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def edge_band(mask: np.ndarray, width: int = 3) -> np.ndarray:
    """Pixels within ``width`` of the edge of a mask, along rows and columns."""
    band = np.zeros_like(mask)
    for axis in (0, 1):
        for shift in range(1, width + 1):
            moved = np.roll(mask, shift, axis)
            changed = moved != mask
            for back in range(shift + 1):
                band |= np.roll(changed, -back, axis)
    return band


@pytest.fixture(scope="module")
def scene() -> dict[str, np.ndarray]:
    """A disc with a hole of 2821 px and one of 113 px, an islet of 709 px, a speck of 113 px."""
    return {
        "disc": disc(200, 200, 120),
        "large hole": disc(230, 230, 30),
        "small hole": disc(140, 170, 6),
        "islet": disc(40, 40, 15),
        "speck": disc(360, 50, 6),
    }


@pytest.fixture(scope="module")
def picture(scene: dict[str, np.ndarray]) -> np.ndarray:
    holes = scene["large hole"] | scene["small hole"]
    return paint((scene["disc"] & ~holes) | scene["islet"] | scene["speck"])


def test_the_mask_is_the_drawn_tissue_but_for_small_parts(
    scene: dict[str, np.ndarray], picture: np.ndarray
) -> None:
    mask = tissue_mask(picture, MPP, PARAMETERS)
    expected = (scene["disc"] & ~scene["large hole"]) | scene["islet"]
    assert mask.dtype == bool
    assert mask.shape == (SIDE, SIDE)
    away_from_edges = ~edge_band(expected)
    assert away_from_edges.mean() > 0.9
    np.testing.assert_array_equal(mask[away_from_edges], expected[away_from_edges])


def test_a_large_hole_stays_open_and_a_small_one_is_filled(
    scene: dict[str, np.ndarray], picture: np.ndarray
) -> None:
    mask = tissue_mask(picture, MPP, PARAMETERS)
    assert mask[scene["small hole"]].all()
    assert not mask[230, 230]
    assert mask[scene["large hole"]].mean() < 0.2


def test_a_small_speck_is_dropped_and_a_larger_islet_kept(
    scene: dict[str, np.ndarray], picture: np.ndarray
) -> None:
    mask = tissue_mask(picture, MPP, PARAMETERS)
    assert not mask[scene["speck"]].any()
    assert mask[scene["islet"]].mean() > 0.9


def test_areas_are_counted_in_square_micrometres(
    scene: dict[str, np.ndarray], picture: np.ndarray
) -> None:
    """The same pixels at 16 µm/px are four times as large: 113 px pass 78 px."""
    mask = tissue_mask(picture, 2 * MPP, COLOUR_ALONE)
    assert mask[scene["speck"]].mean() > 0.8
    assert not mask[170, 140]


def test_the_areas_are_parameters(scene: dict[str, np.ndarray], picture: np.ndarray) -> None:
    all_kept = tissue_mask(
        picture, MPP, TissueParameters(min_tissue_um2=2_000, min_hole_um2=200_000)
    )
    assert all_kept[scene["speck"]].mean() > 0.8  # 113 px = 7 232 µm²
    assert all_kept[scene["large hole"]].all()  # 2821 px = 180 544 µm²
    areas = replace(COLOUR_ALONE, min_tissue_um2=100_000, min_hole_um2=2_000)
    fewer = tissue_mask(picture, MPP, areas)
    assert not fewer[scene["islet"]].any()  # 709 px = 45 376 µm²
    assert not fewer[170, 140]  # 113 px = 7 232 µm²


@pytest.mark.parametrize(("gap_px", "closed"), [(3, True), (10, False)])
def test_gaps_are_closed_up_to_a_physical_width(gap_px: int, closed: bool) -> None:
    """32 µm are 4 px; the gap runs across the picture and so is no hole."""
    tissue = np.zeros((SIDE, SIDE), bool)
    tissue[:, 100:300] = True
    tissue[200 : 200 + gap_px] = False
    mask = tissue_mask(paint(tissue), MPP, COLOUR_ALONE)
    assert mask[200 + gap_px // 2, 150:250].all() == closed
    assert mask[200 + gap_px // 2, 150:250].any() == closed


@pytest.mark.parametrize("side", [3, 40, 400])
def test_a_blank_slide_holds_no_tissue(side: int) -> None:
    white = np.full((side, side, 3), 255, np.uint8)
    grey = np.full((side, side, 3), 230, np.uint8)
    noise = np.random.default_rng(0).integers(-3, 1, (side, side, 3))
    for blank in (white, grey, (white + noise).astype(np.uint8)):
        assert not tissue_mask(blank, MPP, PARAMETERS).any()


def test_a_slide_that_is_all_tissue_is_all_tissue() -> None:
    right = np.zeros((200, 200), bool)
    right[:, 100:] = True
    no_glass = np.where(right[..., None], np.array(PINK), np.array((220, 180, 200)))
    assert tissue_mask(no_glass.astype(np.uint8), MPP, PARAMETERS).all()


def test_an_upper_limit_keeps_otsu_from_dividing_pale_tissue_from_dark() -> None:
    """Little glass: Otsu's threshold, 57, lies between the two sections."""
    picture = np.full((200, 200, 3), (220, 180, 200), np.uint8)  # saturation 46
    picture[:, 95:105] = WHITE
    picture[:, 105:] = (200, 100, 150)  # saturation 128
    mask = tissue_mask(picture, MPP, COLOUR_ALONE)
    assert mask[:, :90].all()
    assert mask[:, 110:].all()
    without_limit = tissue_mask(picture, MPP, replace(COLOUR_ALONE, max_saturation=255))
    assert not without_limit[:, :90].any()
    assert without_limit[:, 110:].all()


def test_otsu_adapts_to_pale_tissue() -> None:
    tissue = disc(200, 200, 100)
    mask = tissue_mask(paint(tissue, PALE), MPP, PARAMETERS)
    away_from_edges = ~edge_band(tissue)
    np.testing.assert_array_equal(mask[away_from_edges], tissue[away_from_edges])


def test_a_faint_tint_of_the_glass_is_no_tissue() -> None:
    """Saturation 10 lies below the lower limit, although Otsu alone would cut at it."""
    tinted = paint(disc(200, 200, 100), (250, 240, 240))
    assert not tissue_mask(tinted, MPP, PARAMETERS).any()
    assert tissue_mask(tinted, MPP, TissueParameters(min_saturation=0)).any()


def test_a_grey_pen_mark_is_no_tissue() -> None:
    drawn = paint(disc(120, 200, 60))
    drawn[180:220, 250:390] = 40
    mask = tissue_mask(drawn, MPP, PARAMETERS)
    assert mask[200, 120]
    assert not mask[:, 250:].any()


def fat(side: int = SIDE) -> np.ndarray:
    """(side, side, 3): thin, pale membranes around cells of 72 µm, nothing in them."""
    at_y, at_x = np.mgrid[:side, :side]
    membrane = (at_x % 9 == 0) | (at_y % 9 == 0)
    return np.where(membrane[..., None], np.array((222, 190, 208)), np.array(WHITE))


def slide_with(parts: list[tuple[np.ndarray, object]], glass: object = WHITE) -> np.ndarray:
    """Parts, each a mask and its colours on white glass; with noise, as a JPEG of quality 70."""
    picture = np.broadcast_to(np.array(glass, float), (SIDE, SIDE, 3)).copy()
    for where, colours in parts:
        picture *= np.where(where[..., None], np.array(colours) / WHITE, 1)
    noise = np.random.default_rng(0).normal(0, 1.5, (SIDE, SIDE, 1))
    picture = np.clip(picture + noise, 0, 255).astype(np.uint8)
    _, stored = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 70])
    return cv2.imdecode(stored, cv2.IMREAD_COLOR)[..., ::-1].copy()


STRONG = disc(110, 110, 80)
LAKE = disc(110, 110, 40)
MUCIN = (224, 212, 226)  # saturation 16, without texture
CAST = (246, 238, 224)  # saturation 23
GRADIENT = np.linspace((246, 242, 232), (226, 224, 222), SIDE)  # its saturation goes from 15 to 5


def test_a_pale_lake_inside_strong_tissue_is_tissue() -> None:
    mask = tissue_mask(slide_with([(STRONG & ~LAKE, PINK), (LAKE, MUCIN)]), MPP, PARAMETERS)
    assert mask[LAKE].all()
    empty = tissue_mask(slide_with([(STRONG & ~LAKE, PINK)]), MPP, PARAMETERS)
    assert not empty[disc(110, 110, 25)].any()


@pytest.mark.parametrize("glass", [WHITE, CAST, GRADIENT], ids=["neutral", "cast", "gradient"])
def test_pale_sections_near_strong_tissue_are_tissue_and_glass_is_not(glass: object) -> None:
    """Of a section of fat and one that is pale as a whole, Otsu's threshold keeps nothing."""
    nuclei = np.random.default_rng(1).random((SIDE, SIDE)) < 0.15
    section = np.where(nuclei[..., None], np.array((205, 185, 205)), np.array(PALE))
    fatty, pale = disc(280, 120, 90), disc(200, 310, 80)
    mask = tissue_mask(
        slide_with([(STRONG, PINK), (fatty, fat()), (pale, section)], glass), MPP, PARAMETERS
    )
    assert mask[disc(110, 110, 78)].all()
    assert mask[disc(280, 120, 80)].mean() > 0.98
    assert mask[disc(200, 310, 75)].mean() > 0.98
    away = ~(disc(110, 110, 86) | disc(280, 120, 96) | disc(200, 310, 86))
    assert not mask[away].any()


@pytest.mark.parametrize("glass", [WHITE, CAST, GRADIENT], ids=["neutral", "cast", "gradient"])
def test_dust_hairs_and_scratches_are_no_tissue(glass: object) -> None:
    rng = np.random.default_rng(2)
    dirt: list[tuple[np.ndarray, object]] = []
    for number in range(60):  # up to 64 µm wide, grey, brown and pink
        x, y, radius = (*rng.uniform(0, SIDE, 2), rng.uniform(0.5, 4))
        dirt.append(
            (disc(x, y, radius), ((90, 90, 90), (150, 110, 80), (190, 120, 160))[number % 3])
        )
    at_y, at_x = np.mgrid[:SIDE, :SIDE]
    dirt.append((np.abs(at_x - 0.4 * at_y - 100) < 1, (120, 120, 120)))
    dirt.append((np.abs(at_y - 330) < 1, (150, 150, 150)))
    assert not tissue_mask(slide_with(dirt, glass), MPP, PARAMETERS).any()
    with_tissue = tissue_mask(slide_with([*dirt, (STRONG, PINK)], glass), MPP, PARAMETERS)
    assert with_tissue[STRONG].mean() > 0.99
    assert not with_tissue[~disc(110, 110, 100)].any()


def test_the_more_sensitive_the_rule_the_larger_the_tissue() -> None:
    membrane = (fat() != WHITE).any(2)
    faint = np.where(membrane[..., None], np.array((236, 224, 236)), np.array((240, 232, 240)))
    picture = slide_with([(STRONG, PINK), (disc(280, 280, 100), faint)])
    kept = [
        tissue_mask(picture, MPP, replace(PARAMETERS, min_saturation=colour, min_texture=texture))
        for colour, texture in ((24, 6.0), (12, 2.5), (6, 1.2))
    ]
    assert all((less <= more).all() for less, more in pairwise(kept))
    assert kept[1][disc(280, 280, 80)].mean() < 0.1
    assert kept[2][disc(280, 280, 80)].mean() > 0.9


def test_a_thumbnail_of_another_resolution_gives_the_same_tissue() -> None:
    picture = slide_with([(STRONG, PINK), (disc(280, 280, 100), fat())])
    fine = cv2.resize(picture, (3 * SIDE, 3 * SIDE), interpolation=cv2.INTER_NEAREST)
    expected = tissue_mask(picture, MPP, PARAMETERS)
    found = tissue_mask(fine, MPP / 3, PARAMETERS)[1::3, 1::3]
    assert (found != expected).mean() < 0.01


def test_a_colourless_slide_holds_tissue_where_it_is_darker_than_glass() -> None:
    """Dust does not count, nor does shading, which is smooth."""
    grey = slide_with([(STRONG, PINK), (disc(280, 280, 90), fat()), (disc(350, 60, 4), (90,) * 3)])
    grey = cv2.cvtColor(cv2.cvtColor(grey, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    shading = np.linspace(1, 0.9, SIDE)[:, None, None]
    for picture in (grey, (grey * shading).astype(np.uint8)):
        mask = tissue_mask(picture, MPP, PARAMETERS)
        assert mask[disc(110, 110, 75)].all()
        assert mask[disc(280, 280, 80)].mean() > 0.98
        assert not mask[~(disc(110, 110, 90) | disc(280, 280, 100))].any()
    blank = np.broadcast_to(244 * shading, (SIDE, SIDE, 3)).astype(np.uint8)
    assert not tissue_mask(blank, MPP, PARAMETERS).any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("mpp", 0.0), ("median_px", 4), ("median_px", 0), ("min_saturation", 256)),
        *(("max_saturation", -1), ("min_texture", -1.0), ("closing_um", -1.0)),
    ],
)
def test_values_that_no_slide_can_be_tiled_with_are_refused_by_name(
    field: str, value: float
) -> None:
    with pytest.raises(InputError, match=rf"^tissue: {field} {value} is not "):
        replace(PARAMETERS, **{field: value})


def test_a_dark_background_differs_from_black_borders_and_dark_tissue() -> None:
    glow = np.where(STRONG[..., None], np.array((30, 120, 90)), np.array((6, 6, 8)))
    assert has_dark_background(glow.astype(np.uint8))
    framed = paint(STRONG)
    framed[:, 150:] = 0
    assert not has_dark_background(framed)
    assert not has_dark_background(np.full((SIDE, SIDE, 3), PINK, np.uint8))
    assert not has_dark_background(np.full((SIDE, SIDE, 3), 255, np.uint8))


def overlap(edges: np.ndarray, length: int) -> np.ndarray:
    """(cells, pixels): how much of each pixel lies in each cell, one interval at a time."""
    return np.array(
        [
            [max(0.0, min(end, pixel + 1) - max(start, pixel)) for pixel in range(length)]
            for start, end in pairwise(edges)
        ]
    )


def test_tissue_fraction_is_exact_at_fractional_edges() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        mask = rng.random(rng.integers(1, 40, 2)) < rng.random()
        height, width = mask.shape
        x_edges = np.sort(rng.uniform(0, width, rng.integers(2, 12)))
        y_edges = np.sort(rng.uniform(0, height, rng.integers(2, 12)))
        area = np.outer(np.diff(y_edges), np.diff(x_edges))
        expected = overlap(y_edges, height) @ mask @ overlap(x_edges, width).T / area
        np.testing.assert_allclose(tissue_fraction(mask, x_edges, y_edges), expected, atol=1e-9)


def test_tissue_fraction_equals_counting_on_a_finer_raster() -> None:
    rng = np.random.default_rng(2)
    mask = rng.random((9, 13)) < 0.4
    fine = mask.repeat(8, axis=0).repeat(8, axis=1)
    x_edges, y_edges = np.array([0, 3, 20, 21, 64, 104]), np.array([5, 6, 40, 72])
    expected = [
        [fine[top:bottom, left:right].mean() for left, right in pairwise(x_edges)]
        for top, bottom in pairwise(y_edges)
    ]
    np.testing.assert_allclose(tissue_fraction(mask, x_edges / 8, y_edges / 8), expected)


def test_tissue_fraction_of_no_cells_is_empty() -> None:
    found = tissue_fraction(np.ones((4, 4), bool), np.array([0.0]), np.array([0.0, 1.0, 2.0]))
    assert found.shape == (2, 0)


def reference_mask(thumbnail: np.ndarray, mpp: float, parameters: TissueParameters) -> np.ndarray:
    """The same steps for coloured pictures at 8 µm/px, each on the whole picture."""

    def pad(picture: np.ndarray) -> np.ndarray:
        return np.pad(picture, 26, mode="edge")

    grey = cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY)
    padded = pad(grey)
    contrast = np.minimum(np.abs(padded.astype(int) - cv2.blur(padded, (13, 13))), 12)
    texture = cv2.blur((contrast * 16).astype(np.uint8), (13, 13)) / 16
    saturation = cv2.cvtColor(thumbnail, cv2.COLOR_RGB2HSV)[..., 1]
    inside = grey[grey < 255]
    bright = 0.75 * np.quantile(inside, 0.99, method="inverted_cdf") if inside.size else 191.25
    glass = (
        (texture[26:-26, 26:-26] < 1.5)
        & (grey >= np.ceil(bright))
        & (grey < 255)
        & (saturation <= 40)
    )
    if glass.mean() >= 0.01:
        white = np.quantile(thumbnail[glass], 0.5, axis=0, method="inverted_cdf")
        balanced = np.minimum(thumbnail * (255 / white), 255).round().astype(np.uint8)
        saturation = cv2.cvtColor(balanced, cv2.COLOR_RGB2HSV)[..., 1]
    rough = (texture > parameters.min_texture).astype(np.uint8)
    colour = cv2.blur(np.minimum(pad(saturation), 40) * 6 * rough, (39, 39))
    rough &= colour > cv2.blur(rough * np.uint8(parameters.min_saturation), (39, 39))
    if min(saturation.shape) > parameters.median_px:
        saturation = cv2.medianBlur(saturation, parameters.median_px)
    rough = cv2.erode(cv2.dilate(rough, ellipse(7)), ellipse(31))[26:-26, 26:-26]
    otsu, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    pale = min(parameters.min_saturation, parameters.max_saturation)
    seeds = (saturation > np.clip(otsu, pale, parameters.max_saturation)) | (rough > 0)
    _, labels = cv2.connectedComponents(((saturation > pale) | seeds).astype(np.uint8))
    mask = np.isin(labels, np.setdiff1d(labels[seeds], 0)).astype(np.uint8)
    diameter_px = 2 * round(parameters.closing_um / mpp / 2) + 1
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, ellipse(diameter_px))
    kept = without_small_parts(mask, parameters.min_tissue_um2 / mpp**2)
    if not kept.any():
        return kept.astype(bool)
    return without_small_parts(1 - kept, parameters.min_hole_um2 / mpp**2) == 0


def ellipse(diameter_px: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter_px, diameter_px))


def without_small_parts(mask: np.ndarray, min_area_px: float) -> np.ndarray:
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = statistics[:, cv2.CC_STAT_AREA] >= min_area_px
    keep[0] = False
    return keep[labels].astype(np.uint8)


def reference_fraction(mask: np.ndarray, x_edges: np.ndarray, y_edges: np.ndarray) -> np.ndarray:
    """From the integral image of the whole mask, 8 bytes a pixel."""
    integral = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    integral[1:, 1:] = mask.cumsum(0, dtype=np.int64).cumsum(1)
    at_both = rows_between(rows_between(integral, y_edges).T, x_edges).T
    area = np.diff(y_edges)[:, None] * np.diff(x_edges)[None, :]
    return np.clip(np.diff(np.diff(at_both, axis=0), axis=1) / area, 0, 1)


def rows_between(table: np.ndarray, at: np.ndarray) -> np.ndarray:
    at = np.clip(at, 0, len(table) - 1)
    low = np.minimum(at.astype(np.int64), len(table) - 2)
    part = (at - low)[:, None]
    return table[low] * (1 - part) + table[low + 1] * part


def cloudy_pictures() -> Iterator[np.ndarray]:
    """Blurred colours of all shapes, higher and lower than a band, some of one colour."""
    rng = np.random.default_rng(3)
    for number in range(60):
        noise = rng.integers(0, 256, (*rng.integers(1, 400, 2), 3)).astype(np.uint8)
        picture = cv2.GaussianBlur(noise, (0, 0), rng.uniform(0.5, 6))
        if number % 10 == 0:
            picture[:] = picture[0, 0]
        yield picture


def test_a_mask_made_in_little_memory_is_the_same_to_the_last_pixel() -> None:
    rng, shares = np.random.default_rng(4), []
    for picture in cloudy_pictures():
        parameters = TissueParameters(
            max_saturation=int(rng.integers(20, 255)),
            min_texture=rng.uniform(2, 16),
            min_tissue_um2=rng.uniform(0, 30_000),
            min_hole_um2=rng.uniform(0, 30_000),
        )
        before = picture.copy()
        found = tissue_mask(picture, MPP, parameters)
        np.testing.assert_array_equal(found, reference_mask(picture, MPP, parameters))
        np.testing.assert_array_equal(picture, before)
        shares.append(found.mean())
    assert max(len(picture) for picture in cloudy_pictures()) > tissue.BAND_PX
    assert np.mean([0 < share < 1 for share in shares]) > 0.4


def test_fractions_made_in_little_memory_are_the_same_to_the_last_bit() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        mask = rng.random(rng.integers(1, 60, 2)) < rng.random()
        x_edges, y_edges = (  # some beyond the mask, some twice
            np.sort(rng.uniform(-1, length + 2, rng.integers(1, 30)).round(rng.integers(1, 4)))
            for length in mask.shape[::-1]
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            expected = reference_fraction(mask, x_edges, y_edges)
            found = tissue_fraction(mask, x_edges, y_edges)
        np.testing.assert_array_equal(found, expected)


def bytes_per_pixel(function: Callable[[], object], num_pixels: int) -> float:
    """Of arrays that are made on the way, the result among them."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1] / num_pixels
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_is_a_few_bytes_a_pixel() -> None:
    """6 for the mask: labels of 4 bytes, the mask and what OpenCV returns beside it."""
    side = 3000
    picture = paint(disc(1500, 1500, 1000, side))
    mask = picture[..., 1] < 200
    edges = np.linspace(0, side, 100)
    assert 4 < bytes_per_pixel(lambda: tissue_mask(picture, MPP, PARAMETERS), side**2) < 6.5
    assert bytes_per_pixel(lambda: tissue_fraction(mask, edges, edges), side**2) < 0.2
    assert bytes_per_pixel(lambda: reference_mask(picture, MPP, PARAMETERS), side**2) > 7
    assert bytes_per_pixel(lambda: reference_fraction(mask, edges, edges), side**2) > 16
