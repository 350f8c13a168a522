"""A cohort of many small slides through tile, embed and fit: seconds a slide, which must not grow.

Slides are so small (512 px, 20 tiles) and the network and model so tiny that next to all
that is measured is what dasmil does for a slide beside its pixels: claims, tables, headers, files.
The peer is a fourth of the cohort. ``again`` is the same command when everything is done: what it
costs to look through an interrupted cohort.
"""

import contextlib
import io
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from table import Row

from dasmil.cli import main
from dasmil.demo.slides import write_cohort
from dasmil.slides.cohort import SlideRow, read_cohort
from dasmil.slides.cohort import write_cohort as write_table

REPOSITORY = Path(__file__).resolve().parents[2]
DRAWN = {"train": 24, "val": 4, "test": 4}  # different slides; the cohort repeats their files
SCALES = ("x10", "x20")


def cohort_of(drawn: Sequence[SlideRow], num_slides: int, folder: Path) -> Path:
    """Files and a table of so many slides."""
    folder.mkdir()
    rows = []
    for number in range(num_slides):
        row = drawn[number % len(drawn)]
        path = folder / f"slide{number:05}{row.path.suffix}"
        shutil.copyfile(row.path, path)
        rows.append(replace(row, slide_id=path.stem, path=path, patient_id=None))
    write_table(folder / "cohort.csv", rows)
    return folder / "cohort.csv"


def command(*args: object) -> float:
    """The seconds that a command of dasmil takes."""
    silent, start = io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        code = main([str(arg) for arg in args])
    assert code == 0, silent.getvalue()
    return time.perf_counter() - start


def walk(
    drawn: Sequence[SlideRow], num_slides: int, folder: Path, workers: int
) -> dict[str, float]:
    """Seconds of each verb over a cohort of so many slides."""
    table = cohort_of(drawn, num_slides, folder)
    tiles, bags, runs = folder / "tiles", folder / "bags", folder / "runs"
    tile = ["tile", "--cohort", table, "--output", tiles, "--tile_px", 128]
    tile += ["--scales", "[x10,x20]", "--workers", max(1, workers)]
    embed = ["embed", "--tiles", tiles, "--output", bags, "--num_workers", workers]
    embed += [text for s in SCALES for text in (f"--extractors.{s}", "random:test_vit")]
    embed += ["--trainer.enable_progress_bar", "false"]
    fit = ["fit", "--config", REPOSITORY / "configs" / "mil.yaml"]
    fit += ["--config", REPOSITORY / "tests" / "conf" / "dasmil.yaml", "--data.bags", bags]
    fit += ["--trainer.max_epochs", 1, "--output", runs]
    steps = {"tile": tile, "tile again": tile, "embed": embed, "embed again": embed}
    steps |= {"status": ["status", tiles, bags], "fit, one epoch": fit}
    return {name: command(*step) for name, step in steps.items()}


def measure(quick: bool) -> Iterable[Row]:
    sizes = (8, 16) if quick else (500, 2000)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        drawn = read_cohort(write_cohort(folder / "drawn", num_slides=DRAWN, size_px0=(512, 512)))
        few, many = (
            walk(drawn, size, folder / f"cohort{size}", 0 if quick else 2) for size in sizes
        )
        for verb, taken in many.items():
            yield Row(
                "cohort",
                f"{verb}, {sizes[1]:,} slides",
                "ms a slide",
                1000 * taken / sizes[1],
                peer=1000 * few[verb] / sizes[0],
                peer_is=f"{sizes[0]:,} slides",
                target="does not grow with the cohort",
            )
