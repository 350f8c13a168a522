"""Pictures without tiles, decoded as a whole by Pillow: only named formats, only so many pixels."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dasmil.errors import InputError
from dasmil.files import must_be_file

TO_A_PYRAMID = (
    "convert it to a pyramid of small tiles, for example with "
    "`vips tiffsave IN OUT.tiff --tile --pyramid --compression jpeg`"
)


def open_picture(path: Path, formats: Sequence[str], max_pixels: int) -> Image.Image:
    """Decode a picture and return it; its file is closed.

    Left to itself, Pillow opens dozens of formats by their content, whatever the name ends with,
    and starts Ghostscript for PostScript.

    Parameters
    ----------
    formats: Pillow's names of the formats that are read, such as ``PNG`` and ``TIFF``.
    max_pixels: limit to width times height, checked before anything is decoded.

    Raises
    ------
    InputError
        if the path is no regular file, the file is in another format, too large, or damaged.
    """
    names = " or ".join(formats)
    must_be_file(path, f"give a picture ({names})")
    try:
        with Image.open(path, formats=tuple(formats)) as image:
            width, height = image.size
            if not 0 < width * height <= max_pixels:
                raise InputError(
                    f"{path}: a picture of {width} x {height} px without tiles; at most "
                    f"{max_pixels:,} px are decoded as a whole: reduce it, or {TO_A_PYRAMID}"
                )
            image.load()
            return image
    except InputError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit is the lower one
        raise InputError(
            f"{path}: a picture without tiles, too large to be decoded as a whole ({error}): "
            f"reduce it, or {TO_A_PYRAMID}"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{path}: cannot be read as {names}; save it as such a file") from error
    except Exception as error:  # on damaged files Pillow's decoders raise whatever they run into
        raise InputError(
            f"{path}: cannot be decoded ({type(error).__name__}: {error}); save it again"
        ) from error
