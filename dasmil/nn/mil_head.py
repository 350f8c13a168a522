"""The attention MIL head: DSMIL's dual stream.

Paper: Li et al., CVPR 2021, as Bontempo et al. 2023, section 3, use it for each scale.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn
from torch_geometric.utils import segment, softmax


@dataclass  # not frozen: Lightning converts its fields under mixed precision
class ScaleOutput:
    """What a model says about one scale, for B bags with N tiles in all and C logits.

    Parameters
    ----------
    bag_logits: (B, C), y in the paper.
    instance_logits: (N, C), z in the paper.
    attention: (N, C); sums to one over the tiles of a bag.
    bag_index: (N,) the bag of each row.
    """

    bag_logits: Tensor
    instance_logits: Tensor
    attention: Tensor
    bag_index: Tensor


class MILHead(nn.Module):
    """Instance logits, and a bag embedding that attends to tiles akin to the critical instance.

    Parameters
    ----------
    in_dim: width K of the tile features.
    num_logits: C; 1 for a binary task with one logit.
    query_dim: width of the queries that are compared with the critical instance's.
    """

    def __init__(self, in_dim: int, num_logits: int, query_dim: int = 128):
        super().__init__()
        self.instance_classifier = nn.Linear(in_dim, num_logits)
        self.transform = nn.Sequential(nn.Linear(in_dim, in_dim), nn.ReLU())
        self.query = nn.Sequential(nn.Linear(in_dim, query_dim), nn.Tanh())
        self.value = nn.Linear(in_dim, in_dim)
        self.bag_classifier = nn.Conv1d(num_logits, num_logits, kernel_size=in_dim)

    def forward(self, h: Tensor, ptr: Tensor) -> ScaleOutput:
        """(N, K) features of B bags and their (B + 1,) boundaries."""
        sizes = ptr.diff()
        bag_index = torch.repeat_interleave(torch.arange(len(sizes), device=h.device), sizes)

        z = self.instance_classifier(h)  # (N, C)
        f = self.transform(h)  # (N, K)
        q = self.query(f)  # (N, Q)
        v = self.value(f)  # (N, K)

        critical = _first_argmax(z, ptr, bag_index)  # (B, C)
        q_critical = torch.cat([q, q.new_zeros(1, q.shape[1])])[critical]  # (B, C, Q)
        score = torch.einsum("nq,ncq->nc", q, q_critical[bag_index]) / sqrt(q.shape[1])
        attention = softmax(score, ptr=ptr, dim=0)  # (N, C)
        embedding = segment(attention[:, :, None] * v[:, None, :], ptr)  # (B, C, K)
        bag_logits = self.bag_classifier(embedding).squeeze(2)  # (B, C)
        return ScaleOutput(bag_logits, z, attention, bag_index)


def _first_argmax(z: Tensor, ptr: Tensor, bag_index: Tensor) -> Tensor:
    """(B, C) row of each bag's largest logit per class; N for a bag without tiles."""
    z = z.detach()
    is_top = z == segment(z, ptr, reduce="max")[bag_index]
    rows = torch.arange(len(z), device=z.device)[:, None]
    candidates = torch.where(is_top, rows, len(z))
    index = bag_index[:, None].expand_as(candidates)
    empty = candidates.new_full((len(ptr) - 1, z.shape[1]), len(z))
    return empty.scatter_reduce(0, index, candidates, "amin")
