"""``embed_slide`` and ``embed`` give the same bag; batches do not depend on what arrives when."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dasmil.bags import bag_path, read_bag
from dasmil.embedding.embed_slide import TileBatches, embed_slide
from dasmil.embedding.extractor import Extractor, load_extractor
from dasmil.errors import InputError
from dasmil.geometry import Tiles
from dasmil.slides.cohort import read_cohort
from dasmil.slides.reader import DamagedError, Slide
from dasmil.slides.tile_table import read_tiles, tiles_path


def dino_extractors(road, tiles: Tiles) -> dict[str, Extractor]:
    return {s.name: load_extractor(str(road.dino[s.name]), s, tiles.tile_px) for s in tiles.scales}


def first_slide(road) -> tuple[Slide, Tiles]:
    row = read_cohort(road.tiles / "cohort.csv")[0]
    return Slide(row), read_tiles(tiles_path(road.tiles, row.slide_id))


def test_its_bag_is_that_of_the_verb_to_the_last_bit(road) -> None:
    slide, tiles = first_slide(road)
    with slide:
        bag = embed_slide(slide, tiles, dino_extractors(road, tiles))
    written = read_bag(bag_path(road.bags, tiles.slide_id))
    assert bag.header == written.header
    assert bag.num_tiles()["x20"] > 64  # several batches
    for name in bag.scales:
        assert torch.equal(bag.features[name], written.features[name])
        assert torch.equal(bag.grid[name], written.grid[name])
    assert torch.equal(bag.parent["x20"], written.parent["x20"])
    bag.validate()


def test_a_slide_without_tiles_gives_a_bag_without_tiles(road) -> None:
    slide, tiles = first_slide(road)
    grid = {name: places[:0] for name, places in tiles.grid.items()}
    parent = {name: rows[:0] for name, rows in tiles.parent.items()}
    with slide:
        bag = embed_slide(
            slide, replace(tiles, grid=grid, parent=parent), dino_extractors(road, tiles)
        )
    assert set(bag.num_tiles().values()) == {0}
    bag.validate()


def test_each_scale_needs_an_extractor(road) -> None:
    slide, tiles = first_slide(road)
    extractors = dino_extractors(road, tiles)
    del extractors["x10"]
    with slide, pytest.raises(InputError, match="given for x20, the tiles have x10, x20"):
        embed_slide(slide, tiles, extractors)


def test_damaged_tiles_are_refused(road, monkeypatch) -> None:
    slide, tiles = first_slide(road)

    def fail(*_: object) -> None:
        raise DamagedError("cut off") from ValueError("cut off")

    monkeypatch.setattr(Slide, "region", fail)
    with slide, pytest.raises(InputError, match=r"be read: cut off; with it .* allows 0"):
        embed_slide(slide, tiles, dino_extractors(road, tiles))


@pytest.mark.parametrize("seed", range(5))
def test_batches_hold_the_same_tiles_in_whatever_order_they_arrive(seed: int) -> None:
    order = random.Random(seed)
    rows = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1)
    cuts = [0, *sorted(order.sample(range(1, 50), 9)), 50]
    pieces = [(start, rows[start:stop]) for start, stop in pairwise(cuts)]
    order.shuffle(pieces)
    batches = TileBatches(50, 8, torch.contiguous_format)
    complete: dict[int, Tensor] = {}
    for start, tiles in pieces:
        complete |= {first: batch.clone() for first, batch in batches.add(start, tiles)}
    assert sorted(complete) == list(range(0, 50, 8))
    for first, batch in complete.items():
        assert torch.equal(batch, rows[first : first + 8])
