"""What is kept of each slide that is evaluated, and all slides put together.

Every process keeps its slides, all are gathered at the end of the epoch, and each slide counts
once, however often a sampler had to repeat it: the metrics of a checkpoint do not depend on the
number of processes, as long as each has the same number of threads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite

import torch
from torch import Tensor

from dasmil.bags import BagGraph
from dasmil.bags.output import ScaleOutput
from dasmil.distributed import gather_lists
from dasmil.metrics import class_probabilities
from dasmil.metrics.evaluated_slides import Evaluation

CONSTANT = 1e-3  # bag logits that differ by less are one


@dataclass(frozen=True)
class SlideResult:
    """One slide; tensors on the CPU.

    Parameters
    ----------
    logits: per scale (C,).
    losses: the terms of the objective, and their weighted sum ``loss``.
    """

    slide_id: str
    patient: str
    label: int
    logits: dict[str, Tensor]
    losses: dict[str, float]


def slide_results(
    graph: BagGraph,
    output: Mapping[str, ScaleOutput],
    losses: Mapping[str, Tensor],
    patients: Mapping[str, str],
) -> list[SlideResult]:
    """One result a bag; a slide without a patient is its own."""
    return [
        SlideResult(
            slide_id,
            patients.get(slide_id, slide_id),
            int(graph.labels[bag]),
            {scale: says.bag_logits[bag].float().cpu() for scale, says in output.items()},
            {name: float(term[bag]) for name, term in losses.items()},
        )
        for bag, slide_id in enumerate(graph.slide_ids)
    ]


def gather_results(results: list[SlideResult]) -> list[SlideResult]:
    """The results of all processes, each slide once, sorted by slide_id."""
    unique = {result.slide_id: result for result in gather_lists(results)}
    return [unique[slide_id] for slide_id in sorted(unique)]


def not_finite(results: Sequence[SlideResult]) -> list[str]:
    """The slides that have a logit or a loss that is not finite: they have no class."""
    return [
        result.slide_id
        for result in results
        if not all(bool(logits.isfinite().all()) for logits in result.logits.values())
        or not all(map(isfinite, result.losses.values()))
    ]


def constant_scales(results: Sequence[SlideResult]) -> list[str]:
    """The scales whose bag logits hardly differ between the slides: they have learned nothing."""
    if len(results) < 2:
        return []
    logits = {s: torch.stack([r.logits[s] for r in results]) for s in results[0].logits}
    return [s for s, z in logits.items() if float((z.amax(0) - z.amin(0)).max()) < CONSTANT]


def evaluation_of(
    results: Sequence[SlideResult],
    classes: tuple[str, ...],
    thresholds: Mapping[str, Mapping[str, float]] | None,
    specificity: float,
) -> Evaluation:
    """All slides of a part, as the figures are computed from them."""
    return Evaluation(
        classes=classes,
        slide_ids=tuple(result.slide_id for result in results),
        patients=tuple(result.patient for result in results),
        labels=torch.tensor([result.label for result in results]),
        probabilities={
            scale: class_probabilities(torch.stack([r.logits[scale] for r in results]))
            for scale in results[0].logits
        },
        thresholds=thresholds,
        specificity=specificity,
    )


def mean_losses(results: Sequence[SlideResult]) -> dict[str, float]:
    """Mean over the slides of each term of the objective, and of their weighted sum, ``loss``."""
    return {
        name: fsum(result.losses[name] for result in results) / len(results)
        for name in results[0].losses
    }
