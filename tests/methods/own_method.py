"""A method outside the package: the mean of the features, and a linear classifier."""

from typing import Any

import torch
from torch import Tensor, nn

from dasmil.bags import BagGraph
from dasmil.bags.output import ScaleOutput
from dasmil.modules import SingleScaleModule
from dasmil.tensors import bag_rows, bag_sizes


class Mean(SingleScaleModule):
    """Mean pooling, with options of several types."""

    def __init__(
        self,
        shift: int = -1,
        widths: list[int] | None = None,
        pair: tuple[float, float] = (0.1, 0.2),
        names: tuple[str, ...] = (),
        **options: Any,
    ):
        super().__init__(**options)

    def build_network(self, scale: str, in_dim: int, num_logits: int) -> nn.Module:
        """One linear layer."""
        return MeanNetwork(scale, nn.Linear(in_dim, num_logits))


class MeanNetwork(nn.Module):
    """Linear in the mean."""

    def __init__(self, scale: str, classifier: nn.Linear):
        super().__init__()
        self.scale, self.classifier = scale, classifier

    def forward(self, graph: BagGraph) -> dict[str, ScaleOutput]:
        """Bag logits alone."""
        ptr = graph.ptr[self.scale]
        features: Tensor = graph.features[self.scale].to(self.classifier.weight.dtype)
        bags = features.split(bag_sizes(ptr))
        means = torch.stack([bag.sum(0) / max(1, len(bag)) for bag in bags])
        rows = bag_rows(ptr, features.device)
        return {self.scale: ScaleOutput(self.classifier(means), None, None, rows)}
