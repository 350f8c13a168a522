"""Slides of 200,000 × 200,000 px as files of a few MB, and the memory that a command takes.

BigTIFFs of JPEG tiles in which equal tiles are stored once: nearly all of them are one white JPEG,
and the tissue is one drawn picture, again and again.
"""

import math
import os
import struct
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import psutil

from dasmil.demo.drawing import draw_slide

CELL_PX0 = 4096  # side of a piece of tissue with the glass around it
POLL_S = 0.02


def write_gigapixel(
    path: Path,
    side_px0: int = 200_000,
    mpp: float = 0.25,
    tissue: float = 0.03,
    downsamples: Sequence[int] = (1, 4, 16, 64),
    tile_px: int | tuple[int, int] = 512,
) -> Path:
    """A square slide which OpenSlide reads as a generic TIFF.

    Parameters
    ----------
    tissue: share of the slide's cells that hold a piece of tissue.
    downsamples: of the stored levels.
    tile_px: side of a stored tile, or its width and height.
    """
    drawn = draw_slide(seed=3, tumour=True, size_px0=(1024, 1024), mpp=1.0).pixels
    piece = cv2.resize(drawn, (CELL_PX0, CELL_PX0), interpolation=cv2.INTER_CUBIC)
    count = math.ceil(side_px0 / CELL_PX0)
    cells = np.random.default_rng(0).permutation(count**2).reshape(count, count)
    with open(path, "wb") as file:
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        pointer = 8  # where the place of the next directory is written
        for downsample in downsamples:
            pointer = _write_level(
                file,
                pointer,
                piece[::downsample, ::downsample],
                cells < max(1, tissue * count**2),
                side_px0 // downsample,
                mpp * downsample,
                (tile_px, tile_px) if isinstance(tile_px, int) else tile_px,
            )
    return path


def _write_level(file, pointer, piece, cells, side_px, mpp, tile_px) -> int:
    """One directory with its tiles; where the place of the next one is to be written."""
    width, height = tile_px
    columns, rows = math.ceil(side_px / width), math.ceil(side_px / height)
    places = np.empty((rows, columns), np.uint64)
    sizes = np.empty((rows, columns), np.uint32)
    stored: dict[bytes, tuple[int, int]] = {}
    cell_px = len(piece)
    for row in range(rows):
        top, above = divmod(row * height, cell_px)
        bottom = math.ceil((row + 1) * height / cell_px)
        for column in range(columns):
            left, before = divmod(column * width, cell_px)
            right = math.ceil((column + 1) * width / cell_px)
            inside = cells[top:bottom, left:right]
            # equal keys, equal pixels; without tissue all are
            key = bytes([*inside.shape]) + inside.tobytes() + struct.pack("<II", above, before)
            key = key if inside.any() else b""
            if key not in stored:
                picture = np.full((height, width, 3), 255, np.uint8)
                for y, x in np.argwhere(inside):
                    _paste(piece, picture, y * cell_px - above, x * cell_px - before)
                jpeg = cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes()
                stored[key] = file.tell(), len(jpeg)
                file.write(jpeg)
            places[row, column], sizes[row, column] = stored[key]

    resolution = struct.pack("<II", round(1e7 / mpp), 1000)  # pixels per centimetre
    short, long, rational, long8 = 3, 4, 5, 16
    tags = [
        (254, long, 1, struct.pack("<I", pointer > 8)),  # a reduced image
        (256, long, 1, struct.pack("<I", side_px)),
        (257, long, 1, struct.pack("<I", side_px)),
        (258, short, 3, struct.pack("<HHH", 8, 8, 8)),
        (259, short, 1, struct.pack("<H", 7)),  # JPEG
        (262, short, 1, struct.pack("<H", 6)),  # YCbCr
        (277, short, 1, struct.pack("<H", 3)),
        (282, rational, 1, resolution),
        (283, rational, 1, resolution),
        (284, short, 1, struct.pack("<H", 1)),
        (296, short, 1, struct.pack("<H", 3)),  # centimetre
        (322, long, 1, struct.pack("<I", width)),
        (323, long, 1, struct.pack("<I", height)),
        (324, long8, places.size, places.tobytes()),
        (325, long, sizes.size, sizes.tobytes()),
        (530, short, 2, struct.pack("<HH", 2, 2)),  # chroma, as OpenCV writes it
    ]
    entries = b""
    for tag, kind, count, data in tags:
        if len(data) > 8:
            file.seek(-(-file.tell() // 8) * 8)
            data, place = struct.pack("<Q", file.tell()), data
            file.write(place)
        entries += struct.pack("<HHQ", tag, kind, count) + data.ljust(8, b"\0")
    directory = -(-file.tell() // 8) * 8
    file.seek(pointer)
    file.write(struct.pack("<Q", directory))
    file.seek(directory)
    file.write(struct.pack("<Q", len(tags)) + entries)
    pointer = file.tell()
    file.write(bytes(8))
    return pointer


def _paste(piece: np.ndarray, picture: np.ndarray, top: int, left: int) -> None:
    """Put a piece into a picture, at a place that may lie partly outside."""
    y0, x0 = max(top, 0), max(left, 0)
    y1 = min(top + len(piece), picture.shape[0])
    x1 = min(left + len(piece), picture.shape[1])
    if y0 < y1 and x0 < x1:
        picture[y0:y1, x0:x1] = piece[y0 - top : y1 - top, x0 - left : x1 - left]


def peak_bytes(command: Sequence[str], environment: Mapping[str, str] = {}) -> dict[str, int]:
    """Run a command to its good end.

    Returns
    -------
    ``tree``: the largest sum of the resident sets of the command and its descendants, looked at
    every 20 ms, and ``largest``: the largest of one of them. A page that two of them share counts
    twice in the sum.
    """
    peaks = {"tree": 0, "largest": 0}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **environment}
    ) as process:
        parent = psutil.Process(process.pid)
        while process.poll() is None:
            sizes = [_resident(parent)]
            sizes += [_resident(child) for child in _children(parent)]
            peaks["tree"] = max(peaks["tree"], sum(sizes))
            peaks["largest"] = max(peaks["largest"], *sizes)
            time.sleep(POLL_S)
        output = process.stdout.read().decode() if process.stdout else ""
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{output}")
    return peaks


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0
