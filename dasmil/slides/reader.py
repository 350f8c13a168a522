"""Read pixels of a slide: one small class around OpenSlide, in level-0 pixels and mpp."""

from collections.abc import Sequence
from itertools import product
from threading import Lock

import cv2
import numpy as np
import numpy.typing as npt
import openslide

from dasmil.errors import InputError
from dasmil.geometry import Extent
from dasmil.slides.cohort import SlideRow
from dasmil.slides.opening import open_slide, slide_file
from dasmil.slides.physical_scale import physical_scale
from dasmil.slides.tiff import VENDORS, JpegLevel, jpeg_level

cv2.setNumThreads(1)  # processes share the slides; more threads only slow them down

RgbArray = npt.NDArray[np.uint8]

NEARLY_WHOLE = 0.06  # a ratio this close to a whole number is treated as whole
CACHE_BYTES = 32 * 2**20  # OpenSlide's own default
READ_BLOCK_PX = 2048  # side of the largest region decoded at once
MAX_THUMBNAIL_PX = 2**29  # 1.6 GB; a slide of 300,000 px a side has 3.5 · 10⁸ at a 16th


class DamagedError(InputError):
    """Pixels of a slide cannot be decoded; others may be intact."""


class Slide:
    """An open slide.

    Handles cannot be pickled: open a slide in the process that reads it. Reading is thread-safe
    unless the slide is damaged.

    Parameters
    ----------
    row: the slide's row of the cohort table; its ``mpp`` or ``magnification`` overrides the file's.
    cache_bytes: memory for decoded parts of the file.

    Attributes
    ----------
    file: the open file; for a folder of DICOM one of its files.
    extent: size, mpp and bounds.

    Raises
    ------
    InputError
        if the file is missing or no slide, can only be decoded in parts that are too large for
        memory, or its physical scale is missing or implausible.
    """

    def __init__(self, row: SlideRow, cache_bytes: int = CACHE_BYTES):
        if row.scale_fault:
            raise InputError(row.scale_fault)
        self.row = row
        self.file = slide_file(row.path)
        self._cache_bytes = cache_bytes
        self._handle = open_slide(self.file, cache_bytes)
        self._jpegs: dict[int, JpegLevel | None] = {}
        self._lock = Lock()
        self.size_px0: tuple[int, int] = self._handle.dimensions
        self.downsamples: tuple[float, ...] = tuple(self._handle.level_downsamples)
        self._level_sizes: tuple[tuple[int, int], ...] = tuple(self._handle.level_dimensions)
        properties = self._handle.properties
        self.physical_scale = physical_scale(row, properties)
        self.mpp = self.physical_scale.mpp
        left = int(properties.get(openslide.PROPERTY_NAME_BOUNDS_X, 0))  # of MIRAX, Leica, ...
        top = int(properties.get(openslide.PROPERTY_NAME_BOUNDS_Y, 0))
        self.extent = Extent(self.size_px0, self.mpp, (left, top))

    def close(self) -> None:
        self._handle.close()
        for jpegs in self._jpegs.values():
            if jpegs is not None:
                jpegs.close()
        self._jpegs = {}

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, box_px0: Sequence[int], size_px: tuple[int, int]) -> RgbArray:
        """Pixels of a box, resampled to a size.

        They come from a stored level that is at least as fine, averaged by area. Pixels outside the
        slide, or never scanned, are white.

        Parameters
        ----------
        box_px0: left, top, right, bottom in level-0 pixels.
        size_px: width and height of the result.

        Returns
        -------
        (height, width, 3) uint8 RGB.

        Raises
        ------
        DamagedError
            if some pixels cannot be decoded.
        """
        left, _, right, _ = box_px0
        return self._read(box_px0, size_px, self.level_for(int(right - left) / size_px[0]))

    def _read(self, box_px0: Sequence[int], size_px: tuple[int, int], level: int) -> RgbArray:
        left, top, right, bottom = (int(edge) for edge in box_px0)
        stored = self.downsamples[level]
        region_px = (max(1, round((right - left) / stored)), max(1, round((bottom - top) / stored)))
        rgb = self.region((left, top), level, region_px)
        if region_px == size_px:
            return rgb
        return resize(rgb, np.empty((size_px[1], size_px[0], 3), np.uint8))

    def level_for(self, downsample: float) -> int:
        """The stored level to read from: the coarsest that is at least as fine, up to rounding.

        OpenSlide interpolates a level if its downsample is not whole. That blurs it and takes as
        long as decoding four times as many pixels, so a whole level up to twice as fine is used
        instead.
        """
        level = self._best_level(downsample)
        for finer in range(level, -1, -1):
            near = self.downsamples[level] <= 2.1 * self.downsamples[finer]
            if near and self.is_whole(finer):
                return finer
        return level

    def _best_level(self, downsample: float) -> int:
        return int(self._handle.get_best_level_for_downsample(downsample * 1.001))

    def is_whole(self, level: int) -> bool:
        """Whether every pixel of a level begins on a level-0 pixel, by OpenSlide's counting."""
        stored = self.downsamples[level]
        drift_px = abs(stored / round(stored) - 1) * max(self.size_px0) / stored
        return drift_px < 1 / 512

    def region(self, origin_px0: tuple[int, int], level: int, size_px: tuple[int, int]) -> RgbArray:
        """Unchanged pixels of a stored level; white outside the slide and if never scanned.

        Parameters
        ----------
        origin_px0: left and top in level-0 pixels.
        size_px: width and height in pixels of the level.

        Returns
        -------
        (height, width, 3) uint8 RGB.
        """
        stored = round(self.downsamples[level])
        if self.is_whole(level) and origin_px0[0] % stored == origin_px0[1] % stored == 0:
            jpegs = self._jpeg_level(level)
            left, top = origin_px0[0] // stored, origin_px0[1] // stored
            if jpegs is not None and (rgb := jpegs.read(left, top, *size_px)) is not None:
                return rgb
        return self._openslide_region(origin_px0, level, size_px)

    def _openslide_region(
        self, origin_px0: tuple[int, int], level: int, size_px: tuple[int, int]
    ) -> RgbArray:
        try:
            rgba = np.asarray(self._handle.read_region(origin_px0, level, size_px))
        except openslide.OpenSlideError as error:
            # after an error, OpenSlide's handle reads nothing more
            self._handle = open_slide(self.file, self._cache_bytes)
            left, top = origin_px0
            raise DamagedError(
                f"{self.row.path}: pixels at {left},{top} cannot be read: {error}"
            ) from error
        return over_white(rgba)

    def _jpeg_level(self, level: int) -> JpegLevel | None:
        """The level as a grid of JPEGs; None unless it is one and equals OpenSlide's pixels."""
        with self._lock:
            if level not in self._jpegs:
                self._jpegs[level] = self._checked_jpeg_level(level)
            return self._jpegs[level]

    def _checked_jpeg_level(self, level: int) -> JpegLevel | None:
        if self._handle.properties.get(openslide.PROPERTY_NAME_VENDOR) not in VENDORS:
            return None
        jpegs = jpeg_level(self.file, self._level_sizes[level], self._cache_bytes)
        if jpegs is not None and not self._matches_openslide(jpegs, level):
            jpegs.close()
            return None
        return jpegs

    def _matches_openslide(self, jpegs: JpegLevel, level: int) -> bool:
        """Whether samples of a level equal OpenSlide's pixels, or both refuse them."""
        stored, (width, height) = round(self.downsamples[level]), self._level_sizes[level]
        sample_px = (min(64, width), min(64, height))
        for down, along in product((0.2, 0.5, 0.8), repeat=2):
            left = int((width - sample_px[0]) * along)
            top = int((height - sample_px[1]) * down)
            found = jpegs.read(left, top, *sample_px)
            try:
                expected = self._openslide_region((left * stored, top * stored), level, sample_px)
            except DamagedError:
                if found is None:
                    continue
                return False
            if found is None or not np.array_equal(found, expected):
                return False
        return True

    def thumbnail(self, mpp: float) -> RgbArray:
        """The whole slide at about ``mpp``, or at its own if that is coarser.

        Memory is bounded by the thumbnail and one block, also if the file has a single level.

        Returns
        -------
        (height, width, 3) uint8 RGB.

        Raises
        ------
        InputError
            if the thumbnail would have more than :data:`MAX_THUMBNAIL_PX`, or cannot be decoded.
        """
        factor = max(1.0, mpp / self.mpp)
        width, height = (max(1, round(side / factor)) for side in self.size_px0)
        if width * height > MAX_THUMBNAIL_PX:
            raise InputError(
                f"{self.row.path}: claims to have {self.size_px0[0]:,} × "
                f"{self.size_px0[1]:,} px, of which a picture at {mpp:g} µm/px would take "
                f"{3 * width * height / 1e9:.0f} GB; export it again, or raise tissue.mpp"
            )
        level = self._best_level(factor)  # interpolation is harmless here
        block = max(16, int(READ_BLOCK_PX * self.downsamples[level] / factor))
        x_px0 = np.linspace(0, self.size_px0[0], width + 1).round().astype(int)
        y_px0 = np.linspace(0, self.size_px0[1], height + 1).round().astype(int)
        picture = np.empty((height, width, 3), dtype=np.uint8)
        for top in range(0, height, block):
            bottom = min(top + block, height)
            for left in range(0, width, block):
                right = min(left + block, width)
                box_px0 = (x_px0[left], y_px0[top], x_px0[right], y_px0[bottom])
                size = (right - left, bottom - top)
                picture[top:bottom, left:right] = self._read(box_px0, size, level)
        return picture


def resize(picture: RgbArray, into: RgbArray) -> RgbArray:
    """Fill ``into`` with a picture: averaged by area if it shrinks, else interpolated.

    OpenCV's area average is fast for whole ratios only. If the ratio is close to a whole one (0.526
    µm/px to 1 is 1.9), the picture is first interpolated to the whole multiple, which changes
    pixels by 0.2 grey levels on average.
    """
    height, width = into.shape[:2]
    if picture.shape == into.shape:
        into[...] = picture
        return into
    ratio = max(picture.shape[0] / height, picture.shape[1] / width)
    whole = max(1, round(ratio))
    if ratio < 1 or abs(ratio / whole - 1) <= NEARLY_WHOLE:
        multiple = (whole * width, whole * height)
        if picture.shape[1::-1] != multiple:
            large = into if whole == 1 else np.empty((multiple[1], multiple[0], 3), np.uint8)
            cv2.resize(picture, multiple, dst=large, interpolation=cv2.INTER_LINEAR)
            picture = large
        if whole == 1:
            return into
    cv2.resize(picture, (width, height), dst=into, interpolation=cv2.INTER_AREA)
    return into


def over_white(rgba: npt.NDArray[np.uint8]) -> RgbArray:
    """Composite RGBA on white: OpenSlide's pixels are transparent if never scanned."""
    rgb = np.asarray(cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB), dtype=np.uint8)
    opacity = cv2.extractChannel(rgba, 3)
    if opacity.min() < 255:
        # clear pixels may be millions: adding white, which saturates, needs no index
        cv2.add(rgb, cv2.cvtColor(cv2.bitwise_not(opacity), cv2.COLOR_GRAY2RGB), dst=rgb)
        partly = (opacity > 0) & (opacity < 255)
        if partly.any():
            alpha = rgba[partly, 3:]
            mixed = rgba[partly, :3] * (alpha / 255.0) + (255 - alpha)
            rgb[partly] = mixed.round().astype(np.uint8)
    return rgb
