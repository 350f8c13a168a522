"""Files of the demo's synthetic slides: pyramidal TIFFs, the drawn truth and the cohort's table."""

import json
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
import tifffile

from dasmil.demo.drawing import DRAWING_VERSION, draw_slide
from dasmil.errors import InputError
from dasmil.files import atomic_path, write_text
from dasmil.tables import write_csv

DEFAULT_NUM_SLIDES: Mapping[str, int] = MappingProxyType({"train": 96, "val": 24, "test": 40})
COHORT_COLUMNS = ("slide_id", "path", "label", "patient_id", "split")
TRUTH_DOWNSAMPLE = 4

_TILE_PX = 256


def write_pyramid(
    path: Path, pixels: np.ndarray, mpp: float, downsamples: Sequence[int] = (1, 2, 4, 8)
) -> None:
    """Write (H, W, 3) uint8 RGB as a tiled pyramidal TIFF, which OpenSlide calls generic-tiff.

    ``mpp`` is that of ``pixels``; ``downsamples`` are relative to it and begin with 1. Tiles are
    deflated, hence without loss.
    """
    height, width = pixels.shape[:2]
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary) as tiff:
        for downsample in downsamples:
            size = max(1, round(width / downsample)), max(1, round(height / downsample))
            per_cm = 1e4 / (mpp * downsample)
            tiff.write(
                cv2.resize(pixels, size, interpolation=cv2.INTER_AREA),
                photometric="rgb",
                tile=(_TILE_PX, _TILE_PX),
                compression="zlib",
                compressionargs={"level": 1},  # higher levels take far longer and save 5 %
                predictor=True,
                maxworkers=1,
                subfiletype=int(downsample > 1),
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                metadata=None,
            )


def write_cohort(
    folder: Path,
    *,
    num_slides: Mapping[str, int] = DEFAULT_NUM_SLIDES,
    seed: int = 0,
    size_px0: tuple[int, int] = (2048, 2048),
    mpp: float = 0.5,
    workers: int = 1,
) -> Path:
    """Draw a cohort in which half the slides of every split (rounded down) hold a tumour.

    Writes ``slides/<slide_id>.tiff``, ``truth/<slide_id>.png`` (0 or 255; the mask reduced 4 times
    by area, then cut at one half) and, last, ``cohort.csv`` with paths relative to ``folder``. The
    parameters are saved in ``demo.json``: files drawn with the same parameters are kept, otherwise
    all slides are drawn again.

    Parameters
    ----------
    num_slides: slides of each split
    size_px0: width and height of a slide in pixels
    mpp: micrometres per pixel
    workers: processes to draw with

    Returns
    -------
    The path of ``cohort.csv``.

    Raises
    ------
    InputError
        if the folder holds a ``cohort.csv`` of something else.
    """
    table = folder / "cohort.csv"
    parameters = {
        "drawing_version": DRAWING_VERSION,
        "num_slides": dict(num_slides),
        "seed": seed,
        "size_px0": list(size_px0),
        "mpp": mpp,
    }
    _prepare_folder(folder, json.dumps(parameters, indent=2) + "\n")
    rows, jobs = [], []
    for row, slide_seed in _plan_cohort(num_slides, seed):
        slide, truth = folder / row["path"], folder / "truth" / f"{row['slide_id']}.png"
        rows.append(row)
        if not (slide.is_file() and truth.is_file()):
            drawn = {"seed": slide_seed, "tumour": row["label"] == "tumour"}
            jobs.append((slide, truth, {**drawn, "size_px0": size_px0, "mpp": mpp}))
    if workers == 1:
        for job in jobs:
            _write_slide(*job)
    else:
        context = multiprocessing.get_context("spawn")  # OpenCV's threads do not survive a fork
        with ProcessPoolExecutor(workers, context, cv2.setNumThreads, (1,)) as pool:
            list(pool.map(_write_slide, *zip(*jobs)))
    write_csv(table, COHORT_COLUMNS, rows)
    return table


def _prepare_folder(folder: Path, parameters: str) -> None:
    """Remove the slides of a demo with other parameters, and note the new ones."""
    note, table = folder / "demo.json", folder / "cohort.csv"
    if table.exists() and not note.exists():
        raise InputError(f"{folder}: its cohort.csv is not the demo's; choose another folder")
    if note.exists() and note.read_text(encoding="utf-8") == parameters:
        return
    outdated = [table, *folder.glob("slides/demo_*.tiff"), *folder.glob("truth/demo_*.png")]
    for path in outdated:
        path.unlink(missing_ok=True)
    write_text(note, parameters)


def _plan_cohort(num_slides: Mapping[str, int], seed: int) -> Iterator[tuple[dict[str, str], int]]:
    """Rows of the table with the seeds of their slides; neither id nor seed reveals the label."""
    rng = np.random.default_rng(seed)
    splits = [split for split, count in num_slides.items() for _ in range(count)]
    seeds = rng.integers(2**32, size=len(splits))
    tumour = np.concatenate(
        [rng.permutation(np.arange(count) < count // 2) for count in num_slides.values()]
    )
    for number, split in enumerate(splits):
        slide_id = f"demo_{number:03d}"
        row = {
            "slide_id": slide_id,
            "path": f"slides/{slide_id}.tiff",
            "label": "tumour" if tumour[number] else "normal",
            "patient_id": f"patient_{number:03d}",
            "split": split,
        }
        yield row, int(seeds[number])


def _write_slide(path: Path, truth: Path, drawn: Mapping[str, Any]) -> None:
    """Write the truth, then the slide; ``drawn`` are arguments of :func:`draw_slide`."""
    slide = draw_slide(**drawn)
    height, width = (max(1, length // TRUTH_DOWNSAMPLE) for length in slide.tumour.shape)
    share = cv2.resize(
        slide.tumour.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_AREA
    )
    with atomic_path(truth) as temporary:
        cv2.imwrite(str(temporary), np.where(share > 127, 255, 0).astype(np.uint8))
    write_pyramid(path, slide.pixels, slide.mpp)
