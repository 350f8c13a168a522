"""Files as mil4wsi writes them, made by hand."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch_geometric.data import Data

from dasmil.cli import main
from dasmil.interop.mil4wsi.graph import PreparedGraph, read_prepared

Tile = tuple[int, int, int, int]  # level, x, y, row of the parent


def make_data(
    tiles: Sequence[Tile], name: str = "slide", label: int = 1, base: int = 2048, **changed: Any
) -> Data:
    """What mil4wsi makes of these tiles; neighbours are one step, base / 2**level, apart."""
    level, x, y, childof = (torch.tensor(column) for column in zip(*tiles, strict=True))
    pairs = [
        (i, j)
        for i, j in product(range(len(tiles)), repeat=2)
        if _are_neighbours(tiles[i], tiles[j], base) or tiles[i][3] == j or tiles[j][3] == i
    ]
    values = {
        "x": torch.randn(len(tiles), 5, generator=torch.Generator().manual_seed(len(tiles))),
        "edge_index": torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous(),
        "childof": childof,
        "level": level,
        "y": torch.tensor([label]),
        "name": name,
        "patch_label": torch.tensor([-1]),
        "x_coord": x,
        "y_coord": y,
    }
    return Data(**{key: v for key, v in (values | changed).items() if v is not None})


def _are_neighbours(one: Tile, other: Tile, base: int) -> bool:
    step = base // 2 ** one[0]
    distance = {abs(one[1] - other[1]), abs(one[2] - other[2])}
    return one[0] == other[0] and distance in ({step}, {0, step})


def make_prepared(tiles: Sequence[Tile], folder: Path, **options: Any) -> PreparedGraph:
    path = folder / "data_0.pt"
    torch.save(make_data(tiles, **options), path)
    return read_prepared(path)


def write_data(folder: Path, part: str, number: int, data: Any) -> Path:
    path = folder / "processed" / part / f"data_{number}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(data, path)
    return path


def block(x: int, y: int, level: int = 2, base: int = 2048, first_row: int = 0) -> list[Tile]:
    """A tile and the four inside it, as rows from ``first_row`` on."""
    step = base // 2 ** (level + 1)
    inside = [
        (level + 1, x + i * step, y + j * step, first_row) for i, j in product((0, 1), repeat=2)
    ]
    return [(level, x, y, -1), *inside]


def blocks(*places: tuple[int, int], **options: int) -> list[Tile]:
    tiles: list[Tile] = []
    for x, y in places:
        tiles += block(x, y, first_row=len(tiles), **options)
    return tiles


def import_bags(src: Path, dest: Path, *options: str) -> int:
    return main(["import", "mil4wsi-bags", str(src), str(dest), *options])


class RunsCode:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")
