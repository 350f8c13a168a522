"""The verb ``embed``: tiles + frozen extractors → a folder of bag files.

``BAGS/<slide_id>.safetensors``, ``BAGS/cohort.csv`` (all slides), ``BAGS/status.csv`` and
``BAGS/extractors.json`` (each scale's extractor and the slides it was trained on).
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dasmil.bag_folder import EXTRACTORS, bag_status, describe_bag
from dasmil.bags import (
    BagHeader,
    ExtractorCard,
    bag_path,
    describe_other_bag,
    read_header,
    read_headers,
)
from dasmil.embedding.dataset import (
    READ_TIMEOUT_S,
    SUSPECT,
    ChunkDataset,
    ClaimingSampler,
    TileChunk,
)
from dasmil.embedding.extractor import Extractor, ExtractorSource, load_extractor
from dasmil.embedding.weights import say
from dasmil.embedding.writer import BagWriter, Embedded, bag_header
from dasmil.errors import InputError, some_of
from dasmil.files import map_files, must_exist, write_text
from dasmil.geometry import Tiles
from dasmil.reading import describe_lost_reader, reader_options
from dasmil.slides.cohort import SlideRow, describe_leaving, read_cohort, write_cohort
from dasmil.slides.tile_table import read_tiles, slide_changed, tiles_path
from dasmil.work.worker import STALE_AFTER_S, Worker


class EmbeddingModule(LightningModule):
    """The extractors of all scales under the Trainer's predict loop.

    Parameters
    ----------
    extractors: one a scale.
    dataset: the chunks to embed.
    sampler: makes the order of this process's chunks, once it is known which process it is.
    batch_size: tiles that go through a network at once.
    num_workers: reading processes of each device.
    """

    def __init__(
        self,
        extractors: Mapping[str, Extractor],
        dataset: ChunkDataset,
        sampler: Callable[[], ClaimingSampler],
        batch_size: int,
        num_workers: int,
    ):
        super().__init__()
        self.names = list(extractors)
        self.extractors = nn.ModuleList(extractors.values())
        self.dataset = dataset
        self.make_sampler = sampler
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._batches: dict[tuple[int, str], _Batches] = {}  # by slide and scale
        self._failed: set[int] = set()
        # with fewer slides to do than processes, some have nothing to do
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def predict_dataloader(self) -> DataLoader[TileChunk]:
        self.sampler = self.make_sampler()
        return DataLoader(
            self.dataset,
            batch_size=None,  # a chunk is a batch
            sampler=self.sampler,
            **reader_options(self.num_workers),
            pin_memory=self.on_gpu,
        )

    @property
    def layout(self) -> torch.memory_format:
        """Channels last, as tiles are read, is faster on a GPU only."""
        return torch.channels_last if self.on_gpu else torch.contiguous_format

    def on_predict_start(self) -> None:
        self.extractors.to(memory_format=self.layout)

    def predict_step(self, chunk: TileChunk, batch_idx: int) -> list[Embedded]:
        """Embed all batches that are full; a slide's last tiles need not fill one."""
        embedded: list[Embedded] = []
        if chunk.error is not None:  # what has come of the slide is not needed any more
            self._failed.add(chunk.slide)
            self.sampler.drop(chunk.slide)
            self._batches = {key: b for key, b in self._batches.items() if key[0] != chunk.slide}
        if chunk.slide in self._failed:
            return embedded
        for name, tiles in chunk.tiles.items():
            key = chunk.slide, name
            if key not in self._batches:
                num_tiles = self.dataset.num_tiles[chunk.slide][name]
                self._batches[key] = _Batches(num_tiles, self.batch_size, self.layout)
            network = self.extractors[self.names.index(name)]
            for start, images in self._batches[key].put(chunk.start[name], tiles):
                features = network(images.contiguous(memory_format=self.layout))
                embedded.append(Embedded(chunk.slide, name, start, features))
            if self._batches[key].are_done:
                del self._batches[key]
        return embedded


class _Batches:
    """Tiles of one scale of one slide, put together to batches of consecutive rows.

    A batch never mixes slides, and holds the same tiles in whatever order they come: what a network
    makes of a tile depends, in its last digits, on what goes through it at the same time. So the
    bytes of a bag depend neither on other slides nor on reading processes or interruptions.

    Parameters
    ----------
    num_tiles: of the slide.
    size: of a batch; the last one holds what is left.
    layout: of a batch in memory, where it is put together.
    """

    def __init__(self, num_tiles: int, size: int, layout: torch.memory_format):
        self.num_tiles = num_tiles
        self.size = size
        self.layout = layout
        self.to_come = num_tiles
        self._begun: dict[int, tuple[Tensor, int]] = {}  # start → tiles, how many are there

    @property
    def are_done(self) -> bool:
        return self.to_come == 0

    def put(self, start: int, tiles: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Rows from ``start`` on; gives the batches that are full now, with their first rows."""
        self.to_come -= len(tiles)
        while len(tiles):
            first = start // self.size * self.size
            length = min(self.size, self.num_tiles - first)
            piece = tiles[: first + length - start]
            if len(piece) == length:
                yield first, piece
            else:
                batch, found = self._begun.pop(first, (None, 0))
                if batch is None:
                    batch = torch.empty(
                        (length, *tiles.shape[1:]),
                        dtype=tiles.dtype,
                        device=tiles.device,
                        memory_format=self.layout,
                    )
                batch[start - first : start - first + len(piece)] = piece
                if found + len(piece) == length:
                    yield first, batch
                else:
                    self._begun[first] = batch, found + len(piece)
            start, tiles = start + len(piece), tiles[len(piece) :]


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
    """Embed every tile with the frozen extractor of its scale and write one bag file a slide.

    Finished slides are skipped. A bag made with other tiles or extractors is never mixed in: the
    run stops before it computes anything. A slide that cannot be read costs one row of status.csv.
    Run it several times at once, or on the Trainer's devices and nodes, and the slides are shared.

    Parameters
    ----------
    tiles:
        folder that `tile` wrote.
    output:
        folder for the bags.
    extractors:
        per scale a DINO checkpoint of that scale, or a timm name (pretrained weights), or
        random:NAME (random weights); or a dictionary with model and what is to differ: weights,
        pooling, image_size, mean, std, interpolation, options.
    trainer:
        Lightning's; devices, nodes, precision and progress bar are its own.
    batch_size:
        tiles that go through a network at once.
    num_workers:
        reading processes of each device.
    max_damaged_tiles:
        share of a slide's finest tiles, in 0..1, that may be left out because their pixels, or
        those of a coarser tile around them, cannot be decoded; a slide with more fails.
    read_timeout:
        seconds that reading one part of a slide (about 2048 px squared) may take.
    stale_after:
        seconds of silence after which the slides of another, vanished worker are taken over.

    Returns
    -------
    The exit code: 1 when a slide failed or was not reached, else 0.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise InputError("embed: strategies that spawn or fork are not for it; use ddp")
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
    networks = _load_extractors(extractors, next(iter(tables.values())), trainer.precision)
    cards = {name: network.card for name, network in networks.items()}
    first = trainer.is_global_zero
    any_header = bag_header(next(iter(tables.values())), cards)
    headers = read_headers(output)
    _refuse_other_bags(output, headers, any_header)
    changed = _changed_slides(cohort, tables)
    reasons = {
        slide_id: _why_to_do(headers.get(slide_id), bag_header(table, cards), max_damaged_tiles)
        for slide_id, table in tables.items()
        if slide_id not in changed
    }
    todo = [row for row in cohort if reasons.get(row.slide_id) is not None]
    wanted = [tables[row.slide_id] for row in todo]

    fingerprints = [card.fingerprint for card in cards.values()]
    wants = {"bags": json.dumps([any_header.tiling, *fingerprints])}
    with Worker(output, stale_after, wants=wants) as worker:
        if other := worker.refused_by("bags"):
            raise InputError(
                f"{output}: {other} embeds into it now with other tiles or extractors; choose "
                "another --output"
            )
        if first:
            if line := describe_leaving(output / "cohort.csv", cohort):
                print(f"embed: {line}")
            write_cohort(output / "cohort.csv", cohort)
            write_text(output / EXTRACTORS, _as_json(extractors, networks))
            status = bag_status(output)
            worker.on_beat = status.write
            _say_what_is_done_again(reasons)
            _note_what_is_known(worker, not_tiled, changed, tables, todo)
        # other processes may find something to do, and wait for each other in the predict loop
        if todo or trainer.world_size > 1:
            dataset = ChunkDataset(todo, wanted, max_roots=batch_size, timeout=read_timeout)
            sampler = partial(
                ClaimingSampler,
                dataset,
                worker,
                is_done=lambda slide: _is_done(wanted[slide], output, cards, max_damaged_tiles),
                num_workers=num_workers,
            )
            module = EmbeddingModule(networks, dataset, sampler, batch_size, num_workers)
            show_progress = _take_bar(trainer)
            writer = BagWriter(wanted, output, cards, worker, max_damaged_tiles, show_progress)
            _predict(trainer, module, writer)
    if not first:
        return 0  # a second process that fails would end the first one before it has reported
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
        for slide_id in suspects:
            message = f"a reading process was killed while it read one of {', '.join(suspects)}"
            writer.worker.note(slide_id, {"state": "failed", "message": message, SUSPECT: True})
        raise InputError(
            f"{writer.output}: a reading process was killed while it read one of "
            f"{', '.join(suspects)}: too little memory (take fewer num_workers), a damaged file, "
            f"or more than read_timeout ({module.dataset.timeout:g} s); run the same command "
            "again: what is done is kept, and these come last, one by one"
        ) from error
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        _report_speed(writer.num_settled(), time.monotonic() - start, writer.seconds_waiting)


def _take_bar(trainer: Trainer) -> bool:
    """Whether to show progress; Lightning's own bar, which counts chunks, makes room."""
    bar = trainer.progress_bar_callback
    if bar is not None:
        trainer.callbacks.remove(bar)  # type: ignore[attr-defined]
    return bar is not None and trainer.is_global_zero


def _read_tables(
    cohort: Sequence[SlideRow], folder: Path
) -> tuple[dict[str, Tiles], dict[str, str]]:
    """Tile tables by slide_id, and why others have none."""
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
    names = [scale.name for scale in tiles.scales]
    if set(sources) != set(names):
        raise InputError(
            f"extractors: given for {', '.join(sorted(sources)) or 'no scale'}, the tiles have "
            f"{', '.join(names)}; give one extractor for each of them"
        )
    networks = {
        scale.name: load_extractor(sources[scale.name], scale, tiles.tile_px)
        for scale in tiles.scales
    }
    for name, network in networks.items():
        network.card = network.card.in_precision(precision)
        say(f"embed: {name}: {network.card}")
    return networks


def _is_done(
    tiles: Tiles, output: Path, cards: Mapping[str, ExtractorCard], max_damaged: float
) -> bool:
    """Whether the slide's bag is there, made of these tiles by these extractors."""
    try:
        found = read_header(bag_path(output, tiles.slide_id))
    except InputError:
        return False
    return _why_to_do(found, bag_header(tiles, cards), max_damaged) is None


def _refuse_other_bags(
    output: Path, headers: Mapping[str, BagHeader | InputError], wanted: BagHeader
) -> None:
    """A folder holds bags of one set of tiling parameters and extractors."""
    for slide_id, found in sorted(headers.items()):
        if isinstance(found, BagHeader) and (words := describe_other_bag(wanted, found)):
            raise InputError(
                f"{bag_path(output, slide_id)}: made with other tiles or extractors than asked for "
                f"now ({words}); choose another --output, or delete that folder to start over"
            )


def _why_to_do(
    found: BagHeader | InputError | None, wanted: BagHeader, max_damaged: float
) -> str | None:
    """None where the bag is done; else why a bag that is there is re-created, "" without one."""
    if found is None:
        return ""
    if isinstance(found, InputError):
        return str(found)
    if found.without_damage() == wanted:
        if found.num_damaged <= max_damaged * wanted.num_tiles:
            return None
        return "more damaged tiles are left out than max_damaged_tiles allows now"
    if found.reader != wanted.reader:
        return "the pixels were read by another version"
    if found.slide_digest != wanted.slide_digest:
        return (
            "the slide file was replaced"
            if found.slide_digest
            else "its tiles are of an older version"
        )
    return "the slide was tiled again"


def _changed_slides(cohort: Sequence[SlideRow], tables: Mapping[str, Tiles]) -> dict[str, str]:
    """Slides whose file has changed since it was tiled, and what to do. Others may be gone."""

    def changed(row: SlideRow) -> bool:
        try:
            return slide_changed(row.path, tables[row.slide_id])
        except InputError:
            return False  # said where it is read

    rows = [row for row in cohort if row.slide_id in tables]
    found = map_files(changed, rows)
    return {
        row.slide_id: f"{row.path}: the slide file has changed since it was tiled; run tile again"
        for row, is_changed in zip(rows, found, strict=True)
        if is_changed
    }


def _say_what_is_done_again(reasons: Mapping[str, str | None]) -> None:
    slides: dict[str, list[str]] = {}
    for slide_id, reason in reasons.items():
        if reason:
            slides.setdefault(reason, []).append(slide_id)
    for reason, names in slides.items():
        print(f"embed: {reason}: {len(names)} bag(s) re-created: {some_of(names)}")


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


def _note_what_is_known(
    worker: Worker,
    not_tiled: Mapping[str, str],
    changed: Mapping[str, str],
    tables: Mapping[str, Tiles],
    todo: Sequence[SlideRow],
) -> None:
    """What has changed since it was last written down, by `tile` or by a worker that was killed."""
    for slide_id, reason in not_tiled.items():
        worker.note(slide_id, {"state": "not tiled", "message": reason})
    for slide_id, reason in changed.items():
        worker.note(slide_id, {"state": "failed", "message": reason})
    waiting = {row.slide_id for row in todo}
    for slide_id in tables:
        if slide_id in changed:
            continue
        state = worker.last(slide_id)["state"]
        if slide_id in waiting and state == "not tiled":
            worker.note(slide_id, {"state": "waiting", "message": ""})
        elif slide_id not in waiting and state in ("not tiled", "failed"):
            worker.note(slide_id, describe_bag(bag_path(worker.folder, slide_id)))


def _report_speed(num_tiles: int, seconds: float, seconds_waiting: float) -> None:
    """The tiles of all processes; what the first of them waited for."""
    print(
        f"embed: {num_tiles} tiles in {seconds:.1f} s, {num_tiles / seconds:.0f} tiles/s; "
        f"{seconds_waiting / seconds:.0%} of it waiting for pixels, the rest for the network"
    )
