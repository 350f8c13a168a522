"""Slides of JPEG tiles, some of which are then damaged."""

from pathlib import Path

import cv2
import numpy as np
import tifffile

SIDE = 128


def picture(width: int, height: int) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    return np.clip(150 + 35 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def write_jpeg_pyramid(
    path: Path,
    width: int,
    height: int,
    downsamples: tuple[int, ...],
    description: str | None = None,
) -> None:
    """A pyramid of JPEG tiles with 0.5 µm/px at its finest level."""
    full = picture(width, height)
    with tifffile.TiffWriter(path) as tiff:
        for downsample in downsamples:
            level = full[::downsample, ::downsample]
            rows, columns = -(-level.shape[0] // SIDE), -(-level.shape[1] // SIDE)
            padded = np.zeros((rows * SIDE, columns * SIDE, 3), np.uint8)
            padded[: level.shape[0], : level.shape[1]] = level
            squares = padded.reshape(rows, SIDE, columns, SIDE, 3).swapaxes(1, 2)
            jpegs = [
                cv2.imencode(".jpg", np.ascontiguousarray(square[..., ::-1]))[1].tobytes()
                for square in squares.reshape(-1, SIDE, SIDE, 3)
            ]
            tiff.write(
                iter(jpegs),
                shape=level.shape,
                dtype=np.uint8,
                photometric="rgb",
                compression="zlib",  # tifffile passes bytes on as they are, but writes no JPEG
                tile=(SIDE, SIDE),
                subfiletype=int(downsample > 1),
                resolution=(2e4 / downsample,) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
                description=description,
            )
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for page in tiff.pages:
            page.tags["Compression"].overwrite(7)
            page.tags["PhotometricInterpretation"].overwrite(6)


def damage(path: Path, *numbers: int, level: int = 0) -> None:
    """End some of a level's JPEGs in their middle; decoders give pixels, and a warning."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[level]
        places = [page.dataoffsets[n] + page.databytecounts[n] // 2 for n in numbers]
    with open(path, "r+b") as file:
        for place in places:
            file.seek(place)
            file.write(b"\xff\xd9")
