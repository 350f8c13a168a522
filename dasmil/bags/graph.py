"""The graph of a bag: 8-neighbours inside a scale, "part of" between scales; all O(N).

Paper, section 3, "Architecture": A_1 and A_2 are :attr:`BagGraph.edge_index` of each scale, A is
:meth:`BagGraph.union_edge_index`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dasmil.bags.bag import Bag
from dasmil.errors import InputError

UNKNOWN = -1  # the label of a slide without one
MAX_CELLS = 2**28  # of a grid's bounding box; a slide of 200,000 px at x40 has 2**20
OFFSETS = tuple((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0))


@dataclass  # not frozen: Lightning converts the fields for precisions such as bf16-true
class BagGraph:
    """One bag, or several side by side; rows of a bag are contiguous at every scale.

    Parameters
    ----------
    features: per scale (N_s, D_s) float32, scales from coarse to fine.
    parent: per scale but the coarsest (N_s,) int64, row in the next coarser scale, -1 for none.
    edge_index: per scale (2, E_s) int64, source and target row, each neighbour pair both ways.
    ptr: per scale (B + 1,) int64; bag b owns the rows ptr[b] to ptr[b + 1].
    labels: (B,) int64 class index, -1 where unknown.
    slide_ids: one a bag.
    """

    features: Mapping[str, Tensor]
    parent: Mapping[str, Tensor]
    edge_index: Mapping[str, Tensor]
    ptr: Mapping[str, Tensor]
    labels: Tensor
    slide_ids: tuple[str, ...]

    @property
    def scales(self) -> tuple[str, ...]:
        return tuple(self.features)

    @property
    def num_bags(self) -> int:
        return len(self.slide_ids)

    def union_edge_index(self) -> Tensor:
        """(2, E) edges of A: all scales' neighbours, and parent ↔ child in both directions.

        Rows are numbered through all scales, coarse to fine.
        """
        parts = []
        start = previous_start = 0
        for name, features in self.features.items():
            parts.append(self.edge_index[name] + start)
            if name in self.parent:
                parent = self.parent[name]
                child = (parent >= 0).nonzero().squeeze(1)
                up = torch.stack([child + start, parent[child] + previous_start])
                parts += [up, up.flip(0)]
            previous_start, start = start, start + len(features)
        return torch.cat(parts, dim=1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "BagGraph":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "BagGraph":
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "BagGraph":
        def over(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: function(tensor) for name, tensor in tensors.items()}

        return BagGraph(
            over(self.features),
            over(self.parent),
            over(self.edge_index),
            over(self.ptr),
            function(self.labels),
            self.slide_ids,
        )


def neighbour_edges(grid: Tensor) -> Tensor:
    """8-connectivity of tiles on an integer grid.

    A table over the bounding box, with a margin of one, tells for each cell which tile lies there.

    Parameters
    ----------
    grid: (N, 2) row, col, no cell twice.

    Returns
    -------
    (2, E) int64 source, target.
    """
    if len(grid) == 0:
        return torch.empty(2, 0, dtype=torch.int64)
    cells = grid.long() - grid.long().amin(0) + 1
    height, width = (cells.amax(0) + 2).tolist()
    position = cells[:, 0] * width + cells[:, 1]
    if height * width > MAX_CELLS:
        raise InputError(
            f"grid of {height} by {width} tiles: no slide is that large; check the bag"
        )
    tile_at = torch.full((height * width,), -1)
    tile_at[position] = torch.arange(len(grid))
    parts = []
    for row, col in OFFSETS:
        neighbour = tile_at[position + (row * width + col)]
        target = (neighbour >= 0).nonzero().squeeze(1)
        parts.append(torch.stack([neighbour[target], target]))
    return torch.cat(parts, dim=1)


def bag_graph(bag: Bag, label: int = UNKNOWN) -> BagGraph:
    """The graph of one bag."""
    return BagGraph(
        features={name: bag.features[name].float() for name in bag.scales},
        parent={name: bag.parent[name].long() for name in bag.scales[1:]},
        edge_index={name: neighbour_edges(bag.grid[name]) for name in bag.scales},
        ptr={name: torch.tensor([0, len(bag.grid[name])]) for name in bag.scales},
        labels=torch.tensor([label]),
        slide_ids=(bag.slide_id,),
    )


def join_graphs(graphs: Sequence[BagGraph]) -> BagGraph:
    """Several graphs side by side, without an edge between them."""
    if len(graphs) == 1:
        return graphs[0]
    features, parent, edge_index, ptr = {}, {}, {}, {}
    coarser = None
    for name in graphs[0].scales:
        sizes = torch.cat([graph.ptr[name].diff() for graph in graphs])
        ptr[name] = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        starts = _starts([len(graph.features[name]) for graph in graphs])
        features[name] = torch.cat([graph.features[name] for graph in graphs])
        edge_index[name] = torch.cat(
            [graph.edge_index[name] + start for graph, start in zip(graphs, starts, strict=True)], 1
        )
        if coarser is not None:
            above = _starts([len(graph.features[coarser]) for graph in graphs])
            rows = [graph.parent[name] for graph in graphs]
            shifted = [r + (r >= 0) * start for r, start in zip(rows, above, strict=True)]
            parent[name] = torch.cat(shifted)
        coarser = name
    return BagGraph(
        features,
        parent,
        edge_index,
        ptr,
        labels=torch.cat([graph.labels for graph in graphs]),
        slide_ids=tuple(slide_id for graph in graphs for slide_id in graph.slide_ids),
    )


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:number]) for number in range(len(sizes))]
