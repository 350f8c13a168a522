"""Pictures are read in the named formats alone, and their size is known before their pixels."""

import os
import struct
import zlib

import numpy as np
import psutil
import pytest
from PIL import Image

from dasmil.errors import InputError
from dasmil.slides import pictures
from dasmil.slides.pictures import open_picture

FORMATS = ("PNG", "TIFF")
MAX_PIXELS = 10_000


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A grey PNG that claims a size; its pixels are compressed ``data``."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_picture_is_decoded_and_its_file_closed(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (100, 100), dtype=np.uint8)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pixels).save(path)
    found = open_picture(path, FORMATS, MAX_PIXELS)
    path.unlink()
    assert (np.asarray(found) == pixels).all()
    assert not [file for file in psutil.Process().open_files() if file.path.startswith(str(path))]


@pytest.mark.parametrize("kind", ["EPS", "BMP", "GIF", "JPEG", "PPM", "PDF", "WEBP", "SGI"])
def test_other_formats_are_refused_whatever_the_name_says(tmp_path, kind, monkeypatch):
    """PostScript starts Ghostscript in Pillow; no process may start."""
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    path = tmp_path / "a.png"
    with open(path, "wb") as file:
        Image.new("RGB", (20, 10)).save(file, format=kind)
    with pytest.raises(InputError, match=r"a\.png: cannot be read as PNG or TIFF; save it"):
        open_picture(path, FORMATS, MAX_PIXELS)


@pytest.mark.parametrize("size", [(101, 100), (13_300, 13_300), (2**30, 2**30), (0, 5), (5, 0)])
def test_the_size_is_checked_before_anything_is_decoded(tmp_path, size, monkeypatch):
    monkeypatch.setattr(pictures.Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    path = tmp_path / "a.png"
    path.write_bytes(png(*size))
    with pytest.raises(InputError, match=r"a\.png: .*(without tiles|cannot be read)"):
        open_picture(path, FORMATS, MAX_PIXELS)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_truncated_picture_is_an_error(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (90, 90), dtype=np.uint8)
    Image.fromarray(pixels).save(path, compression="tiff_lzw")
    whole = path.read_bytes()
    for length in (0, 7, len(whole) // 2, len(whole) - 1000):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cannot be (read|decoded)"):
            open_picture(path, FORMATS, MAX_PIXELS)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path, tmp_path / "none.png"):
        with pytest.raises(InputError, match=r"give a picture \(PNG or TIFF\)"):
            open_picture(path, FORMATS, MAX_PIXELS)
    with pytest.raises(InputError):
        open_picture(tmp_path / ("n" * 300), FORMATS, MAX_PIXELS)
    with pytest.raises(InputError):
        open_picture(tmp_path / "a\0.png", FORMATS, MAX_PIXELS)
