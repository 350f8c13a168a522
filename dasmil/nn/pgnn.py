"""The pyramidal graph neural network.

Paper: Bontempo et al. 2023, section 3, "Architecture".
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dasmil.bags.graph import BagGraph
from dasmil.nn.gat import GAT, Residual, drop_nodes
from dasmil.tensors import is_in_blocks


def module_key(scale: str) -> str:
    """A scale as a name of a torch module, which has no dots: ``x2.5`` → ``x2_5``."""
    return scale.replace(".", "_")


class PGNN(nn.Module):
    """One GAT per scale on its own sub-graph, then one GAT on the union of all scales.

    H = GAT([GAT(X_1; A_1, θ_1) ‖ … ‖ GAT(X_M; A_M, θ_M)]; A, θ_{M+1}), where ‖ stacks the tiles.

    Parameters
    ----------
    in_dims: width of the tile features per scale, coarse to fine; M ≥ 1 scales.
    hidden_dim: width between the two layers.
    out_dim: width of the contextualised features H.
    heads, attention_dropout, node_dropout, residual: see :class:`GAT`.
    """

    def __init__(
        self,
        in_dims: Mapping[str, int],
        hidden_dim: int = 384,
        out_dim: int = 256,
        heads: int = 3,
        attention_dropout: float = 0.2,
        node_dropout: float = 0.5,
        residual: Residual = "none",
    ):
        super().__init__()
        rest = (heads, attention_dropout, node_dropout, residual)
        self.scale_gats = nn.ModuleDict(
            {module_key(s): GAT(in_dim, hidden_dim, *rest) for s, in_dim in in_dims.items()}
        )
        self.union_gat = GAT(hidden_dim, out_dim, *rest)

    def forward(self, graph: BagGraph) -> dict[str, Tensor]:
        """Contextualised features per scale, (N_s, out_dim).

        Raises
        ------
        ValueError
            if the graph has no edges.
        """
        if graph.neighbours is None or graph.union is None:
            raise ValueError("the graph has no edges: make it by bag_graph(bag, edges=True)")
        sizes = [len(graph.features[s]) for s in graph.scales]
        # for a large bag each copy would take gigabytes
        width, weight = self.union_gat.conv.in_channels, self.union_gat.conv.bias
        room = weight.new_empty(sum(sizes), width) if is_in_blocks(graph.union.ptr) else None
        parts = [None] * len(sizes) if room is None else room.split(sizes)
        gats: list[Any] = [self.scale_gats[module_key(s)] for s in graph.scales]
        lists = [*(graph.neighbours[s] for s in graph.scales), graph.union]
        *own, union = drop_nodes([*gats, self.union_gat], lists)
        of_scales = zip(gats, graph.features.values(), own, parts, strict=True)
        per_scale = [gat.attend(x, seen, into) for gat, x, seen, into in of_scales]  # (N_s, hidden)
        together = torch.cat(per_scale) if room is None else room
        h = self.union_gat.attend(together, union)  # (Σ N_s, out)
        return dict(zip(graph.scales, h.split(sizes), strict=True))
