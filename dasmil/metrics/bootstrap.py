"""Bootstrap over patients (Efron and Tibshirani, 1993, chapters 13 and 16)."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def resamples(patients: Sequence[str], strata: Sequence[Any], num: int, seed: int) -> list[Tensor]:
    """Slides drawn anew by patient: all slides of a drawn patient come along.

    Patients are drawn with replacement within their stratum, as many as it has, so that each class
    keeps its patients (as pROC's ``boot.stratified``; Robin et al., 2011). A stratum of a single
    patient is in every draw.

    Parameters
    ----------
    patients: (n,) of each slide.
    strata: (n,) of each slide, of one kind that can be sorted: mostly its label. Patients whose
        slides hold the same set of them are one stratum.
    num: of draws.
    seed: of the draws; they depend on it and on the slides' order alone.

    Returns
    -------
    Per draw (m,) int64 indices into the slides; m varies where patients have several slides.
    """
    slides: dict[str, list[int]] = defaultdict(list)
    for index, patient in enumerate(patients):
        slides[patient].append(index)
    groups: dict[tuple[Any, ...], list[list[int]]] = defaultdict(list)
    for indices in slides.values():
        groups[tuple(sorted({strata[index] for index in indices}))].append(indices)

    rng = np.random.default_rng(seed)
    drawn: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(num)]
    for stratum in sorted(groups):
        members = groups[stratum]
        flat = np.concatenate(members)
        starts = np.cumsum([0, *map(len, members)])
        for draw, chosen in zip(drawn, rng.integers(len(members), size=(num, len(members)))):
            draw += [flat[starts[patient] : starts[patient + 1]] for patient in chosen]
    return [torch.from_numpy(np.concatenate(draw)) for draw in drawn]


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a figure's values over the draws; nan where one of them is nan."""
    outside = (1 - level) / 2
    low, high = np.quantile(np.asarray(values, dtype=np.float64), [outside, 1 - outside])
    return float(low), float(high)


def paired_p_value(differences: Sequence[float]) -> float:
    """Two-sided p of no difference, from the differences of two methods over shared draws.

    (1 + 2 · min(#{d ≤ 0}, #{d ≥ 0})) / (1 + number of draws), at most 1: the share of draws beyond
    zero, doubled, with one more draw counted as beyond so that p is never 0 (Davison and Hinkley,
    1997, section 4.2). nan where a difference is nan.
    """
    values = np.asarray(differences, dtype=np.float64)
    if np.isnan(values).any():
        return float("nan")
    beyond = min(int((values <= 0).sum()), int((values >= 0).sum()))
    return min(1.0, (1 + 2 * beyond) / (1 + len(values)))
