"""Edges from the integer grid, on one core, against a search tree and against reading a file."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from cases import THOUSAND, grids
from safetensors.torch import load_file, save_file
from scipy.spatial import cKDTree
from table import Row, seconds
from torch import Tensor

from dasmil.bags import Neighbours, grid_neighbours
from dasmil.bags.neighbours import union_neighbours


def by_tree(grid: Tensor) -> Tensor:
    """The usual way: all pairs within √2 by a k-d tree; (2, E) both ways."""
    pairs = cKDTree(grid.numpy()).query_pairs(1.5, output_type="ndarray")
    return torch.from_numpy(np.concatenate([pairs, pairs[:, ::-1]]).T.copy())


def read(path: Path) -> Tensor:
    return load_file(path)["edge_index"].clone()


def union(coarse: Tensor, fine: Tensor, parent: Tensor) -> Neighbours:
    neighbours = {"x10": grid_neighbours(coarse), "x20": grid_neighbours(fine)}
    return union_neighbours(neighbours, {"x20": parent})


def measure(quick: bool) -> Iterator[Row]:
    torch.set_num_threads(1)
    runs = 1 if quick else 9
    for num_tiles in (THOUSAND,) if quick else (16 * THOUSAND, 64 * THOUSAND):
        coarse, fine, parent = grids(num_tiles)
        parent = parent.long()
        tiles = f"{num_tiles // THOUSAND}k tiles"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "edges.safetensors"
            save_file({"edge_index": grid_neighbours(fine).edge_index()}, path)
            ours, tree, reading = seconds(
                lambda grid=fine: grid_neighbours(grid),
                lambda grid=fine: by_tree(grid),
                lambda path=path: read(path),
                runs=runs,
            )
        yield Row(
            "edges",
            f"8-neighbours, {tiles}, one core",
            "ms",
            1e3 * ours,
            1e3 * tree,
            "k-d tree",
            1e3 * reading,
            "reading them from a warm file",
            "≤ 20 ms for 64k",
        )
        (all_scales,) = seconds(lambda c=coarse, f=fine, p=parent: union(c, f, p), runs=runs)
        yield Row(
            "edges", f"both scales and their union, {tiles}, one core", "ms", 1e3 * all_scales
        )
