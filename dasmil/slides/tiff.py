"""Decode the JPEG tiles of a TIFF slide without OpenSlide.

OpenSlide spends most of ``read_region`` on compositing decoded tiles. If a level is a plain grid of
JPEGs, as in Aperio's files and in plain pyramids, this module copies the tiles side by side. It
reads a level only if samples of it equal OpenSlide's pixels. If the decoder warns, OpenSlide reads
the region, and refuses it.
"""

import logging
import os
import weakref
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import simplejpeg
import tifffile

from dasmil.errors import InputError, explaining

logging.getLogger("tifffile").disabled = True  # it logs each tag of a damaged file

T = TypeVar("T")
RgbArray = npt.NDArray[np.uint8]

START = b"\xff\xd8"  # of a JPEG
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
VENDORS = frozenset({"aperio", "generic-tiff"})  # their JPEGs neither overlap nor leave gaps
# tells the decoder that the three components are RGB, which only the TIFF's header states
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
        # a large slide has a million of each: arrays take an eighth of the memory of lists
        self._offsets = np.asarray(page.dataoffsets, np.int64)
        self._lengths = np.asarray(page.databytecounts, np.int64)
        self._space = "RGB" if page.photometric == tifffile.PHOTOMETRIC.RGB else "YCbCr"
        self._head = _head(page)
        self._file = os.open(path, os.O_RDONLY)
        self._file_bytes = os.fstat(self._file).st_size
        self.close = weakref.finalize(self, os.close, self._file)
        kept = max(1, cache_bytes // (3 * page.tilewidth * page.tilelength))
        self._decode = lru_cache(kept)(self._decode_tile)

    def read(self, left: int, top: int, width: int, height: int) -> RgbArray | None:
        """Pixels of a region of the level; white beyond its right and lower border.

        Parameters
        ----------
        left, top, width, height: in pixels of the level.

        Returns
        -------
        (height, width, 3) uint8 RGB; None if a tile cannot be decoded in this way.
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

    def _decode_tile(self, number: int) -> RgbArray | None:
        length, offset = int(self._lengths[number]), int(self._offsets[number])
        if offset + length > self._file_bytes:
            return None
        data = os.pread(self._file, length, offset)
        if data[:2] != START:  # empty or damaged
            return None
        encoded = self._head + data[2:]
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(encoded)
            if (width, height) != self.side_px or space != self._space:
                return None
            return np.asarray(simplejpeg.decode_jpeg(encoded), np.uint8)
        except ValueError:  # an error of the decoder, or a warning such as "Corrupt JPEG data"
            return None


def jpeg_level(path: Path, size_px: tuple[int, int], cache_bytes: int) -> JpegLevel | None:
    """The level of that width and height; None if it is no grid of JPEGs of three components."""

    def is_wanted(page: tifffile.TiffPage) -> bool:
        return bool(
            (page.imagewidth, page.imagelength) == size_px
            and page.is_tiled
            and page.compression == tifffile.COMPRESSION.JPEG
            and page.photometric in (tifffile.PHOTOMETRIC.YCBCR, tifffile.PHOTOMETRIC.RGB)
            and page.samplesperpixel == 3
            and page.bitspersample == 8
            and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
            and len(page.dataoffsets) == len(page.databytecounts) == _num_tiles(page)
        )

    return _of_page(path, is_wanted, lambda page: JpegLevel(path, page, cache_bytes))


def _num_tiles(page: tifffile.TiffPage) -> int:
    return int(-(-page.imagewidth // page.tilewidth) * -(-page.imagelength // page.tilelength))


def bits_per_sample(path: Path) -> int:
    """Bits per colour of a PNG, or of the first picture in a TIFF; 8 if the file is neither."""
    with open(path, "rb") as file:
        head = file.read(25)
    if head.startswith(b"\x89PNG") and len(head) == 25:
        return head[24]
    return _of_page(path, lambda _: True, lambda page: int(page.bitspersample)) or 8


def refuse_damaged_picture(path: Path) -> None:
    """Raise :class:`InputError` if OpenSlide would refuse a JPEG or TIFF as damaged.

    Pillow reads tiled TIFFs that are so damaged that OpenSlide does not detect them, and returns
    pixels of JPEGs although their decoder warns. Only the first page of a TIFF is checked.
    """
    with open(path, "rb") as file:
        start = file.read(4)
        head, pieces = b"", [(0, path.stat().st_size)]
        if start.startswith(TIFF_STARTS):
            is_tiled, head, pieces = _of_page(path, lambda _: True, _stored) or (True, b"", [])
            if is_tiled:
                raise InputError(f"{path}: a tiled TIFF that OpenSlide cannot read; is it damaged?")
        elif not start.startswith(START):
            return
        for offset, length in pieces:
            file.seek(offset)
            encoded = head + file.read(length)[len(head) and 2 :]
            with explaining(f"{path}: a damaged JPEG", "save it again", ValueError):
                _, _, space, _ = simplejpeg.decode_jpeg_header(encoded)
                colors = "CMYK" if space in ("CMYK", "YCCK") else "GRAY"
                simplejpeg.decode_jpeg(encoded, colors, min_factor=8)  # small, from all the data


def _stored(page: tifffile.TiffPage) -> tuple[bool, bytes, list[tuple[int, int]]]:
    """Whether a page is tiled, the head of each of its JPEGs, and their offsets and lengths."""
    is_jpeg = page.compression == tifffile.COMPRESSION.JPEG
    pieces = list(zip(page.dataoffsets, page.databytecounts)) if is_jpeg else []
    return bool(page.is_tiled), _head(page), pieces


def _head(page: tifffile.TiffPage) -> bytes:
    """The bytes to put before each JPEG of a page: its colour space and its tables."""
    is_rgb = page.photometric == tifffile.PHOTOMETRIC.RGB
    tables = page.jpegtables[2:-2] if page.jpegtables else b""
    return START + (ADOBE_RGB if is_rgb else b"") + tables


def _of_page(
    path: Path,
    is_wanted: Callable[[tifffile.TiffPage], bool],
    get: Callable[[tifffile.TiffPage], T],
) -> T | None:
    """``get`` of the first wanted page; None if there is none, or the file is damaged."""
    try:
        with tifffile.TiffFile(path) as tiff:
            for page in tiff.pages:
                if isinstance(page, tifffile.TiffPage) and is_wanted(page):
                    return get(page)
    except Exception:  # tifffile raises many kinds on damaged directories; OpenSlide then decides
        return None
    return None
