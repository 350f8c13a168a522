"""The graph attention layer of the PGNN.

Paper: Bontempo et al. 2023, section 3, "Architecture"; the layer is that of Veličković et al. 2018,
Eq. 3 and 6, as ``torch_geometric.nn.GATConv`` computes it. The number of heads, their mean and both
dropouts are those of the released code (D13, D14), and so are the residual forms (D15). D numbers:
.github/docs/paper.md.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GATConv

from dasmil.bags.neighbours import Neighbours, cut_nodes
from dasmil.errors import InputError
from dasmil.nn.neighbour_attention import coefficients
from dasmil.nn.neighbour_sums import AttendedSum, ProjectedSum
from dasmil.tensors import BLOCK_ROWS, autocast_type, is_in_blocks

Residual = Literal["none", "plain", "glu"]


class GatedLinearUnit(nn.Module):
    """h · σ(MLP(h)), with a hidden layer of half the width (D15)."""

    def __init__(self, dim: int):
        super().__init__()
        half = dim // 2
        self.mlp = nn.Sequential(nn.Linear(dim, half), nn.ELU(), nn.Linear(half, dim))

    def forward(self, h: Tensor) -> Tensor:
        """(N, dim) → (N, dim)."""
        return h * self.mlp(h).sigmoid()


def drop_nodes(layers: Sequence["GAT"], lists: Sequence[Neighbours]) -> list[Neighbours]:
    """Cut the edges of the nodes that each layer drops in training; the host waits once for all."""
    if not any(layer.training and layer.node_dropout > 0 for layer in layers):
        return list(lists)
    dropped = [
        torch.rand(len(each), device=each.ptr.device) < layer.node_dropout * layer.training
        for layer, each in zip(layers, lists, strict=True)
    ]
    return list(cut_nodes(lists, dropped))


class GAT(nn.Module):
    """h_i = mean over heads of Σ_j α_ij W x_j, over the neighbours j of i and i itself.

    α_ij = softmax_j(LeakyReLU_0.2(a_src·W x_j + a_dst·W x_i)).

    Parameters
    ----------
    in_dim, out_dim: widths of the node features.
    heads: number of attention heads; their outputs are averaged.
    attention_dropout: probability of dropping a coefficient α_ij in training.
    node_dropout: probability of cutting all edges of a node in training; the node keeps its
        features and its edge to itself.
    residual: ``none``: h; ``plain``: x + h; ``glu``: x + GLU(h).

    Raises
    ------
    InputError
        if a residual is chosen and the widths differ.
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
                "features, hidden_dim and out_dim the same width"
            )
        self.node_dropout = node_dropout
        self.residual = residual
        self.conv = GATConv(in_dim, out_dim, heads, concat=False, dropout=attention_dropout)
        self.gate = GatedLinearUnit(out_dim) if residual == "glu" else nn.Identity()

    def forward(self, x: Tensor, neighbours: Neighbours, into: Tensor | None = None) -> Tensor:
        """(N, in_dim) → (N, out_dim), of the type of the weights.

        Parameters
        ----------
        x: (N, in_dim) of any floating type, such as that of the bag file.
        neighbours: which nodes each node sees.
        into: (N, out_dim) tensor that receives the result, if no gradient is needed.
        """
        (left,) = drop_nodes([self], [neighbours])
        return self.attend(x, left, into)

    def attend(self, x: Tensor, neighbours: Neighbours, into: Tensor | None = None) -> Tensor:
        """:meth:`forward` of lists that have already lost the dropped nodes' edges."""
        if is_in_blocks(x) and not self.training:
            return self._in_blocks(x, neighbours, into)
        x = x.to(self.conv.bias.dtype)
        h = self.gate(self._attend(x, neighbours))  # (N, out_dim)
        h = h if self.residual == "none" else x + h
        return h if into is None else into.copy_(h)

    def _in_blocks(self, x: Tensor, neighbours: Neighbours, into: Tensor | None) -> Tensor:
        """Forward pass by blocks: W x of all nodes and heads would take 5 kB per node."""
        shape = len(x), self.conv.out_channels
        result = x.new_empty(shape, dtype=self.conv.bias.dtype) if into is None else into
        for start in range(0, len(x), BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, len(x))
            rows, part = neighbours.of_nodes(start, stop)
            seen = x[rows].to(result.dtype)
            own = slice(0, stop - start)  # the rows begin with the nodes of the block
            h = self.gate(self._attend(seen, part))
            result[start:stop] = h if self.residual == "none" else seen[own] + h
        return result

    def _attend(self, x: Tensor, neighbours: Neighbours) -> Tensor:
        """``self.conv(x)`` for the first N of M nodes, (M, in_dim) → (N, out_dim)."""
        conv = self.conv
        heads, width = conv.heads, conv.out_channels
        # a·W x = (Wᵀ a)·x: the scores need no pass over (N, H, C). Autocast would round them, and
        # they are exponents.
        with torch.autocast(x.device.type, enabled=False):
            weight = conv.lin.weight.view(heads, width, -1)  # (H, C, in)
            vectors = torch.einsum("ahc,hci->ahi", torch.cat([conv.att_src, conv.att_dst]), weight)
            scores = x.to(weight.dtype) @ vectors.flatten(0, 1).T  # (M, 2 H)
            source, target = scores.split(heads, dim=1)
            target = target[: len(neighbours)]
        dropout = conv.dropout if self.training else 0.0
        alpha = coefficients(source, target, neighbours, dropout) / heads  # (E, H)
        if x.is_cuda:
            rows = autocast_type(x)
            summed = AttendedSum.apply(rows, alpha.to(rows.dtype), neighbours)  # (N, H, in)
            h = F.linear(summed.flatten(1), weight.transpose(0, 1).flatten(1))
        else:
            rows = conv.lin(x).view(-1, heads, width)  # (M, H, C)
            h = ProjectedSum.apply(rows, alpha.to(rows.dtype), neighbours)
        return h + conv.bias
