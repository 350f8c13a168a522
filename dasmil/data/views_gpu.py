"""Operations on many views at once: few and large ones, as a GPU needs.

``x`` is (N, 3, H, W) of levels from 0 to 255; unlike PIL they are not rounded between operations.
Which views an operation is applied to decides the sizes of tensors. So functions named ``prepare_``
work on the CPU, where that is known, and nothing waits for the GPU. What they return moves to the
GPU in one piece (:func:`pack`).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dasmil.data.views_cpu import CONTRAST, GREY, HUE, SATURATION, half_kernel

Shapes = list[tuple[bool, tuple[int, ...]]]  # per tensor whether it holds floats, and its shape


def pack(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Shapes]:
    """Join many small tensors, so that two copies move them all.

    Parameters
    ----------
    parts: int64 or float32.

    Returns
    -------
    The int64 values; the float32 values as int32, because Lightning rounds the float tensors of a
    batch to the precision of the network; the shapes.
    """
    shapes = [(part.is_floating_point(), tuple(part.shape)) for part in parts]
    numbers, values = (
        torch.cat([part.flatten() for part in parts if part.dtype == dtype])
        for dtype in (torch.int64, torch.float32)
    )
    return numbers, values.view(torch.int32), shapes


def unpack(numbers: Tensor, values: Tensor, shapes: Shapes) -> list[Tensor]:
    """The tensors that :func:`pack` joined, as views of the joined ones."""
    sizes = [(is_float, math.prod(shape)) for is_float, shape in shapes]
    pieces = {
        is_float: iter(joined.split([size for kind, size in sizes if kind == is_float]))
        for is_float, joined in ((False, numbers), (True, values.view(torch.float32)))
    }
    return [next(pieces[is_float]).view(shape) for is_float, shape in shapes]


def apply_to(x: Tensor, rows: Tensor, operation: Callable[..., Tensor], *drawn: Tensor) -> None:
    """Apply an operation in place to some views.

    Parameters
    ----------
    rows: (n,) numbers of the views.
    drawn: (n, ...) further arguments of the operation.
    """
    if len(rows):
        x[rows] = operation(x[rows], *drawn)


def crop(tiles: Tensor, box_px: Tensor, side_px: int) -> Tensor:
    """Crop and resample by PIL's bicubic filter, as two matrices per view: rows and columns.

    Parameters
    ----------
    tiles: (B, 3, S, S) uint8.
    box_px: (B, V, 4) top, left, height, width.

    Returns
    -------
    (B · V, 3, side, side) float32.
    """
    num_tiles, size_px = len(tiles), tiles.shape[-1]
    top, left, height, width = box_px.to(tiles.device, torch.float32).unbind(-1)
    rows = _resampling(top, height, side_px, size_px)  # (B, V, side, S)
    columns = _resampling(left, width, side_px, size_px)
    x = tiles.permute(0, 2, 1, 3).float().reshape(num_tiles, size_px, 3 * size_px)
    x = rows.flatten(1, 2) @ x  # (B, V · side, 3 · S)
    x = x.view(-1, side_px * 3, size_px) @ columns.flatten(0, 1).mT  # (B · V, side · 3, side)
    return x.view(-1, side_px, 3, side_px).transpose(1, 2).clamp(0, 255).contiguous()


def _resampling(start: Tensor, length: Tensor, side_px: int, size_px: int) -> Tensor:
    """Weights (B, V, side, S) of a tile's S pixels for crops of given starts and lengths (B, V)."""
    start, length = start[..., None, None], length[..., None, None]
    out = torch.arange(side_px, device=start.device, dtype=torch.float32)[:, None]
    pixel = torch.arange(size_px, device=start.device, dtype=torch.float32)
    step = length / side_px
    d = ((pixel + 0.5 - start - (out + 0.5) * step) / step.clamp(min=1)).abs()
    near = (1.5 * d - 2.5) * d**2 + 1  # Keys' cubic with a = -0.5
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    weight = torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
    weight = weight * ((pixel >= start) & (pixel < start + length))
    return weight / weight.sum(-1, keepdim=True)


def prepare_colour(order: Tensor, factors: Tensor) -> list[Tensor]:
    """Three tensors per operation in their order: for blending, and for shifting the hue.

    Brightness, contrast and saturation are one operation here: they blend with black, with the
    mean grey level, or with each pixel's own grey level.

    Parameters
    ----------
    order: (N, 4) numbers of ColorJitter's operations, on the CPU.
    factors: (N, 4) by number of the operation, on the CPU.

    Returns
    -------
    Per operation the shares (3, N) of the pixel, of the mean grey level and of its own grey level;
    the numbers (n,) of the views whose hue it shifts; by how many turns (n,).
    """
    ordered = factors.gather(1, order)  # (N, 4)
    is_hue = order == HUE
    turns, kept = ordered.where(is_hue, 0), ordered.where(~is_hue, 1)
    to_mean = (1 - kept).where(order == CONTRAST, 0)
    to_pixel = (1 - kept).where(order == SATURATION, 0)
    shares = torch.stack([kept, to_mean, to_pixel], dim=1)  # (N, 3, 4)
    parts = []
    for number in range(order.shape[1]):
        shifted = turns[:, number].nonzero().flatten()
        parts += [shares[:, :, number].T, shifted, turns[shifted, number]]
    return parts


def change_colour(x: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Apply torchvision's ColorJitter in place, with the parts of :func:`prepare_colour`."""
    for shares, shifted, turns in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        apply_to(x, shifted, shift_hue, turns)
        kept, to_mean, to_pixel = shares[..., None, None, None]  # (N, 1, 1, 1)
        grey = to_grey(x)
        target = grey * to_pixel + grey.mean((2, 3), keepdim=True) * to_mean
        x.mul_(kept).add_(target).clamp_(0, 255)
    return x


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue of HSV by ``shift`` (N,) turns; saturation and value stay."""
    red, green, blue = x.split(1, 1)
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low
    # in sextants from red, to green if positive and to blue if negative
    hue = 1 + (green + blue - red - low) / chroma.clamp(min=1e-6)
    hue = hue.copysign(green - blue) + 6 * shift.view(-1, 1, 1, 1)
    hue = hue - 6 * (hue / 6).floor()  # 0 to 6
    red = low + chroma * ((hue - 3).abs() - 1).clamp(0, 1)
    green = value - chroma * ((hue - 2).abs() - 1).clamp(0, 1)
    blue = value - chroma * ((hue - 4).abs() - 1).clamp(0, 1)
    return torch.cat([red, green, blue], 1)


def to_grey(x: Tensor) -> Tensor:
    """The grey levels (N, 1, H, W)."""
    red, green, blue = x.split(1, 1)
    return red * GREY[0] + green * GREY[1] + blue * GREY[2]


def prepare_blur(sigma_px: Tensor) -> Tensor:
    """Weights (N, reach + 1) of the blur at distances of 0, 1, ... pixels, from (N,) on the CPU."""
    if not len(sigma_px):
        return sigma_px.new_empty(0, 1)
    return torch.from_numpy(half_kernel(sigma_px.numpy()))


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    """PIL's Gaussian blur, with the weights of :func:`prepare_blur`."""
    reach, side = taps.shape[1] - 1, x.shape[-1]
    centre, *others = taps[..., None, None, None].unbind(1)  # (N, 1, 1, 1)
    for axis, padding in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        padded = F.pad(x, padding, mode="replicate")
        x = x * centre
        for d, tap in enumerate(others, start=1):
            pair = padded.narrow(axis, reach - d, side) + padded.narrow(axis, reach + d, side)
            x.addcmul_(pair, tap)
    return x


def solarize(x: Tensor, threshold: int) -> Tensor:
    """Invert levels from the threshold on; PIL would have rounded them before."""
    return torch.where(x < threshold - 0.5, x, 255 - x)
