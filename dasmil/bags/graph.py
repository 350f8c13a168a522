"""The graph of a bag: 8-neighbours inside a scale, "part of" between scales; all O(N).

Bontempo et al. 2023, section 3, "Architecture": A_1 and A_2 are :attr:`BagGraph.neighbours` of the
scales, A is :attr:`BagGraph.union`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from dasmil.bags.bag import Bag
from dasmil.bags.header import BagHeader
from dasmil.bags.neighbours import Neighbours, grid_neighbours, join_neighbours, union_neighbours

UNKNOWN = -1  # the label of a slide without one


class BagHeaders:
    """The headers of a graph's bags.

    It is neither a tuple nor a dataclass, whose contents Lightning converts, and refuses if frozen.
    """

    def __init__(self, headers: Iterable[BagHeader]):
        self._headers = tuple(headers)

    def __iter__(self) -> Iterator[BagHeader]:
        return iter(self._headers)

    def __getitem__(self, number: int) -> BagHeader:
        return self._headers[number]


@dataclass  # not frozen: Lightning converts the fields for precisions such as bf16-true
class BagGraph:
    """The graph of one or several bags; the rows of a bag are contiguous at every scale.

    Parameters
    ----------
    features: per scale (N_s, D_s), float16 or float32 as stored; scales from coarse to fine.
    grid: per scale (N_s, 2) int32 row, col; always on the CPU.
    parent: per scale but the coarsest (N_s,) int64, row in the next coarser scale, -1 for none.
    ptr: per scale (B + 1,) int64; bag b owns the rows ptr[b] to ptr[b + 1]; always on the CPU, so
        that its sizes are known without waiting for a GPU.
    labels: (B,) int64 class index, -1 if unknown.
    headers: one per bag.
    neighbours: of each scale's tiles on its grid; None if no edges were made.
    union: of the tiles of all scales, in one numbering from coarse to fine: neighbours on the
        grids, parents and children; None if no edges were made.
    """

    features: Mapping[str, Tensor]
    grid: Mapping[str, Tensor]
    parent: Mapping[str, Tensor]
    ptr: Mapping[str, Tensor]
    labels: Tensor
    headers: BagHeaders
    neighbours: Mapping[str, Neighbours] | None = None
    union: Neighbours | None = None

    @property
    def slide_ids(self) -> tuple[str, ...]:
        """One per bag."""
        return tuple(header.slide_id for header in self.headers)

    @property
    def scales(self) -> tuple[str, ...]:
        return tuple(self.features)

    @property
    def num_bags(self) -> int:
        return len(self.labels)

    def in_dtype(self, dtype: torch.dtype) -> "BagGraph":
        """The graph with its features in another dtype."""
        return replace(self, features={name: x.to(dtype) for name, x in self.features.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "BagGraph":
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "BagGraph":
        return self._map(lambda part: part.pin_memory())

    def _map(self, function: Callable[[Any], Any]) -> "BagGraph":
        def over(parts: Mapping[str, Any]) -> dict[str, Any]:
            return {name: function(part) for name, part in parts.items()}

        return BagGraph(
            over(self.features),
            self.grid,
            over(self.parent),
            self.ptr,
            function(self.labels),
            self.headers,
            None if self.neighbours is None else over(self.neighbours),
            None if self.union is None else function(self.union),
        )

    def bag(self, number: int) -> Bag:
        """One of the bags; its features are views of the graph's, on the same device."""
        header, rows = self.headers[number], self.rows(number)
        parent = {}
        for coarse, fine in pairwise(self.scales):
            above = self.parent[fine][rows[fine]].cpu()
            parent[fine] = torch.where(above < 0, above, above - rows[coarse].start).int()
        return Bag.from_header(
            header,
            {name: self.features[name][rows[name]] for name in self.scales},
            {name: self.grid[name][rows[name]] for name in self.scales},
            parent,
        )

    def rows(self, number: int) -> dict[str, slice]:
        """The rows of one bag, per scale."""
        return {name: slice(*ptr[number : number + 2].tolist()) for name, ptr in self.ptr.items()}


def bag_graph(bag: Bag, label: int = UNKNOWN, edges: bool = True) -> BagGraph:
    """Make the graph of one bag.

    Parameters
    ----------
    label: class index.
    edges: whether to make edges; methods whose ``uses_edges`` is False need none.
    """
    parent = {name: bag.parent[name].long() for name in bag.scales[1:]}
    neighbours = {name: grid_neighbours(bag.grid[name]) for name in bag.scales} if edges else None
    return BagGraph(
        features={name: bag.features[name] for name in bag.scales},
        grid={name: bag.grid[name] for name in bag.scales},
        parent=parent,
        ptr={name: torch.tensor([0, len(bag.grid[name])]) for name in bag.scales},
        labels=torch.tensor([label]),
        headers=BagHeaders([bag.header]),
        neighbours=neighbours,
        union=None if neighbours is None else union_neighbours(neighbours, parent),
    )


def join_graphs(graphs: Sequence[BagGraph]) -> BagGraph:
    """Join graphs, without edges between them."""
    if len(graphs) == 1:
        return graphs[0]
    features, grid, parent, ptr = {}, {}, {}, {}
    coarser = None
    for name in graphs[0].scales:
        sizes = torch.cat([graph.ptr[name].diff() for graph in graphs])
        ptr[name] = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        features[name] = torch.cat([graph.features[name] for graph in graphs])
        grid[name] = torch.cat([graph.grid[name] for graph in graphs])
        if coarser is not None:
            above = accumulate((len(graph.features[coarser]) for graph in graphs), initial=0)
            rows = [graph.parent[name] for graph in graphs]
            shifted = [r + (r >= 0) * start for r, start in zip(rows, above)]
            parent[name] = torch.cat(shifted)
        coarser = name
    neighbours = _join_edges(graphs)
    return BagGraph(
        features,
        grid,
        parent,
        ptr,
        labels=torch.cat([graph.labels for graph in graphs]),
        headers=BagHeaders(header for graph in graphs for header in graph.headers),
        neighbours=neighbours,
        union=None if neighbours is None else union_neighbours(neighbours, parent),
    )


def _join_edges(graphs: Sequence[BagGraph]) -> dict[str, Neighbours] | None:
    """Neighbours per scale; None if the graphs have no edges."""
    parts = [graph.neighbours for graph in graphs if graph.neighbours is not None]
    if not parts:
        return None
    return {name: join_neighbours([part[name] for part in parts]) for name in parts[0]}
