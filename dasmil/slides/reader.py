"""OpenSlide behind one small class: everything in level-0 pixels or mpp."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from threading import Lock

import cv2
import numpy as np
import numpy.typing as npt
import openslide
from PIL import UnidentifiedImageError

from dasmil.errors import InputError
from dasmil.files import must_be_file
from dasmil.geometry import Extent
from dasmil.slides.cohort import SlideRow
from dasmil.slides.pictures import TO_A_PYRAMID, open_picture
from dasmil.slides.tiff import VENDORS as JPEG_VENDORS
from dasmil.slides.tiff import JpegLevel, jpeg_level, refuse_damaged_picture
from dasmil.units import Mpp

cv2.setNumThreads(1)  # slides are shared among processes; threads below them only get in the way

RgbArray = npt.NDArray[np.uint8]

PLAUSIBLE_MPP = (0.05, 20.0)  # µm/px; nothing that is sold scans outside this range
MAX_ANISOTROPY = 1.05  # mpp-x against mpp-y
CONTRADICTION = 1.2  # the table's mpp against the file's: scanners of one magnification differ less
NEARLY_WHOLE = 0.06  # how far a ratio may be from a whole one to be treated as such
CACHE_BYTES = 32 * 2**20  # OpenSlide's own default
READ_BLOCK_PX = 2048  # side of the largest region decoded at once
MAX_STORED_TILE_PX = 2**28  # a stored tile is decoded as a whole: 2.5 GB at this size
MAX_THUMBNAIL_PX = 2**29  # 1.6 GB; a slide of 300,000 px a side has 3.5 · 10⁸ at a 16th
PICTURES = ("PNG", "JPEG", "TIFF", "BMP")  # slides without tiles, which Pillow decodes


@dataclass(frozen=True)
class PhysicalScale:
    """The mpp of a slide and where it came from: ``table``, ``slide`` or ``objective power``.

    ``warning`` says that the table contradicts the file.
    """

    mpp: Mpp
    source: str
    warning: str = ""


class DamagedError(InputError):
    """Pixels of a slide that cannot be decoded; others of it may be sound."""


class Slide:
    """An open slide.

    Handles cannot be pickled: open a slide in the process that reads it. Reading is thread-safe
    as long as the slide is sound.

    Parameters
    ----------
    row: the slide's row of the cohort table; its ``mpp`` or ``magnification`` overrides the file's.
    cache_bytes: memory for parts of the file that are decoded and may be read again.

    Attributes
    ----------
    file: the file that is open; of a folder of DICOM one of its files.

    Raises
    ------
    InputError
        when the file is missing, is no slide, can only be decoded in parts that are too large for
        memory, or its physical scale is missing or implausible, in the file or in its row.
    """

    def __init__(self, row: SlideRow, cache_bytes: int = CACHE_BYTES):
        if row.scale_fault:
            raise InputError(row.scale_fault)
        self.row = row
        self.file = _slide_file(row.path)
        self._cache_bytes = cache_bytes
        self._handle = _open(self.file, cache_bytes)
        self._jpegs: dict[int, JpegLevel | None] = {}
        self._lock = Lock()
        self.size_px0: tuple[int, int] = self._handle.dimensions
        self.downsamples: tuple[float, ...] = tuple(self._handle.level_downsamples)
        self._level_sizes: tuple[tuple[int, int], ...] = tuple(self._handle.level_dimensions)
        _refuse_giant_tiles(row.path, self._handle)
        self.physical_scale = _physical_scale(row, self._handle.properties)
        self.mpp = self.physical_scale.mpp
        self.extent = Extent(self.size_px0, self.mpp, _bounds_px0(self._handle.properties))

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

        Read from a stored level that is at least as fine as asked, then averaged down by area. What
        lies outside the slide or was never scanned is white.

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
            if some of them cannot be decoded.
        """
        left, _, right, _ = box_px0
        return self._read(box_px0, size_px, self.level_for(int(right - left) / size_px[0]))

    def _read(self, box_px0: Sequence[int], size_px: tuple[int, int], level: int) -> RgbArray:
        left, top, right, bottom = (int(edge) for edge in box_px0)
        stored = self.downsamples[level]
        region_px = (
            max(1, round((right - left) / stored)),
            max(1, round((bottom - top) / stored)),
        )
        rgb = self.region((left, top), level, region_px)
        if region_px == size_px:
            return rgb
        return resize(rgb, np.empty((size_px[1], size_px[0], 3), np.uint8))

    def level_for(self, downsample: float) -> int:
        """The stored level to read from: the coarsest that is at least as fine, but for rounding.

        OpenSlide interpolates a level whose downsample is not whole. That blurs it and takes as
        long as decoding four times as many pixels, so a level twice as fine that is whole is taken
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
        """Whether every pixel of a level begins on a level-0 pixel, as OpenSlide counts."""
        stored = self.downsamples[level]
        drift_px = abs(stored / round(stored) - 1) * max(self.size_px0) / stored
        return drift_px < 1 / 512

    def region(self, origin_px0: tuple[int, int], level: int, size_px: tuple[int, int]) -> RgbArray:
        """Pixels of a stored level as they are; white outside the slide and where unscanned.

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
            if jpegs is not None:
                left, top = origin_px0[0] // stored, origin_px0[1] // stored
                rgb = jpegs.read(left, top, *size_px)
                if rgb is not None:
                    return rgb
        return self._openslide_region(origin_px0, level, size_px)

    def _openslide_region(
        self, origin_px0: tuple[int, int], level: int, size_px: tuple[int, int]
    ) -> RgbArray:
        try:
            rgba = np.asarray(self._handle.read_region(origin_px0, level, size_px))
        except openslide.OpenSlideError as error:
            self._handle = _open(self.file, self._cache_bytes)  # the old one reads nothing more
            left, top = origin_px0
            raise DamagedError(
                f"{self.row.path}: pixels at {left},{top} cannot be read: {error}"
            ) from error
        return _over_white(rgba)

    def _jpeg_level(self, level: int) -> JpegLevel | None:
        """The level as a grid of JPEGs, if it is one and gives OpenSlide's pixels."""
        with self._lock:
            if level not in self._jpegs:
                self._jpegs[level] = self._checked_jpeg_level(level)
            return self._jpegs[level]

    def _checked_jpeg_level(self, level: int) -> JpegLevel | None:
        properties = self._handle.properties
        if properties.get(openslide.PROPERTY_NAME_VENDOR) not in JPEG_VENDORS:
            return None
        size_px = self._level_sizes[level]
        jpegs = jpeg_level(self.file, size_px, self._cache_bytes)
        if jpegs is not None and not self._gives_the_same(jpegs, level):
            jpegs.close()
            return None
        return jpegs

    def _gives_the_same(self, jpegs: JpegLevel, level: int) -> bool:
        """Whether samples of a level come out as OpenSlide has them, or are refused by both."""
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
        """The whole slide at about ``mpp`` (never finer than stored), block by block.

        Memory is bounded by the thumbnail and one block, also when the file has a single level.

        Raises
        ------
        InputError
            if the thumbnail would have more than :data:`MAX_THUMBNAIL_PX`, or cannot be decoded.
        """
        factor = max(1.0, mpp / self.mpp)
        width, height = (max(1, round(side / factor)) for side in self.size_px0)
        if width * height > MAX_THUMBNAIL_PX:
            raise InputError(
                f"{self.row.path}: it says that it has {self.size_px0[0]:,} × "
                f"{self.size_px0[1]:,} px, of which a picture at {mpp:g} µm/px would take "
                f"{3 * width * height / 1e9:.0f} GB; export it again, or raise tissue.mpp"
            )
        level = self._best_level(factor)  # an interpolated one, too: detail is not looked for here
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


def _slide_file(path: Path) -> Path:
    """A folder stands for the DICOM slide in it; any one of its files opens the whole."""
    try:
        path.stat()
        names = list(path.iterdir()) if path.is_dir() else None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:  # a name that is too long, a loop of links, a folder of someone else
        raise InputError(f"{path}: cannot be opened: {error.strerror}") from error
    if names is None:
        must_be_file(path, "give the file of a slide")
        _refuse_odd_parts(path.with_suffix(""), path.suffix.lower() == ".mrxs")
        return path
    _refuse_odd_parts(path, True)
    files = sorted(p for p in names if p.suffix.lower() == ".dcm" and p.name[0] != ".")
    if not files:
        raise InputError(f"{path}: a folder without DICOM (.dcm) files is no slide")
    if (num_slides := len(set(map(_dicom_series, files)) - {None})) > 1:
        raise InputError(
            f"{path}: the folder holds {num_slides} DICOM slides; give each a folder of its own, "
            "or name one file of each in a cohort table"
        )
    return files[0]


def _dicom_series(file: Path) -> str | None:
    """The slide that a file is a part of; None for a label or an overview that lies alone."""
    try:
        with openslide.OpenSlide(file) as slide:
            return slide.properties.get("dicom.SeriesInstanceUID")
    except (openslide.OpenSlideError, OSError):
        return None


def _refuse_odd_parts(folder: Path, is_read: bool) -> None:
    """OpenSlide opens the files of a slide in a folder, and would wait for a FIFO for ever."""
    for path in folder.iterdir() if is_read and folder.is_dir() else ():
        if not path.is_dir():
            must_be_file(path, "remove it from the folder of the slide")


def _open(path: Path, cache_bytes: int) -> openslide.AbstractSlide:
    """A slide in one of OpenSlide's formats, or a picture as a slide of one level."""
    try:
        if openslide.OpenSlide.detect_format(path) is not None:
            handle = openslide.OpenSlide(path)
            handle.set_cache(openslide.OpenSlideCache(cache_bytes))
            return handle
    except openslide.OpenSlideError as error:
        raise InputError(f"{path}: cannot be opened as a slide: {error}") from error
    refuse_damaged_picture(path)
    try:
        return openslide.ImageSlide(open_picture(path, PICTURES, MAX_STORED_TILE_PX))
    except InputError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise InputError(
                f"{path}: OpenSlide does not know this format, and it is no picture "
                f"({', '.join(PICTURES)}); is it a slide?"
            ) from error
        raise


def _refuse_giant_tiles(path: Path, handle: openslide.AbstractSlide) -> None:
    """Memory does not grow with the slide, but with what the file stores as one piece it does."""
    for level in range(handle.level_count):
        width, height = (
            int(handle.properties.get(f"openslide.level[{level}].tile-{side}", 0))
            for side in ("width", "height")
        )
        if width * height > MAX_STORED_TILE_PX:
            raise InputError(
                f"{path}: stored in tiles of {width} × {height} px, which take gigabytes each; "
                + TO_A_PYRAMID
            )


def _physical_scale(row: SlideRow, properties: Mapping[str, str]) -> PhysicalScale:
    """The table's override, else the file's mpp, else its objective power (mpp = 10 / power)."""
    mpp_x = _recorded(properties, openslide.PROPERTY_NAME_MPP_X)
    mpp_y = _recorded(properties, openslide.PROPERTY_NAME_MPP_Y) or mpp_x
    power = _recorded(properties, openslide.PROPERTY_NAME_OBJECTIVE_POWER)
    low, high = PLAUSIBLE_MPP
    if row.mpp is not None or row.magnification is not None:
        mpp = row.mpp or 10 / (row.magnification or 1)
        own = (mpp_x + mpp_y) / 2 or (10 / power if power else 0.0)
        warning = ""
        if low <= own <= high and not 1 / CONTRADICTION <= mpp / own <= CONTRADICTION:
            warning = f"the table's {mpp:g} µm/px is used, the file says {own:g}"
        found = PhysicalScale(Mpp(mpp), "table", warning)
    elif mpp_x:
        if not 1 / MAX_ANISOTROPY <= mpp_x / mpp_y <= MAX_ANISOTROPY:
            raise InputError(
                f"slide {row.slide_id} ({row.path}): its pixels are not square ({mpp_x:g} by "
                f"{mpp_y:g} µm); fill the column mpp of its row in the cohort table"
            )
        found = PhysicalScale(Mpp((mpp_x + mpp_y) / 2), "slide")
    elif power:
        found = PhysicalScale(Mpp(10 / power), "objective power")
    else:
        raise InputError(
            f"slide {row.slide_id} ({row.path}): the file records neither mpp nor objective power; "
            "fill the column mpp (or magnification) of its row in the cohort table"
        )
    if not low <= found.mpp <= high:
        raise InputError(
            f"slide {row.slide_id} ({row.path}): {found.mpp:g} µm/px (from the {found.source}) is "
            f"outside the plausible {low:g}-{high:g}; fill the column mpp of its row in the cohort "
            "table"
        )
    return found


def _bounds_px0(properties: Mapping[str, str]) -> tuple[int, int]:
    """Left and top of what was scanned, which MIRAX, Leica and others say; 0, 0 where all was."""
    left = int(properties.get(openslide.PROPERTY_NAME_BOUNDS_X, 0))
    return left, int(properties.get(openslide.PROPERTY_NAME_BOUNDS_Y, 0))


def _recorded(properties: Mapping[str, str], name: str) -> float:
    """A number from the file; 0 where it is missing, and some files write 0 for just that."""
    return float(properties.get(name, 0))


def resize(picture: RgbArray, into: RgbArray) -> RgbArray:
    """Fill ``into`` with a picture: averaged by area where it shrinks, else interpolated.

    OpenCV's average is fast for whole ratios only. Near to one (0.526 µm/px to 1 is 1.9) the
    picture is first interpolated to the whole multiple, which moves a mean of 0.2 grey levels.
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


def _over_white(rgba: npt.NDArray[np.uint8]) -> RgbArray:
    """Composite on white: OpenSlide's RGBA is transparent where nothing was scanned."""
    rgb = np.asarray(cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB), dtype=np.uint8)
    opacity = cv2.extractChannel(rgba, 3)
    if opacity.min() < 255:
        # of clear pixels there may be millions: adding white, which saturates, takes no index
        cv2.add(rgb, cv2.cvtColor(cv2.bitwise_not(opacity), cv2.COLOR_GRAY2RGB), dst=rgb)
        partly = (opacity > 0) & (opacity < 255)
        if partly.any():
            alpha = rgba[partly, 3:]
            mixed = rgba[partly, :3] * (alpha / 255.0) + (255 - alpha)
            rgb[partly] = mixed.round().astype(np.uint8)
    return rgb
