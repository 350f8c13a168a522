"""CLAM: attention pooling whose top and bottom tiles train a classifier of tiles.

Paper: Lu et al., Nature Biomedical Engineering 2021, "Data-efficient and weakly supervised
computational pathology on whole-slide images", Methods.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dasmil.bags import BagGraph
from dasmil.bags.output import ScaleOutput
from dasmil.losses import bag_loss
from dasmil.modules.options import OptimizerOptions
from dasmil.modules.single_scale import SingleScaleModule
from dasmil.nn.attention import AttentionScores, attention_pool
from dasmil.tensors import bag_rows, bag_sizes, precisely

# as released, except for the cosine schedule
RELEASED = OptimizerOptions(
    learning_rate=2e-4, betas=(0.9, 0.999), weight_decay=1e-5, decay_below=None
)
HARD = log(1000)  # if the largest logit leads by this much, the smooth SVM equals the hard one


@dataclass(frozen=True)
class NetworkOptions:
    """The trunk and the attention.

    Parameters
    ----------
    branches:
        one attention for all classes (``single``, CLAM-SB), or one per class (``multi``,
        CLAM-MB).
    hidden_dim:
        width of the trunk.
    attention_dim:
        width of the hidden layer of the attention.
    gated:
        whether a sigmoid gate multiplies the tanh.
    dropout:
        probability of dropout after the trunk and in the attention.
    """

    branches: Literal["single", "multi"] = "single"
    hidden_dim: int = 512
    attention_dim: int = 256
    gated: bool = True
    dropout: float = 0.25


@dataclass(frozen=True)
class ObjectiveOptions:
    """The loss of the tiles.

    Parameters
    ----------
    instance:
        weight w of the loss of the tiles; that of the label loss is 1 - w.
    instance_loss:
        ``cross_entropy``, or the smooth top-1 ``svm``.
    num_instances:
        k, number of tiles of the highest and of the lowest attention; fewer in a smaller bag.
    subtyping:
        whether the tiles of the highest attention also train the tile classifiers of all other
        classes, as negative tiles.
    """

    instance: float = 0.3
    instance_loss: Literal["cross_entropy", "svm"] = "svm"
    num_instances: int = 8
    subtyping: bool = False


@dataclass(kw_only=True)
class CLAMOutput(ScaleOutput):
    """Also holds the hidden vectors of the tiles, for the loss.

    Parameters
    ----------
    hidden: (N, K).
    """

    hidden: Tensor


class CLAM(SingleScaleModule):
    """Clustering-constrained attention MIL (Lu et al. 2021); one scale, no edges.

    W processes learn what one process learns that accumulates the gradients of W batches.

    Parameters
    ----------
    network:
        the trunk and the attention.
    objective:
        the loss of the tiles.
    optimizer:
        learning rate, schedule and weight decay.
    one_logit:
        one logit for two classes; CLAM has a classifier per class.
    options:
        options of :class:`dasmil.modules.SingleScaleModule`.
    """

    network: "CLAMNetwork"

    def __init__(
        self,
        network: NetworkOptions = NetworkOptions(),
        objective: ObjectiveOptions = ObjectiveOptions(),
        optimizer: OptimizerOptions = RELEASED,
        one_logit: bool = False,
        **options: Any,
    ):
        super().__init__(optimizer=optimizer, one_logit=one_logit, **options)
        self.network_options = network
        self.objective_options = objective

    def build_network(self, scale: str, in_dim: int, num_logits: int) -> nn.Module:
        """Trunk, attention, and classifiers of bags and tiles."""
        return CLAMNetwork(scale, in_dim, num_logits, len(self.classes), self.network_options)

    @property
    def uses_all_weights(self) -> bool:
        """False: without subtyping only one tile classifier per bag gets a gradient."""
        return False

    def objective(
        self, output: Mapping[str, ScaleOutput], graph: BagGraph
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(1 - w) · label loss + w · loss of the tiles per bag, shape (B,), and both terms."""
        (scale, found), *_ = output.items()
        assert isinstance(found, CLAMOutput) and found.attention is not None
        label_loss = bag_loss(found.bag_logits, graph.labels)
        sizes = bag_sizes(graph.ptr[scale])
        bags = zip(found.hidden.split(sizes), found.attention.split(sizes), graph.labels.tolist())
        tile_loss = torch.stack([self._tile_loss(*bag) for bag in bags])
        weight = self.objective_options.instance
        total = self.label_weight(graph.labels) * (1 - weight) * label_loss + weight * tile_loss
        return total, {f"bag/{scale}": label_loss, f"instance/{scale}": tile_loss}

    def _tile_loss(self, hidden: Tensor, attention: Tensor, label: int) -> Tensor:
        """The loss of the tiles of one bag; the choice of tiles has no gradient.

        Parameters
        ----------
        hidden: (n, K).
        attention: (n, A).
        label: index of the bag's class.
        """
        options = self.objective_options
        k = min(options.num_instances, len(hidden))
        if k == 0:
            return hidden.new_zeros(())
        losses = []
        for number, classify in enumerate(self.network.tile_classifiers):
            if number != label and not options.subtyping:
                continue
            scores = attention[:, min(number, attention.shape[1] - 1)].detach()
            chosen, num_positive = scores.topk(k).indices, 0
            if number == label:
                chosen, num_positive = torch.cat([chosen, (-scores).topk(k).indices]), k
            logits = precisely(classify, hidden[chosen])  # (k or 2 k, 2)
            wanted = (torch.arange(len(logits), device=logits.device) < num_positive).long()
            if options.instance_loss == "svm":
                losses.append(smooth_svm(logits, wanted).mean())
            else:
                losses.append(F.cross_entropy(logits, wanted))
        num_classes = len(self.network.tile_classifiers) if options.subtyping else 1
        return torch.stack(losses).sum() / num_classes


class CLAMNetwork(nn.Module):
    """A trunk, one attention or one per class, and classifiers of bags and of tiles.

    Parameters
    ----------
    scale: scale to read.
    in_dim: width D of its features.
    num_logits: C.
    num_classes: number of tile classifiers, one per class.
    options: see :class:`NetworkOptions`.
    """

    def __init__(
        self, scale: str, in_dim: int, num_logits: int, num_classes: int, options: NetworkOptions
    ):
        super().__init__()
        self.scale = scale
        width, dropout = options.hidden_dim, options.dropout
        is_single = options.branches == "single"
        self.trunk = nn.Sequential(nn.Linear(in_dim, width), nn.ReLU(), nn.Dropout(dropout))
        self.attention = AttentionScores(
            *(width, options.attention_dim, 1 if is_single else num_logits, options.gated, dropout)
        )
        self.classifier = nn.Linear(width, num_logits)
        self.tile_classifiers = nn.ModuleList(nn.Linear(width, 2) for _ in range(num_classes))

    def forward(self, graph: BagGraph) -> dict[str, ScaleOutput]:
        """Bag logits (B, C), attention (N, C) and the hidden vectors (N, K) of the tiles."""
        ptr = graph.ptr[self.scale]
        h = self.trunk(graph.features[self.scale].to(self.classifier.weight.dtype))  # (N, K)
        attention, embeddings = attention_pool(self.attention(h), h, ptr)  # (B, A, K)
        weight, bias = self.classifier.weight, self.classifier.bias
        with torch.autocast(h.device.type, enabled=False):
            logits = (embeddings.to(weight.dtype) * weight).sum(2) + bias  # each of its own vector
        attention = attention.expand(-1, logits.shape[1])
        return {self.scale: CLAMOutput(logits, None, attention, bag_rows(ptr, h.device), hidden=h)}


def smooth_svm(logits: Tensor, targets: Tensor) -> Tensor:
    """The smooth top-1 SVM loss with margin 1 and temperature 1 (Berrada et al., ICLR 2018).

    If the largest logit leads by ln 1000 or more, it is the hard loss.

    Parameters
    ----------
    logits: (n, C).
    targets: (n,) int64 class index.

    Returns
    -------
    Loss per row, shape (n,).
    """
    is_own = F.one_hot(targets, logits.shape[1]).to(logits.dtype)
    own = (logits * is_own).sum(1, keepdim=True)
    raised = logits + 1 - is_own - own
    first, second = logits.topk(2, dim=1).values.T
    return torch.where(first - second >= HARD, raised.amax(1), raised.logsumexp(1))
