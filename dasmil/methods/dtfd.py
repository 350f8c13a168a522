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
from dasmil.errors import InputError
from dasmil.losses import bag_loss
from dasmil.modules.mil import SingleScaleModule
from dasmil.modules.options import OptimizerOptions
from dasmil.nn.attention import AttentionScores, attention_pool
from dasmil.tensors import bag_rows, precisely

# as released, but for the cosine schedule
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
        into which the tiles of a slide are drawn; fewer in a slide of fewer tiles.
    distillation:
        what a pseudo-bag gives the second tier: its embedding (``afs``), its tiles of the
        highest score (``maxs``), or those of the highest and the lowest (``maxmins``).
    num_instances:
        tiles of all pseudo-bags together that are of the highest score.
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
                "pseudo-bags, of which each gives at least one"
            )


@dataclass
class DTFDOutput(ScaleOutput):
    """Also the first tier's output.

    Parameters
    ----------
    pseudo_logits: (P, C), of all pseudo-bags of all bags.
    pseudo_ptr: (B + 1,) boundaries of the bags among them.
    """

    pseudo_logits: Tensor | None = None
    pseudo_ptr: Tensor | None = None


class DTFD(SingleScaleModule):
    """Double-tier feature distillation MIL (Zhang et al. 2022); one scale, no edges.

    Each tier has its own loss and its own optimiser; no gradient of the second loss reaches the
    first tier, so that one backward pass of their sum is the released two.

    In training, each step draws other pseudo-bags. Those of an evaluation depend on the slide
    alone, so that a metric is the same each time.

    Parameters
    ----------
    network:
        the two tiers.
    optimizer:
        learning rate, schedule and weight decay, of both optimisers.
    one_logit:
        false: DTFD has a logit per class.
    options:
        of :class:`dasmil.modules.MILModule`, and the scale.
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
        self.automatic_optimization = False
        if optimizer.decay_below is not None:
            raise InputError("optimizer.decay_below: DTFD's weight decay always acts; give null")

    def build(self, in_dims: Mapping[str, int], num_logits: int) -> nn.Module:
        """Both tiers."""
        (scale, in_dim), *_ = in_dims.items()
        return DTFDNetwork(scale, in_dim, num_logits, self.network_options)

    def objective(
        self, output: Mapping[str, ScaleOutput], graph: BagGraph
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of both tiers' label losses per bag, shape (B,), and each of them."""
        (scale, found), *_ = output.items()
        assert isinstance(found, DTFDOutput) and found.pseudo_logits is not None
        assert found.pseudo_ptr is not None
        bag_of = bag_rows(found.pseudo_ptr)
        of_pseudo = bag_loss(found.pseudo_logits, graph.labels[bag_of])
        sizes = found.pseudo_ptr.diff().tolist()
        first = torch.stack([part.sum() / max(1, len(part)) for part in of_pseudo.split(sizes)])
        second = bag_loss(found.bag_logits, graph.labels)
        total = self.label_weight(graph.labels) * (first + second)
        return total, {f"bag/{scale}": second, f"pseudo_bag/{scale}": first}

    def training_step(self, graph: BagGraph, batch_idx: int) -> Any:
        """A step of each optimiser."""
        total, terms = self.objective(self(graph), graph)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(total.mean())
        for part in self.network.children():
            nn.utils.clip_grad_norm_(part.parameters(), CLIP)
        for optimizer in optimizers:
            optimizer.step()
        self.note_losses(graph, total.detach(), {k: v.detach() for k, v in terms.items()})

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        schedules: Any = self.lr_schedulers()
        for schedule in schedules:
            schedule.step()

    def configure_optimizers(self) -> Any:
        """One per tier."""
        return [self.adam(self.network.first_tier()), self.adam(self.network.second.parameters())]


class DTFDNetwork(nn.Module):
    """Two tiers of gated attention.

    Parameters
    ----------
    scale: whose tiles it reads.
    in_dim: width of their features.
    num_logits: C.
    options: see :class:`NetworkOptions`.
    """

    def __init__(self, scale: str, in_dim: int, num_logits: int, options: NetworkOptions):
        super().__init__()
        self.scale = scale
        self.options = options
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

    def first_tier(self) -> list[nn.Parameter]:
        """The weights of the first tier."""
        parts = (self.projection, self.attention, self.classifier)
        return [weight for part in parts for weight in part.parameters()]

    def forward(self, graph: BagGraph) -> dict[str, ScaleOutput]:
        """Logits of the second tier, and of the pseudo-bags."""
        ptr = graph.ptr[self.scale]
        x = graph.features[self.scale].to(self.classifier.weight.dtype)
        sizes = ptr.diff().tolist()
        orders = [
            self._order(size, slide_id)
            for size, slide_id in zip(sizes, graph.slide_ids, strict=True)
        ]
        of_bags = [
            self.of_bag(part, order.to(x.device))
            for part, order in zip(x.split(sizes), orders, strict=True)
        ]
        bag_logits, pseudo_logits, attention = zip(*of_bags, strict=True)
        counts = torch.tensor([0, *map(len, pseudo_logits)], device=x.device)
        together = torch.cat(attention).expand(-1, bag_logits[0].shape[0])
        return {
            self.scale: DTFDOutput(
                *(torch.stack(bag_logits), None, together, bag_rows(ptr)),
                pseudo_logits=torch.cat(pseudo_logits),
                pseudo_ptr=counts.cumsum(0),
            )
        }

    def _order(self, size: int, slide_id: str) -> Tensor:
        """(n,) the tiles in the order in which they are dealt out."""
        if self.training:
            return torch.randperm(size)
        generator = torch.Generator().manual_seed(zlib.crc32(slide_id.encode()))
        return torch.randperm(size, generator=generator)

    def of_bag(self, x: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of one bag: its logits (C,), those of its pseudo-bags (G, C), and the attention (n, 1).

        The attention is that of the first tier inside the pseudo-bags, each of which counts alike.

        Parameters
        ----------
        x: (n, D) features.
        order: (n,) the tiles in the order in which they are dealt out.
        """
        h = precisely(self.projection, x[order]).relu()  # (n, K)
        num_groups = max(1, min(self.options.num_pseudo_bags, len(h)))
        groups = h.tensor_split(num_groups)  # the first ones get one tile more
        ptr = torch.tensor([0, *map(len, groups)], device=h.device).cumsum(0)
        attention, embedding = attention_pool(self.attention(h), h, ptr)
        embedding = embedding.squeeze(1)  # (G, K)
        pseudo_logits = precisely(self.classifier, embedding)  # (G, C)
        distilled = self._distil(h, attention, embedding, groups)
        whole = torch.tensor([0, len(distilled)], device=h.device)
        _, summed = attention_pool(self.second["attention"](distilled), distilled, whole)
        logits = precisely(self.second["classifier"], summed[0, 0])  # (C,)
        weights = torch.empty_like(attention)
        weights[order] = attention / num_groups
        return logits, pseudo_logits, weights

    def _distil(
        self, h: Tensor, attention: Tensor, embedding: Tensor, groups: tuple[Tensor, ...]
    ) -> Tensor:
        """(m, K) what the second tier reads; no gradient goes back through it."""
        if self.options.distillation == "afs":
            return embedding.detach()
        n = self.options.num_instances // self.options.num_pseudo_bags
        with torch.no_grad():
            # the class activation of each tile: how it adds to the logits of its pseudo-bag
            scores = ((attention * h) @ self.classifier.weight.T).softmax(1)[:, -1]  # (N,)
        chosen = []
        for group, values in zip(groups, scores.split([len(g) for g in groups]), strict=True):
            ranked = group[values.sort(descending=True).indices].detach()
            chosen.append(ranked[:n])
            if self.options.distillation == "maxmins":
                chosen.append(ranked[-n:])
        return torch.cat(chosen)
