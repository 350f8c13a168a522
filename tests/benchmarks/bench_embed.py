"""``embed``: preparing tiles alone, and the whole verb, against a read and a resize for each tile.

The limit is ``read_region`` alone, of the very regions that ours reads (runs of coarsest tiles that
lie side by side), each pixel once, without making tiles of them.
"""

import contextlib
import io
import multiprocessing
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from statistics import median
from unittest import mock

import numpy as np
import openslide
import torch
from lightning.pytorch import Trainer
from PIL import Image
from table import Row, seconds
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dasmil.demo.slides import write_cohort
from dasmil.embedding.dataset import CACHE_BYTES, ChunkDataset
from dasmil.embedding.embed import embed
from dasmil.embedding.extractor import Extractor, load_extractor
from dasmil.geometry import Tiles
from dasmil.quiet import hush
from dasmil.slides.cohort import SlideRow, read_cohort
from dasmil.slides.cohort import write_cohort as write_table
from dasmil.slides.cutting import TileCutter
from dasmil.slides.reader import RgbArray, Slide
from dasmil.slides.tile import tile
from dasmil.slides.tile_table import read_tiles, tiles_path
from dasmil.units import Scale

SLIDES = Path(__file__).resolve().parents[3] / "shared" / "data" / "slides" / "atlas_x20"
SCALES = ("x10", "x20")
NETWORK = "random:test_vit"
LARGER_NETWORK = "random:vit_small_patch16_224"  # where there is a GPU
QUICK = "a network that costs nothing"
BATCH_SIZE = 64
WORKERS = 2


class TileByTile(Dataset[Tensor]):
    """The usual way: every tile of a scale is read and resized on its own."""

    def __init__(self, rows: Sequence[SlideRow], tables: Sequence[Tiles], scale: str):
        self.side = tables[0].tile_px
        self.tiles = [
            (row.path, box)
            for row, table in zip(rows, tables, strict=True)
            for box in table.boxes_px0(scale).tolist()
        ]
        self.open: tuple[Path, openslide.OpenSlide] | None = None

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> Tensor:
        path, (left, top, right, bottom) = self.tiles[index]
        if self.open is None or self.open[0] != path:
            self.open = path, openslide.OpenSlide(path)
        slide = self.open[1]
        level = slide.get_best_level_for_downsample((right - left) / self.side * 1.001)
        stored = slide.level_downsamples[level]
        size = round((right - left) / stored), round((bottom - top) / stored)
        picture = slide.read_region((left, top), level, size).convert("RGB")
        if picture.size != (self.side, self.side):
            picture = picture.resize((self.side, self.side), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


class RecordingSlide(Slide):
    """Notes what is read."""

    regions: list[tuple[tuple[int, int], int, tuple[int, int]]]

    def region(self, origin_px0: tuple[int, int], level: int, size_px: tuple[int, int]) -> RgbArray:
        self.regions.append((origin_px0, level, size_px))
        return super().region(origin_px0, level, size_px)


def prepare(row: SlideRow, table: Tiles) -> None:
    dataset = ChunkDataset([row], [table], BATCH_SIZE)
    for number in range(len(dataset)):
        assert not dataset[number].error


def prepare_tile_by_tile(row: SlideRow, table: Tiles) -> None:
    for scale in SCALES:
        dataset = TileByTile([row], [table], scale)
        for number in range(len(dataset)):
            dataset[number]


def regions_of(row: SlideRow, table: Tiles) -> list[tuple[tuple[int, int], int, tuple]]:
    with RecordingSlide(row) as slide:
        slide.regions = []
        TileCutter(slide, table).cut(0, len(table.grid[SCALES[0]]))
        return slide.regions


def read_alone(row: SlideRow, regions: Iterable[tuple[tuple[int, int], int, tuple]]) -> None:
    with openslide.OpenSlide(row.path) as slide:
        slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
        for region in regions:
            slide.read_region(*region)


class Quick(nn.Module):
    """A network that takes as good as no time, as a small one on a GPU."""

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) → (N, 3)."""
        return images[:, :, 15::16, 15::16].mean((2, 3))


def make_network(kind: str, scale: Scale, tile_px: int) -> Extractor:
    if kind == QUICK:
        return Extractor(Quick(), QUICK, tile_px, (0.5,) * 3, (0.25,) * 3)
    return load_extractor(kind, scale, tile_px)


def embed_all(tiles: Path, bags: Path, kind: str) -> float:
    """Run the verb; returns the share of its time in which the network waits for pixels."""
    rmtree(bags, ignore_errors=True)
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        mock.patch("dasmil.embedding.embed.load_extractor", make_network),
    ):
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        extractors = dict.fromkeys(SCALES, kind)
        assert embed(tiles, bags, extractors, trainer, BATCH_SIZE, WORKERS) == 0
    share = re.search(r"(\d+)% of it waiting for pixels", printed.getvalue())
    assert share
    return int(share[1]) / 100


def embed_tile_by_tile(rows: Sequence[SlideRow], tables: Sequence[Tiles], kind: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for scale in tables[0].scales:
        network = make_network(kind, scale, tables[0].tile_px).to(device)
        loader = DataLoader(TileByTile(rows, tables, scale.name), BATCH_SIZE, num_workers=WORKERS)
        with torch.inference_mode():
            torch.cat([network(tiles.to(device)).half().cpu() for tiles in loader])


def network_alone(tables: Sequence[Tiles], kind: str) -> None:
    """As many tiles of noise, without reading any."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side, batch = tables[0].tile_px, BATCH_SIZE
    network = make_network(kind, tables[0].scales[0], side).to(device)
    images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device=device)
    left = sum(sum(table.num_tiles().values()) for table in tables)
    with torch.inference_mode():
        for size in [batch] * (left // batch) + [left % batch]:
            network(images[:size]).cpu()


def cohort(folder: Path, quick: bool) -> tuple[Path, int]:
    """A table of slides, and the side of their tiles."""
    if quick or not SLIDES.is_dir():
        count, size_px0 = ({"train": 1}, (640, 640)) if quick else ({"train": 2}, (4096, 4096))
        return write_cohort(folder / "slides", num_slides=count, size_px0=size_px0), 64
    rows = [
        SlideRow("PDAC-tru-cut_HE3", SLIDES / "PDAC-tru-cut_HE3.svs"),
        SlideRow("erosion_HE", SLIDES / "erosion_HE.tif", mpp=0.5),
    ]
    write_table(folder / "cohort.csv", rows)
    return folder / "cohort.csv", 256


def measure(quick: bool) -> Iterable[Row]:
    hush()
    if "fork" in multiprocessing.get_all_start_methods():  # as from the command line on Linux
        multiprocessing.set_start_method("fork", force=True)
    runs = 1 if quick else 5
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        table, side = cohort(folder, quick)
        tiles = folder / "tiles"
        with contextlib.redirect_stdout(io.StringIO()):
            assert tile(table, tiles, SCALES, tile_px=side, workers=1) == 0
        rows = read_cohort(tiles / "cohort.csv")
        tables = [read_tiles(tiles_path(tiles, row.slide_id)) for row in rows]
        counts = [sum(one.num_tiles().values()) for one in tables]
        for row, one, count in zip(rows, tables, counts, strict=True):
            ours, peer, limit = seconds(
                partial(prepare, row, one),
                partial(prepare_tile_by_tile, row, one),
                partial(read_alone, row, regions_of(row, one)),
                runs=runs,
            )
            yield Row(
                "embed",
                f"input alone, one process, {row.slide_id}, {count} tiles",
                "tiles/s",
                count / ours,
                peer=count / peer,
                peer_is="a read_region and a PIL resize for each tile",
                limit=count / limit,
                limit_is="read_region alone, of the regions that ours reads",
                target="≥ 2 × the peer, ≥ 0.8 of the limit",
                more_is_better=True,
            )
        if not quick:  # so many tiles that the start of the workers does not count
            rows = [replace(row, slide_id=f"{row.slide_id}_{n}") for n in range(2) for row in rows]
            write_table(folder / "cohort.csv", rows)
            tiles = folder / "more tiles"
            with contextlib.redirect_stdout(io.StringIO()):
                assert tile(folder / "cohort.csv", tiles, SCALES, tile_px=side, workers=1) == 0
            tables, counts = tables * 2, counts * 2
        torch.set_num_threads(1)  # the workers want cores, too, and threads wait for each other
        has_gpu = torch.cuda.is_available()
        for kind in (QUICK, NETWORK, LARGER_NETWORK) if has_gpu else (QUICK, NETWORK):
            shares: list[float] = []
            ours, peer, limit = seconds(
                lambda kind=kind, shares=shares: shares.append(  # type: ignore[misc]
                    embed_all(tiles, folder / "bags", kind)
                ),
                partial(embed_tile_by_tile, rows, tables, kind),
                partial(network_alone, tables, kind),
                runs=1 if quick else 3,
            )
            case = (
                f"whole verb, {kind.removeprefix('random:')}, {WORKERS} workers, "
                f"{len(rows)} slides, {sum(counts)} tiles"
            )
            yield Row(
                "embed",
                case,
                "tiles/s",
                sum(counts) / ours,
                peer=sum(counts) / peer,
                peer_is="a DataLoader a scale, a read and a resize for each tile",
                limit=sum(counts) / limit,
                limit_is="the network alone, of one batch again and again",
                target="≥ 2 × the peer, unless the network is the limit",
                more_is_better=True,
            )
            if has_gpu:
                share = 100 * median(shares)
                yield Row("embed", f"{case}: time in which the GPU waits for pixels", "%", share)
