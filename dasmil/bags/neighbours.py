"""Neighbour lists of a bag graph, all in O(N).

Bontempo et al. 2023, section 3, "Architecture": :func:`grid_neighbours` is A_1, …, A_M of the
scales' grids, :func:`union_neighbours` is A with the relation "part of" between the scales.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

OFFSETS = tuple((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1))  # slot 4: the tile itself
DENSE_CELLS = 16  # per tile: a lookup table of the bounding box may have so many cells
FREE_CELLS = 2**16  # or so many more, whatever the number of tiles


@dataclass  # not frozen: Lightning converts the fields for precisions such as bf16-true
class Neighbours:
    """Neighbour lists of N nodes: each node "sees" its neighbours and itself.

    The relation is symmetric. Each of the E entries is a pair "i sees j"; the entries of node i are
    ptr[i] to ptr[i + 1].

    Parameters
    ----------
    ptr: (N + 1,) int32, first entry of each node.
    index: (E,) int32, the node j that is seen.
    reverse: (E,) int32, number of the reverse entry, "j sees i".
    """

    ptr: Tensor
    index: Tensor
    reverse: Tensor

    def __len__(self) -> int:
        return len(self.ptr) - 1

    @cached_property
    def seers(self) -> Tensor:
        """(E,) int32, the node i of each entry "i sees j"."""
        with torch.inference_mode(False):  # a later training step may keep them, too
            nodes = torch.arange(len(self), dtype=torch.int32, device=self.ptr.device)
            return nodes.repeat_interleave(self.ptr.diff(), output_size=len(self.index))

    def edge_index(self) -> Tensor:
        """(2, E - N) int64 source and target of each edge, as in PyG; without self-loops."""
        edges = torch.stack([self.index, self.seers]).long()
        return edges[:, edges[0] != edges[1]]

    def of_nodes(self, start: int, stop: int) -> tuple[Tensor, "Neighbours"]:
        """The lists of the nodes ``start`` to ``stop``, without reverse entries.

        Returns
        -------
        (M,) these nodes, then all others that they see; and their lists, whose ``index`` counts in
        the former.
        """
        first, last = self.ptr[start], self.ptr[stop]
        index = self.index[first:last]
        others = index[(index < start) | (index >= stop)].unique()
        own = torch.arange(start, stop, dtype=index.dtype, device=index.device)
        place = torch.searchsorted(others, index, out_int32=True) + (stop - start)
        inside = (index >= start) & (index < stop)
        return torch.cat([own, others]), Neighbours(
            ptr=self.ptr[start : stop + 1] - first,
            index=torch.where(inside, index - start, place),
            reverse=index.new_empty(0),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Neighbours":
        parts = (self.ptr, self.index, self.reverse)
        return Neighbours(*(part.to(device, non_blocking=non_blocking) for part in parts))

    def pin_memory(self) -> "Neighbours":
        return Neighbours(self.ptr.pin_memory(), self.index.pin_memory(), self.reverse.pin_memory())


def cut_nodes(lists: Sequence[Neighbours], dropped: Sequence[Tensor]) -> Iterator[Neighbours]:
    """Each of the lists without the edges of its dropped nodes, which still see themselves.

    The host waits for a GPU once, for the numbers of entries of all lists.

    Parameters
    ----------
    dropped: for each of the lists (N,) bool.
    """
    kept = [
        (each.seers == each.index)
        | ~(nodes.index_select(0, each.seers) | nodes.index_select(0, each.index))
        for each, nodes in zip(lists, dropped, strict=True)
    ]
    starts = [_starts(mask) for mask in kept]  # new number of each kept entry
    counts = torch.stack([start[-1] for start in starts]).tolist()
    for each, mask, start, count in zip(lists, kept, starts, counts, strict=True):
        place = start[:-1].where(mask, count).long()  # the entries that go share a last place
        entries = start.new_empty(count + 1)
        entries.scatter_(0, place, torch.arange(len(mask), dtype=start.dtype, device=start.device))
        left = entries[:-1]
        yield Neighbours(
            ptr=start.index_select(0, each.ptr),
            index=each.index.index_select(0, left),
            reverse=start.index_select(0, each.reverse.index_select(0, left)),
        )


def grid_neighbours(grid: Tensor) -> Neighbours:
    """8-connectivity of tiles on an integer grid.

    Parameters
    ----------
    grid: (N, 2) row, col; each cell at most once.
    """
    if len(grid) == 0:
        none = torch.empty(0, dtype=torch.int32)
        return Neighbours(torch.zeros(1, dtype=torch.int32), none, none)
    cells = grid.long() - grid.long().amin(0) + 1  # a margin of one, for all neighbours
    height, width = (cells.amax(0) + 2).tolist()
    position = cells[:, 0] * width + cells[:, 1]
    shifts = torch.tensor([row * width + col for row, col in OFFSETS])
    wanted = (position[:, None] + shifts).view(-1)
    seen = _tiles_at(position, wanted, height * width).view(-1, len(OFFSETS))  # -1 for none
    there = seen >= 0
    number = _starts(there.view(-1))  # of each entry that exists
    # slot k of a tile is slot 8 - k of its neighbour
    other = seen * len(OFFSETS) + torch.arange(len(OFFSETS) - 1, -1, -1, dtype=torch.int32)
    return Neighbours(
        ptr=number[:: len(OFFSETS)].contiguous(),
        index=seen.masked_select(there),
        reverse=number.index_select(0, other.masked_select(there)),
    )


def _tiles_at(position: Tensor, wanted: Tensor, num_cells: int) -> Tensor:
    """Number of the tile at each wanted position, int32, -1 for none."""
    numbers = torch.arange(len(position), dtype=torch.int32)
    if num_cells <= DENSE_CELLS * len(position) + FREE_CELLS:
        table = torch.full((num_cells,), -1, dtype=torch.int32)
        table[position] = numbers
        return table.index_select(0, wanted)
    held, order = position.sort()  # few tiles far apart: a table of the box would be too large
    place = torch.searchsorted(held, wanted).clamp(max=len(held) - 1)
    return torch.where(held[place] == wanted, order.int()[place], -1)


def union_neighbours(
    neighbours: Mapping[str, Neighbours], parent: Mapping[str, Tensor]
) -> Neighbours:
    """The lists of all scales in one numbering, coarse to fine; parent and child see each other.

    Parameters
    ----------
    neighbours: of each scale, coarse to fine.
    parent: per scale but the coarsest (N_s,) row in the next coarser scale, -1 for none; sorted by
        parents.
    """
    if len(neighbours) == 1:
        return next(iter(neighbours.values()))
    first_node = dict(zip(neighbours, accumulate(map(len, neighbours.values()), initial=0)))
    counts = torch.cat([own.ptr.diff() for own in neighbours.values()])  # entries per node, (N,)
    above: dict[str, tuple[Tensor, Tensor]] = {}  # per scale: nodes of children and their parents
    for coarse, fine in pairwise(neighbours):
        rows = parent[fine]
        held = (rows >= 0).nonzero().squeeze(1)
        above[fine] = (held + first_node[fine], rows[held] + first_node[coarse])
    num_parents, num_children = torch.zeros_like(counts), torch.zeros_like(counts)
    for child, of in above.values():
        num_parents[child] = 1
        num_children += torch.bincount(of, minlength=len(counts)).int()
    ptr = _starts(counts + num_parents + num_children)

    index = torch.empty(int(ptr[-1]), dtype=torch.int32, device=ptr.device)
    reverse = torch.empty_like(index)
    for name, own in neighbours.items():
        start = first_node[name]
        moved = ptr[start : start + len(own)] - own.ptr[:-1]
        entry = torch.arange(len(own.index), dtype=torch.int32, device=ptr.device)
        entry += moved.index_select(0, own.seers)
        index.index_copy_(0, entry.long(), own.index + start)
        reverse.index_copy_(0, entry.long(), entry.index_select(0, own.reverse))
    for child, of in above.values():  # entries: its own scale, then its parent, then its children
        eldest = torch.searchsorted(of, of)  # the first child of the same parent
        siblings = torch.arange(len(of), device=ptr.device) - eldest
        up = (ptr[child] + counts[child]).long()
        down = ptr[of] + counts[of] + num_parents[of] + siblings
        index[up], index[down] = of.int(), child.int()
        reverse[up], reverse[down] = down.int(), up.int()
    return Neighbours(ptr, index, reverse)


def join_neighbours(parts: Sequence[Neighbours]) -> Neighbours:
    """Join lists, without edges between them."""
    nodes = accumulate(map(len, parts), initial=0)
    entries = list(accumulate((len(part.index) for part in parts), initial=0))
    ptrs = [part.ptr[:-1] + start for part, start in zip(parts, entries)]
    return Neighbours(
        ptr=torch.cat([*ptrs, parts[0].ptr.new_tensor([entries[-1]])]),
        index=torch.cat([part.index + start for part, start in zip(parts, nodes)]),
        reverse=torch.cat([part.reverse + start for part, start in zip(parts, entries)]),
    )


def _starts(counts: Tensor) -> Tensor:
    """(N,) counts → (N + 1,) int32 cumulative sums, beginning with 0."""
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
    return starts
