"""Vectors → graph: bags, their files, and the graph over their tiles."""

from dasmil.bag_folder import bag_path
from dasmil.bags.bag import Bag, all_finite, ancestor_rows
from dasmil.bags.graph import UNKNOWN, BagGraph, bag_graph, join_graphs
from dasmil.bags.header import (
    BagHeader,
    ExtractorCard,
    bag_format,
    describe_difference,
    describe_other_bag,
)
from dasmil.bags.neighbours import Neighbours, grid_neighbours
from dasmil.bags.output import ScaleOutput
from dasmil.bags.store import read_bag, read_header, read_headers, write_bag

__all__ = [
    "UNKNOWN",
    "Bag",
    "BagGraph",
    "BagHeader",
    "ExtractorCard",
    "Neighbours",
    "ScaleOutput",
    "all_finite",
    "ancestor_rows",
    "bag_format",
    "bag_graph",
    "bag_path",
    "describe_difference",
    "describe_other_bag",
    "grid_neighbours",
    "join_graphs",
    "read_bag",
    "read_header",
    "read_headers",
    "write_bag",
]
