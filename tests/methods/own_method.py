"""A method that is none of ours: the mean of the features, and a linear classifier."""

from torch import Tensor, nn
from torch_geometric.utils import segment

from dasmil.bags import BagGraph
from dasmil.bags.output import ScaleOutput
from dasmil.modules import SingleScaleModule
from dasmil.tensors import bag_rows


class Mean(SingleScaleModule):
    """Mean pooling."""

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
        logits = self.classifier(segment(features, ptr, reduce="mean"))
        return {self.scale: ScaleOutput(logits, None, None, bag_rows(ptr))}
