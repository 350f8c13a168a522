"""The verb ``embed``: tiles + frozen extractors → a folder of bag files.

``BAGS/<slide_id>.safetensors``, ``BAGS/cohort.csv`` (all slides), ``BAGS/status.csv`` and
``BAGS/extractors.json`` (each scale's extractor and the slides it was trained on).
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dasmil.bags import ExtractorCard, bag_path, read_header
from dasmil.embedding.dataset import ChunkDataset, TileChunk, WholeSlideSampler
from dasmil.embedding.extractor import Extractor, load_extractor
from dasmil.embedding.writer import BagWriter, Embedded, bag_header, failure_path
from dasmil.errors import InputError
from dasmil.files import write_csv, write_text
from dasmil.slides.cohort import SlideRow, read_cohort, write_cohort
from dasmil.slides.tiling import TilePyramid, read_tiles, tiles_path


class EmbeddingModule(LightningModule):
    """The extractors of all scales under the Trainer's predict loop.

    Parameters
    ----------
    extractors: one a scale.
    dataset: the chunks to embed.
    batch_size: tiles that go through a network at once.
    num_workers: reading processes of each device.
    """

    def __init__(
        self,
        extractors: Mapping[str, Extractor],
        dataset: ChunkDataset,
        batch_size: int,
        num_workers: int,
    ):
        super().__init__()
        self.names = list(extractors)
        self.extractors = nn.ModuleList(extractors.values())
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._queues: dict[tuple[int, str], _Queue] = {}  # by slide and scale
        self._failed: set[int] = set()
        # with fewer slides to do than processes, some have nothing to do
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def predict_dataloader(self) -> DataLoader[TileChunk]:
        world = self.trainer.world_size, self.trainer.global_rank
        return DataLoader(
            self.dataset,
            batch_size=None,  # a chunk is a batch
            sampler=WholeSlideSampler(self.dataset, *world, self.num_workers),
            num_workers=self.num_workers,
            pin_memory=self.on_gpu,
        )

    def on_predict_start(self) -> None:
        if self.on_gpu:
            self.extractors.to(memory_format=torch.channels_last)  # as the tiles are

    def predict_step(self, chunk: TileChunk, batch_idx: int) -> list[Embedded]:
        """Embed all batches that are full; a slide's last tiles need not fill one."""
        embedded: list[Embedded] = []
        if chunk.error is not None:  # what has come of the slide is not needed any more
            self._failed.add(chunk.slide)
            self._queues = {key: q for key, q in self._queues.items() if key[0] != chunk.slide}
        if chunk.slide in self._failed:
            return embedded
        for name, tiles in chunk.tiles.items():
            key = chunk.slide, name
            if key not in self._queues:
                self._queues[key] = _Queue(self.dataset.num_tiles[chunk.slide][name])
            queue = self._queues[key]
            queue.put(chunk.start[name], tiles)
            network = self.extractors[self.names.index(name)]
            while batch := queue.batch(self.batch_size):
                images = torch.cat([piece for _, piece in batch])
                # channels lie last in memory, which is faster on a GPU only
                features = network(images if self.on_gpu else images.contiguous())
                parts = features.split([len(piece) for _, piece in batch])
                embedded += [
                    Embedded(chunk.slide, name, start, part)
                    for (start, _), part in zip(batch, parts, strict=True)
                ]
            if not queue.to_come:
                del self._queues[key]
        return embedded


class _Queue:
    """Tiles of one scale of one slide that wait for a full batch.

    Batches never mix slides: a bag does not depend on what else is embedded.
    """

    def __init__(self, num_tiles: int):
        self.to_come = num_tiles
        self.pieces: list[tuple[int, Tensor]] = []  # row of the first tile, tiles

    def put(self, start: int, tiles: Tensor) -> None:
        self.to_come -= len(tiles)
        self.pieces.append((start, tiles))

    def batch(self, size: int) -> list[tuple[int, Tensor]]:
        """The next ``size`` tiles, less when no more will come; empty when they are not there."""
        waiting = sum(len(tiles) for _, tiles in self.pieces)
        if waiting == 0 or (self.to_come and waiting < size):
            return []
        batch = []
        while self.pieces and size:
            start, tiles = self.pieces.pop(0)
            batch.append((start, tiles[:size]))
            if len(tiles) > size:
                self.pieces.insert(0, (start + size, tiles[size:]))
            size -= len(batch[-1][1])
        return batch


def embed(
    tiles: Path,
    output: Path,
    extractors: dict[str, str],
    trainer: Trainer,
    batch_size: int = 64,
    num_workers: int = 2,
) -> int:
    """Embed every tile with the frozen extractor of its scale and write one bag file a slide.

    Finished slides are skipped. A bag made with other tiles or extractors is never mixed in: the
    run stops before it computes anything. A slide that cannot be read costs one row of status.csv.

    Parameters
    ----------
    tiles:
        folder that `tile` wrote.
    output:
        folder for the bags.
    extractors:
        per scale a DINO checkpoint of that scale, or a timm name (pretrained weights), or
        random:NAME (random weights).
    trainer:
        Lightning's; devices, nodes, precision and progress bar are its own.
    batch_size:
        tiles that go through a network at once.
    num_workers:
        reading processes of each device.

    Returns
    -------
    The exit code: 1 when a slide failed, else 0.
    """
    cohort = read_cohort(tiles / "cohort.csv")
    rows = [row for row in cohort if tiles_path(tiles, row.slide_id).exists()]
    if not rows:
        raise InputError(f"{tiles}: no slide of its cohort has been tiled; see its status.csv")
    networks = _load_extractors(extractors, read_tiles(tiles_path(tiles, rows[0].slide_id)))
    cards = {name: network.card for name, network in networks.items()}
    todo = [
        row
        for row in rows
        if not _is_done(read_tiles(tiles_path(tiles, row.slide_id)), output, cards)
    ]

    if trainer.is_global_zero:
        for row in todo:
            failure_path(output, row.slide_id).unlink(missing_ok=True)
        write_cohort(output / "cohort.csv", cohort)
        _write_extractors(output / "extractors.json", extractors, networks)
    if todo:
        dataset = ChunkDataset(todo, tiles, max_roots=batch_size)
        module = EmbeddingModule(networks, dataset, batch_size, num_workers)
        writer = BagWriter([tiles_path(tiles, row.slide_id) for row in todo], output, cards)
        trainer.callbacks.append(writer)  # type: ignore[attr-defined]
        start = time.monotonic()
        trainer.predict(module, return_predictions=False)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            num_tiles = sum(sum(counts.values()) for counts in dataset.num_tiles)
            _report_speed(num_tiles, time.monotonic() - start, writer.seconds_waiting)
    if not trainer.is_global_zero:
        return 0  # a second process that fails would end the first one before it has reported
    return _report(cohort, tiles, output, skipped={r.slide_id for r in rows if r not in todo})


def _load_extractors(sources: Mapping[str, str], tiles: TilePyramid) -> dict[str, Extractor]:
    names = [scale.name for scale in tiles.scales]
    if set(sources) != set(names):
        raise InputError(
            f"extractors: given for {', '.join(sorted(sources)) or 'no scale'}, the tiles have "
            f"{', '.join(names)}; give one extractor for each of them"
        )
    return {
        scale.name: load_extractor(sources[scale.name], scale, tiles.tile_px)
        for scale in tiles.scales
    }


def _is_done(tiles: TilePyramid, output: Path, cards: Mapping[str, ExtractorCard]) -> bool:
    """True when the slide's bag is there; refuses a bag made in another way."""
    path = bag_path(output, tiles.slide_id)
    if not path.exists():
        return False
    if read_header(path) != bag_header(tiles, cards):
        raise InputError(
            f"{path}: made with other tiles or extractors than asked for now; "
            "choose another --output, or delete that file to make it anew"
        )
    return True


def _write_extractors(
    path: Path, sources: Mapping[str, str], networks: Mapping[str, Extractor]
) -> None:
    records = {
        name: {**asdict(network.card), "source": sources[name], "trained_on": network.trained_on}
        for name, network in networks.items()
    }
    write_text(path, json.dumps(records, indent=2))


def _report_speed(num_tiles: int, seconds: float, seconds_waiting: float) -> None:
    """The tiles of all processes; what the first of them waited for."""
    print(
        f"embed: {num_tiles} tiles in {seconds:.1f} s, {num_tiles / seconds:.0f} tiles/s; "
        f"{seconds_waiting / seconds:.0%} of it waiting for pixels, the rest for the network"
    )


def _report(cohort: Sequence[SlideRow], tiles: Path, output: Path, skipped: set[str]) -> int:
    status = []
    for row in cohort:
        failure = failure_path(output, row.slide_id)
        if not tiles_path(tiles, row.slide_id).exists():
            state, message = "not tiled", f"see {tiles / 'status.csv'}"
        elif bag_path(output, row.slide_id).exists():
            state, message = "done", "embedded before" if row.slide_id in skipped else ""
        else:
            reason = failure.read_text() if failure.exists() else "not reached; run embed again"
            state, message = "failed", reason
        status.append({"slide_id": row.slide_id, "state": state, "message": message})
    states = [record["state"] for record in status]
    write_csv(output / "status.csv", ("slide_id", "state", "message"), status)
    for record in status:
        if record["state"] != "done":
            print(f"{record['state']}: {record['slide_id']}: {record['message']}")
    print(
        f"embed: {states.count('done')} done, {states.count('not tiled')} not tiled, "
        f"{states.count('failed')} failed; see {output / 'status.csv'}"
    )
    return int("failed" in states)
