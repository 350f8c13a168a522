"""ABMIL: the attention-weighted mean of the tiles, plain or gated.

Paper: Ilse et al., ICML 2018, section 2.4, Eq. 8 (plain) and Eq. 9 (gated).
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from dasmil.bags import BagGraph
from dasmil.bags.output import ScaleOutput
from dasmil.modules.options import OptimizerOptions
from dasmil.modules.single_scale import SingleScaleModule
from dasmil.nn.attention import AttentionScores, attention_pool
from dasmil.tensors import bag_rows, precisely

# as released, except for the cosine schedule
RELEASED = OptimizerOptions(
    learning_rate=5e-4, betas=(0.9, 0.999), weight_decay=1e-4, decay_below=None
)


@dataclass(frozen=True)
class NetworkOptions:
    """The attention.

    Parameters
    ----------
    attention_dim:
        L, width of the attention's hidden layer.
    gated:
        whether a sigmoid gate multiplies the tanh (Eq. 9) or not (Eq. 8).
    hidden_dim:
        width of a layer with ReLU before the attention; null: no such layer.
    """

    attention_dim: int = 128
    gated: bool = True
    hidden_dim: int | None = None


class ABMIL(SingleScaleModule):
    """Attention-based MIL (Ilse et al. 2018); one scale, no edges.

    Parameters
    ----------
    network:
        the attention.
    optimizer:
        learning rate, schedule and weight decay.
    options:
        options of :class:`dasmil.modules.SingleScaleModule`.
    """

    def __init__(
        self,
        network: NetworkOptions = NetworkOptions(),
        optimizer: OptimizerOptions = RELEASED,
        **options: Any,
    ):
        super().__init__(optimizer=optimizer, **options)
        self.network_options = network

    def build_network(self, scale: str, in_dim: int, num_logits: int) -> nn.Module:
        """One attention pooling."""
        return ABMILNetwork(scale, in_dim, num_logits, self.network_options)


class ABMILNetwork(nn.Module):
    """An attention over the tiles, and a linear classifier of the attention-weighted sum.

    Parameters
    ----------
    scale: scale to read.
    in_dim: width D of its features.
    num_logits: C.
    options: see :class:`NetworkOptions`.
    """

    def __init__(self, scale: str, in_dim: int, num_logits: int, options: NetworkOptions):
        super().__init__()
        self.scale = scale
        self.trunk: nn.Module = nn.Identity()
        if options.hidden_dim is not None:
            self.trunk = nn.Sequential(nn.Linear(in_dim, options.hidden_dim), nn.ReLU())
            in_dim = options.hidden_dim
        self.attention = AttentionScores(in_dim, options.attention_dim, gated=options.gated)
        self.classifier = nn.Linear(in_dim, num_logits)

    def forward(self, graph: BagGraph) -> dict[str, ScaleOutput]:
        """Bag logits (B, C) and attention (N, C), the same for every class."""
        ptr = graph.ptr[self.scale]
        h = self.trunk(graph.features[self.scale].to(self.classifier.weight.dtype))  # (N, K)
        attention, embedding = attention_pool(self.attention(h), h, ptr)
        logits = precisely(self.classifier, embedding.squeeze(1))  # (B, C)
        attention = attention.expand(-1, logits.shape[1])
        return {self.scale: ScaleOutput(logits, None, attention, bag_rows(ptr, h.device))}
