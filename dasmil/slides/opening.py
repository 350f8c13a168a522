"""Open a slide by OpenSlide or Pillow; refuse files that would take too much memory."""

from pathlib import Path

import openslide
from PIL import UnidentifiedImageError

from dasmil.errors import InputError
from dasmil.files import must_be_file
from dasmil.slides.pictures import TO_A_PYRAMID, open_picture
from dasmil.slides.tiff import refuse_damaged_picture

MAX_STORED_TILE_PX = 2**28  # a stored tile is decoded as a whole: 2.5 GB at this size
PICTURES = ("PNG", "JPEG", "TIFF", "BMP")  # slides without tiles, which Pillow decodes


def slide_file(path: Path) -> Path:
    """The file to open: of a folder, one of the files of the DICOM slide in it.

    Raises
    ------
    InputError
        if there is no such file, or the folder holds no DICOM slide or several.
    """
    try:
        path.stat()
        names = list(path.iterdir()) if path.is_dir() else None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:  # too long a name, circular links, no permission
        raise InputError(f"{path}: cannot be opened: {error.strerror}") from error
    if names is None:
        must_be_file(path, "give the file of a slide")
        _refuse_odd_parts(path.with_suffix(""), path.suffix.lower() == ".mrxs")
        return path
    _refuse_odd_parts(path, True)
    files = sorted(p for p in names if p.suffix.lower() == ".dcm" and p.name[0] != ".")
    if not files:
        raise InputError(f"{path}: a folder without DICOM (.dcm) files is no slide; name a file")
    if (num_slides := len(set(map(_dicom_series, files)) - {None})) > 1:
        raise InputError(
            f"{path}: the folder holds {num_slides} DICOM slides; give each its own folder, "
            "or name one file of each in a cohort table"
        )
    return files[0]


def _dicom_series(file: Path) -> str | None:
    """The slide that a file belongs to; None for a label or an overview without its slide."""
    try:
        with openslide.OpenSlide(file) as slide:
            return slide.properties.get("dicom.SeriesInstanceUID")
    except (openslide.OpenSlideError, OSError):
        return None


def _refuse_odd_parts(folder: Path, is_read: bool) -> None:
    """Refuse FIFOs and devices in a slide's folder, on which OpenSlide would wait forever."""
    for path in folder.iterdir() if is_read and folder.is_dir() else ():
        if not path.is_dir():
            must_be_file(path, "remove it from the folder of the slide")


def open_slide(path: Path, cache_bytes: int) -> openslide.AbstractSlide:
    """Open one of OpenSlide's formats, or a picture as a slide of one level.

    Raises
    ------
    InputError
        if the file is damaged or neither, or each part of it would take too much memory.
    """
    try:
        if openslide.OpenSlide.detect_format(path) is not None:
            handle = openslide.OpenSlide(path)
            refuse_giant_tiles(path, handle, MAX_STORED_TILE_PX)
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


def refuse_giant_tiles(path: Path, handle: openslide.AbstractSlide, max_px: int) -> None:
    """Raise :class:`InputError` for huge stored tiles: each is decoded in memory as a whole."""
    for level in range(handle.level_count):
        width, height = (
            int(handle.properties.get(f"openslide.level[{level}].tile-{side}", 0))
            for side in ("width", "height")
        )
        if width * height > max_px:
            raise InputError(
                f"{path}: stored in tiles of {width} × {height} px, which take too much memory; "
                + TO_A_PYRAMID
            )
