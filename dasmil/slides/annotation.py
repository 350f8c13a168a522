"""What was marked on a slide, as areas or as points, and which tiles that makes positive.

==================================== =============================================================
``<slide_id>.xml``                    polygons in level-0 pixels, as ASAP and Camelyon16 write them
``<slide_id>.tif, .tiff, .png``       mask over the whole slide, at any resolution; also
                                      ``<slide_id>_mask.tif``, as Camelyon16 names them
``<slide_id>.csv``                    points: columns x and y in level-0 pixels
==================================== =============================================================
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import numpy.typing as npt
import openslide
import tifffile
from PIL import Image, UnidentifiedImageError

from dasmil.errors import InputError
from dasmil.files import read_csv

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
MaskArray = npt.NDArray[np.bool_]

MASK_SUFFIXES = (".tif", ".tiff", ".png")
FILE_NAMES = (
    *("{slide_id}.xml", "{slide_id}.csv"),
    *(f"{{slide_id}}{suffix}" for suffix in MASK_SUFFIXES),
    *(f"{{slide_id}}_mask{suffix}" for suffix in MASK_SUFFIXES),
)
LESION_GROUPS = frozenset(["_0", "_1", "tumor", "metastases", "none"])  # in lower case
EXCLUDED_GROUPS = frozenset(["_2", "exclusion", "normal"])
POLYGON_TYPES = frozenset(["Polygon", "Spline", "Rectangle"])

MAX_MASK_PX = 2**28  # of a slide's mask in memory, one byte each: 100,000 x 200,000 px at 1/16
READ_BLOCK_PX = 4096  # side of the largest region of a mask decoded at once


def find_truth(folder: Path, slide_id: str) -> Path | None:
    """The slide's annotation in a folder; None where it has none.

    Raises
    ------
    InputError
        when there are two.
    """
    paths = [folder / name.format(slide_id=slide_id) for name in FILE_NAMES]
    found = [path for path in paths if path.is_file()]
    if len(found) > 1:
        raise InputError(
            f"{found[0]}: there is {found[1].name} beside it; keep one annotation of a slide"
        )
    return found[0] if found else None


def read_annotation(path: Path, size_px0: tuple[int, int]) -> "Points | Areas":
    """What a file marks on a slide.

    Parameters
    ----------
    size_px0: width and height of the slide.

    Raises
    ------
    InputError
        when the file is not readable as what its name says, or does not fit the slide.
    """
    if path.suffix == ".csv":
        return read_points(path, size_px0)
    if path.suffix == ".xml":
        return read_polygons(path, size_px0)
    return read_mask(path, size_px0)


@dataclass(frozen=True)
class Points:
    """Marked places; every one counts, whatever else its row of the table says.

    Parameters
    ----------
    xy_px0: (P, 2).
    """

    xy_px0: FloatArray

    @property
    def is_empty(self) -> bool:
        return len(self.xy_px0) == 0

    def tile_count(self, boxes_px0: IntArray) -> IntArray:
        """(N, 4) left, top, right, bottom → (N,) points in each; left and top edge are inside."""
        x, y = self.xy_px0[np.argsort(self.xy_px0[:, 0])].T
        first, end = np.searchsorted(x, boxes_px0[:, 0]), np.searchsorted(x, boxes_px0[:, 2])
        counts = [
            np.count_nonzero((y[i:j] >= top) & (y[i:j] < bottom))
            for i, j, top, bottom in zip(first, end, boxes_px0[:, 1], boxes_px0[:, 3], strict=True)
        ]
        return np.array(counts, dtype=np.int64)

    def positive_tiles(self, boxes_px0: IntArray, min_share: float = 0.5) -> MaskArray:
        """(N,) bool: at least one point lies in the tile; ``min_share`` is of areas."""
        return self.tile_count(boxes_px0) > 0


class Areas(ABC):
    """Marked areas of a slide.

    Parameters
    ----------
    size_px0: width and height of the slide.
    """

    def __init__(self, size_px0: tuple[int, int]):
        self.size_px0 = size_px0

    @abstractmethod
    def mask(self, downsample: float) -> MaskArray:
        """(H, W) bool over the whole slide, whose pixels are ``downsample`` level-0 pixels wide."""

    @cached_property
    @abstractmethod
    def finest(self) -> MaskArray:
        """(H, W) bool over the whole slide, as fine as memory allows: from it shares are taken."""

    @property
    def is_empty(self) -> bool:
        return not self.finest.any()

    def tile_share(self, boxes_px0: IntArray) -> FloatArray:
        """(N, 4) left, top, right, bottom → (N,) share of each that is marked, in 0..1.

        Exact on :attr:`finest`, also where edges of tiles cut its pixels.
        """
        mask = self.finest
        share = np.zeros(len(boxes_px0))
        limits = np.array([mask.shape[1], mask.shape[0]] * 2)
        boxes = boxes_px0 * (limits / np.array(self.size_px0 * 2))
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        for number, (left, top, right, bottom) in enumerate(np.clip(boxes, 0, limits)):
            rows, columns = _cells(top, bottom), _cells(left, right)
            cut = mask[rows, columns]
            if cut.any():
                share[number] = _cover(top, bottom) @ cut @ _cover(left, right) / areas[number]
        return share

    def positive_tiles(self, boxes_px0: IntArray, min_share: float = 0.5) -> MaskArray:
        """(N,) bool: at least this share of the tile is marked."""
        return self.tile_share(boxes_px0) >= min_share - 1e-9


def _cells(low: float, high: float) -> slice:
    """The pixels that an interval touches."""
    return slice(int(np.floor(low)), int(np.ceil(high)))


def _cover(low: float, high: float) -> FloatArray:
    """How much of each of these pixels lies in the interval."""
    edges = np.arange(np.floor(low), np.ceil(high) + 1)
    return np.diff(np.clip(edges, low, high))


def read_points(path: Path, size_px0: tuple[int, int]) -> Points:
    """A table with the columns x and y; others are not read."""
    columns, rows = read_csv(path)
    if not {"x", "y"} <= set(columns):
        raise InputError(f"{path}: points need the columns x and y, in level-0 pixels")
    try:
        xy = np.array([(float(row["x"]), float(row["y"])) for row in rows]).reshape(-1, 2)
    except ValueError as error:
        raise InputError(f"{path}: {error}; x and y are level-0 pixels") from None
    outside = ~((xy >= 0) & (xy <= np.array(size_px0))).all(axis=1)
    if outside.any():
        x, y = xy[outside][0]
        raise InputError(
            f"{path}: the point {x:g},{y:g} lies outside the slide of {size_px0[0]} x "
            f"{size_px0[1]} px; x and y are level-0 pixels"
        )
    return Points(xy)


class Polygons(Areas):
    """Areas inside polygons.

    A pixel of a mask is marked when its centre lies inside. :attr:`finest` has the smallest power
    of two as downsample with which it has at most 2^28 pixels: 16 for 100,000 x 200,000 px, 1 for
    16,000 x 16,000 px.

    Parameters
    ----------
    lesions: each (V, 2) x, y in level-0 pixels.
    excluded: cut out of all lesions.
    """

    def __init__(
        self,
        size_px0: tuple[int, int],
        lesions: tuple[FloatArray, ...] = (),
        excluded: tuple[FloatArray, ...] = (),
    ):
        super().__init__(size_px0)
        self.lesions = lesions
        self.excluded = excluded

    def mask(self, downsample: float) -> MaskArray:
        mask = np.zeros(_shape(self.size_px0, downsample), dtype=bool)
        for polygons, value in ((self.lesions, True), (self.excluded, False)):
            for xy in polygons:
                _fill(mask, xy / downsample, value)
        return mask

    @cached_property
    def finest(self) -> MaskArray:
        return self.mask(_reduction(self.size_px0))


def _shape(size_px0: tuple[int, int], downsample: float) -> tuple[int, int]:
    """Rows and columns of a mask."""
    width, height = (max(1, round(length / downsample)) for length in size_px0)
    return height, width


def _reduction(size: tuple[int, int]) -> int:
    """The smallest power of two by which a mask of this size must be reduced."""
    factor = 1
    while (size[0] // factor) * (size[1] // factor) > MAX_MASK_PX:
        factor *= 2
    return factor


def _fill(mask: MaskArray, xy: FloatArray, value: bool) -> None:
    """Set the pixels whose centre lies inside a polygon, by the even-odd rule.

    OpenCV and Pillow set those that its outline touches too: half a pixel too much on every side.
    """
    xy = xy - 0.5  # pixel (0, 0) has its centre at 0, 0
    start, end = xy, np.roll(xy, -1, axis=0)
    first, last = (
        np.clip(np.ceil(bound(start[:, 1], end[:, 1])).astype(int), 0, len(mask))
        for bound in (np.minimum, np.maximum)
    )
    num_rows = last - first  # of pixels whose centre the edge passes
    edge = np.repeat(np.arange(len(xy)), num_rows)
    row = np.arange(len(edge)) - np.repeat(num_rows.cumsum() - num_rows, num_rows) + first[edge]
    (x0, y0), (x1, y1) = start[edge].T, end[edge].T
    crossing = np.ceil(x0 + (row - y0) * (x1 - x0) / (y1 - y0)).astype(int)
    order = np.lexsort((crossing, row))
    bounds = np.clip(crossing[order], 0, mask.shape[1]).reshape(-1, 2)
    for at, (left, right) in zip(row[order][::2].tolist(), bounds.tolist(), strict=True):
        mask[at, left:right] = value


def read_polygons(path: Path, size_px0: tuple[int, int]) -> Polygons:
    """Annotations of ASAP.

    Groups _0, _1, Tumor, Metastases and None are lesions; _2, Exclusion and Normal are cut out of
    them. What has less than three corners has no area, and is left out.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise InputError(f"{path}: not XML ({error})") from error
    if root.tag != "ASAP_Annotations":
        raise InputError(
            f"{path}: its root is {root.tag!r}, not ASAP_Annotations; save it from ASAP"
        )
    lesions: list[FloatArray] = []
    excluded: list[FloatArray] = []
    for annotation in root.iter("Annotation"):
        group, name = annotation.get("PartOfGroup", ""), annotation.get("Name", "")
        if group.lower() not in LESION_GROUPS | EXCLUDED_GROUPS:
            raise InputError(
                f"{path}: {name!r} is of the group {group!r}, which is not known; lesions are of "
                "_0, _1, Tumor, Metastases or None, what is cut out of _2, Exclusion or Normal"
            )
        if annotation.get("Type") not in POLYGON_TYPES:
            raise InputError(
                f"{path}: {name!r} is a {annotation.get('Type')}, not a polygon; "
                "points are given as a CSV table with the columns x and y"
            )
        xy = _corners(path, name, annotation)
        if len(xy) < 3:
            continue
        if (xy.max(axis=0) < 0).any() or (xy.min(axis=0) > size_px0).any():
            raise InputError(
                f"{path}: {name!r} lies outside the slide of {size_px0[0]} x {size_px0[1]} px; "
                "is it of another slide?"
            )
        (lesions if group.lower() in LESION_GROUPS else excluded).append(xy)
    return Polygons(size_px0, tuple(lesions), tuple(excluded))


def _corners(path: Path, name: str, annotation: ElementTree.Element) -> FloatArray:
    """(V, 2) in their order."""
    corners = annotation.findall("Coordinates/Coordinate")
    try:
        values = sorted((float(c.attrib["Order"]), _xy(c)) for c in corners)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{path}: the corners of {name!r} are not all numbers ({type(error).__name__}: {error})"
        ) from error
    return np.array([xy for _, xy in values], dtype=np.float64).reshape(-1, 2)


def _xy(corner: ElementTree.Element) -> tuple[float, float]:
    x, y = float(corner.attrib["X"]), float(corner.attrib["Y"])
    if not np.isfinite((x, y)).all():
        raise ValueError(f"{x},{y}")
    return x, y


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
        height, width = _shape(self.size_px0, downsample)
        for level, (stored_width, stored_height) in enumerate(self.levels):
            if abs(stored_width - width) <= 1 and abs(stored_height - height) <= 1:
                return self._read(level)
        return _resized(self.finest, (width, height))

    @cached_property
    def finest(self) -> MaskArray:
        for level, (width, height) in enumerate(self.levels):
            if width * height <= MAX_MASK_PX:
                return self._read(level)
        return self._read(len(self.levels) - 1)

    def _read(self, level: int) -> MaskArray:
        """Block by block, so that little more than the mask itself is in memory."""
        width, height = self.levels[level]
        factor = _reduction((width, height))
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
    return path.suffix != ".png" and openslide.OpenSlide.detect_format(path) is not None


def _refuse_odd_pixels(path: Path) -> None:
    """OpenSlide gives colours: what is not 8 bits of grey (or RGB) would change its values."""
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        kinds = (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB)
        if page.bitspersample != 8 or page.photometric not in kinds:
            raise InputError(
                f"{path}: its pixels are {page.bitspersample} bits "
                f"({tifffile.PHOTOMETRIC(page.photometric).name}); save it as 8-bit grey"
            )


def _picture(path: Path) -> npt.NDArray[np.uint8]:
    """(H, W) values of a picture without levels; of colours the largest channel."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise InputError(f"{path}: the mask cannot be read: {error}") from error
    if pixels.ndim == 3:
        pixels = pixels[..., : 3 if pixels.shape[2] > 2 else 1].max(axis=2)
    if pixels.max(initial=0) > 255:
        raise InputError(f"{path}: it holds the value {pixels.max()}; save it as 8-bit grey")
    return pixels.astype(np.uint8)
