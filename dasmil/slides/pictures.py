"""Pictures without tiles, which Pillow decodes as a whole: limited formats and sizes."""

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
    """Decode a picture and close its file.

    Without a list of formats, Pillow opens dozens of formats by their content, whatever the file's
    suffix, and starts Ghostscript for PostScript.

    Parameters
    ----------
    formats: Pillow's names of the allowed formats, such as ``PNG`` and ``TIFF``.
    max_pixels: limit of width times height, checked before decoding.

    Raises
    ------
    InputError
        if the path is no regular file, or the file has another format, is too large or damaged.
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
    except Image.DecompressionBombError as error:  # Pillow's own limit is lower
        raise InputError(
            f"{path}: a picture without tiles, too large to be decoded as a whole ({error}): "
            f"reduce it, or {TO_A_PYRAMID}"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{path}: cannot be read as {names}; save it as such a file") from error
    except Exception as error:  # Pillow's decoders raise any kind of error on damaged files
        raise InputError(
            f"{path}: cannot be decoded ({type(error).__name__}: {error}); save it again"
        ) from error
