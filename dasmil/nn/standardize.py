"""Features of zero mean and unit standard deviation; not in the paper, and off by default."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from dasmil.bags.graph import BagGraph
from dasmil.nn.pgnn import module_key


class Standardize(nn.Module):
    """(x − mean) / std per feature and scale, with the statistics of the training tiles.

    A briefly trained extractor gives nearly constant features; removing their mean exposes what
    varies.

    Parameters
    ----------
    in_dims: width of the tile features per scale.
    """

    def __init__(self, in_dims: Mapping[str, int]):
        super().__init__()
        for scale, width in in_dims.items():
            self.register_buffer(f"mean_{module_key(scale)}", torch.zeros(width))
            self.register_buffer(f"std_{module_key(scale)}", torch.ones(width))

    def set_statistics(self, scale: str, mean: Tensor, std: Tensor) -> None:
        """Set the (D_s,) mean and standard deviation; a feature with std 0 is only centred."""
        self.get_buffer(f"mean_{module_key(scale)}").copy_(mean)
        self.get_buffer(f"std_{module_key(scale)}").copy_(torch.where(std > 0, std, 1))

    def forward(self, graph: BagGraph) -> BagGraph:
        """The graph with standardised features."""
        features = {
            scale: (x - self.get_buffer(f"mean_{module_key(scale)}"))
            / self.get_buffer(f"std_{module_key(scale)}")
            for scale, x in graph.features.items()
        }
        return replace(graph, features=features)
