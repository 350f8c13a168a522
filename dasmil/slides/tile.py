"""The verb ``tile``: a cohort of slides → a folder of tile tables.

``TILES/cohort.csv`` (all slides, with absolute paths), ``TILES/status.csv`` (status of each),
``TILES/tiles/<slide_id>.safetensors`` and ``TILES/qc/<slide_id>.png``. Several commands may work on
one folder at once, on one machine or on several (:mod:`dasmil.work`).
"""

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from operator import attrgetter
from pathlib import Path
from typing import Any

from dasmil.errors import DiskFullError, InputError, error_text, join_few
from dasmil.files import write_text
from dasmil.json_text import describe_changes, read_json_object
from dasmil.progress import progress
from dasmil.slides.artefacts import ArtefactParameters
from dasmil.slides.cohort import (
    SlideRow,
    read_cohort,
    refuse_faulty,
    replace_cohort,
    slides_digest,
)
from dasmil.slides.pyramid import TilingParameters
from dasmil.slides.reader import Slide
from dasmil.slides.tile_slide import StatusRow, qc_path, summary, tile_slide, what_changed
from dasmil.slides.tile_table import read_parameters, read_tiles, tiles_path
from dasmil.slides.tissue import TissueParameters
from dasmil.units import parse_scales
from dasmil.work.process import ChildProcess
from dasmil.work.status import Status
from dasmil.work.worker import STALE_AFTER_S, Worker

PARAMETERS = "tiling.json"
AGAIN = "run tile again; finished slides are kept"
MESSAGES = ("message", "warning")  # of a row: in status.csv, and on screen
POLL_S = 1.0  # how often the status of other workers is read
SLIDE_TIMEOUT_S = 3600.0
NAMED_AFTER_S = 10.0  # a slide that takes longer is named beside the progress bar


def tile(
    cohort: Path,
    output: Path,
    scales: tuple[str, ...],
    tile_px: int = 256,
    min_tissue: float = 0.25,
    max_upsampling: float = 1.15,
    tissue: TissueParameters = TissueParameters(),  # noqa: B008 - frozen, and the CLI shows its fields
    artefacts: ArtefactParameters = ArtefactParameters(),  # noqa: B008 - as above
    workers: int | None = None,
    slide_timeout: float = SLIDE_TIMEOUT_S,
    stale_after: float = STALE_AFTER_S,
) -> int:
    """Find tissue and lay aligned tiles of every scale over it, for each slide of a cohort.

    Slides that are done with the same parameters are skipped. If a slide fails, ``status.csv`` says
    why and the run continues. Several commands, on one machine or on many, share the slides.

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
        how many times finer than the slide a scale may be.
    tissue:
        how tissue is found.
    artefacts:
        which pen marks, black borders and blurred tiles are excluded; none by default.
    workers:
        number of processes; default: one per core.
    slide_timeout:
        seconds per slide; a slide that takes longer fails, and the others continue.
    stale_after:
        seconds without a heartbeat after which another worker's slides are taken over.

    Returns
    -------
    The exit code: 1 if a slide failed or was not reached, else 0.
    """
    if workers is not None and workers < 1:
        raise InputError(f"workers: {workers} is not a positive number of processes")
    if not slide_timeout > 0:
        raise InputError(f"slide_timeout: {slide_timeout:g} is not a positive number of seconds")
    names = tuple(scale.name for scale in parse_scales(scales))
    parameters = TilingParameters(names, tile_px, min_tissue, max_upsampling, tissue, artefacts)
    rows = read_cohort(cohort, leave_out=output)
    wants = {"parameters": parameters.as_json(), "cohort": slides_digest(rows)}
    with Worker(output, stale_after, wants=wants) as worker:
        _refuse_other_parameters(output, [r for r in rows if not r.fault], parameters, worker)
        if other := worker.refused_by("cohort"):
            raise InputError(
                f"{output}: {other} tiles other slides into it now; give both the same --cohort, "
                "which they will share, or start after it has ended"
            )
        replace_cohort(output / "cohort.csv", rows, "tile")
        status = tile_status(output)
        worker.write_status = status.write
        rows = refuse_faulty(rows, worker)
        num_processes = min(workers or os.cpu_count() or 1, len(rows))
        _tile_all(rows, output, parameters, num_processes, slide_timeout, worker)
    print("\n".join([*_same_files(status.rows), status.summary("tile")]))
    return int(any(row["state"] not in ("done", "empty") for row in status.rows))


def tile_status(folder: Path) -> Status:
    """The status of a folder that ``tile`` writes."""
    parameters = read_json_object(folder / PARAMETERS, AGAIN)
    names = parameters.get("scales")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{folder / PARAMETERS}: names no scales; {AGAIN}")
    scales = parse_scales(names)
    columns = [f"tiles/{scale.name}" for scale in scales]
    return Status(
        folder,
        [row.slide_id for row in read_cohort(folder / "cohort.csv")],
        [*columns, "tissue_mm2", "covered", "mpp", "mpp_source"],
        path=partial(tiles_path, folder),
        describe=lambda path: summary(read_tiles(path)),
    )


def _tile_all(
    rows: Sequence[SlideRow],
    output: Path,
    parameters: TilingParameters,
    num_processes: int,
    slide_timeout: float,
    worker: Worker,
) -> None:
    """Work until every slide is settled, by this worker or by another."""
    waiting = deque(rows)
    function = partial(_tile_slide, output=output, parameters=parameters)
    idle = [ChildProcess(function) for _ in range(num_processes)]
    running: dict[Connection, ChildProcess] = {}
    try:
        with progress(desc="tile", total=len(rows), unit="slide") as bar:
            while waiting or running:
                while idle and (row := worker.claim_next(waiting, attrgetter("slide_id"))):
                    process = idle.pop()
                    process.begin(row)
                    running[process.connection] = process
                if not running:
                    bar.set_postfix_str("waiting for other workers")
                    time.sleep(POLL_S)
                ready = wait(list(running), POLL_S) if running else []
                for connection in [c for c in running if c in ready]:
                    process = running.pop(connection)
                    row = process.task
                    # keep the original duration if the slide was done earlier
                    seconds = worker.last_record(row.slide_id).get("seconds")
                    worker.settle(row.slide_id, {"seconds": seconds, **_result(process, row)})
                    idle.append(process)
                late = [c for c, process in running.items() if process.seconds() > slide_timeout]
                for connection in late:
                    process = running.pop(connection)
                    process.kill()
                    worker.settle(process.task.slide_id, _too_late(process.task, slide_timeout))
                    idle.append(ChildProcess(function))
                bar.update(len(rows) - len(waiting) - len(running) - bar.n)
                if running:
                    bar.set_postfix_str(_longest(running.values()))
    finally:
        for process in [*idle, *running.values()]:
            process.kill()


def _longest(running: Iterable[ChildProcess]) -> str:
    """The slide that runs longest, for the progress bar; "" if none takes long."""
    seconds, slide_id = max((process.seconds(), process.task.slide_id) for process in running)
    return f"{slide_id}: {seconds:.0f} s" if seconds > NAMED_AFTER_S else ""


def _too_late(row: SlideRow, slide_timeout: float) -> StatusRow:
    message = (
        f"{row.path}: not done after {slide_timeout:g} s; it may be damaged, else give a larger "
        "--slide_timeout"
    )
    return {"state": "failed", "message": message, "seconds": slide_timeout}


def _result(process: ChildProcess, row: SlideRow) -> StatusRow:
    try:
        result: StatusRow = process.result()
    except EOFError as death:  # out of memory, or a crash in a decoder
        return {"state": "failed", "message": f"{row.path}: {death}; is the file damaged?"}
    return result


def _tile_slide(row: SlideRow, output: Path, parameters: TilingParameters) -> StatusRow:
    """Tile one slide; any error becomes its row of the status table."""
    start = time.monotonic()
    try:
        with Slide(row) as slide:
            done, changed = _done_before(slide, output)
            if done is not None:
                return done
            result = tile_slide(slide, output, parameters)
            if changed:
                words = f"{changed}: tiled again"
                result |= {
                    key: "; ".join(filter(None, [words, str(result[key])])) for key in MESSAGES
                }
    except DiskFullError:
        raise
    except Exception as error:  # reported in status.csv, on screen and by the exit code
        result = {"state": "failed", "message": error_text(error)}
    return {**result, "seconds": round(time.monotonic() - start, 2)}


def _done_before(slide: Slide, output: Path) -> tuple[StatusRow | None, str]:
    """The status row of a slide that is done; else None, and what has changed since."""
    path = tiles_path(output, slide.row.slide_id)
    if not path.exists() or not qc_path(output, slide.row.slide_id).exists():
        return None, ""
    try:
        tiles = read_tiles(path)
    except InputError:
        return None, "its tile table was damaged"
    if changed := what_changed(slide, tiles):
        return None, changed
    return summary(tiles, slide.physical_scale), ""


def _refuse_other_parameters(
    output: Path, rows: Sequence[SlideRow], parameters: TilingParameters, worker: Worker
) -> None:
    """A folder holds tiles of one set of parameters, also if two commands start together."""
    wanted = parameters.as_json()
    path = output / PARAMETERS
    if other := worker.refused_by("parameters"):
        raise InputError(
            f"{output}: {other} tiles into it now with other parameters; choose another --output"
        )
    ours = {tiles_path(output, row.slide_id) for row in rows}
    unreadable = []
    for table in sorted(output.glob("tiles/[!.]*.safetensors")):  # also of slides not asked for now
        try:
            found = read_parameters(table)
        except InputError as error:
            unreadable += [str(error)] if table in ours else []
            continue
        if found != wanted:
            raise InputError(
                f"{table}: made with other parameters than asked for now "
                f"({describe_changes(found, wanted)}); choose another --output, or delete that "
                "folder to start over"
            )
    if unreadable:
        more = f", and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        print(f"tile: {unreadable[0]}{more}; re-creating them")
    if not path.exists() or path.read_text(encoding="utf-8") != wanted:
        write_text(path, wanted)


def _same_files(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Warn about slides of different names that are one file, or copies of it."""
    slides: dict[str, list[str]] = {}
    for row in rows:
        if digest := row.get("slide_digest"):
            slides.setdefault(digest, []).append(row["slide_id"])
    for names in slides.values():
        if len(names) > 1:
            yield f"warning: {join_few(names)} are the same slide file; keep one row per file"
