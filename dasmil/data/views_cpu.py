"""Operations on one view on the CPU, in bytes as in PIL, by torch's resampling and OpenCV."""

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dasmil.slides.reader import RgbArray

GREY = (0.299, 0.587, 0.114)  # weights of red, green, blue: ITU-R 601, as in PIL and torchvision
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbers in its ColorJitter
BLUR_PASSES = 3  # PIL's Gaussian blur is a box blur applied three times


def crop(tile: Tensor, box_px: Sequence[int], side_px: int) -> RgbArray:
    """Crop and resample by PIL's bicubic filter, which averages if it shrinks.

    Parameters
    ----------
    tile: (3, S, S) uint8.
    box_px: top, left, height, width.

    Returns
    -------
    (side, side, 3).
    """
    top, left, height, width = box_px
    box = tile[None, :, top : top + height, left : left + width]
    box = box.contiguous(memory_format=torch.channels_last)  # else the result has channels first
    view = F.interpolate(box, (side_px, side_px), mode="bicubic", antialias=True)
    return view[0].permute(1, 2, 0).numpy()


def jitter_colour(view: RgbArray, order: Sequence[int], factors: Sequence[float]) -> RgbArray:
    """Apply torchvision's ColorJitter: its four operations with their factors, in this order."""
    for operation in order:
        if operation == HUE and factors[HUE] != 0:
            view = shift_hue(view, factors[HUE])
        elif operation != HUE and factors[operation] != 1:
            view = _mix(view, operation, factors[operation])
    return view


def _mix(view: RgbArray, operation: int, factor: float) -> RgbArray:
    """Blend with black, with the mean grey level, or with each pixel's own grey level."""
    mix = factor * np.eye(3, 4)  # RGB and 1 → RGB
    if operation == CONTRAST:
        mix[:, 3] = (1 - factor) * cv2.mean(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY))[0]
    elif operation == SATURATION:
        mix[:, :3] += (1 - factor) * np.array(GREY)
    return np.asarray(cv2.transform(view, mix), dtype=np.uint8)


def shift_hue(view: RgbArray, shift: float) -> RgbArray:
    """Rotate the hue of HSV by ``shift`` turns; saturation and value stay."""
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(shift * 255) % 256)  # truncated as torchvision does with PIL
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL), dtype=np.uint8)


def to_grey(view: RgbArray) -> RgbArray:
    grey = cv2.cvtColor(view, cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), dtype=np.uint8)


def blur(view: RgbArray, sigma_px: float) -> RgbArray:
    half = half_kernel(np.array([sigma_px]))[0]
    kernel = np.concatenate([half[:0:-1], half])
    blurred = cv2.sepFilter2D(view, cv2.CV_32F, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(cv2.convertScaleAbs(blurred), dtype=np.uint8)  # rounds


def half_kernel(sigma_px: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Weights (N, reach + 1) of PIL's Gaussian blur at distances of 0, 1, ... pixels.

    A box has whole pixels up to its radius and a part of the next (Gwosdek et al. 2011).

    Parameters
    ----------
    sigma_px: (N,).
    """
    variance = sigma_px.astype(np.float64)[:, None] ** 2 / BLUR_PASSES  # of one box
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part /= 6 * (variance - (whole + 1) ** 2)
    reach = BLUR_PASSES * (int(whole.max()) + 1)
    number = np.arange(2 * reach + 1)
    distance = np.minimum(number, len(number) - number)  # on a ring
    box = np.clip(whole + part + 1 - distance, 0, 1)
    box /= box.sum(axis=1, keepdims=True)
    kernel = np.fft.irfft(np.fft.rfft(box) ** BLUR_PASSES, len(number))
    return kernel[:, : reach + 1].astype(np.float32)


def solarize(view: RgbArray, threshold: int) -> RgbArray:
    """Invert levels from the threshold on."""
    return np.where(view < threshold, view, 255 - view)
