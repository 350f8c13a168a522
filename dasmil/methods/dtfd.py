"""DTFD: pseudo-bags, whose distilled features make a second bag.

Paper: Zhang et al., CVPR 2022, "DTFD-MIL: Double-Tier Feature Distillation Multiple Instance
Learning for Histopathology Whole Slide Image Classification", sections 3.2 and 3.3.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dasmil.bags import BagGraph
from dasmil.bags.output import ScaleOutput
from dasmil.data.seeds import draw_seed, training_seed
from dasmil.errors import InputError
from dasmil.losses import bag_loss
from dasmil.modules.options import OptimizerOptions
from dasmil.modules.single_scale import SingleScaleModule
from dasmil.nn.attention import AttentionScores, attention_pool
from dasmil.tensors import bag_rows, bag_sizes, precisely, send

# as released, except for the cosine schedule
RELEASED = OptimizerOptions(
    learning_rate=1e-4, betas=(0.9, 0.999), weight_decay=1e-4, decay_below=None
)
CLIP = 5.0  # largest norm of the gradient of each of the four parts, as released


@dataclass(frozen=True)
class NetworkOptions:
    """The two tiers.

    Parameters
    ----------
    num_pseudo_bags:
        number of pseudo-bags into which the tiles of a slide are dealt; fewer if it has fewer
        tiles.
    distillation:
        what a pseudo-bag gives to the second tier: its embedding (``afs``), its tiles of the
        highest score (``maxs``), or those of the highest and the lowest score (``maxmins``).
    num_instances:
        number of highest-scoring tiles over all pseudo-bags.
    hidden_dim:
        width of the projected features.
    attention_dim:
        width of the hidden layer of both attentions.
    """

    num_pseudo_bags: int = 4
    distillation: Literal["afs", "maxs", "maxmins"] = "afs"
    num_instances: int = 4
    hidden_dim: int = 512
    attention_dim: int = 128

    def __post_init__(self) -> None:
        if self.num_instances < self.num_pseudo_bags:
            raise InputError(
                f"num_instances: {self.num_instances} are fewer than the {self.num_pseudo_bags} "
                "pseudo-bags; give at least one per pseudo-bag"
            )


@dataclass(kw_only=True)
class DTFDOutput(ScaleOutput):
    """Also holds the first tier's output.

    Parameters
    ----------
    pseudo_logits: logits of the pseudo-bags of all bags, (P, C).
    pseudo_ptr: boundaries of the bags among them, (B + 1,).
    """

    pseudo_logits: Tensor
    pseudo_ptr: Tensor


class DTFD(SingleScaleModule):
    """Double-tier feature distillation MIL (Zhang et al. 2022); one scale, no edges.

    Each tier has its own loss. No gradient of the second loss reaches the first tier, so one
    backward pass of their sum equals the two released ones; and Adam treats each weight by itself,
    so one optimiser equals the two released ones.

    In training, each epoch draws other pseudo-bags of a slide. Those of an evaluation depend on the
    slide alone, so a metric is the same each time. W processes learn what one process learns that
    accumulates the gradients of W batches.

    Parameters
    ----------
    network:
        the two tiers.
    optimizer:
        learning rate, schedule and weight decay.
    one_logit:
        one logit for two classes; DTFD has a logit per class.
    options:
        options of :class:`dasmil.modules.SingleScaleModule`.
    """

    network: "DTFDNetwork"

    def __init__(
        self,
        network: NetworkOptions = NetworkOptions(),
        optimizer: OptimizerOptions = RELEASED,
        one_logit: bool = False,
        **options: Any,
    ):
        super().__init__(optimizer=optimizer, one_logit=one_logit, **options)
        self.network_options = network

    def build_network(self, scale: str, in_dim: int, num_logits: int) -> nn.Module:
        """Both tiers."""
        return DTFDNetwork(scale, in_dim, num_logits, self.network_options)

    def objective(
        self, output: Mapping[str, ScaleOutput], graph: BagGraph
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of both tiers' label losses per bag, shape (B,), and each of them."""
        (scale, found), *_ = output.items()
        assert isinstance(found, DTFDOutput)
        bag_of = bag_rows(found.pseudo_ptr, graph.labels.device)
        of_pseudo = bag_loss(found.pseudo_logits, graph.labels[bag_of])
        sizes = bag_sizes(found.pseudo_ptr)
        first = torch.stack([part.sum() / max(1, len(part)) for part in of_pseudo.split(sizes)])
        second = bag_loss(found.bag_logits, graph.labels)
        total = self.label_weight(graph.labels) * (first + second)
        return total, {f"bag/{scale}": second, f"pseudo_bag/{scale}": first}

    def on_train_epoch_start(self) -> None:
        self.network.deal_seed = draw_seed(training_seed(), self.current_epoch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for part in self.network.children():
            nn.utils.clip_grad_norm_(part.parameters(), CLIP)


class DTFDNetwork(nn.Module):
    """Two tiers of gated attention.

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
        self.options = options
        self.deal_seed = 0  # of the pseudo-bags of an epoch
        width = options.hidden_dim
        self.projection = nn.Linear(in_dim, width, bias=False)
        self.attention = AttentionScores(width, options.attention_dim)
        self.classifier = nn.Linear(width, num_logits)
        self.second = nn.ModuleDict(
            {
                "attention": AttentionScores(width, options.attention_dim),
                "classifier": nn.Linear(width, num_logits),
            }
        )

    def forward(self, graph: BagGraph) -> dict[str, ScaleOutput]:
        """Bag logits (B, C) of the second tier, attention (N, C), and the pseudo-bags' logits."""
        ptr = graph.ptr[self.scale]
        x = graph.features[self.scale].to(self.classifier.weight.dtype)
        sizes = bag_sizes(ptr)
        outputs = [
            self.forward_bag(bag, send(self.deal(len(bag), slide_id), x.device))
            for bag, slide_id in zip(x.split(sizes), graph.slide_ids, strict=True)
        ]
        bag_logits, pseudo_logits, attention = zip(*outputs, strict=True)
        counts = torch.tensor([0, *map(len, pseudo_logits)])
        together = torch.cat(attention).expand(-1, bag_logits[0].shape[0])
        return {
            self.scale: DTFDOutput(
                *(torch.stack(bag_logits), None, together, bag_rows(ptr, x.device)),
                pseudo_logits=torch.cat(pseudo_logits),
                pseudo_ptr=counts.cumsum(0),
            )
        }

    def deal(self, size: int, slide_id: str) -> Tensor:
        """The order (n,) in which a slide's tiles are dealt out."""
        seed = zlib.crc32(slide_id.encode())
        if self.training:
            seed = draw_seed(self.deal_seed, seed)
        return torch.randperm(size, generator=torch.Generator().manual_seed(seed))

    def forward_bag(self, x: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits (C,) of one bag, those (G, C) of its pseudo-bags, and the attention (n, 1).

        The attention is that of the first tier within each pseudo-bag, divided by G.

        Parameters
        ----------
        x: (n, D) features.
        order: (n,) order in which the tiles are dealt out.
        """
        h = precisely(self.projection, x[order]).relu()  # (n, K)
        num_groups = max(1, min(self.options.num_pseudo_bags, len(h)))
        groups = h.tensor_split(num_groups)  # the first groups get one tile more
        ptr = torch.tensor([0, *map(len, groups)]).cumsum(0)
        attention, embedding = attention_pool(self.attention(h), h, ptr)
        embedding = embedding.squeeze(1)  # (G, K)
        pseudo_logits = precisely(self.classifier, embedding)  # (G, C)
        distilled = self._distil(h, attention, embedding, groups)
        whole = torch.tensor([0, len(distilled)])
        _, summed = attention_pool(self.second["attention"](distilled), distilled, whole)
        logits = precisely(self.second["classifier"], summed[0, 0])  # (C,)
        weights = torch.empty_like(attention)
        weights[order] = attention / num_groups
        return logits, pseudo_logits, weights

    def _distil(
        self, h: Tensor, attention: Tensor, embedding: Tensor, groups: tuple[Tensor, ...]
    ) -> Tensor:
        """The input (m, K) of the second tier; it has no gradient."""
        if self.options.distillation == "afs":
            return embedding.detach()
        n = self.options.num_instances // self.options.num_pseudo_bags
        with torch.no_grad():
            # class activation of each tile: its contribution to the logits of its pseudo-bag
            scores = ((attention * h) @ self.classifier.weight.T).softmax(1)[:, -1]  # (N,)
        chosen = []
        for group, values in zip(groups, scores.split([len(g) for g in groups]), strict=True):
            ranked = group[values.sort(descending=True).indices].detach()
            chosen.append(ranked[:n])
            if self.options.distillation == "maxmins":
                chosen.append(ranked[-n:])
        return torch.cat(chosen)
