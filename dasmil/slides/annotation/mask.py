"""Masks: pictures over the whole slide that are not zero where something is marked."""

import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import openslide
import tifffile
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION as PHOTOMETRIC
from PIL.TiffImagePlugin import TiffImageFile

from dasmil.errors import InputError
from dasmil.slides.annotation.areas import Areas, MaskArray, mask_shape, reduction

MIN_IS_WHITE = 0
READ_BLOCK_PX = 4096  # side of the largest region of a mask decoded at once


class MaskFile(Areas):
    """Areas where a picture that covers the whole slide is not zero.

    :attr:`finest` is its finest level with at most 2^28 pixels, as it is; a picture with none so
    small is reduced, and a pixel is then marked when half of it is.
    """

    def __init__(self, path: Path, size_px0: tuple[int, int], levels: tuple[tuple[int, int], ...]):
        super().__init__(size_px0)
        self.path = path
        self.levels = levels  # width and height, fine to coarse

    def mask(self, downsample: float) -> MaskArray:
        """A stored level of this size as it is; else reduced (or enlarged) from :attr:`finest`."""
        height, width = mask_shape(self.size_px0, downsample)
        for level, (stored_width, stored_height) in enumerate(self.levels):
            if abs(stored_width - width) <= 1 and abs(stored_height - height) <= 1:
                return self._read(level)
        return _resized(self.finest, (width, height))

    @cached_property
    def finest(self) -> MaskArray:
        for level, (width, height) in enumerate(self.levels):
            if reduction((width, height)) == 1:
                return self._read(level)
        return self._read(len(self.levels) - 1)

    def _read(self, level: int) -> MaskArray:
        """Block by block, so that little more than the mask itself is in memory."""
        width, height = self.levels[level]
        factor = reduction((width, height))
        mask = np.zeros((-(-height // factor), -(-width // factor)), dtype=bool)
        found: set[int] = set()
        for left, top, block in self._blocks(level):
            if not block.any():
                continue
            counts = cv2.calcHist([block], [0], None, [256], [0, 256])
            found |= set((np.flatnonzero(counts[1:]) + 1).tolist())
            rows, columns = (-(-length // factor) for length in block.shape)
            top, left = top // factor, left // factor
            reduced = _resized(block > 0, (columns, rows))
            mask[top : top + rows, left : left + columns] = reduced
        if len(found) > 1:
            some = ", ".join(map(str, sorted(found)[:4])) + (", …" if len(found) > 4 else "")
            raise InputError(
                f"{self.path}: it holds the values {some}; a mask has one value beside 0, the "
                "lesions'"
            )
        return mask

    def _blocks(self, level: int) -> Iterator[tuple[int, int, npt.NDArray[np.uint8]]]:
        """Left, top and pixels of a level's blocks."""
        if not _is_pyramid(self.path):
            yield 0, 0, _picture(self.path)
            return
        width, height = self.levels[level]
        with openslide.OpenSlide(self.path) as handle:
            factor = handle.level_downsamples[level]
            for top in range(0, height, READ_BLOCK_PX):
                for left in range(0, width, READ_BLOCK_PX):
                    size = min(READ_BLOCK_PX, width - left), min(READ_BLOCK_PX, height - top)
                    place_px0 = round(left * factor), round(top * factor)
                    try:
                        rgba = np.asarray(handle.read_region(place_px0, level, size))
                    except openslide.OpenSlideError as error:
                        raise InputError(
                            f"{self.path}: the mask cannot be read: {error}"
                        ) from error
                    red, green, blue, _ = cv2.split(rgba)
                    yield left, top, np.maximum(np.maximum(red, green), blue)


def _resized(mask: MaskArray, size: tuple[int, int]) -> MaskArray:
    """At another width and height: a pixel is marked when half of it is."""
    if mask.shape == size[::-1]:
        return mask
    grey = mask.astype(np.uint8) * 255
    return np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA) > 127)


def read_mask(path: Path, size_px0: tuple[int, int]) -> MaskFile:
    """A picture or a pyramid (TIFF that OpenSlide reads), whose shape is that of the slide."""
    if _is_pyramid(path):
        _refuse_odd_pixels(path)
        with openslide.OpenSlide(path) as handle:
            levels = handle.level_dimensions
    else:
        height, width = _picture(path).shape
        levels = ((width, height),)
    width, height = levels[0]
    off = min(
        abs(height - width * size_px0[1] / size_px0[0]),
        abs(width - height * size_px0[0] / size_px0[1]),
    )
    if off > max(1.0, 0.001 * max(width, height)):
        raise InputError(
            f"{path}: a mask of {width} x {height} px does not have the shape of the slide, "
            f"{size_px0[0]} x {size_px0[1]} px; it must cover the whole slide"
        )
    return MaskFile(path, size_px0, levels)


def _is_pyramid(path: Path) -> bool:
    return path.suffix.lower() != ".png" and openslide.OpenSlide.detect_format(path) is not None


def _refuse_odd_pixels(path: Path) -> None:
    """OpenSlide gives colours: what is not 8 bits of grey (or RGB) would change its values."""
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        kinds = (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB)
        if page.bitspersample != 8 or page.photometric not in kinds or page.extrasamples:
            with_alpha = ", with alpha" if page.extrasamples else ""
            raise InputError(
                f"{path}: its pixels are {page.bitspersample} bits "
                f"({tifffile.PHOTOMETRIC(page.photometric).name}{with_alpha}); save it as 8-bit "
                "grey, min-is-black"
            )


def _picture(path: Path) -> npt.NDArray[np.uint8]:
    """(H, W) values of a picture without levels, as they are stored.

    Of colours it is the largest channel, of a palette the number of the colour. What is transparent
    is not marked; where all that is seen is black, the alpha channel itself is the mask.
    """
    try:
        with Image.open(path) as image:
            pixels, alpha = _values(path, image)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise InputError(f"{path}: the mask cannot be read: {error}") from error
    if alpha is not None and alpha.min() != alpha.max():
        pixels = np.where(alpha > 0, pixels, 0)
        pixels = pixels if pixels.any() else alpha
    if pixels.dtype.kind not in "biu" or pixels.min(initial=0) < 0:
        raise InputError(f"{path}: its pixels are {pixels.dtype}; save it as 8-bit grey")
    if pixels.max(initial=0) > 255:
        raise InputError(f"{path}: it holds the value {pixels.max()}; save it as 8-bit grey")
    return pixels.astype(np.uint8)


def _values(
    path: Path, image: Image.Image
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8] | None]:
    """(H, W) values and alpha; None if the picture has no alpha."""
    alpha = None
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    if image.mode == "PA":
        image = image.convert("P")
    pixels = np.asarray(image)
    if pixels.ndim == 3:
        pixels = pixels[..., : 3 if pixels.shape[2] > 2 else 1].max(axis=2)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == MIN_IS_WHITE:
        # Pillow inverts these as pictures; what writes masks so, such as tifffile, means the values
        pixels = {"1": np.logical_not, "L": np.invert}.get(image.mode, np.asarray)(pixels)
        if pixels.size and np.count_nonzero(pixels) > pixels.size / 2:
            warnings.warn(
                f"{path}: most of it is marked, by its stored values; if it is to be seen the "
                "other way round (its photometric is min-is-white), save it as min-is-black",
                stacklevel=2,
            )
    return pixels, alpha
