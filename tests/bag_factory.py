"""Bags, graphs and folders of bags for the tests, and their edges found by search."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dasmil.bags import (
    Bag,
    BagGraph,
    ExtractorCard,
    Neighbours,
    bag_graph,
    bag_path,
    write_bag,
)
from dasmil.geometry import Extent, Int32Array, Tiles
from dasmil.units import Mpp, Scale, TilePx

CLASSES = ["normal", "tumour"]


def make_bag(
    slide_id: str = "slide",
    scales: Sequence[str | Scale] = ("x10", "x20"),
    dims: int | Mapping[str, int] = 6,
    num_tiles: int = 20,
    side: int = 16,
    seed: int = 0,
    tile_px: int = 256,
    fingerprint: str = "f" * 64,
) -> Bag:
    """A valid bag.

    Parameters
    ----------
    scales: coarse to fine; a name stands for its nominal mpp.
    dims: width of the features, the same for all scales or per scale.
    num_tiles: of the finest scale, drawn from ``side`` x ``side`` cells; 0 gives an empty bag.
    """
    rng = np.random.default_rng(seed)
    kinds = tuple(Scale.parse(s) if isinstance(s, str) else s for s in scales)
    widths = {s.name: dims if isinstance(dims, int) else dims[s.name] for s in kinds}
    drawn = rng.choice(side * side, num_tiles, replace=False)
    lines = sorted(_ancestry(divmod(int(cell), side), kinds) for cell in drawn)

    grid: dict[str, Int32Array] = {}
    parent: dict[str, Int32Array] = {}
    features: dict[str, Tensor] = {}
    rows_above: dict[tuple, int] = {}
    for number, scale in enumerate(kinds):
        tiles = list(dict.fromkeys(line[: number + 1] for line in lines))
        cells = [tile[-1] for tile in tiles]
        grid[scale.name] = np.array(cells, dtype=np.int32).reshape(-1, 2)
        values = rng.standard_normal((len(tiles), widths[scale.name]))
        features[scale.name] = torch.from_numpy(values.astype(np.float16))
        if number > 0:
            above = [rows_above[tile[:-1]] for tile in tiles]
            parent[scale.name] = np.array(above, dtype=np.int32)
        rows_above = {tile: row for row, tile in enumerate(tiles)}

    tiles = Tiles(
        slide_id=slide_id,
        extent=Extent((20_000, 10_000), Mpp(0.25)),
        scales=kinds,
        tile_px=TilePx(tile_px),
        tiling='{"min_tissue": 0.25}',
        grid=grid,
        parent=parent,
    )
    cards = {name: make_card(width, fingerprint) for name, width in widths.items()}
    return Bag(tiles, features, cards)


def with_changes(bag: Bag, **changes: Any) -> Bag:
    """The bag with other values of its fields, of its tiles' or of their extent's.

    Parameters
    ----------
    changes: by name of the field; ``grid`` and ``parent`` as tensors.
    """

    def taken(kind: type) -> dict[str, Any]:
        names = {each.name for each in fields(kind)} & changes.keys()
        return {name: changes.pop(name) for name in names}

    for name in {"grid", "parent"} & changes.keys():
        changes[name] = {scale: rows.numpy() for scale, rows in changes[name].items()}
    extent = replace(bag.tiles.extent, **taken(Extent))
    tiles = replace(bag.tiles, extent=extent, **taken(Tiles))
    return replace(bag, tiles=tiles, **changes)


def make_card(feature_dim: int = 6, fingerprint: str = "f" * 64) -> ExtractorCard:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return ExtractorCard("vit_small_patch16_224", fingerprint, mean, std, 224, feature_dim)


def _ancestry(cell: tuple[int, int], scales: Sequence[Scale]) -> tuple[tuple[int, int], ...]:
    """The cells of a finest tile's ancestors and its own, coarse to fine."""
    ratios = [round(scale.mpp / scales[-1].mpp) for scale in scales]
    return tuple((cell[0] // ratio, cell[1] // ratio) for ratio in ratios)


def make_graphs(sizes: Iterable[int], labels: Sequence[int] = (), **bag: object) -> list[BagGraph]:
    """One graph a size, each of its own random bag."""
    return [
        bag_graph(
            make_bag(f"slide{number}", num_tiles=size, seed=number, **bag),  # type: ignore[arg-type]
            labels[number] if labels else number % 2,
        )
        for number, size in enumerate(sizes)
    ]


def write_bags(
    folder: Path,
    labels: Mapping[str, str | None],
    split: Mapping[str, str] | None = None,
    patients: Mapping[str, str] | None = None,
    missing: Iterable[str] = (),
    empty: Iterable[str] = (),
    digests: Mapping[str, str] | None = None,
    **bag: object,
) -> Path:
    """A folder of bags with its cohort.csv, and one bag of 8 tiles for each slide.

    Parameters
    ----------
    labels: label of each slide, None where it has none.
    split, patients: the columns of those names, where given.
    missing: slides without a bag file.
    empty: slides whose bag holds no tile.
    digests: of the slides' files, empty where not given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_cohort_csv(folder / "cohort.csv", labels, split, patients)
    for seed, slide_id in enumerate(labels):
        if slide_id in set(missing):
            continue
        num_tiles = 0 if slide_id in set(empty) else 8
        made = make_bag(slide_id, num_tiles=num_tiles, seed=seed, **bag)  # type: ignore[arg-type]
        digest = (digests or {}).get(slide_id, "")
        write_bag(bag_path(folder, slide_id), with_changes(made, slide_digest=digest))
    return folder


def trainer_of(split: object) -> Any:
    """As much of a Trainer as a DataModule asks, whose model has met the slides of ``split``."""
    card = SimpleNamespace(split=split, bag_format=make_bag().header.bag_format())
    model = SimpleNamespace(is_bound=True, card=card)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(lightning_module=model, world_size=1, global_rank=0, strategy=strategy)


def write_cohort_csv(
    path: Path,
    labels: Mapping[str, str | None],
    split: Mapping[str, str] | None = None,
    patients: Mapping[str, str] | None = None,
) -> None:
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["slide_id", "path", "label", "patient_id", "split"])
        for slide_id, label in labels.items():
            patient = (patients or {}).get(slide_id, "")
            part = (split or {}).get(slide_id, "")
            table.writerow([slide_id, f"{slide_id}.svs", label or "", patient, part])


def neighbours_by_search(grid: Tensor) -> list[tuple[int, int]]:
    """Sorted pairs of different tiles whose rows and columns differ by one at most."""
    cells = grid.tolist()
    pairs = product(range(len(cells)), repeat=2)
    return [
        (i, j)
        for i, j in pairs
        if i != j and max(abs(cells[i][0] - cells[j][0]), abs(cells[i][1] - cells[j][1])) == 1
    ]


def union_by_search(bag: Bag) -> list[tuple[int, int]]:
    """Sorted edges of all scales in one numbering; a parent is found by the pixels it covers."""
    edges: list[tuple[int, int]] = []
    starts = np.cumsum([0, *bag.num_tiles().values()])
    for number, name in enumerate(bag.scales):
        start = int(starts[number])
        edges += [(i + start, j + start) for i, j in neighbours_by_search(bag.grid[name])]
        if number == 0:
            continue
        coarser = bag.scales[number - 1]
        for child, inner in enumerate(bag.boxes_px0(name).tolist()):
            for above, outer in enumerate(bag.boxes_px0(coarser).tolist()):
                if _contains(outer, inner):
                    i, j = int(starts[number - 1]) + above, start + child
                    edges += [(i, j), (j, i)]
    return sorted(edges)


def _contains(outer: Sequence[int], inner: Sequence[int]) -> bool:
    left, top, right, bottom = inner
    return outer[0] <= left and outer[1] <= top and right <= outer[2] and bottom <= outer[3]


def neighbours_of(edges: Tensor, num_nodes: int) -> Neighbours:
    """The lists of a symmetric (2, E) edge_index without repetitions; every node sees itself."""
    loops = torch.arange(num_nodes).expand(2, -1)
    seen, seer = torch.cat([edges[:, edges[0] != edges[1]], loops], dim=1)
    order = torch.argsort(seer * num_nodes + seen)
    seen, seer = seen[order], seer[order]
    reverse = torch.searchsorted(seer * num_nodes + seen, seen * num_nodes + seer)
    assert torch.equal(seen[reverse], seer), "an edge goes one way only"
    ptr = torch.searchsorted(seer, torch.arange(num_nodes + 1))
    return Neighbours(ptr.int(), seen.int(), reverse.int())


def as_pairs(edge_index: Tensor) -> list[tuple[int, int]]:
    """Sorted, with repetitions kept."""
    return sorted((int(i), int(j)) for i, j in edge_index.T)
