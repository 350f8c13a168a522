"""Damaged tile tables: each is refused in one sentence, or is a sound table."""

from pathlib import Path

import numpy as np
from damage import refused_or_sound

from dasmil.embedding.dataset import ChunkDataset
from dasmil.geometry import Extent
from dasmil.slides.cohort import SlideRow
from dasmil.slides.pyramid import TilingParameters, lay_tiles
from dasmil.slides.tile_slide import summary
from dasmil.slides.tile_table import read_parameters, read_tiles, tiles_path, write_tiles
from dasmil.units import Mpp

MUTATIONS = 1500


def use(path: Path) -> None:
    """All that is done with a table before a pixel is read."""
    read_parameters(path)
    tiles = read_tiles(path)
    assert summary(tiles)["state"] in ("done", "empty")
    ChunkDataset([SlideRow(tiles.slide_id, Path("a.svs"))], [tiles], max_roots=4)
    for scale in tiles.scales:
        boxes = tiles.boxes_px0(scale.name)
        assert (boxes >= 0).all() and (boxes[:, :2] < tiles.extent.size_px0).all()


def test_damaged_tables_are_refused_in_one_sentence(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((20, 20)) < 0.4
    parameters = TilingParameters(("x5", "x10", "x20"), 64)
    path = tiles_path(tmp_path, "slide")
    write_tiles(path, lay_tiles("slide", mask, Extent((900, 800), Mpp(0.5)), parameters))
    assert refused_or_sound(path, use, seed=0, number=MUTATIONS) > MUTATIONS // 2
