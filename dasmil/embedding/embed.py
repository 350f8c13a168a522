"""The verb ``embed``: tiles + frozen extractors → a folder of bag files.

``BAGS/<slide_id>.safetensors``, ``BAGS/cohort.csv`` (all slides), ``BAGS/status.csv`` and
``BAGS/extractors.json`` (each scale's extractor and the slides it was trained on).
"""

import json
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
from dasmil.embedding.writer import BagWriter, bag_header, failure_path
from dasmil.errors import InputError
from dasmil.files import write_csv, write_text
from dasmil.slides.cohort import SlideRow, read_cohort, write_cohort
from dasmil.slides.tile import tiles_path
from dasmil.slides.tiling import TilePyramid, read_tiles


class EmbeddingModule(LightningModule):
    """The extractors of all scales under the Trainer's predict loop.

    Parameters
    ----------
    extractors: one a scale.
    dataset: the chunks to embed.
    num_workers: reading processes of each device.
    """

    def __init__(
        self, extractors: Mapping[str, Extractor], dataset: ChunkDataset, num_workers: int
    ):
        super().__init__()
        self.names = list(extractors)
        self.feature_dims = [network.card.feature_dim for network in extractors.values()]
        self.extractors = nn.ModuleList(extractors.values())
        self.dataset = dataset
        self.num_workers = num_workers
        # with fewer slides to do than processes, some have nothing to do
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def predict_dataloader(self) -> DataLoader[TileChunk]:
        sampler = WholeSlideSampler(self.dataset, self.trainer.world_size, self.trainer.global_rank)
        return DataLoader(
            self.dataset,
            batch_size=None,  # a chunk is a batch
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=self.on_gpu,
        )

    def predict_step(self, chunk: TileChunk, batch_idx: int) -> Tensor:
        number = self.names.index(chunk.scale)
        if len(chunk.tiles) == 0:
            return torch.empty(0, self.feature_dims[number])
        return self.extractors[number](chunk.tiles)


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
        dataset = ChunkDataset(todo, tiles, batch_size)
        module = EmbeddingModule(networks, dataset, num_workers)
        files = [tiles_path(tiles, row.slide_id) for row in todo]
        trainer.callbacks.append(BagWriter(files, output, cards))  # type: ignore[attr-defined]
        trainer.predict(module, return_predictions=False)
        trainer.strategy.barrier()
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
