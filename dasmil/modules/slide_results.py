"""Per-slide results of an evaluation, and how they are merged across processes.

Every process keeps the results of its slides. At the end of the epoch all are gathered, and each
slide counts once, however often a sampler repeated it. So the metrics of a checkpoint do not depend
on the number of processes, if each has the same number of threads.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite

import torch
from torch import Tensor

from dasmil.bags import BagGraph
from dasmil.bags.output import ScaleOutput
from dasmil.data.distributed import gather_lists
from dasmil.metrics import class_probabilities
from dasmil.metrics.evaluated_slides import Evaluation

CONSTANT = 1e-3  # bag logits that differ by less count as equal


@dataclass(frozen=True)
class SlideResult:
    """The result of one slide; tensors on the CPU.

    Parameters
    ----------
    label: index of its class.
    logits: bag logits (C,) per scale.
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
    """One result per bag; a slide without a patient counts as a patient of its own."""
    return [
        SlideResult(
            slide_id,
            patients.get(slide_id, slide_id),
            int(graph.labels[bag]),
            {scale: each.bag_logits[bag].float().cpu() for scale, each in output.items()},
            {name: float(term[bag]) for name, term in losses.items()},
        )
        for bag, slide_id in enumerate(graph.slide_ids)
    ]


def gather_results(results: list[SlideResult]) -> list[SlideResult]:
    """The results of all processes, each slide once, sorted by slide_id."""
    unique = {result.slide_id: result for result in gather_lists(results)}
    return [unique[slide_id] for slide_id in sorted(unique)]


def not_finite(results: Sequence[SlideResult]) -> list[str]:
    """The slide_ids with a logit or a loss that is not finite; these slides have no class."""
    return [
        result.slide_id
        for result in results
        if not all(bool(logits.isfinite().all()) for logits in result.logits.values())
        or not all(map(isfinite, result.losses.values()))
    ]


def warn_constant_scales(results: Sequence[SlideResult], model: str) -> None:
    """Warn of the scales that have learned nothing: their bag logits hardly differ between slides.

    Adam turns weight decay into whole steps towards zero if gradients are smaller.

    Parameters
    ----------
    model: which model it is, for the sentence.
    """
    if len(results) < 2:
        return
    logits = {s: torch.stack([r.logits[s] for r in results]) for s in results[0].logits}
    constant = [s for s, z in logits.items() if float((z.amax(0) - z.amin(0)).max()) < CONSTANT]
    if constant:
        warnings.warn(
            f"{', '.join(constant)}: {model} gives bag logits that differ by less than "
            f"{CONSTANT:g} over the {len(results)} validation slides: this scale has "
            "learned nothing; set model.standardize to true, or train for longer, and if "
            "model.optimizer.decay_below is null, lower model.optimizer.weight_decay",
            stacklevel=2,
        )


def evaluate_results(
    results: Sequence[SlideResult], classes: tuple[str, ...], specificity: float
) -> Evaluation:
    """The slides of a split, as the metrics are computed from them."""
    return Evaluation(
        classes=classes,
        slide_ids=tuple(result.slide_id for result in results),
        patients=tuple(result.patient for result in results),
        labels=torch.tensor([result.label for result in results]),
        probabilities={
            scale: class_probabilities(torch.stack([r.logits[scale] for r in results]))
            for scale in results[0].logits
        },
        specificity=specificity,
    )


def mean_losses(results: Sequence[SlideResult]) -> dict[str, float]:
    """Mean over the slides of each term of the objective and of their weighted sum ``loss``."""
    return {
        name: fsum(result.losses[name] for result in results) / len(results)
        for name in results[0].losses
    }
