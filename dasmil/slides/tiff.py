"""The JPEG tiles inside a TIFF slide, decoded without OpenSlide.

OpenSlide spends most of a ``read_region`` on composing what it has decoded. Where a level is
nothing but a grid of JPEGs, as in Aperio's files and in plain pyramids, they are laid side by
side here instead. OpenSlide remains the measure: a level is read in this way only when samples of
it come out the same in both.
"""

import os
import weakref
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import tifffile

RgbArray = npt.NDArray[np.uint8]

VENDORS = frozenset({"aperio", "generic-tiff"})  # their JPEGs neither overlap nor leave gaps
FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
# tells the decoder what only the TIFF's header says: that the three components are RGB
ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"


class JpegLevel:
    """One stored level of a TIFF slide whose tiles are JPEGs.

    Parameters
    ----------
    path: the slide.
    page: the level in it.
    cache_bytes: memory for decoded JPEGs.
    """

    def __init__(self, path: Path, page: tifffile.TiffPage, cache_bytes: int):
        self.size_px = (page.imagewidth, page.imagelength)
        self.side_px = (page.tilewidth, page.tilelength)
        self.columns = -(-page.imagewidth // page.tilewidth)
        # of a large slide a million each: as arrays they take an eighth of what Python's numbers do
        self._offsets = np.asarray(page.dataoffsets, np.int64)
        self._lengths = np.asarray(page.databytecounts, np.int64)
        adobe = ADOBE_RGB if page.photometric == tifffile.PHOTOMETRIC.RGB else b""
        tables = page.jpegtables[2:-2] if page.jpegtables else b""
        self._head = b"\xff\xd8" + adobe + tables
        self._file = os.open(path, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, self._file)
        kept = max(1, cache_bytes // (3 * page.tilewidth * page.tilelength))
        self._decode = lru_cache(kept)(self._decode_anew)

    def read(self, left: int, top: int, width: int, height: int) -> RgbArray | None:
        """Pixels of a part of the level; None where this way of reading does not lead to them.

        Beyond the right and lower border of the level it is white.

        Parameters
        ----------
        left, top, width, height: in pixels of the level.
        """
        if left < 0 or top < 0 or left >= self.size_px[0] or top >= self.size_px[1]:
            return None
        right, bottom = min(left + width, self.size_px[0]), min(top + height, self.size_px[1])
        into = np.empty((height, width, 3), np.uint8)
        into[bottom - top :] = into[:, right - left :] = 255
        side_x, side_y = self.side_px
        for row in range(top // side_y, -(-bottom // side_y)):
            y0, y1 = max(top, row * side_y), min(bottom, (row + 1) * side_y)
            for column in range(left // side_x, -(-right // side_x)):
                picture = self._decode(row * self.columns + column)
                if picture is None:
                    return None
                x0, x1 = max(left, column * side_x), min(right, (column + 1) * side_x)
                into[y0 - top : y1 - top, x0 - left : x1 - left] = picture[
                    y0 - row * side_y : y1 - row * side_y,
                    x0 - column * side_x : x1 - column * side_x,
                ]
        return into

    def _decode_anew(self, number: int) -> RgbArray | None:
        data = os.pread(self._file, self._lengths[number], self._offsets[number])
        if data[:2] != b"\xff\xd8":  # nothing stored here, or nothing sound
            return None
        encoded = np.frombuffer(self._head + data[2:], np.uint8)
        picture = cv2.imdecode(encoded, FLAGS)
        if picture is None or picture.shape != (self.side_px[1], self.side_px[0], 3):
            return None
        return np.asarray(picture, np.uint8)


def jpeg_level(path: Path, size_px: tuple[int, int], cache_bytes: int) -> JpegLevel | None:
    """The level of that width and height, if it is a grid of JPEGs of three components."""
    try:
        file = tifffile.TiffFile(path)
    except tifffile.TiffFileError:  # OpenSlide knows more kinds of files, or says what is wrong
        return None
    with file as tiff:
        for page in tiff.pages:
            if (
                isinstance(page, tifffile.TiffPage)
                and (page.imagewidth, page.imagelength) == size_px
                and page.is_tiled
                and page.compression == tifffile.COMPRESSION.JPEG
                and page.photometric in (tifffile.PHOTOMETRIC.YCBCR, tifffile.PHOTOMETRIC.RGB)
                and page.samplesperpixel == 3
                and page.bitspersample == 8
                and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
            ):
                return JpegLevel(path, page, cache_bytes)
    return None


def bits_per_sample(path: Path) -> int:
    """Of a PNG, or of the first picture in a TIFF; 8 if the file is neither."""
    try:
        with open(path, "rb") as file:
            head = file.read(25)
        if head.startswith(b"\x89PNG"):
            return head[24]
        with tifffile.TiffFile(path) as tiff:
            return int(getattr(tiff.pages[0], "bitspersample", 8))
    except (tifffile.TiffFileError, OSError):
        return 8
