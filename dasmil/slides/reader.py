"""OpenSlide behind one small class: everything in level-0 pixels or mpp."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import openslide
from PIL import UnidentifiedImageError

from dasmil.errors import InputError
from dasmil.slides.cohort import SlideRow
from dasmil.units import Mpp

cv2.setNumThreads(1)  # slides are shared among processes; threads below them only get in the way

RgbArray = npt.NDArray[np.uint8]

PLAUSIBLE_MPP = (0.05, 20.0)  # µm/px; nothing that is sold scans outside this range
MAX_ANISOTROPY = 1.05  # mpp-x against mpp-y
READ_BLOCK_PX = 2048  # side of the largest region decoded at once


@dataclass(frozen=True)
class PhysicalScale:
    """The mpp of a slide and where it came from: ``table``, ``slide`` or ``objective power``."""

    mpp: Mpp
    source: str


class Slide:
    """An open slide.

    Handles cannot be pickled: open a slide in the process that reads it. Reading is thread-safe.

    Parameters
    ----------
    row: the slide's row of the cohort table; its ``mpp`` or ``magnification`` overrides the file's.

    Raises
    ------
    InputError
        when the file is missing, is no slide, or its physical scale is missing or implausible.
    """

    def __init__(self, row: SlideRow):
        self.row = row
        self._handle = _open(_slide_file(row.path))
        self.size_px0: tuple[int, int] = self._handle.dimensions
        self.downsamples: tuple[float, ...] = tuple(self._handle.level_downsamples)
        self.physical_scale = _physical_scale(row, self._handle.properties)
        self.mpp = self.physical_scale.mpp

    def close(self) -> None:
        self._handle.close()

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, box_px0: Sequence[int], size_px: tuple[int, int]) -> RgbArray:
        """Pixels of a box, resampled to a size.

        Read from the coarsest stored level that is at least as fine as asked, then averaged down
        by area. What lies outside the slide or was never scanned is white.

        Parameters
        ----------
        box_px0: left, top, right, bottom in level-0 pixels.
        size_px: width and height of the result.

        Returns
        -------
        (height, width, 3) uint8 RGB.
        """
        left, top, right, bottom = (int(edge) for edge in box_px0)
        level = self._handle.get_best_level_for_downsample((right - left) / size_px[0] * 1.001)
        stored = self.downsamples[level]
        region_px = (
            max(1, round((right - left) / stored)),
            max(1, round((bottom - top) / stored)),
        )
        try:
            rgba = np.asarray(self._handle.read_region((left, top), level, region_px))
        except (openslide.OpenSlideError, OSError) as error:  # OSError: a truncated PNG or JPEG
            raise InputError(
                f"{self.row.path}: pixels at {left},{top} cannot be read: {error}"
            ) from error
        rgb = _over_white(rgba)
        if region_px == size_px:
            return rgb
        shrinks = region_px[0] >= size_px[0] and region_px[1] >= size_px[1]
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        return np.asarray(cv2.resize(rgb, size_px, interpolation=interpolation), dtype=np.uint8)

    def thumbnail(self, mpp: float) -> RgbArray:
        """The whole slide at about ``mpp`` (never finer than stored), block by block.

        Memory is bounded by the thumbnail and one block, also when the file has a single level.
        """
        factor = max(1.0, mpp / self.mpp)
        width, height = (max(1, round(side / factor)) for side in self.size_px0)
        level = self._handle.get_best_level_for_downsample(factor * 1.001)
        block = max(16, int(READ_BLOCK_PX * self.downsamples[level] / factor))
        x_px0 = np.linspace(0, self.size_px0[0], width + 1).round().astype(int)
        y_px0 = np.linspace(0, self.size_px0[1], height + 1).round().astype(int)
        picture = np.empty((height, width, 3), dtype=np.uint8)
        for top in range(0, height, block):
            bottom = min(top + block, height)
            for left in range(0, width, block):
                right = min(left + block, width)
                box_px0 = (x_px0[left], y_px0[top], x_px0[right], y_px0[bottom])
                picture[top:bottom, left:right] = self.read(box_px0, (right - left, bottom - top))
        return picture


def _slide_file(path: Path) -> Path:
    """A folder stands for the DICOM slide in it; any one of its files opens the whole."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.dcm"))
    if not files:
        raise InputError(f"{path}: a folder without DICOM (.dcm) files is no slide")
    return files[0]


def _open(path: Path) -> openslide.AbstractSlide:
    try:
        return openslide.open_slide(path)
    except UnidentifiedImageError as error:  # Pillow is asked when OpenSlide knows no format
        raise InputError(f"{path}: OpenSlide does not know this format; is it a slide?") from error
    except (openslide.OpenSlideError, OSError) as error:
        raise InputError(f"{path}: cannot be opened as a slide: {error}") from error


def _physical_scale(row: SlideRow, properties: Mapping[str, str]) -> PhysicalScale:
    """The table's override, else the file's mpp, else its objective power (mpp = 10 / power)."""
    if row.mpp is not None:
        found = PhysicalScale(Mpp(row.mpp), "table")
    elif row.magnification is not None:
        found = PhysicalScale(Mpp(10 / row.magnification), "table")
    elif mpp_x := _recorded(properties, openslide.PROPERTY_NAME_MPP_X):
        mpp_y = _recorded(properties, openslide.PROPERTY_NAME_MPP_Y) or mpp_x
        if not 1 / MAX_ANISOTROPY <= mpp_x / mpp_y <= MAX_ANISOTROPY:
            raise InputError(
                f"slide {row.slide_id} ({row.path}): its pixels are not square ({mpp_x:g} by "
                f"{mpp_y:g} µm); fill the column mpp of its row in the cohort table"
            )
        found = PhysicalScale(Mpp((mpp_x + mpp_y) / 2), "slide")
    elif power := _recorded(properties, openslide.PROPERTY_NAME_OBJECTIVE_POWER):
        found = PhysicalScale(Mpp(10 / power), "objective power")
    else:
        raise InputError(
            f"slide {row.slide_id} ({row.path}): the file records neither mpp nor objective power; "
            "fill the column mpp (or magnification) of its row in the cohort table"
        )
    low, high = PLAUSIBLE_MPP
    if not low <= found.mpp <= high:
        raise InputError(
            f"slide {row.slide_id} ({row.path}): {found.mpp:g} µm/px (from the {found.source}) is "
            f"outside the plausible {low:g}-{high:g}; fill the column mpp of its row in the cohort "
            "table"
        )
    return found


def _recorded(properties: Mapping[str, str], name: str) -> float:
    """A number from the file; 0 where it is missing, and some files write 0 for just that."""
    return float(properties.get(name, 0))


def _over_white(rgba: npt.NDArray[np.uint8]) -> RgbArray:
    """Composite on white: OpenSlide's RGBA is transparent where nothing was scanned."""
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    blended = rgba[..., :3] * (alpha / 255.0) + (255 - alpha)
    return np.asarray(blended.round(), dtype=np.uint8)
