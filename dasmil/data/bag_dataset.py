"""Bag files as graphs: one item per slide."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dasmil.bags import UNKNOWN, Bag, BagGraph, bag_graph, bag_path, join_graphs, read_bag
from dasmil.errors import InputError
from dasmil.slides.cohort import SlideRow

NETWORK_ROUNDING = 1e-6  # relative; a float32 network gives equal tiles of other batches such parts


@dataclass(frozen=True)
class UnreadBag:
    """Takes the place of the graph of a bag that ``predict`` cannot read.

    Parameters
    ----------
    slide_ids: the slide, as in a :class:`BagGraph`.
    reason: a sentence.
    """

    slide_ids: tuple[str]
    reason: str


@dataclass(eq=False)
class BagDataset(Dataset[Any]):
    """One graph per slide, made from its bag file on access.

    Parameters
    ----------
    folder: of the bag files.
    rows: the slides.
    classes: their labels in order; any other label is unknown.
    scales: scales to read, coarse to fine; None: all.
    edges: whether graphs have edges.
    cache: graphs by slide_id, filled on first access; None: nothing is cached.
    to_cache: what is put into the cache for a graph.
    unreadable: reasons by slide_id why a bag cannot be read, as far as headers show it; such a bag
        and any other that cannot be read gives an :class:`UnreadBag`. None: it raises InputError.
    """

    folder: Path
    rows: Sequence[SlideRow]
    classes: Sequence[str]
    scales: Sequence[str] | None = None
    edges: bool = True
    cache: dict[str, BagGraph] | None = None
    to_cache: Callable[[BagGraph], BagGraph] = copy
    unreadable: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        indices: dict[str | None, int] = {name: index for index, name in enumerate(self.classes)}
        self.labels = [indices.get(row.label, UNKNOWN) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> BagGraph | UnreadBag:
        slide_id = self.rows[index].slide_id
        if self.unreadable and slide_id in self.unreadable:
            return UnreadBag((slide_id,), self.unreadable[slide_id])
        if self.cache and slide_id in self.cache:
            return self.cache[slide_id]
        try:
            bag = read_bag(bag_path(self.folder, slide_id), self.scales)
            graph = bag_graph(bag, self.labels[index], self.edges)
        except InputError as error:
            if self.unreadable is None:
                raise
            return UnreadBag((slide_id,), str(error))
        if self.cache is None:
            return graph
        return self.cache.setdefault(slide_id, self.to_cache(graph))


def copy_to_cache(graph: BagGraph, device: torch.device, where: str, joins: bool) -> BagGraph:
    """A copy of a graph without memory-mapped tensors.

    Parameters
    ----------
    device: device of the process; with a GPU, ram is pinned memory.
    where: ram or device.
    joins: whether batches hold several graphs: only features are then kept on the device, see
        :func:`join_features_there`.
    """
    graph = replace(graph, grid={name: x.clone() for name, x in graph.grid.items()})
    if where == "device" and device.type != "cpu":
        if not joins:
            return graph.to(device)
        features = {name: x.to(device) for name, x in graph.features.items()}
        return replace(graph, features=features)
    if device.type == "cuda":
        return graph.pin_memory()
    return replace(graph, features={name: x.clone() for name, x in graph.features.items()})


def join_features_there(graphs: Sequence[BagGraph]) -> BagGraph:
    """Join graphs whose features are on a GPU and whose edges are not.

    The sizes of joined edges depend on their values. On the GPU the host would wait for each of
    them; here the GPU works on the batch before, and then copies the edges from pinned memory.
    """
    graph = join_graphs(graphs)
    edges = replace(graph, features={}).pin_memory()
    return replace(edges, features=graph.features)


def feature_statistics(bags: Iterable[Bag]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation (D_s,) of the tiles' features per scale.

    The deviation is 0 if rounding explains it: two neighbouring values of the stored type that
    alternate deviate by half their distance.
    """
    count: dict[str, int] = defaultdict(int)
    total: dict[str, Tensor] = defaultdict(lambda: torch.zeros(1, dtype=torch.float64))
    total_square: dict[str, Tensor] = defaultdict(lambda: torch.zeros(1, dtype=torch.float64))
    origin: dict[str, Tensor] = {}  # features of one tile: differences to them do not cancel
    rounding: dict[str, float] = defaultdict(lambda: NETWORK_ROUNDING)
    for bag in bags:
        for scale in bag.scales:
            x = bag.features[scale].double()
            if not len(x):
                continue
            half_step = torch.finfo(bag.features[scale].dtype).eps / 2
            rounding[scale] = max(rounding[scale], half_step)
            x = x - origin.setdefault(scale, x[0].clone())
            count[scale] += len(x)
            total[scale] = total[scale] + x.sum(0)
            total_square[scale] = total_square[scale] + x.square().sum(0)
    statistics = {}
    for scale in count:
        mean = total[scale] / count[scale]
        std = (total_square[scale] / count[scale] - mean.square()).clamp(min=0).sqrt()
        mean = mean + origin[scale]
        varies = std > rounding[scale] * mean.abs()
        statistics[scale] = (mean.float(), torch.where(varies, std, 0).float())
    return statistics
