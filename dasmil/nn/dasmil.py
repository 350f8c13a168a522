"""DAS-MIL: the PGNN, and one MIL head per scale.

Paper: Bontempo et al. 2023, section 3 and Fig. 1.
"""

from collections.abc import Mapping

from torch import nn

from dasmil.bags.graph import BagGraph
from dasmil.nn.mil_head import MILHead, ScaleOutput
from dasmil.nn.pgnn import PGNN, module_key


class DASMIL(nn.Module):
    """Bag and instance logits at every scale; the finest scale's are the final prediction.

    Parameters
    ----------
    in_dims: width of the tile features per scale, coarse to fine.
    num_logits: C; 1 for a binary task with one logit.
    hidden_dim, out_dim, heads, attention_dropout, node_dropout: see :class:`PGNN`.
    query_dim: see :class:`MILHead`.
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
        query_dim: int = 128,
    ):
        super().__init__()
        self.pgnn = PGNN(in_dims, hidden_dim, out_dim, heads, attention_dropout, node_dropout)
        self.heads = nn.ModuleDict(
            {module_key(scale): MILHead(out_dim, num_logits, query_dim) for scale in in_dims}
        )

    def forward(self, graph: BagGraph) -> dict[str, ScaleOutput]:
        """What each scale says, coarse to fine."""
        h = self.pgnn(graph)
        return {s: self.heads[module_key(s)](h[s], graph.ptr[s]) for s in graph.scales}
