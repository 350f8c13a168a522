"""A paired test of two models over the same slides: swaps by patient."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from math import nan

import numpy as np
from scipy.stats import rankdata

from dasmil.metrics.evaluated_slides import Inputs
from dasmil.metrics.slide import OF_RANKS, Array, BoolArray, IntArray

NUMBERS_AT_ONCE = 2**22  # of an array of swapped slides: 32 MiB
LEVEL = 0.05


def swaps(num_patients: int, draws: int, seed: int) -> tuple[BoolArray, bool]:
    """Which patients change sides in each swap, (swaps, patients), and whether it is all of them.

    All if that is at most ``draws``; to swap the others is the same with the opposite sign, so
    the last patient stays. Else ``draws`` at random, which depend on seed and number alone.
    """
    if num_patients - 1 <= np.log2(draws):
        number = np.arange(2 ** (num_patients - 1))
        return ((number[:, None] >> np.arange(num_patients)) & 1).astype(bool), True
    return np.random.default_rng(seed).integers(2, size=(draws, num_patients)).astype(bool), False


def p_value(observed: float, swapped: Array, every: bool) -> float:
    """Two-sided: the share of swaps whose difference is at least as large, whatever its sign.

    Of swaps at random the data count as one more, so that p is never 0 and holds its level
    (Phipson and Smyth, 2010).

    Parameters
    ----------
    swapped: (swaps,) difference of each.
    every: they are all swaps there are, that without a change among them.

    Returns
    -------
    nan if no data could give a p of at most 0.05, or if a difference is nan.
    """
    smallest = 1 / len(swapped) if every else 1 / (1 + len(swapped))
    if smallest > LEVEL or not np.isfinite([observed, *swapped]).all():
        return nan
    as_large = int((np.abs(swapped) >= abs(observed) - 1e-12).sum())
    return as_large / len(swapped) if every else (1 + as_large) / (1 + len(swapped))


def swap_test(
    ours: Sequence[Inputs],
    theirs: Sequence[Inputs],
    patients: IntArray,
    names: Collection[str],
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """p of no difference of each metric's mean over the runs, by swaps of whole patients.

    The hypothesis: it does not matter which of the two models a patient's predictions are of. So
    the predictions of random patients are swapped, in all runs, and the difference is taken again.
    It holds its level for any number of patients, however their slides hang together. Metrics that
    ask for the order of the slides alone swap ranks, as probabilities of two models need not mean
    the same (Venkatraman and Begg, Biometrika 83:835, 1996); see :func:`_lost_by_ranking`. Ranks
    are those in a slide's own fold if only pairs of the same fold are compared, as the models of
    different folds are different models too.

    Parameters
    ----------
    ours, theirs: one per run, of the same slides; the first of the one are swapped with the first
        of the other.
    patients: (n,) of each slide; a number from 0.
    """
    changed, every = swaps(int(patients.max()) + 1, draws, seed)
    ranked = [name for name in names if name.startswith(OF_RANKS) and "_at_val_" not in name]
    same_fold = [name for name in ranked if name.endswith("_same_fold")]
    whole = [name for name in ranked if name not in same_fold]
    plain = [name for name in names if name not in ranked]
    every_slide = np.zeros(len(patients), dtype=int)
    found = {}
    for group, folds in ((plain, None), (whole, every_slide), (same_fold, ours[0].folds)):
        if not group:
            continue
        pairs = [
            (one, other) if folds is None else (_ranks(one, folds), _ranks(other, folds))
            for one, other in zip(ours, theirs, strict=True)
        ]
        observed = _differences(pairs, np.zeros((1, len(patients)), dtype=bool), group)
        step = max(1, NUMBERS_AT_ONCE // pairs[0][0].probabilities.size)
        parts = [
            _differences(pairs, changed[start : start + step][:, patients], group)
            for start in range(0, len(changed), step)
        ]
        wider = 1 if folds is None else _lost_by_ranking(ours[0].labels, patients, folds)
        for name in group:
            swapped = wider * np.concatenate([part[name] for part in parts])
            found[name] = p_value(float(observed[name][0]), swapped, every)
    return {name: found[name] for name in names}


def _ranks(inputs: Inputs, folds: IntArray) -> Inputs:
    """With the rank of each slide in its fold in place of its probabilities."""
    ranks = np.empty_like(inputs.probabilities)
    for fold in np.unique(folds):
        here = folds == fold
        ranks[here] = rankdata(inputs.probabilities[here], axis=0)
    return replace(inputs, probabilities=ranks)


def _lost_by_ranking(labels: IntArray, patients: IntArray, folds: IntArray) -> float:
    """How much less models differ in ranks than without them, as standard deviations.

    The ranks of a class in a fold are centred: of its P patients P − 1 are free (a half of one
    patient). Without this factor the test errs in up to 8 % if there are ten patients. A fold
    weighs as much as it has pairs of slides of two classes.
    """
    free, whole = 0.0, 0.0
    for fold in np.unique(folds):
        here = folds == fold
        classes, slides = np.unique(labels[here], return_counts=True)
        weight = float(slides.sum() ** 2 - np.square(slides).sum()) ** 2
        num = np.array([len(np.unique(patients[here & (labels == label)])) for label in classes])
        free += weight * (1 / np.maximum(num - 1, 0.5)).sum()
        whole += weight * (1 / num).sum()
    return float(np.sqrt(free / whole)) if whole else 1.0


def _differences(
    pairs: Sequence[tuple[Inputs, Inputs]], swapped: BoolArray, names: Collection[str]
) -> dict[str, Array]:
    """(swaps, n) which slides change sides → per metric (swaps,)."""
    total = {name: np.zeros(len(swapped)) for name in names}
    for one, other in pairs:
        ours, theirs = (
            _mixed(*two, swapped).metrics(names) for two in ((one, other), (other, one))
        )
        for name in names:
            total[name] += (ours[name] - theirs[name]) / len(pairs)
    return total


def _mixed(one: Inputs, other: Inputs, swapped: BoolArray) -> Inputs:
    """(swaps, n) of the other where swapped, else of the one."""
    return replace(
        one,
        probabilities=np.where(swapped[..., None], other.probabilities, one.probabilities),
        margins={
            point: np.where(swapped, other.margins[point], one.margins[point])
            for point in one.margins.keys() & other.margins.keys()
        },
    )
