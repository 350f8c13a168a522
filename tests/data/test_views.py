"""The fast way to DINO's views against lightly's PIL transform, torchvision and PIL itself."""

import math
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightly.transforms.dino_transform import DINOTransform
from PIL import Image, ImageFilter, ImageOps
from scipy import stats
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tv

from dasmil.data import views_cpu, views_gpu
from dasmil.data.views import DrawnTiles, PilViews, TensorViews
from dasmil.errors import InputError
from dasmil.slides.cohort import SlideRow
from dasmil.slides.reader import Slide

MEAN, STD = [0.5, 0.4, 0.6], [0.2, 0.25, 0.3]
SMALL = {"global_crop_size": 48, "local_crop_size": 24, "n_local_views": 3}
OPTIONS = {  # none is lightly's default, no two are the same
    **SMALL,
    "global_crop_scale": (0.35, 0.9),
    "local_crop_scale": (0.06, 0.3),
    "hf_prob": 0.55,
    "vf_prob": 0.25,
    "rr_prob": 0.35,
    "cj_prob": 0.7,
    "cj_strength": 0.9,
    "cj_bright": 0.5,
    "cj_contrast": 0.7,
    "cj_sat": 0.6,
    "cj_hue": 0.3,
    "random_gray_scale": 0.15,
    "gaussian_blur": (0.9, 0.2, 0.45),
    "sigmas": (0.3, 2.5),
    "solarization_prob": 0.4,
    "normalize": {"mean": MEAN, "std": STD},
}
NOTHING = {  # the whole tile as it is
    **SMALL,
    "global_crop_scale": (1.0, 1.0),
    "local_crop_scale": (1.0, 1.0),
    "hf_prob": 0.0,
    "cj_prob": 0.0,
    "random_gray_scale": 0.0,
    "gaussian_blur": (0.0, 0.0, 0.0),
    "solarization_prob": 0.0,
    "normalize": {"mean": MEAN, "std": STD},
}


def painted(side: int, grain: int, seed: int = 0) -> np.ndarray:
    """Smooth blobs of any colour, with some noise."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(256, size=(grain, grain, 3)).astype(np.uint8)
    picture = np.array(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
    noise = generator.integers(-8, 9, size=picture.shape)
    return (picture.astype(int) + noise).clip(0, 255).astype(np.uint8)


PICTURE = painted(128, 12)


@pytest.fixture(scope="module")
def tissue(shared_data: Path) -> np.ndarray:
    """(256, 256, 3) of a real slide."""
    path = shared_data / "slides" / "native" / "cmu-1-small-region.svs"
    with Slide(SlideRow("cmu", path)) as slide:
        return slide.read((1152, 896, 1408, 1152), (256, 256))


# One operation at a time, with the same parameters. Both ways are run on the CPU.


def on_cpu(operation: str, *drawn: Any) -> np.ndarray:
    return getattr(views_cpu, operation)(PICTURE, *drawn)


def as_on_gpu(operation: str, *drawn: Any) -> np.ndarray:
    """Every other view is another picture, with other parameters if it has any."""
    x = torch.from_numpy(np.stack([painted(128, 7, seed=1), PICTURE])).permute(0, 3, 1, 2).float()
    if operation == "solarize":
        x = views_gpu.solarize(x, *drawn)
    elif operation == "jitter_colour":
        order, factors = (torch.tensor(part) for part in drawn)
        others = order.flip(0), torch.tensor([1.3, 0.7, 1.2, 0.3])
        both = torch.stack([others[0], order]), torch.stack([others[1], factors])
        x = views_gpu.change_colour(x, views_gpu.prepare_colour(*both))
    elif operation == "blur":
        sigma_px = torch.tensor([2 * drawn[0] / 3, drawn[0]])
        x = views_gpu.convolve(x, views_gpu.prepare_blur(sigma_px))
    else:
        pairs = [torch.tensor([2 * part / 3, part]) for part in drawn]
        x = getattr(views_gpu, operation)(x, *pairs)
    return x[1].expand(3, -1, -1).permute(1, 2, 0).numpy()


def assert_near(ours: np.ndarray, theirs: Image.Image, most: float, mean: float) -> None:
    """In levels of 256."""
    away = np.abs(ours.astype(float) - np.asarray(theirs).astype(float))
    assert away.max() <= most and away.mean() <= mean, (away.max(), away.mean())


WAYS = pytest.mark.parametrize("way", [on_cpu, as_on_gpu])


@WAYS
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 2.5])
@pytest.mark.parametrize(
    ("number", "adjust"),
    [(0, tv.adjust_brightness), (1, tv.adjust_contrast), (2, tv.adjust_saturation)],
)
def test_brightness_contrast_and_saturation_are_pils_within_two_levels(
    way: Any, number: int, adjust: Any, factor: float
) -> None:
    """PIL rounds the grey level, and cuts off the result."""
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[number] = factor
    image = adjust(Image.fromarray(PICTURE), factor)
    assert_near(way("jitter_colour", [2, 0, 3, 1], factors), image, 2, 0.6)


@WAYS
@pytest.mark.parametrize("shift", [-0.5, -0.21, 0.04, 0.1, 0.33])
def test_hue_is_pils_within_its_rounding(way: Any, shift: float) -> None:
    """PIL cuts hue and saturation to bytes twice: a step of hue is up to 6 levels of a colour."""
    image = tv.adjust_hue(Image.fromarray(PICTURE), shift)
    assert_near(way("jitter_colour", [2, 0, 3, 1], [1.0, 1.0, 1.0, shift]), image, 14, 1)


@pytest.mark.parametrize("shift", [-0.5, -0.21, 0.04, 0.1, 0.33])
def test_hue_is_torchvisions_of_floats(shift: float) -> None:
    x = torch.from_numpy(PICTURE).permute(2, 0, 1)[None].float()
    expected = tv.adjust_hue(x / 255, shift) * 255
    torch.testing.assert_close(
        views_gpu.shift_hue(x, torch.tensor([shift])), expected, atol=2e-3, rtol=0
    )


def test_grey_has_no_hue() -> None:
    grey = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    assert np.array_equal(views_cpu.shift_hue(grey, 0.3), grey)
    x = torch.from_numpy(grey).permute(2, 0, 1)[None].float()
    torch.testing.assert_close(views_gpu.shift_hue(x, torch.tensor([0.3])), x)


@WAYS
def test_the_order_of_the_colour_operations_is_kept(way: Any) -> None:
    factors = [1.6, 0.5, 1.7, 0.2]
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    images = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [1, 2, 3, 0]):
        image = Image.fromarray(PICTURE)
        for number in order:
            image = adjust[number](image, factors[number])
        assert_near(way("jitter_colour", order, factors), image, 20, 2)
        images.append(np.asarray(image).astype(float))
    assert np.abs(images[0] - images[1]).mean() > 8  # the order shows
    assert np.abs(images[0] - images[2]).mean() > 8


@WAYS
def test_grey_is_pils_within_a_level(way: Any) -> None:
    assert_near(way("to_grey"), tv.to_grayscale(Image.fromarray(PICTURE), 3), 1, 0.5)


@WAYS
@pytest.mark.parametrize("sigma_px", [0.1, 0.5, 1.0, 1.41, 1.42, 2.0, 4.0])
def test_blur_is_pils_within_four_levels(way: Any, sigma_px: float) -> None:
    """PIL rounds after each of six passes, and repeats the border in each."""
    image = Image.fromarray(PICTURE).filter(ImageFilter.GaussianBlur(sigma_px))
    assert_near(way("blur", sigma_px), image, 4, 0.75)


@pytest.mark.parametrize("sigma_px", [1.0, 2.0, 4.0])
def test_blur_has_the_form_of_pils(sigma_px: float) -> None:
    """It is no true Gaussian: an edge from black to white tells them apart."""
    edge = np.zeros((64, 64, 3), np.uint8)
    edge[:, 32:] = 255
    image = Image.fromarray(edge).filter(ImageFilter.GaussianBlur(sigma_px))
    assert_near(views_cpu.blur(edge, sigma_px), image, 1, 0.5)


@WAYS
def test_solarization_is_pils(way: Any) -> None:
    assert_near(way("solarize", 128), ImageOps.solarize(Image.fromarray(PICTURE), 128), 0, 0)


BOXES_PX = [(0, 0, 128, 128), (3, 5, 100, 90), (40, 1, 37, 49), (90, 88, 38, 40), (60, 7, 20, 120)]


@pytest.mark.parametrize("side_px", [24, 48, 96])
def test_crops_are_pils(side_px: int) -> None:
    """Smaller and larger than what they are cut from; at the border of the box nothing leaks in."""
    tile = torch.from_numpy(PICTURE).permute(2, 0, 1)
    tiles = torch.stack([tile.flip(0), tile])
    boxes_px = torch.tensor(BOXES_PX)
    x = views_gpu.crop(tiles, torch.stack([boxes_px.flip(0), boxes_px]), side_px)
    made = x.permute(0, 2, 3, 1).numpy()[len(BOXES_PX) :]
    for box_px, matmul in zip(BOXES_PX, made, strict=True):
        image = tv.resized_crop(
            Image.fromarray(PICTURE), *box_px, [side_px] * 2, InterpolationMode.BICUBIC
        )
        assert_near(views_cpu.crop(tile, box_px, side_px), image, 1, 0.25)
        assert_near(matmul, image, 2, 0.4)


# All operations of a view


def by_pil(drawn: DrawnTiles, sides_px: list[int]) -> list[Tensor]:
    """Lightly's chain of operations, with what was drawn."""
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    views = []
    for number, side_px in enumerate(sides_px):
        _, box_px, turned, order, factors, grey, sigma_px, solarized = (
            drawn.tiles,
            *(part[number].tolist() for part in drawn[1:]),
        )
        image = Image.fromarray(drawn.tiles.permute(1, 2, 0).numpy())
        image = tv.resized_crop(image, *box_px, [side_px] * 2, InterpolationMode.BICUBIC)
        image = tv.hflip(image) if turned[0] else image
        image = tv.vflip(image) if turned[1] else image
        image = tv.rotate(image, 90) if turned[2] else image
        for operation in order:
            image = adjust[operation](image, factors[operation])
        image = tv.to_grayscale(image, 3) if grey else image
        image = image.filter(ImageFilter.GaussianBlur(sigma_px)) if sigma_px else image
        image = ImageOps.solarize(image, 128) if solarized else image
        views.append(tv.normalize(tv.to_tensor(image), MEAN, STD))
    return views


def stacked(drawn: list[DrawnTiles]) -> DrawnTiles:
    return DrawnTiles(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))


def levels(one: Tensor, other: Tensor) -> Tensor:
    """How far two normalised views are apart, in levels of 256."""
    return (one - other).abs() * 255 * torch.tensor(STD).view(3, 1, 1)


def test_with_the_same_draws_views_are_lightlys() -> None:
    make = TensorViews(DINOTransform(**OPTIONS))
    drawn = [make.draw(PICTURE, seed) for seed in range(24)]
    together = make.batch(stacked(drawn))
    away: dict[str, list[float]] = {"cpu": [], "gpu": []}
    for seed, tile in enumerate(drawn):
        alone = make(PICTURE, seed)
        for number, theirs in enumerate(by_pil(tile, make.sides_px)):
            away["cpu"].append(levels(alone[number], theirs).mean().item())
            away["gpu"].append(levels(together[number][seed], theirs).mean().item())
    for way in away.values():
        assert len(way) == 24 * 5
        assert max(way) < 4 and np.mean(way) < 1.5, (max(way), np.mean(way))


def test_on_tissue_too(tissue: np.ndarray) -> None:
    make = TensorViews(DINOTransform(vf_prob=0.5, normalize={"mean": MEAN, "std": STD}))
    drawn = [make.draw(tissue, seed) for seed in range(4)]
    together = make.batch(stacked(drawn))
    for seed, tile in enumerate(drawn):
        alone = make(tissue, seed)
        for number, theirs in enumerate(by_pil(tile, make.sides_px)):
            assert levels(alone[number], theirs).mean() < 3
            assert levels(together[number][seed], theirs).mean() < 3


def test_without_augmentation_both_backends_give_the_tile() -> None:
    transform = DINOTransform(**NOTHING)
    pil, ours = PilViews(transform)(PICTURE, 1), TensorViews(transform)(PICTURE, 1)
    assert isinstance(pil, list) and isinstance(ours, list)
    assert (
        [v.shape for v in pil] == [v.shape for v in ours] == [(3, 48, 48)] * 2 + [(3, 24, 24)] * 3
    )
    for one, other in zip(pil, ours, strict=True):
        assert (one.dtype, other.dtype) == (torch.float32,) * 2
        assert other.is_contiguous()
        assert levels(one, other).max() < 1.01


# What is drawn


def drawings(num: int, side: int = 96, **changes: Any) -> DrawnTiles:
    make = TensorViews(DINOTransform(**{**OPTIONS, **changes}))
    return stacked([make.draw(np.zeros((side, side, 3), np.uint8), seed) for seed in range(num)])


@pytest.fixture(scope="module")
def drawn() -> DrawnTiles:
    return drawings(1500)


LIKELY = 1e-3  # of a draw like this or less likely, for each of the tests


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    assert low <= values.min() and values.max() <= high
    assert stats.kstest(values.double(), stats.uniform(low, high - low).cdf).pvalue > LIKELY


def assert_frequency(happened: Tensor, probability: float) -> None:
    num, total = int(happened.sum()), happened.numel()
    assert stats.binomtest(num, total, probability).pvalue > LIKELY, (num / total, probability)


@pytest.mark.parametrize("view", [0, 1, 2, 4])
def test_each_view_has_its_probabilities(drawn: DrawnTiles, view: int) -> None:
    for number, probability in enumerate((0.55, 0.25, 0.35)):
        assert_frequency(drawn.turned[:, view, number], probability)
    assert_frequency((drawn.factors[:, view] != torch.tensor([1.0, 1, 1, 0])).any(1), 0.7)
    assert_frequency(drawn.grey[:, view], 0.15)
    assert_frequency(drawn.sigma_px[:, view] > 0, (0.9, 0.2, 0.45, 0.45, 0.45)[view])
    assert_frequency(drawn.solarized[:, view], 0.4 if view == 1 else 0)


@pytest.mark.parametrize("view", [0, 1, 2, 4])
def test_each_view_has_its_ranges(drawn: DrawnTiles, view: int) -> None:
    """The second large view does not take cj_strength: lightly gives it 0.5 whatever is set."""
    strength = 0.5 if view == 1 else 0.9
    factors = drawn.factors[:, view]
    jittered = factors[(factors != torch.tensor([1.0, 1, 1, 0])).any(1)]
    for number, (middle, width) in enumerate(((1, 0.5), (1, 0.7), (1, 0.6), (0, 0.3))):
        reach = width * strength
        assert_uniform(jittered[:, number], middle - reach - 1e-6, middle + reach + 1e-6)
    sigmas_px = drawn.sigma_px[:, view]
    assert_uniform(sigmas_px[sigmas_px > 0], 0.3, 2.5)


def test_random_draws_are_independent(drawn: DrawnTiles) -> None:
    """Between views, and between the operations of a view."""
    draws = torch.cat(
        [
            *(drawn.turned[:, :, k].float() for k in range(3)),
            *(drawn.factors[:, :, k] for k in range(4)),
            drawn.box_px[:, :, 2].float(),
            (drawn.box_px[:, :, :2] + 0.5).div(97 - drawn.box_px[:, :, 2:]).flatten(1),
            drawn.grey.float(),
            drawn.sigma_px,
            drawn.solarized[:, 1:2].float(),
        ],
        dim=1,
    )
    correlation = torch.corrcoef(draws.double().T).fill_diagonal_(0).abs()
    assert correlation.max() < 4.5 / math.sqrt(len(draws))


def test_every_order_of_the_colour_operations_is_as_likely(drawn: DrawnTiles) -> None:
    counts = Counter(map(tuple, drawn.order.flatten(0, 1).tolist()))
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > LIKELY


@pytest.mark.parametrize("scale", [(0.35, 0.9), (0.06, 0.3), (0.9, 1.0)])
def test_boxes_are_torchvisions(scale: tuple[float, float]) -> None:
    """In size, form and place; with (0.9, 1.0) most first tries do not fit."""
    boxes_px = drawings(500, local_crop_scale=scale).box_px[:, 2:].flatten(0, 1).double()
    torch.manual_seed(0)
    image = Image.fromarray(np.zeros((96, 96, 3), np.uint8))
    theirs_px = torch.tensor(
        [RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(len(boxes_px))]
    ).double()

    def figures(boxes: Tensor) -> dict[str, Tensor]:
        top, left, height, width = boxes.T
        places = {"top": top / (97 - height), "left": left / (97 - width)}
        return {"area": height * width, "form": height / width, **places}

    for name, theirs in figures(theirs_px).items():
        assert stats.ks_2samp(figures(boxes_px)[name], theirs).pvalue > LIKELY, name
    top, left, height, width = boxes_px.T
    assert min(top.min(), left.min()) == 0
    assert max((top + height).max(), (left + width).max()) == 96


@pytest.mark.slow
def test_pictures_of_the_two_backends_are_alike() -> None:
    """Lightness, contrast, saturation, sharpness and colour of many views of one tile."""
    transform = DINOTransform(**{**OPTIONS, "n_local_views": 1})
    pil, ours = PilViews(transform), TensorViews(transform)

    def figures(make: Any, start: int) -> np.ndarray:
        rows = []
        for seed in range(start, start + 400):
            for view in make(PICTURE, seed):
                rgb = view * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
                high = rgb.amax(0)
                saturation = (high - rgb.amin(0)) / high.clamp(min=1e-3)
                rows.append(
                    [
                        rgb.mean(),
                        rgb.std(),
                        saturation.mean(),
                        rgb.diff(dim=1).abs().mean(),
                        rgb.diff(dim=2).abs().mean(),
                        *rgb.mean((1, 2)),
                    ]
                )
        return np.array(rows).reshape(400, 3, -1)

    one, other = figures(pil, 0), figures(ours, 0)
    for view in range(3):
        for figure in range(one.shape[2]):
            assert stats.ks_2samp(one[:, view, figure], other[:, view, figure]).pvalue > LIKELY


# Seeds


@pytest.mark.parametrize("make", [PilViews, TensorViews])
def test_the_seed_alone_decides(make: Any) -> None:
    views = make(DINOTransform(**OPTIONS))
    first = views(PICTURE, 2**62)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    again, other = views(PICTURE, 2**62), views(PICTURE, 2**62 + 1)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_drawing_leaves_the_other_generators_alone() -> None:
    """What stochastic depth draws next is not the same for every tile."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    TensorViews(DINOTransform(**OPTIONS))(PICTURE, 5)
    assert torch.equal(torch.rand(1), expected)


def test_a_view_does_not_depend_on_the_others_of_its_batch() -> None:
    make = TensorViews(DINOTransform(**OPTIONS))
    pictures = [painted(128, 9, seed) for seed in range(6)]
    drawn = [make.draw(picture, seed) for seed, picture in enumerate(pictures)]
    whole = make.batch(stacked(drawn))
    for number, tile in enumerate(drawn):
        for together, alone in zip(whole, make.batch(stacked([tile])), strict=True):
            torch.testing.assert_close(together[number], alone[0], atol=2e-5, rtol=0)


def test_an_operation_that_is_not_known_is_refused() -> None:
    transform = DINOTransform(**OPTIONS)
    transform.transforms[1].transform.transforms.append(SimpleNamespace())
    with pytest.raises(InputError, match=r"lightly has SimpleNamespace, which only PIL does here"):
        TensorViews(transform)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_makes_the_same_views() -> None:
    make = TensorViews(DINOTransform(**OPTIONS))
    drawn = stacked([make.draw(PICTURE, seed) for seed in range(16)])
    there = make.batch(drawn._replace(tiles=drawn.tiles.cuda()))
    for one, other in zip(make.batch(drawn), there, strict=True):
        assert other.is_cuda
        assert levels(one, other.cpu()).mean() < 0.5
