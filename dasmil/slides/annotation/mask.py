"""Masks: pictures over the whole slide whose marked pixels are not zero."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import openslide
import tifffile
from PIL import Image
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION as PHOTOMETRIC
from PIL.TiffImagePlugin import TiffImageFile

from dasmil.errors import InputError, explaining
from dasmil.slides.annotation.areas import MAX_MASK_PX, Areas, MaskArray, mask_shape, reduction
from dasmil.slides.opening import refuse_giant_tiles
from dasmil.slides.pictures import open_picture
from dasmil.slides.tiff import TIFF_STARTS

MIN_IS_WHITE = 0
FORMATS = ("PNG", "TIFF")
MAX_PICTURE_PX = 89_000_000  # of a mask without tiles; Pillow warns about larger ones
MAX_TILE_PX = 2**24  # of a pyramid, which decodes a stored tile as a whole
READ_BLOCK_PX = 4096  # side of the largest region of a mask decoded at once
STRIP_PX = 2**22  # of a decoded picture, converted at once


class MaskFile(Areas):
    """Areas from a picture over the whole slide; marked pixels are not zero.

    :attr:`finest` is its finest level with at most 2^28 pixels.

    Parameters
    ----------
    levels: width and height of each, fine to coarse.
    picture: (H, W) values of a file without levels; None if there are levels.
    """

    def __init__(
        self,
        path: Path,
        size_px0: tuple[int, int],
        levels: tuple[tuple[int, int], ...],
        picture: npt.NDArray[np.uint8] | None = None,
    ):
        super().__init__(size_px0)
        self.path = path
        self.levels = levels
        self.picture = picture
        if reduction(levels[-1]) > 1:
            raise InputError(
                f"{path}: a mask of {levels[-1][0]} x {levels[-1][1]} px without a smaller level; "
                f"at most {MAX_MASK_PX:,} px are read; save it as a pyramid"
            )

    def mask(self, downsample: float) -> MaskArray:
        """A stored level of this size, else :attr:`finest` resized."""
        height, width = mask_shape(self.size_px0, downsample)
        for level, (stored_width, stored_height) in enumerate(self.levels):
            if abs(stored_width - width) <= 1 and abs(stored_height - height) <= 1:
                return self._read(level)
        return _resized(self.finest, (width, height))

    @cached_property
    def finest(self) -> MaskArray:
        return self._read(next(n for n, size in enumerate(self.levels) if reduction(size) == 1))

    def _read(self, level: int) -> MaskArray:
        """Read a level block by block, so that memory holds little more than the mask."""
        width, height = self.levels[level]
        mask = np.zeros((height, width), dtype=bool)
        values: set[int] = set()
        for left, top, block in self._blocks(level):
            if not block.any():
                continue
            counts = cv2.calcHist([block], [0], None, [256], [0, 256])
            values |= set((np.flatnonzero(counts[1:]) + 1).tolist())
            rows, columns = block.shape
            mask[top : top + rows, left : left + columns] = block > 0
        if len(values) > 1:
            some = ", ".join(map(str, sorted(values)[:4])) + (", …" if len(values) > 4 else "")
            raise InputError(
                f"{self.path}: holds the values {some}; save it with 0 and one value for lesions"
            )
        return mask

    def _blocks(self, level: int) -> Iterator[tuple[int, int, npt.NDArray[np.uint8]]]:
        """Left, top and pixels of a level's blocks."""
        if self.picture is not None:
            yield 0, 0, self.picture
            return
        width, height = self.levels[level]
        with _opened(self.path) as handle:
            factor = handle.level_downsamples[level]
            for top in range(0, height, READ_BLOCK_PX):
                for left in range(0, width, READ_BLOCK_PX):
                    size = min(READ_BLOCK_PX, width - left), min(READ_BLOCK_PX, height - top)
                    place_px0 = round(left * factor), round(top * factor)
                    with _readable(self.path):
                        rgba = np.asarray(handle.read_region(place_px0, level, size))
                    red, green, blue, _ = cv2.split(rgba)
                    yield left, top, np.maximum(np.maximum(red, green), blue)


def _resized(mask: MaskArray, size: tuple[int, int]) -> MaskArray:
    """Resize a mask to a width and height: a pixel is marked if half of it is."""
    if mask.shape == size[::-1]:
        return mask
    grey = mask.astype(np.uint8) * 255
    return np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA) > 127)


def read_mask(path: Path, size_px0: tuple[int, int]) -> MaskFile:
    """Read a picture or a pyramid (a TIFF that OpenSlide reads) with the shape of the slide."""
    picture = None
    if _is_pyramid(path):
        _refuse_odd_pixels(path)
        with _opened(path) as handle:
            levels = handle.level_dimensions
    else:
        picture = _picture(path)
        levels = ((picture.shape[1], picture.shape[0]),)
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
    return MaskFile(path, size_px0, levels, picture)


def _is_pyramid(path: Path) -> bool:
    """Whether OpenSlide reads the TIFF. Other formats, which it also detects, are refused."""
    with open(path, "rb") as file:
        is_tiff = file.read(4) in TIFF_STARTS
    if not is_tiff or path.suffix.lower() == ".png":
        return False
    return openslide.OpenSlide.detect_format(path) is not None


def _opened(path: Path) -> openslide.OpenSlide:
    with _readable(path):
        handle = openslide.OpenSlide(path)
    refuse_giant_tiles(path, handle, MAX_TILE_PX)
    return handle


def _readable(path: Path) -> AbstractContextManager[None]:
    """OpenSlide, and tifffile on damaged files, raise any kind of error."""
    return explaining(f"{path}: the mask cannot be read", "save it again")


def _refuse_odd_pixels(path: Path) -> None:
    """Refuse all but 8-bit grey or RGB: OpenSlide returns colours, which change other values."""
    with _readable(path), tifffile.TiffFile(path) as file:
        page = file.pages.first
        bits, photometric = page.bitspersample, tifffile.PHOTOMETRIC(page.photometric)
        has_alpha = bool(page.extrasamples)
    kinds = (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB)
    if bits != 8 or photometric not in kinds or has_alpha:
        with_alpha = ", with alpha" if has_alpha else ""
        raise InputError(
            f"{path}: its pixels are {bits} bits ({photometric.name}{with_alpha}); save it as "
            "8-bit grey, min-is-black"
        )


def _picture(path: Path) -> npt.NDArray[np.uint8]:
    """(H, W) stored values of a picture without levels.

    The value of a colour is its largest channel, or its number in a palette. Transparent pixels are
    not marked. If all visible pixels are black, the alpha channel is the mask.
    """
    image = open_picture(path, FORMATS, MAX_PICTURE_PX)
    # Pillow inverts min-is-white pictures; programs that write masks so, such as tifffile, mean the
    # stored values
    inverts = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == MIN_IS_WHITE
    pixels = np.empty((image.height, image.width), dtype=np.uint8)
    alpha = np.empty_like(pixels) if image.has_transparency_data else None
    num_rows = max(1, STRIP_PX // image.width)
    for top in range(0, image.height, num_rows):
        strip = image.crop((0, top, image.width, min(top + num_rows, image.height)))
        rows = slice(top, top + strip.height)
        pixels[rows] = _values(path, strip, inverts)
        if alpha is not None:
            alpha[rows] = np.asarray(strip.convert("RGBA").getchannel("A"))
    if inverts and np.count_nonzero(pixels) > pixels.size / 2:
        warnings.warn(
            f"{path}: most of it is marked by its stored values; if they are inverted (its "
            "photometric is min-is-white), save it as min-is-black",
            stacklevel=2,
        )
    if alpha is not None and alpha.min() != alpha.max():
        pixels[alpha == 0] = 0
        pixels = pixels if pixels.any() else alpha
    return pixels


def _values(path: Path, image: Image.Image, inverts: bool) -> npt.NDArray[Any]:
    """(H, W) values of a strip, from 0 to 255.

    Parameters
    ----------
    inverts: whether Pillow has inverted the stored values.
    """
    pixels = np.asarray(image.convert("P") if image.mode == "PA" else image)
    if pixels.ndim == 3:
        channels = np.moveaxis(pixels, 2, 0)[: 3 if pixels.shape[2] > 2 else 1]
        pixels = reduce(np.maximum, channels)
    if inverts:
        pixels = {"1": np.logical_not, "L": np.invert}.get(image.mode, np.asarray)(pixels)
    if pixels.dtype.kind not in "biu" or pixels.min(initial=0) < 0:
        raise InputError(f"{path}: its pixels are {pixels.dtype}; save it as 8-bit grey")
    if pixels.max(initial=0) > 255:
        raise InputError(f"{path}: holds the value {pixels.max()}; save it as 8-bit grey")
    return pixels
