"""The graph attention layer of the PGNN.

Paper: Bontempo et al. 2023, section 3, "Architecture"; the layer is Veličković et al. 2018 as
``torch_geometric.nn.GATConv`` computes it. The number of heads, their mean and both dropouts are
those of the released code (D13, D14 of the README).
"""

from torch import Tensor, nn
from torch_geometric.nn import GATConv
from torch_geometric.utils import dropout_node


class GAT(nn.Module):
    """h_i = mean over heads of Σ_j α_ij W x_j, over the neighbours j of i and i itself.

    α_ij = softmax_j(LeakyReLU_0.2(a_src·W x_j + a_dst·W x_i)).

    Parameters
    ----------
    in_dim, out_dim: widths of the node features.
    heads: attention heads, averaged.
    attention_dropout: probability of dropping a coefficient α_ij in training.
    node_dropout: probability of cutting all edges of a node in training; the node keeps its
        features and still sees itself.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        heads: int = 3,
        attention_dropout: float = 0.2,
        node_dropout: float = 0.5,
    ):
        super().__init__()
        self.node_dropout = node_dropout
        self.conv = GATConv(in_dim, out_dim, heads, concat=False, dropout=attention_dropout)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """(N, in_dim), (2, E) → (N, out_dim)."""
        if self.training and self.node_dropout > 0:
            edge_index, _, _ = dropout_node(edge_index, self.node_dropout, len(x))
        return self.conv(x, edge_index)
