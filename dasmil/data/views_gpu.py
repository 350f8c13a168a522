"""Operations on many views at once: few and large ones, as a GPU needs.

``x`` is (N, 3, H, W) of levels from 0 to 255; unlike PIL they are not rounded between operations.
The random numbers of the N views are (N, ...) on the CPU, so that nothing waits for the GPU.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dasmil.data.views_cpu import CONTRAST, GREY, HUE, SATURATION, half_kernel


def apply_where(x: Tensor, mask: Tensor, operation: Callable[..., Tensor], *drawn: Tensor) -> None:
    """Apply an operation in place to the views that the mask (N,) selects.

    Parameters
    ----------
    drawn: (N, ...) further arguments of the operation.
    """
    numbers = mask.nonzero().flatten()
    if len(numbers):
        index = numbers.to(x.device, non_blocking=True)
        x[index] = operation(x[index], *(part[numbers] for part in drawn))


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
    top, left, height, width = box_px.to(tiles.device, torch.float32, non_blocking=True).unbind(-1)
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


def jitter_colour(x: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Apply torchvision's ColorJitter in place: its four operations in the given order.

    Brightness, contrast and saturation are one operation here: they blend with black, with the
    mean grey level, or with each pixel's own grey level.

    Parameters
    ----------
    order: (N, 4) numbers of the operations.
    factors: (N, 4) by number of the operation.
    """
    ordered = factors.gather(1, order)  # (N, 4)
    is_hue = order == HUE
    shift, kept = ordered.where(is_hue, 0), ordered.where(~is_hue, 1)
    to_mean = (1 - kept).where(order == CONTRAST, 0)
    to_pixel = (1 - kept).where(order == SATURATION, 0)
    weights = torch.stack([kept, to_mean, to_pixel]).to(x.device, non_blocking=True)
    for number in range(order.shape[1]):
        apply_where(x, shift[:, number] != 0, shift_hue, shift[:, number])
        kept, to_mean, to_pixel = weights[:, :, number, None, None, None]  # (N, 1, 1, 1)
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
    hue = hue.copysign(green - blue) + 6 * _per_view(shift, x)
    hue = hue - 6 * (hue / 6).floor()  # 0 to 6
    red = low + chroma * ((hue - 3).abs() - 1).clamp(0, 1)
    green = value - chroma * ((hue - 2).abs() - 1).clamp(0, 1)
    blue = value - chroma * ((hue - 4).abs() - 1).clamp(0, 1)
    return torch.cat([red, green, blue], 1)


def to_grey(x: Tensor) -> Tensor:
    """The grey levels (N, 1, H, W)."""
    red, green, blue = x.split(1, 1)
    return red * GREY[0] + green * GREY[1] + blue * GREY[2]


def blur(x: Tensor, sigma_px: Tensor) -> Tensor:
    taps = torch.from_numpy(half_kernel(sigma_px.numpy()))  # (N, reach + 1)
    reach, side = taps.shape[1] - 1, x.shape[-1]
    centre, *others = (_per_view(tap, x) for tap in taps.unbind(1))
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


def _per_view(drawn: Tensor, x: Tensor) -> Tensor:
    """Reshape (N,) to (N, 1, 1, 1) on the device of ``x``."""
    return drawn.to(x.device, non_blocking=True).view(-1, 1, 1, 1)
