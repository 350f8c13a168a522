"""The verb ``embed``: tiles and frozen extractors → a folder of bag files.

It writes ``BAGS/<slide_id>.safetensors``, ``BAGS/cohort.csv`` (all slides), ``BAGS/status.csv`` and
``BAGS/extractors.json`` (per scale the extractor and the slides it was trained on).
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from dasmil.bag_folder import EXTRACTORS, bag_status, describe_bag
from dasmil.bags import BagHeader, bag_path, describe_other_bag, read_header, read_headers
from dasmil.embedding.dataset import READ_TIMEOUT_S, ChunkDataset
from dasmil.embedding.embed_slide import bag_header, refuse_other_scales
from dasmil.embedding.extractor import Extractor, ExtractorSource, load_extractor
from dasmil.embedding.module import EmbeddingModule
from dasmil.embedding.sampler import SUSPECT, ClaimingSampler
from dasmil.embedding.weights import print_once
from dasmil.embedding.writer import BagWriter
from dasmil.errors import InputError, join_few
from dasmil.files import map_files, must_exist, write_text
from dasmil.geometry import Tiles
from dasmil.reading import describe_lost_reader
from dasmil.slides.cohort import SlideRow, read_cohort, replace_cohort
from dasmil.slides.tile_table import read_tiles, slide_changed, tiles_path
from dasmil.trainer import name_precision
from dasmil.work.worker import STALE_AFTER_S, Worker


def embed(
    tiles: Path,
    output: Path,
    extractors: dict[str, str | ExtractorSource],
    trainer: Trainer,
    batch_size: int = 64,
    num_workers: int = 2,
    max_damaged_tiles: float = 0.0,
    read_timeout: float = READ_TIMEOUT_S,
    stale_after: float = STALE_AFTER_S,
) -> int:
    """Embed every tile with the frozen extractor of its scale and write one bag file per slide.

    Finished slides are skipped. A folder never mixes bags of different tiles or extractors: the run
    stops before it computes anything. A slide that cannot be read costs one row of status.csv. Run
    the command several times at once, or on the Trainer's devices and nodes, to share the slides.

    Parameters
    ----------
    tiles:
        folder that `tile` wrote.
    output:
        folder for the bags.
    extractors:
        per scale a DINO checkpoint of that scale, a timm name (pretrained weights) or random:NAME
        (random weights); or a dictionary with model and the settings to change: weights, pooling,
        image_size, mean, std, interpolation, options.
    trainer:
        Lightning's Trainer; it sets devices, nodes, precision and progress bar.
    batch_size:
        tiles per pass through a network.
    num_workers:
        reading processes per device.
    max_damaged_tiles:
        share of a slide's finest tiles, in 0..1, that may be left out because their pixels, or
        those of a coarser tile around them, cannot be decoded; a slide with more fails.
    read_timeout:
        seconds that reading one part of a slide (about 2048 px squared) may take.
    stale_after:
        seconds of silence after which the slides of another, vanished worker are taken over.

    Returns
    -------
    The exit code: 1 if a slide failed or was not reached, else 0.

    Raises
    ------
    InputError
        if an argument is impossible, no slide can be embedded, the bags in ``output`` have other
        tiles or extractors, or a reading process was killed.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise InputError("embed: it cannot use strategies that spawn or fork; use ddp")
    if not 0 <= max_damaged_tiles < 1:
        raise InputError(f"max_damaged_tiles: {max_damaged_tiles:g} is no share in 0..1")
    if not read_timeout > 0:
        raise InputError(f"read_timeout: {read_timeout:g} is not a positive number of seconds")
    must_exist(tiles, "give --tiles the folder that tile wrote")
    cohort = read_cohort(tiles / "cohort.csv")
    tables, not_tiled = _read_tables(cohort, tiles)
    if not tables:
        reason = next(iter(not_tiled.values()))
        raise InputError(f"{tiles}: no slide of its cohort has been tiled ({reason})")
    any_table = next(iter(tables.values()))
    networks = _load_extractors(extractors, any_table, name_precision(trainer))
    cards = {name: network.card for name, network in networks.items()}
    headers = read_headers(output)
    _refuse_other_bags(output, headers, bag_header(any_table, cards))
    changed = _changed_slides(cohort, tables)
    reasons = {
        slide_id: _why_to_do(headers.get(slide_id), bag_header(table, cards), max_damaged_tiles)
        for slide_id, table in tables.items()
        if slide_id not in changed
    }
    todo = [row for row in cohort if reasons.get(row.slide_id) is not None]

    fingerprints = [card.fingerprint for card in cards.values()]
    wants = {"bags": json.dumps([any_table.tiling, *fingerprints])}
    with Worker(output, stale_after, wants=wants) as worker:
        if other := worker.refused_by("bags"):
            raise InputError(
                f"{output}: {other} embeds into it now with other tiles or extractors; choose "
                "another --output"
            )
        if trainer.is_global_zero:
            replace_cohort(output / "cohort.csv", cohort, "embed")
            write_text(output / EXTRACTORS, _as_json(extractors, networks))
            status = bag_status(output)
            worker.write_status = status.write
            _print_reasons(reasons)
            _note_known_states(worker, not_tiled, changed, reasons)
        # another process may find something to do, and all wait for each other in the predict loop
        if todo or trainer.world_size > 1:
            wanted = [tables[row.slide_id] for row in todo]
            dataset = ChunkDataset(todo, wanted, max_roots=batch_size, timeout=read_timeout)

            def is_done(slide: int) -> bool:
                header = bag_header(wanted[slide], cards)
                try:
                    existing = read_header(bag_path(output, header.slide_id))
                except InputError:
                    return False
                return _why_to_do(existing, header, max_damaged_tiles) is None

            sampler = partial(ClaimingSampler, dataset, worker, is_done, num_workers)
            module = EmbeddingModule(
                networks, dataset, sampler, batch_size, num_workers, max_damaged_tiles
            )
            _predict(trainer, module, BagWriter(module, output, worker, _hide_bar(trainer)))
    if not trainer.is_global_zero:
        return 0  # only rank 0 reports; a non-zero exit here would kill it before it does
    print(status.summary("embed"))
    return int(any(row["state"] in ("failed", "waiting") for row in status.rows))


def _predict(trainer: Trainer, module: EmbeddingModule, writer: BagWriter) -> None:
    trainer.callbacks.append(writer)  # type: ignore[attr-defined]
    start = time.monotonic()
    try:
        trainer.predict(module, return_predictions=False)
    except RuntimeError as error:
        if not describe_lost_reader(error):
            raise
        suspects = writer.worker.claimed()
        cause = f"a reading process was killed while it read one of {', '.join(suspects)}"
        for slide_id in suspects:
            record = {"state": "failed", "message": cause, SUSPECT: len(suspects)}
            writer.worker.note(slide_id, record)
        raise InputError(
            f"{writer.output}: {cause}: too little memory (take fewer num_workers), a damaged "
            f"file, or more than read_timeout ({module.dataset.timeout:g} s); run the same command "
            "again: finished slides are kept, and these come last, one by one"
        ) from error
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        seconds, num_tiles = time.monotonic() - start, writer.num_settled()
        print(  # the tiles of all processes, but the waiting of rank 0
            f"embed: {num_tiles} tiles in {seconds:.1f} s, {num_tiles / seconds:.0f} tiles/s; "
            f"{module.waiting.seconds() / seconds:.0%} of it waiting for pixels, the rest for the "
            "network"
        )


def _hide_bar(trainer: Trainer) -> bool:
    """Remove Lightning's progress bar, which counts chunks; return whether to show another one."""
    bar = trainer.progress_bar_callback
    if bar is not None:
        trainer.callbacks.remove(bar)  # type: ignore[attr-defined]
    return bar is not None and trainer.is_global_zero


def _read_tables(
    cohort: Sequence[SlideRow], folder: Path
) -> tuple[dict[str, Tiles], dict[str, str]]:
    """Tile tables by slide_id, and why the other slides have none."""
    tables, missing = {}, {}
    for row in cohort:
        if row.fault:
            missing[row.slide_id] = row.fault
            continue
        path = tiles_path(folder, row.slide_id)
        try:
            tables[row.slide_id] = read_tiles(path)
        except InputError as error:
            missing[row.slide_id] = str(error) if path.exists() else f"see {folder / 'status.csv'}"
    return tables, missing


def _load_extractors(
    sources: Mapping[str, str | ExtractorSource], tiles: Tiles, precision: str
) -> dict[str, Extractor]:
    refuse_other_scales(sources, tiles)
    networks = {
        scale.name: load_extractor(sources[scale.name], scale, tiles.tile_px)
        for scale in tiles.scales
    }
    for name, network in networks.items():
        network.card = network.card.in_precision(precision)
        print_once(f"embed: {name}: {network.card}")
    return networks


def _refuse_other_bags(
    output: Path, headers: Mapping[str, BagHeader | InputError], wanted: BagHeader
) -> None:
    """A folder holds bags of one set of tiling parameters and extractors."""
    for slide_id, header in sorted(headers.items()):
        if isinstance(header, BagHeader) and (words := describe_other_bag(wanted, header)):
            raise InputError(
                f"{bag_path(output, slide_id)}: made with other tiles or extractors than asked for "
                f"now ({words}); choose another --output, or delete that folder to start over"
            )


def _why_to_do(
    header: BagHeader | InputError | None, wanted: BagHeader, max_damaged: float
) -> str | None:
    """None if the bag of a slide is done; else why it is re-created, "" if there is none."""
    if header is None:
        return ""
    if isinstance(header, InputError):
        return str(header)
    if header.without_damage() == wanted:
        if header.num_damaged <= max_damaged * wanted.num_tiles:
            return None
        return "more damaged tiles are left out than max_damaged_tiles allows now"
    if header.reader != wanted.reader:
        return "the pixels were read by another version"
    if header.slide_digest != wanted.slide_digest:
        is_old = not header.slide_digest
        return "its tiles are of an older version" if is_old else "the slide file was replaced"
    return "the slide was tiled again"


def _changed_slides(cohort: Sequence[SlideRow], tables: Mapping[str, Tiles]) -> dict[str, str]:
    """Slides whose file has changed since it was tiled, and what to do."""

    def has_changed(row: SlideRow) -> bool:
        try:
            return slide_changed(row.path, tables[row.slide_id])
        except InputError:
            return False  # reported when the slide is read

    rows = [row for row in cohort if row.slide_id in tables]
    return {
        row.slide_id: f"{row.path}: the slide file has changed since it was tiled; run tile again"
        for row, changed in zip(rows, map_files(has_changed, rows), strict=True)
        if changed
    }


def _print_reasons(reasons: Mapping[str, str | None]) -> None:
    slides: dict[str, list[str]] = {}
    for slide_id, reason in reasons.items():
        if reason:
            slides.setdefault(reason, []).append(slide_id)
    for reason, names in slides.items():
        print(f"embed: {reason}: {len(names)} bag(s) re-created: {join_few(names)}")


def _as_json(
    sources: Mapping[str, str | ExtractorSource], networks: Mapping[str, Extractor]
) -> str:
    records = {
        name: {
            **asdict(network.card),
            "source": source if isinstance(source := sources[name], str) else source.asked(),
            "repository": network.repository,
            "trained_on": network.trained_on,
        }
        for name, network in networks.items()
    }
    return json.dumps(records, indent=2)


def _note_known_states(
    worker: Worker,
    not_tiled: Mapping[str, str],
    changed: Mapping[str, str],
    reasons: Mapping[str, str | None],
) -> None:
    """Record states that have changed since the last record, by `tile` or a killed worker."""
    for slide_id, reason in not_tiled.items():
        worker.note(slide_id, {"state": "not tiled", "message": reason})
    for slide_id, reason in changed.items():
        worker.note(slide_id, {"state": "failed", "message": reason})
    for slide_id, why in reasons.items():
        state, is_done = worker.last_record(slide_id)["state"], why is None
        if not is_done and state == "not tiled":
            worker.note(slide_id, {"state": "waiting", "message": ""})
        elif is_done and state in ("not tiled", "failed"):
            worker.note(slide_id, describe_bag(bag_path(worker.folder, slide_id)))
