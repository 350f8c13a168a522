"""DAS-MIL: the PGNN, and one MIL head per scale.

Paper: Bontempo et al. 2023, section 3 and Fig. 1.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from dasmil.bags.graph import BagGraph
from dasmil.nn.gat import Backend, Residual
from dasmil.nn.mil_head import MILHead
from dasmil.nn.pgnn import PGNN, module_key
from dasmil.nn.pooling_head import PoolingHead
from dasmil.output import ScaleOutput


class DASMIL(nn.Module):
    """Bag and instance logits at every scale; the finest scale's are the final prediction.

    Parameters
    ----------
    in_dims: width of the tile features per scale, coarse to fine.
    num_logits: C; 1 for a binary task with one logit.
    hidden_dim, out_dim, heads, attention_dropout, node_dropout, residual: see :class:`PGNN`.
    query_dim, bag_classifier_init: see :class:`MILHead`.
    contextualize: False leaves the PGNN out: the heads see the extractors' features (Table 5, ✗).
    concatenate_parents: True gives a head each tile's vector with its parent's before it
        (Table 4, [10x ‖ 20x]); the coarsest scale has no parents.
    coarse_instances: what the heads of all scales but the finest are shown: ``all`` tiles, or
        those that are ``parents`` of a tile (D12).
    gat_backend: ``backend`` of :class:`GAT`.
    pooling: of a head: ``attention`` is the paper's; ``mean`` and ``max`` are :class:`PoolingHead`,
        to compare with.
    """

    def __init__(
        self,
        in_dims: Mapping[str, int],
        num_logits: int = 1,
        hidden_dim: int = 384,
        out_dim: int = 256,
        heads: int = 3,
        attention_dropout: float = 0.2,
        node_dropout: float = 0.5,
        residual: Residual = "none",
        query_dim: int = 128,
        bag_classifier_init: Literal["lecun", "torch"] = "lecun",
        contextualize: bool = True,
        concatenate_parents: bool = False,
        coarse_instances: Literal["all", "parents"] = "all",
        pooling: Literal["attention", "mean", "max"] = "attention",
        gat_backend: Backend = "gather",
    ):
        super().__init__()
        self.concatenate_parents = concatenate_parents
        self.coarse_instances = coarse_instances
        self.pgnn: PGNN | None = None
        widths = dict(in_dims)
        if contextualize:
            dropouts = (attention_dropout, node_dropout)
            self.pgnn = PGNN(in_dims, hidden_dim, out_dim, heads, *dropouts, residual, gat_backend)
            widths = dict.fromkeys(in_dims, out_dim)
        targets = dict(widths)
        if concatenate_parents:
            for coarse, fine in pairwise(widths):
                targets[fine] = widths[coarse] + widths[fine]

        def head(width: int) -> nn.Module:
            if pooling == "attention":
                return MILHead(width, num_logits, query_dim, bag_classifier_init)
            return PoolingHead(width, num_logits, pooling)

        self.heads = nn.ModuleDict({module_key(s): head(width) for s, width in targets.items()})

    def forward(self, graph: BagGraph) -> dict[str, ScaleOutput]:
        """What each scale says, coarse to fine."""
        if self.pgnn is None:
            h = dict(graph.in_dtype(next(self.parameters()).dtype).features)
        else:
            h = self.pgnn(graph)
        shown: dict[str, Tensor] = {}
        targets = dict(h)
        for coarse, fine in pairwise(graph.scales):
            parent = graph.parent[fine]
            if self.coarse_instances == "parents":
                children = torch.bincount(parent[parent >= 0], minlength=len(h[coarse]))
                shown[coarse] = children > 0
            if self.concatenate_parents:
                targets[fine] = torch.cat([_rows_or_zero(h[coarse], parent), h[fine]], dim=1)
        return {
            s: self.heads[module_key(s)](targets[s], graph.ptr[s], shown.get(s))
            for s in graph.scales
        }


def _rows_or_zero(x: Tensor, rows: Tensor) -> Tensor:
    """(N, K) rows of x; zeros where the row is -1."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[rows]
