"""The graph attention layer of the PGNN.

Paper: Bontempo et al. 2023, section 3, "Architecture"; the layer is Veličković et al. 2018 as
``torch_geometric.nn.GATConv`` computes it. The number of heads, their mean and both dropouts are
those of the released code (D13, D14), and so are the residual forms (D15).
"""

from typing import Literal

from torch import Tensor, nn
from torch_geometric.nn import GATConv
from torch_geometric.utils import dropout_node

from dasmil.errors import InputError

Residual = Literal["none", "plain", "glu"]


class GatedLinearUnit(nn.Module):
    """h · σ(MLP(h)), with an MLP of half the width (D15)."""

    def __init__(self, dim: int):
        super().__init__()
        half = dim // 2
        self.mlp = nn.Sequential(nn.Linear(dim, half), nn.ELU(), nn.Linear(half, dim))

    def forward(self, h: Tensor) -> Tensor:
        """(N, dim) → (N, dim)."""
        return h * self.mlp(h).sigmoid()


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
    residual: ``none``: h; ``plain``: x + h; ``glu``: x + GLU(h).

    Raises
    ------
    InputError
        when a residual is asked for and the widths differ.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        heads: int = 3,
        attention_dropout: float = 0.2,
        node_dropout: float = 0.5,
        residual: Residual = "none",
    ):
        super().__init__()
        if residual != "none" and in_dim != out_dim:
            raise InputError(
                f"residual {residual!r}: it adds features of width {in_dim} to {out_dim}; give "
                "features, hidden_dim and out_dim one width"
            )
        self.node_dropout = node_dropout
        self.residual = residual
        self.conv = GATConv(in_dim, out_dim, heads, concat=False, dropout=attention_dropout)
        self.gate = GatedLinearUnit(out_dim) if residual == "glu" else nn.Identity()

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """(N, in_dim), (2, E) → (N, out_dim)."""
        if self.training and self.node_dropout > 0:
            edge_index, _, _ = dropout_node(edge_index, self.node_dropout, len(x))
        h = self.gate(self.conv(x, edge_index))  # (N, out_dim)
        return h if self.residual == "none" else x + h
