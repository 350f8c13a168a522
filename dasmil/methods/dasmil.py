"""DAS-MIL: a graph over all scales, an attention head per scale, and distillation between them.

Paper: Bontempo et al. 2023, section 3 and Fig. 1. Codes such as D6 name differences between paper
and released code; ``.github/docs/paper.md`` explains each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dasmil.bags import BagGraph, ancestor_rows
from dasmil.bags.output import ScaleOutput
from dasmil.errors import InputError
from dasmil.losses import bag_loss, criticality_loss, distillation_loss, max_instance_loss
from dasmil.losses.criticality import ChildrenPooling, Reduction
from dasmil.losses.distillation import ClassDistribution, Direction
from dasmil.modules.mil import MILModule
from dasmil.nn import PGNN, MILHead, PoolingHead
from dasmil.nn.gat import Residual
from dasmil.nn.pgnn import module_key


@dataclass(frozen=True)
class NetworkOptions:
    """The graph and the heads.

    Parameters
    ----------
    hidden_dim:
        width between the two graph layers (D13).
    out_dim:
        width of the contextualised features H.
    heads:
        attention heads of each GAT, averaged (D13).
    attention_dropout:
        probability of dropping an attention coefficient of a GAT (D13).
    node_dropout:
        probability that a node loses its edges in a training step (D14).
    residual:
        of each GAT: none, plain (x + h) or glu (x + GLU(h)) (D15).
    query_dim:
        width of the MIL head's queries.
    bag_classifier_init:
        variance of the bag classifier's first weights: lecun (1 / fan-in) or torch
        (a third of it) (D16).
    contextualize:
        whether there is a graph; without it the heads read the extractors' features (Table 5).
    concatenate_parents:
        whether a head reads each tile's vector after its parent's, [10x ‖ 20x] (Table 4); the
        coarsest scale has no parents.
    coarse_instances:
        whether the heads of all scales but the finest read ``all`` tiles, or only those that
        are ``parents`` of a tile (D12).
    pooling:
        pooling of a head: the paper's attention, or for comparison the mean or max of the
        instance logits.
    """

    hidden_dim: int = 384
    out_dim: int = 256
    heads: int = 3
    attention_dropout: float = 0.2
    node_dropout: float = 0.5
    residual: Residual = "none"
    query_dim: int = 128
    bag_classifier_init: Literal["lecun", "torch"] = "lecun"
    contextualize: bool = True
    concatenate_parents: bool = False
    coarse_instances: Literal["all", "parents"] = "all"
    pooling: Literal["attention", "mean", "max"] = "attention"


@dataclass(frozen=True)
class ObjectiveOptions:
    """The scalars of Eq. 3, and a switch for each way in which paper and released code differ.

    The scalars' defaults are the paper's (section 4, "Optimization"); ``.github/docs/paper.md``
    gives the reason for the default of each switch.

    Parameters
    ----------
    distillation:
        λ, weight of L_KD; bag losses are multiplied by (1 − λ), see ``discounted``.
    criticality:
        β, weight of L_CRIT.
    instance:
        weight of the max-instance label loss, which is never multiplied by (1 − λ) (D7).
    temperature:
        τ of L_KD.
    discounted:
        which bag losses are multiplied by (1 − λ): those of the ``coarse`` scales, or that of
        the finest, ``fine``, as printed (D6).
    distillation_pairs:
        which scale teaches another if there are more than two: the next finer one
        (``neighbours``), or the ``finest``.
    kl_direction:
        KL(teacher ‖ student) or KL(student ‖ teacher) (D1).
    squared_temperature:
        whether the KL is multiplied by τ² (D2).
    class_distribution:
        softmax over the classes, or one two-point distribution per class (D3).
    epsilon:
        whether the KL uses (p + 1e-7) / (1 + 1e-8) instead of log space (D5).
    criticality_scores:
        what Eq. 2 compares: instance logits, or attention (D10).
    children_pooling:
        GraphPooling of Eq. 2: mean or max of the children (D9).
    criticality_reduction:
        reduction of Eq. 2 over the tiles: mean or sum (D8).
    detach_teacher:
        whether Eq. 1 and Eq. 2 give no gradient to the teaching scale (D11).
    """

    distillation: float = 1.0
    criticality: float = 1.0
    instance: float = 1.0
    temperature: float = 1.5
    discounted: Literal["coarse", "fine"] = "coarse"
    distillation_pairs: Literal["neighbours", "finest"] = "neighbours"
    kl_direction: Direction = "teacher_student"
    squared_temperature: bool = True
    class_distribution: ClassDistribution = "softmax"
    epsilon: bool = False
    criticality_scores: Literal["logits", "attention"] = "logits"
    children_pooling: ChildrenPooling = "mean"
    criticality_reduction: Reduction = "mean"
    detach_teacher: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.distillation <= 1:
            raise InputError(f"distillation: λ = {self.distillation} is not between 0 and 1")
        if min(self.criticality, self.instance) < 0:
            raise InputError("criticality, instance: a weight of a loss cannot be negative")
        if self.temperature <= 0:
            raise InputError(f"temperature: τ = {self.temperature} is not positive")


class DASMIL(MILModule):
    """DAS-MIL with the objective of Eq. 3 (Bontempo et al. 2023).

    Parameters
    ----------
    network:
        the graph and the heads.
    objective:
        weights of the losses, and switches between paper and released code.
    options:
        options of :class:`MILModule`.
    """

    def __init__(
        self,
        network: NetworkOptions = NetworkOptions(),
        objective: ObjectiveOptions = ObjectiveOptions(),
        **options: Any,
    ):
        super().__init__(**options)
        self.network_options = network
        self.objective_options = objective

    def build(self, in_dims: Mapping[str, int], num_logits: int) -> nn.Module:
        """Make the graph network and a head per scale."""
        return DASMILNetwork(in_dims, num_logits, self.network_options)

    @property
    def uses_edges(self) -> bool:
        """Whether there is a graph."""
        return self.network_options.contextualize

    @property
    def output_scales(self) -> tuple[str, ...]:
        """All scales that the network reads."""
        return self.scales

    def objective(
        self, output: Mapping[str, ScaleOutput], graph: BagGraph
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 3 per bag, shape (B,), and its individual terms."""
        return objective(
            *(output, graph.parent, graph.ptr, graph.labels),
            self.objective_options,
            self.label_weight(graph.labels),
        )


class DASMILNetwork(nn.Module):
    """Bag and instance logits at every scale; the finest scale's are the final prediction.

    Parameters
    ----------
    in_dims: width of the tile features per scale, coarse to fine.
    num_logits: C; 1 for a binary task with one logit.
    options: see :class:`NetworkOptions`.
    """

    def __init__(
        self,
        in_dims: Mapping[str, int],
        num_logits: int = 1,
        options: NetworkOptions = NetworkOptions(),
    ):
        super().__init__()
        self.concatenate_parents = options.concatenate_parents
        self.coarse_instances = options.coarse_instances
        self.pgnn: PGNN | None = None
        widths = dict(in_dims)
        if options.contextualize:
            self.pgnn = PGNN(
                *(in_dims, options.hidden_dim, options.out_dim, options.heads),
                *(options.attention_dropout, options.node_dropout, options.residual),
            )
            widths = dict.fromkeys(in_dims, options.out_dim)
        targets = dict(widths)
        if options.concatenate_parents:
            for coarse, fine in pairwise(widths):
                targets[fine] = widths[coarse] + widths[fine]

        def head(width: int) -> nn.Module:
            if options.pooling == "attention":
                return MILHead(width, num_logits, options.query_dim, options.bag_classifier_init)
            return PoolingHead(width, num_logits, options.pooling)

        self.heads = nn.ModuleDict({module_key(s): head(width) for s, width in targets.items()})

    def forward(self, graph: BagGraph) -> dict[str, ScaleOutput]:
        """The output of each scale, coarse to fine."""
        if self.pgnn is None:
            h = dict(graph.in_dtype(next(self.parameters()).dtype).features)
        else:
            h = self.pgnn(graph)
        shown: dict[str, Tensor] = {}
        targets = dict(h)
        for coarse, fine in pairwise(graph.scales):
            parent = graph.parent[fine]
            if self.coarse_instances == "parents":
                is_parent = torch.zeros(len(h[coarse]) + 1, dtype=torch.bool, device=parent.device)
                rows = parent.where(parent >= 0, len(h[coarse]))
                shown[coarse] = is_parent.index_fill(0, rows, True)[:-1]
            if self.concatenate_parents:
                targets[fine] = torch.cat([_rows_or_zero(h[coarse], parent), h[fine]], dim=1)
        return {
            s: self.heads[module_key(s)](targets[s], graph.ptr[s], shown.get(s))
            for s in graph.scales
        }


def _rows_or_zero(x: Tensor, rows: Tensor) -> Tensor:
    """The rows (N, K) of x; zeros for a row of -1."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[rows]


def objective(
    output: Mapping[str, ScaleOutput],
    parent: Mapping[str, Tensor],
    ptr: Mapping[str, Tensor],
    labels: Tensor,
    options: ObjectiveOptions,
    label_weight: Tensor | float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 3 for M scales; each but the finest is taught by a finer one.

    Σ_taught (1 − λ) L_CE(y) + L_CE(y_finest) + λ Σ L_KD + β Σ L_CRIT + instance Σ L_max

    Parameters
    ----------
    output: output of each scale, coarse to fine.
    parent: per scale but the coarsest (N_s,) row in the next coarser scale, -1 for none.
    ptr: per scale (B + 1,) boundaries of the bags.
    labels: (B,) int64 class index.
    options: weights and switches.
    label_weight: (B,) weights of the bags' label losses in the total, or one weight for all.
        Distillation terms use no labels and are not weighted.

    Returns
    -------
    The total (B,), and every unweighted term (B,) by name: ``bag/<scale>``, ``instance/<scale>``,
    and for each taught scale ``distillation/<scale>`` and ``criticality/<scale>``.
    """
    scales = list(output)
    finest = scales[-1]
    terms: dict[str, Tensor] = {}
    total = torch.zeros_like(labels, dtype=output[finest].bag_logits.dtype)
    for scale in scales:
        of_scale = output[scale]
        assert of_scale.instance_logits is not None
        is_discounted = (scale == finest) == (options.discounted == "fine") and len(scales) > 1
        discount = 1.0 - options.distillation if is_discounted else 1.0
        label_loss = bag_loss(of_scale.bag_logits, labels)
        top_loss = max_instance_loss(of_scale.instance_logits, ptr[scale], labels, of_scale.shown)
        terms[f"bag/{scale}"], terms[f"instance/{scale}"] = label_loss, top_loss
        total = total + label_weight * (discount * label_loss + options.instance * top_loss)

    for number, coarse in enumerate(scales[:-1]):
        fine = finest if options.distillation_pairs == "finest" else scales[number + 1]
        between = scales[number + 1 : scales.index(fine) + 1]
        rows = ancestor_rows([parent[scale] for scale in between])
        kd, crit = _teach(output[coarse], output[fine], rows, ptr[coarse], options)
        terms[f"distillation/{coarse}"], terms[f"criticality/{coarse}"] = kd, crit
        total = total + options.distillation * kd + options.criticality * crit
    return total, terms


def _teach(
    student: ScaleOutput,
    teacher: ScaleOutput,
    parent: Tensor,
    ptr: Tensor,
    options: ObjectiveOptions,
) -> tuple[Tensor, Tensor]:
    """L_KD and L_CRIT, each of shape (B,), of a coarse scale that a finer one teaches."""
    kd = distillation_loss(
        student.bag_logits,
        teacher.bag_logits,
        options.temperature,
        direction=options.kl_direction,
        squared_temperature=options.squared_temperature,
        class_distribution=options.class_distribution,
        epsilon=options.epsilon,
        detach_teacher=options.detach_teacher,
    )
    of_tiles = [
        each.attention if options.criticality_scores == "attention" else each.instance_logits
        for each in (student, teacher)
    ]
    assert of_tiles[0] is not None and of_tiles[1] is not None
    crit = criticality_loss(
        *(of_tiles[0], of_tiles[1], parent),
        ptr,
        children_pooling=options.children_pooling,
        reduction=options.criticality_reduction,
        detach_teacher=options.detach_teacher,
    )
    return kd, crit
