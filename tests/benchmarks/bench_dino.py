"""DINO's views of a tile: ours on one core and, where there is one, on a GPU; peer is lightly's."""

from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from lightly.transforms.dino_transform import DINOTransform
from PIL import Image
from table import Row, seconds

from dasmil.data.tiles import TileDataset
from dasmil.data.views import PackedTiles, PilViews, TensorViews
from dasmil.slides.cohort import SlideRow

AREA = "DINO's views"
TILE_PX = 256
VIEWS = "2 × 224 + 6 × 96 of 256 px"
PEER = "lightly's DINOTransform on PIL images"
BATCH = 64


def measure(quick: bool) -> Iterable[Row]:
    torch.set_num_threads(1)
    transform = DINOTransform(vf_prob=0.5)  # the data module's defaults
    ours, lightlys = TensorViews(transform), PilViews(transform)
    num_tiles, runs = (2, 1) if quick else (32, 5)
    with TemporaryDirectory() as folder:
        side_px = TILE_PX * (2 if quick else 6)
        slide = write_slide(Path(folder), side_px)
        columns, rows = np.meshgrid(*[np.arange(0, side_px, TILE_PX)] * 2)
        corners = np.stack([columns.flatten(), rows.flatten()], axis=1)
        boxes_px0 = np.concatenate([corners, corners + TILE_PX], axis=1)[:num_tiles]

        def read(views: Callable) -> TileDataset:
            return TileDataset([slide], [boxes_px0], TILE_PX, views)

        pixels = [read(lambda tile, _: tile)[0, row, 0] for row in range(num_tiles)]

        def make(views: Callable) -> Callable[[], object]:
            return lambda: [views(tile, seed) for seed, tile in enumerate(pixels)]

        def read_and_make(views: Callable) -> Callable[[], object]:
            tiles = read(views)
            return lambda: [tiles[0, row, row] for row in range(num_tiles)]

        for case, way in (("one core", make), ("one core, with reading", read_and_make)):
            fast, slow = seconds(way(ours), way(lightlys), runs=runs)
            yield Row(
                AREA,
                f"{VIEWS}, {case}",
                "tiles/s",
                num_tiles / fast,
                num_tiles / slow,
                PEER,
                target="3 × peer" if way is make else "",
                more_is_better=True,
            )
    if torch.cuda.is_available():
        yield on_gpu(ours, lightlys, pixels, runs)


def on_gpu(ours: TensorViews, lightlys: PilViews, pixels: list[np.ndarray], runs: int) -> Row:
    """A batch whose tiles were read and drawn for by other processes; peer on one core."""
    batch = ours.collate(
        [ours.draw(pixels[number % len(pixels)], number) for number in range(BATCH)]
    )
    batch = PackedTiles(*(part.pin_memory() for part in batch[:3]), batch.shapes)
    gpu = torch.device("cuda", torch.cuda.current_device())

    def fast() -> None:
        ours.batch(batch.to(gpu))
        torch.cuda.synchronize()

    def slow() -> None:
        for seed in range(8):
            lightlys(pixels[seed % len(pixels)], seed)

    there, here = seconds(fast, slow, runs=runs)
    name = torch.cuda.get_device_name()
    peer_is = f"{PEER}, one core"
    return Row(
        AREA, f"{VIEWS}, {name}", "tiles/s", BATCH / there, 8 / here, peer_is, more_is_better=True
    )


def write_slide(folder: Path, side: int) -> SlideRow:
    """Smooth blobs of any colour, with some noise."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(256, size=(side // 8, side // 8, 3), dtype=np.uint8)
    picture = np.array(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
    picture += generator.integers(8, size=picture.shape, dtype=np.uint8)
    path = folder / "slide.png"
    Image.fromarray(picture).save(path)
    return SlideRow("slide", path, mpp=0.5)
