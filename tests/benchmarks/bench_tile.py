"""``tile``: seconds a slide with one process and with all cores.

The limit is reading the thumbnails alone, in one process and shared by all cores.
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from shutil import rmtree

from table import Row, seconds

from dasmil.demo.slides import write_cohort
from dasmil.quiet import hush
from dasmil.slides.cohort import SlideRow, read_cohort
from dasmil.slides.cohort import write_cohort as write_table
from dasmil.slides.reader import Slide
from dasmil.slides.tile import tile
from dasmil.slides.tissue import TissueParameters

SLIDES = Path(__file__).resolve().parents[3] / "shared" / "data" / "slides"


def tile_all(table: Path, output: Path, scales: Sequence[str], workers: int) -> None:
    rmtree(output, ignore_errors=True)
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        assert tile(table, output, tuple(scales), workers=workers) == 0


def read_thumbnails(rows: Iterable[SlideRow]) -> None:
    for row in rows:
        with Slide(row) as slide:
            slide.thumbnail(TissueParameters().mpp)


def cohorts(folder: Path, quick: bool) -> Iterable[tuple[str, list[SlideRow], tuple[str, ...]]]:
    if quick or not SLIDES.is_dir():
        count, side = (2, 1024) if quick else (8, 4096)
        table = write_cohort(folder / "slides", num_slides={"train": count}, size_px0=(side, side))
        yield "drawn slides", read_cohort(table), ("x10", "x20")
        return
    x20 = sorted((SLIDES / "atlas_x20").iterdir())
    x5 = sorted((SLIDES / "atlas_x5").iterdir())
    yield "atlas x20", [_row(path, 0.5) for path in x20], ("x10", "x20")
    yield "atlas x5", [_row(path, 2.0) for path in x5], ("x2.5", "x5")


def _row(path: Path, mpp: float) -> SlideRow:
    return SlideRow(path.stem, path, mpp=mpp)


def measure(quick: bool) -> Iterable[Row]:
    hush()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, rows, scales in cohorts(folder, quick):
            table, output = folder / f"{name}.csv", folder / "tiles"
            write_table(table, rows)
            all_cores, one, thumbnails = seconds(
                partial(tile_all, table, output, scales, cores),
                partial(tile_all, table, output, scales, 1),
                partial(read_thumbnails, rows),
                runs=1 if quick else 3,
                warmup=0 if quick else 1,
            )
            yield Row(
                "tile",
                f"{name}, {len(rows)} slides, {cores} cores",
                "s a slide",
                all_cores / len(rows),
                peer=one / len(rows),
                peer_is="one process",
                limit=thumbnails / len(rows) / min(cores, len(rows)),
                limit_is="reading the thumbnails alone, shared by all cores",
                target="thumbnail-level work only, seconds a slide",
            )
