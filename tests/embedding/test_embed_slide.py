"""Each scale needs an extractor; batches do not depend on what arrives when."""

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dasmil.embedding.embed_slide import TileBatches, refuse_other_scales
from dasmil.errors import InputError
from dasmil.slides.cohort import read_cohort
from dasmil.slides.tile_table import read_tiles, tiles_path


def test_each_scale_needs_an_extractor(road) -> None:
    row = read_cohort(road.tiles / "cohort.csv")[0]
    tiles = read_tiles(tiles_path(road.tiles, row.slide_id))
    refuse_other_scales({"x10": None, "x20": None}, tiles)
    with pytest.raises(InputError, match="given for x20, the tiles have x10, x20"):
        refuse_other_scales({"x20": None}, tiles)


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
