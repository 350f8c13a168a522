"""The graph of a bag: 8-neighbours inside a scale, "part of" between scales; all O(N).

Paper, section 3, "Architecture": A_1 and A_2 are :attr:`BagGraph.neighbours` of each scale, A is
:attr:`BagGraph.union`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dasmil.bags.bag import Bag
from dasmil.bags.neighbours import Neighbours, grid_neighbours, join_neighbours, union_neighbours

UNKNOWN = -1  # the label of a slide without one


@dataclass  # not frozen: Lightning converts the fields for precisions such as bf16-true
class BagGraph:
    """One bag, or several side by side; rows of a bag are contiguous at every scale.

    Parameters
    ----------
    features: per scale (N_s, D_s), float16 or float32 as stored; scales from coarse to fine.
    parent: per scale but the coarsest (N_s,) int64, row in the next coarser scale, -1 for none.
    neighbours: of each scale's tiles on its grid.
    union: of all scales' tiles, numbered through from coarse to fine: neighbours on the grids, and
        parents and children.
    ptr: per scale (B + 1,) int64; bag b owns the rows ptr[b] to ptr[b + 1].
    labels: (B,) int64 class index, -1 where unknown.
    slide_ids: one a bag.
    """

    features: Mapping[str, Tensor]
    parent: Mapping[str, Tensor]
    neighbours: Mapping[str, Neighbours]
    union: Neighbours
    ptr: Mapping[str, Tensor]
    labels: Tensor
    slide_ids: tuple[str, ...]

    @property
    def scales(self) -> tuple[str, ...]:
        return tuple(self.features)

    @property
    def num_bags(self) -> int:
        return len(self.slide_ids)

    def in_dtype(self, dtype: torch.dtype) -> "BagGraph":
        """The graph with features of the dtype that a model computes in."""
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
            over(self.parent),
            over(self.neighbours),
            function(self.union),
            over(self.ptr),
            function(self.labels),
            self.slide_ids,
        )


def bag_graph(bag: Bag, label: int = UNKNOWN) -> BagGraph:
    """The graph of one bag."""
    parent = {name: bag.parent[name].long() for name in bag.scales[1:]}
    neighbours = {name: grid_neighbours(bag.grid[name]) for name in bag.scales}
    return BagGraph(
        features={name: bag.features[name] for name in bag.scales},
        parent=parent,
        neighbours=neighbours,
        union=union_neighbours(neighbours, parent),
        ptr={name: torch.tensor([0, len(bag.grid[name])]) for name in bag.scales},
        labels=torch.tensor([label]),
        slide_ids=(bag.slide_id,),
    )


def join_graphs(graphs: Sequence[BagGraph]) -> BagGraph:
    """Several graphs side by side, without an edge between them."""
    if len(graphs) == 1:
        return graphs[0]
    features, parent, neighbours, ptr = {}, {}, {}, {}
    coarser = None
    for name in graphs[0].scales:
        sizes = torch.cat([graph.ptr[name].diff() for graph in graphs])
        ptr[name] = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        features[name] = torch.cat([graph.features[name] for graph in graphs])
        neighbours[name] = join_neighbours([graph.neighbours[name] for graph in graphs])
        if coarser is not None:
            above = _starts([len(graph.features[coarser]) for graph in graphs])
            rows = [graph.parent[name] for graph in graphs]
            shifted = [r + (r >= 0) * start for r, start in zip(rows, above, strict=True)]
            parent[name] = torch.cat(shifted)
        coarser = name
    return BagGraph(
        features,
        parent,
        neighbours,
        union_neighbours(neighbours, parent),
        ptr,
        labels=torch.cat([graph.labels for graph in graphs]),
        slide_ids=tuple(slide_id for graph in graphs for slide_id in graph.slide_ids),
    )


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:number]) for number in range(len(sizes))]
