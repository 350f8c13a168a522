"""Attention pooling over the tiles of each bag, plain or gated.

Paper: Ilse et al., ICML 2018, section 2.4, Eq. 8 (plain) and Eq. 9 (gated).
"""

import torch
from torch import Tensor, nn

from dasmil.tensors import bag_sizes, precisely


class AttentionScores(nn.Module):
    """wᵀ tanh(V h), or with a gate wᵀ(tanh(V h) ⊙ σ(U h)), for each of A attentions.

    Scores are computed in at least float32, because tiles are ranked by them.

    Parameters
    ----------
    in_dim: K, width of the tile vectors.
    attention_dim: L, width of the hidden layer.
    num_attentions: A.
    gated: whether to use the gate.
    dropout: probability of dropping an entry of the hidden layer, and of the gate.
    """

    def __init__(
        self,
        in_dim: int,
        attention_dim: int,
        num_attentions: int = 1,
        gated: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.v = nn.Linear(in_dim, attention_dim)
        self.u = nn.Linear(in_dim, attention_dim) if gated else None
        self.w = nn.Linear(attention_dim, num_attentions)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        """Features (N, K) → scores (N, A)."""
        hidden = self.dropout(precisely(self.v, h).tanh())
        if self.u is not None:
            hidden = hidden * self.dropout(precisely(self.u, h).sigmoid())
        return precisely(self.w, hidden)


def attention_pool(scores: Tensor, h: Tensor, ptr: Tensor) -> tuple[Tensor, Tensor]:
    """Attention a_n = softmax_n(scores) over the tiles of each bag, and Σ_n a_n h_n (Eq. 7).

    Parameters
    ----------
    scores: (N, A) of A attentions.
    h: (N, K) features of the tiles.
    ptr: (B + 1,) boundaries of the bags, on the CPU.

    Returns
    -------
    Attention (N, A), which sums to one per bag, and weighted sums (B, A, K), which are zero for a
    bag without tiles.
    """
    sizes = bag_sizes(ptr)
    attention = [part.softmax(0) for part in scores.split(sizes)]
    h = h.to(scores.dtype)
    sums = [a.T @ part for a, part in zip(attention, h.split(sizes), strict=True)]
    return torch.cat(attention), torch.stack(sums)
