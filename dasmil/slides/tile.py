"""The verb ``tile``: a cohort of slides → a folder of tile tables.

``TILES/cohort.csv`` (all slides, with absolute paths), ``TILES/status.csv`` (what became of each),
``TILES/tiles/<slide_id>.safetensors`` and ``TILES/qc/<slide_id>.png``.
"""

import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from dasmil.errors import InputError
from dasmil.files import write_csv
from dasmil.slides.cohort import SlideRow, read_cohort, write_cohort
from dasmil.slides.reader import Slide
from dasmil.slides.tile_slide import StatusRow, summary, tile_slide
from dasmil.slides.tiling import TilingParameters, read_tiles, tiles_path
from dasmil.slides.tissue import TissueParameters
from dasmil.units import parse_scales


def tile(
    cohort: Path,
    output: Path,
    scales: tuple[str, ...],
    tile_px: int = 256,
    min_tissue: float = 0.25,
    max_upsampling: float = 1.15,
    tissue: TissueParameters = TissueParameters(),  # noqa: B008 - frozen, and the CLI shows its fields
    workers: int | None = None,
) -> int:
    """Find tissue and lay aligned tiles of every scale over it, for each slide of a cohort.

    Slides that are done with the same parameters are skipped. A slide that fails costs one row of
    ``status.csv`` and the run goes on.

    Parameters
    ----------
    cohort:
        cohort table (CSV with slide_id, path and optionally label, patient_id, split, mpp,
        magnification) or a folder of slides.
    output:
        folder for the tile tables, QC pictures, status.csv and cohort.csv.
    scales:
        magnifications, for example [x5,x10,x20]; x20 is 0.5 µm/px.
    tile_px:
        side of a tile in pixels, the same at every scale.
    min_tissue:
        share of a finest tile that must be tissue.
    max_upsampling:
        how much finer than the slide a scale may be.
    tissue:
        how tissue is found.
    workers:
        processes; all cores when not given.

    Returns
    -------
    The exit code: 1 when a slide failed, else 0.
    """
    if workers is not None and workers < 1:
        raise InputError(f"workers: {workers} is not a positive number of processes")
    names = tuple(scale.name for scale in parse_scales(scales))
    parameters = TilingParameters(names, tile_px, min_tissue, max_upsampling, tissue)
    rows = read_cohort(cohort, leave_out=output)
    _refuse_other_parameters(output, rows, parameters)
    write_cohort(output / "cohort.csv", rows)

    status: dict[str, StatusRow] = {}
    workers = min(workers or os.cpu_count() or 1, len(rows))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_tile_slide, row, output, parameters): row for row in rows}
        for future in tqdm(as_completed(futures), "tile", len(futures), unit="slide"):
            result = future.result()
            status[str(result["slide_id"])] = result
            _write_status(output, rows, status, parameters)

    states = [row["state"] for row in status.values()]
    for slide_id, row in sorted(status.items()):
        if row["state"] != "done":
            print(f"{row['state']}: {slide_id}: {row['message']}")
    print(
        f"tile: {states.count('done')} done, {states.count('empty')} without tissue, "
        f"{states.count('failed')} failed; see {output / 'status.csv'}"
    )
    return int("failed" in states)


def _tile_slide(row: SlideRow, output: Path, parameters: TilingParameters) -> StatusRow:
    """One slide; whatever goes wrong with it becomes its row of the status table."""
    start = time.monotonic()
    try:
        with Slide(row) as slide:
            result = _done_before(slide, output) or tile_slide(slide, output, parameters)
    except Exception as error:  # the message is reported in status.csv, on screen and by exit code
        message = (
            str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        )
        result = {"state": "failed", "message": message}
    return {"slide_id": row.slide_id, "seconds": round(time.monotonic() - start, 2), **result}


def _done_before(slide: Slide, output: Path) -> StatusRow | None:
    """The status of a slide whose tiles are there; with another mpp or size it is tiled anew."""
    path = tiles_path(output, slide.row.slide_id)
    if not path.exists():
        return None
    tiles = read_tiles(path)
    if (tiles.slide_mpp, tiles.size_px0) != (slide.mpp, slide.size_px0):
        return None
    message = "tiled before" if any(tiles.num_tiles().values()) else "tiled before, no tile kept"
    return summary(tiles, slide, message)


def _write_status(
    output: Path,
    rows: Sequence[SlideRow],
    status: dict[str, StatusRow],
    parameters: TilingParameters,
) -> None:
    names = [scale.name for scale in parse_scales(parameters.scales)]
    columns = ["slide_id", "state", *(f"tiles/{name}" for name in names)]
    columns += ["mpp", "mpp_source", "seconds", "message"]
    waiting = {"state": "waiting"}
    records = ({"slide_id": r.slide_id, **status.get(r.slide_id, waiting)} for r in rows)
    write_csv(output / "status.csv", columns, records)


def _refuse_other_parameters(
    output: Path, rows: Iterable[SlideRow], parameters: TilingParameters
) -> None:
    """A folder holds tiles of one set of parameters."""
    for row in rows:
        path = tiles_path(output, row.slide_id)
        if path.exists() and read_tiles(path).tiling != parameters.as_json():
            raise InputError(
                f"{path}: made with other parameters than asked for now; "
                "choose another --output, or delete that folder to start over"
            )
