"""Damaged bags: each is refused in one sentence, or is a sound bag."""

from pathlib import Path

import numpy as np
from bag_factory import make_bag
from damage import refused_or_sound

from dasmil.bag_folder import describe_bag
from dasmil.bags import bag_graph, bag_path, read_bag, read_header, write_bag
from dasmil.bags.store import graph_bytes
from dasmil.reports.heatmap import draw_heatmap

MUTATIONS = 1500


def use(path: Path) -> None:
    """All that is done with a bag."""
    describe_bag(path)
    graph_bytes(path)
    bag = read_bag(path)
    assert bag.header == read_header(path)
    header = bag.header
    assert header.bag_format() and header.scales and "/" not in header.slide_id
    bag_graph(bag)
    canvas = np.full((20, 20, 3), 255, np.uint8)
    for scale in bag.scales:
        boxes = bag.boxes_px0(scale).numpy()
        assert (boxes >= 0).all() and (boxes[:, 2:] >= boxes[:, :2]).all()
        draw_heatmap(canvas, bag, scale, {"a": np.full(len(boxes), 0.5)}, "")


def test_damaged_bags_are_refused_in_one_sentence(tmp_path: Path) -> None:
    path = bag_path(tmp_path, "slide")
    write_bag(path, make_bag(scales=("x5", "x10", "x20"), num_tiles=12))
    assert refused_or_sound(path, use, seed=0, number=MUTATIONS) > MUTATIONS // 2
