"""DINO's views of a tile: lightly's transform of PIL images, or the same without PIL.

Both draw from the tile's seed alone, so views do not depend on the batch or the process.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightly.transforms.dino_transform import DINOTransform
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from dasmil.data import views_cpu, views_gpu
from dasmil.errors import InputError
from dasmil.slides.reader import RgbArray

CROP_TRIES = 10  # after which torchvision's RandomResizedCrop takes the whole image
NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}  # in this order


@dataclass(frozen=True)
class ViewOptions:
    """The views of a tile that DINO sees.

    Parameters
    ----------
    global_crop_px:
        side of the two large crops in pixels.
    global_crop_scale:
        smallest and largest share of the tile that a large crop covers.
    local_crop_px:
        side of the small crops in pixels.
    local_crop_scale:
        smallest and largest share of the tile that a small crop covers.
    num_local_crops:
        number of small crops per tile.
    vertical_flip:
        probability of a vertical flip; tissue has no natural orientation.
    augmentation:
        further arguments of lightly's ``DINOTransform``.
    augmentation_backend:
        ``pil`` runs lightly's transform itself; ``tensor`` does the same several times faster: on
        a GPU for the whole batch at once, else in the reading processes.
    """

    global_crop_px: int = 224
    global_crop_scale: tuple[float, float] = (0.4, 1.0)
    local_crop_px: int = 96
    local_crop_scale: tuple[float, float] = (0.05, 0.4)
    num_local_crops: int = 6
    vertical_flip: float = 0.5
    augmentation: dict[str, Any] | None = None
    augmentation_backend: Literal["tensor", "pil"] = "tensor"

    def make_transform(self, mean: Sequence[float], std: Sequence[float]) -> DINOTransform:
        """lightly's transform, which normalises by a mean and a standard deviation per channel.

        Raises
        ------
        InputError
            if lightly refuses ``augmentation``.
        """
        try:
            return DINOTransform(
                global_crop_size=self.global_crop_px,
                global_crop_scale=self.global_crop_scale,
                local_crop_size=self.local_crop_px,
                local_crop_scale=self.local_crop_scale,
                n_local_views=self.num_local_crops,
                vf_prob=self.vertical_flip,
                normalize={"mean": list(mean), "std": list(std)},
                **(self.augmentation or {}),
            )
        except (IndexError, TypeError, ValueError) as error:
            raise InputError(
                f"data.views.augmentation: lightly's DINOTransform refuses it: {error}"
            ) from error


@dataclass
class PilViews:
    """Views by a transform of PIL images, one tile at a time.

    Parameters
    ----------
    transform: PIL image → list of views.
    """

    transform: Callable[[Image.Image], Any]

    def __call__(self, pixels: RgbArray, seed: int) -> Any:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - lightly's transforms draw from it
        torch.manual_seed(seed)
        return self.transform(Image.fromarray(pixels))


class DrawnTiles(NamedTuple):
    """Tiles, and the random numbers of their V views, on the CPU."""

    tiles: Tensor  # (B, 3, S, S) uint8
    box_px: Tensor  # (B, V, 4) top, left, height, width of the crop
    turned: Tensor  # (B, V, 3) left to right, upside down, by a quarter
    order: Tensor  # (B, V, 4) numbers of the colour operations in their order
    factors: Tensor  # (B, V, 4) as in NEUTRAL
    grey: Tensor  # (B, V)
    sigma_px: Tensor  # (B, V) of the blur; 0 is none
    solarized: Tensor  # (B, V)


class PackedTiles(NamedTuple):
    """The same for a batch, as its views need it: three tensors move to the GPU, not dozens."""

    tiles: Tensor  # (B, 3, S, S) uint8
    numbers: Tensor  # as views_gpu.pack returns them
    values: Tensor
    shapes: views_gpu.Shapes

    def to(self, device: torch.device) -> "PackedTiles":
        """Move to a device; the host does not wait for a copy from pinned memory to CUDA.

        Other memory may be freed, and other devices may read it, before a copy is complete.
        """
        tiles, numbers, values = (
            tensor.to(device, non_blocking=device.type == "cuda" and tensor.is_pinned())
            for tensor in (self.tiles, self.numbers, self.values)
        )
        return PackedTiles(tiles, numbers, values, self.shapes)


class TensorViews:
    """The views of lightly's ``DINOTransform``, several times faster.

    Every probability and range is read from the transform itself. First all random numbers of a
    tile are drawn. Then its views are made: at once on the CPU, or later for a batch on a GPU.

    Parameters
    ----------
    transform: lightly's.

    Raises
    ------
    InputError
        if it holds an operation that only PIL can do here.
    """

    def __init__(self, transform: DINOTransform):
        views = [_operations(view.transform.transforms) for view in transform.transforms]
        crops = [view["RandomResizedCrop"] for view in views]
        jitters = [_operations(view["RandomApply"].transforms)["ColorJitter"] for view in views]
        self.sides_px = [int(crop.size[0]) for crop in crops]
        self._area = np.array([crop.scale for crop in crops])  # (V, 2), share of the tile
        self._log_ratio = np.log([crop.ratio for crop in crops])  # (V, 2)
        turns = ("RandomHorizontalFlip", "p"), ("RandomVerticalFlip", "p"), ("RandomRotate", "prob")
        self._turn = np.array(
            [[getattr(view.get(name), p, 0.0) for name, p in turns] for view in views]
        )  # (V, 3)
        self._jitter = np.array([[view["RandomApply"].p] for view in views])  # (V, 1)
        self._factors = np.array(
            [
                [getattr(one, name) or (same,) * 2 for name, same in NEUTRAL.items()]
                for one in jitters
            ]
        )  # (V, 4, 2)
        self._grey = np.array([view["RandomGrayscale"].p for view in views])
        self._blur = np.array([view["GaussianBlur"].prob for view in views])
        self._sigma_px = np.array([view["GaussianBlur"].sigmas for view in views])  # (V, 2)
        self._solarize = np.array([view["RandomSolarization"].prob for view in views])
        self._threshold = views[0]["RandomSolarization"].threshold
        normalize = views[0]["Normalize"]
        mean, std = (torch.tensor(c).view(3, 1, 1) for c in (normalize.mean, normalize.std))
        self._gain, self._offset = 1 / (255 * std), -mean / std  # of levels 0 to 255

    def __call__(self, pixels: RgbArray, seed: int) -> list[Tensor]:
        """Views of a tile (S, S, 3), each (3, side, side) on the CPU."""
        drawn = self.draw(pixels, seed)
        return [self._view(drawn, number) for number in range(len(self.sides_px))]

    def _view(self, drawn: DrawnTiles, number: int) -> Tensor:
        """One view of a tile, (3, side, side)."""
        view = views_cpu.crop(drawn.tiles, drawn.box_px[number].tolist(), self.sides_px[number])
        order, factors = drawn.order[number].tolist(), drawn.factors[number].tolist()
        view = views_cpu.jitter_colour(view, order, factors)
        if drawn.grey[number]:
            view = views_cpu.to_grey(view)
        if drawn.sigma_px[number] > 0:
            view = views_cpu.blur(view, float(drawn.sigma_px[number]))
        if drawn.solarized[number]:
            view = views_cpu.solarize(view, self._threshold)
        x = torch.from_numpy(view).permute(2, 0, 1).float().contiguous()
        mirrored, upset, quarter = drawn.turned[number].tolist()
        if mirrored or upset:
            x = x.flip([2] * mirrored + [1] * upset)
        x = x.rot90(1, (1, 2)) if quarter else x
        return x.mul_(self._gain).add_(self._offset)

    def draw(self, pixels: RgbArray, seed: int) -> DrawnTiles:
        """The random numbers of a tile (S, S, 3) for :meth:`batch`, without the dimension B."""
        generator = np.random.default_rng(seed)
        num_views = len(self.sides_px)
        boxes_px = self._draw_boxes_px(generator, pixels.shape[0])
        turn, order, factor = (generator.random((num_views, n)) for n in (3, 4, 4))
        jitter, grey, blur, sigma, solarize = generator.random((5, num_views))
        factors = np.where(
            jitter[:, None] < self._jitter, _between(self._factors, factor), [*NEUTRAL.values()]
        )
        sigmas_px = np.where(blur < self._blur, _between(self._sigma_px, sigma), 0)
        return DrawnTiles(
            torch.from_numpy(pixels).permute(2, 0, 1),
            torch.from_numpy(boxes_px),
            torch.from_numpy(turn < self._turn),
            torch.from_numpy(order.argsort(axis=1)),
            torch.from_numpy(factors.astype(np.float32)),
            torch.from_numpy(grey < self._grey),
            torch.from_numpy(sigmas_px.astype(np.float32)),
            torch.from_numpy(solarize < self._solarize),
        )

    def _draw_boxes_px(self, generator: np.random.Generator, side_px: int) -> np.ndarray:
        """Boxes (V, 4) as torchvision's RandomResizedCrop draws: the first that fits, or all."""
        num_views = len(self.sides_px)
        u = generator.random((2, num_views, CROP_TRIES))
        area = side_px**2 * _between(self._area[:, None], u[0])
        ratio = np.exp(_between(self._log_ratio[:, None], u[1]))
        sizes = np.rint(np.sqrt([area / ratio, area * ratio]))  # (2, V, tries) height, width
        fits = ((sizes > 0) & (sizes <= side_px)).all(axis=0)
        size = sizes[:, np.arange(num_views), fits.argmax(axis=1)].T  # (V, 2)
        size[~np.any(fits, axis=1)] = side_px
        corner = np.floor(generator.random((num_views, 2)) * (side_px - size + 1))
        return np.concatenate([corner, size], axis=1).astype(np.int64)

    def collate(self, drawn: Sequence[DrawnTiles]) -> PackedTiles:
        """Join what :meth:`draw` returned for the tiles of a batch."""
        tiles = default_collate([tile.tiles for tile in drawn])  # in a worker's shared memory
        parts = zip(*(tile[1:] for tile in drawn), strict=True)
        return self._pack(DrawnTiles(tiles, *(torch.stack(part) for part in parts)))

    def _pack(self, drawn: DrawnTiles) -> PackedTiles:
        parts = [self._gain, self._offset]
        for places in self._places.values():
            parts += _prepare(*(part[:, places] for part in drawn[1:]))
        return PackedTiles(drawn.tiles, *views_gpu.pack(parts))

    @property
    def _places(self) -> dict[int, list[int]]:
        """Per side in pixels the numbers of the views of this size."""
        return {
            side_px: [place for place, side in enumerate(self.sides_px) if side == side_px]
            for side_px in dict.fromkeys(self.sides_px)
        }

    @torch.no_grad()
    def batch(self, drawn: DrawnTiles | PackedTiles) -> list[Tensor]:
        """Per view (B, 3, side, side) in float32, on the device of the tiles."""
        if isinstance(drawn, DrawnTiles):
            drawn = self._pack(drawn).to(drawn.tiles.device)
        gain, offset, *parts = views_gpu.unpack(drawn.numbers, drawn.values, drawn.shapes)
        size = len(parts) // len(self._places)
        views: list[Tensor] = [drawn.tiles] * len(self.sides_px)
        for group, (side_px, places) in enumerate(self._places.items()):
            its_parts = parts[group * size : (group + 1) * size]
            same_size = self._make_same_size(drawn.tiles, its_parts, side_px)
            same_size.mul_(gain).add_(offset)
            for number, place in enumerate(places):
                views[place] = same_size.unflatten(0, (-1, len(places)))[:, number]
        return views

    def _make_same_size(self, tiles: Tensor, parts: Sequence[Tensor], side_px: int) -> Tensor:
        """V views of the same size per tile, shape (B · V, 3, side, side); see _prepare."""
        box_px, grey, blurred, taps, solarized, mirrored, upset, quarter, *colour = parts
        x = views_gpu.crop(tiles, box_px, side_px)
        views_gpu.change_colour(x, colour)
        views_gpu.apply_to(x, grey, views_gpu.to_grey)
        views_gpu.apply_to(x, blurred, views_gpu.convolve, taps)
        views_gpu.apply_to(x, solarized, lambda v: views_gpu.solarize(v, self._threshold))
        views_gpu.apply_to(x, mirrored, lambda v: v.flip(3))
        views_gpu.apply_to(x, upset, lambda v: v.flip(2))
        views_gpu.apply_to(x, quarter, lambda v: v.rot90(1, (2, 3)))
        return x


def _prepare(box_px: Tensor, *parts: Tensor) -> list[Tensor]:
    """What the operations on views of the same size need, from the parts of :class:`DrawnTiles`.

    Returns
    -------
    The boxes; the numbers of the views that become grey, that are blurred, the weights of the blur,
    the numbers of those that are solarized and of those turned in each way; the colour.
    """
    turned, order, factors, is_grey, sigma_px, is_solarized = (p.flatten(0, 1) for p in parts)
    blurred = sigma_px.nonzero().flatten()
    return [
        box_px.float(),
        is_grey.nonzero().flatten(),
        blurred,
        views_gpu.prepare_blur(sigma_px[blurred]),
        is_solarized.nonzero().flatten(),
        *(one.nonzero().flatten() for one in turned.unbind(1)),
        *views_gpu.prepare_colour(order, factors),
    ]


def _operations(steps: Any) -> dict[str, Any]:
    """The operations of one of lightly's transforms by the name of their class."""
    known = {
        *("RandomResizedCrop", "RandomHorizontalFlip", "RandomVerticalFlip", "RandomRotate"),
        *("RandomApply", "ColorJitter", "RandomGrayscale", "GaussianBlur", "RandomSolarization"),
        *("ToTensor", "Normalize"),
    }
    steps_by_name = {type(step).__name__: step for step in steps}
    rotation = steps_by_name.pop("RandomRotateDegrees", None)
    if rotation is not None and rotation.transform.p > 0:
        raise InputError(
            "data.views.augmentation.rr_degrees: only PIL turns by other angles than 90° here; "
            "leave it out, or set data.views.augmentation_backend to pil"
        )
    unknown = sorted(set(steps_by_name) - known)
    if unknown:
        raise InputError(
            f"data.views.augmentation: this version of lightly has {', '.join(unknown)}, which "
            "only PIL does here; set data.views.augmentation_backend to pil"
        )
    return steps_by_name


def _between(ends: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The values at shares ``u`` between two ``ends`` (..., 2)."""
    return ends[..., 0] + u * (ends[..., 1] - ends[..., 0])
