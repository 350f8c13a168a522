"""The paired test against swaps made one by one, and its level."""

from itertools import product
from math import isnan

import numpy as np
import pytest

from dasmil.metrics.evaluated_slides import Inputs
from dasmil.metrics.paired import p_value, swap_test, swaps
from dasmil.metrics.slide import average_precision

LABELS = np.array([0, 0, 0, 1, 1, 1, 1])
PATIENTS = np.array([0, 1, 2, 3, 4, 5, 1])  # patient 1 has a slide of each class


def inputs(positive: np.ndarray, threshold: float = 0.5) -> Inputs:
    probabilities = np.stack([1 - positive, positive], axis=-1)
    return Inputs(probabilities, {"youden": positive - threshold}, LABELS, None, 0.9)


def by_hand(ours: np.ndarray, theirs: np.ndarray, measure, wider: float = 1) -> float:
    """Share of the 64 ways to give each patient to one of the models."""
    differences = []
    for sides in product([False, True], repeat=6):
        swapped = np.array(sides)[PATIENTS]
        one, other = np.where(swapped, theirs, ours), np.where(swapped, ours, theirs)
        differences.append(abs(float(measure(one)) - float(measure(other))))
    return float(np.mean(wider * np.array(differences) >= differences[0] - 1e-12))


@pytest.mark.parametrize("seed", range(3))
def test_every_swap_is_made_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = rng.permutation(7) + 1.0, rng.permutation(7) + 1.0  # their own ranks
    names = ["average_precision", "brier", "accuracy_at_val_threshold"]
    # probabilities of one model mean something else than those of the other; their order does not
    found = swap_test([inputs(ours / 10, 0.35)], [inputs(theirs / 20, 0.2)], PATIENTS, names)

    def precision(ranks: np.ndarray) -> np.ndarray:
        return average_precision(ranks, LABELS == 1)

    def brier(positive: np.ndarray) -> np.ndarray:
        return np.square(positive - LABELS).mean()

    def accuracy(called: np.ndarray) -> np.ndarray:
        return (called == LABELS).mean()

    wider = ((1 / 2 + 1 / 3) / (1 / 3 + 1 / 4)) ** 0.5  # of three patients and four
    assert found == pytest.approx(
        {
            "average_precision": by_hand(ours, theirs, precision, wider),
            "brier": by_hand(ours / 10, theirs / 20, brier),
            "accuracy_at_val_threshold": by_hand(ours > 3.5, theirs > 4, accuracy),
        }
    )


def test_models_of_different_folds_need_not_mean_the_same_by_a_score() -> None:
    """Only the order inside each fold counts if only pairs of the same fold are compared."""
    rng = np.random.default_rng(0)
    labels, folds, patients = np.arange(40) % 2, np.arange(40) // 20, np.arange(40)

    def of_folds(scores: np.ndarray) -> Inputs:
        return Inputs(np.stack([-scores, scores], axis=-1), {}, labels, folds, 0.9)

    ours, theirs = 4 * labels + rng.standard_normal(40), rng.standard_normal(40)
    name = "auroc_same_fold"
    p = swap_test([of_folds(ours)], [of_folds(theirs)], patients, [name])[name]
    moved = of_folds(ours + 100 * folds), of_folds(np.exp(theirs - 9 * folds))
    assert swap_test([moved[0]], [moved[1]], patients, [name])[name] == p < 0.01


def test_runs_are_swapped_together() -> None:
    """With the same run twice, nothing is more certain."""
    rng = np.random.default_rng(0)
    one, other = inputs(rng.random(7)), inputs(rng.random(7))
    once = swap_test([one], [other], PATIENTS, ["auroc"])
    assert swap_test([one, one], [other, other], PATIENTS, ["auroc"]) == pytest.approx(once)


def test_swaps_are_all_there_are_or_depend_on_the_seed() -> None:
    changed, every = swaps(6, 32, 0)
    assert every and len(np.unique(changed, axis=0)) == 32 and not changed[:, -1].any()
    changed, every = swaps(6, 31, 0)
    assert not every and changed.shape == (31, 6)
    assert (changed == swaps(6, 31, 0)[0]).all() and (changed != swaps(6, 31, 1)[0]).any()


@pytest.mark.parametrize(
    ("observed", "swapped", "every", "expected"),
    [
        (0.1, [0.0] * 39, False, 1 / 40),  # never 0
        (-0.1, [0.2, 0.1, -0.1, *[0.05] * 36], False, 4 / 40),  # either sign; an equal one counts
        (0.0, [0.1, -0.1] * 20, False, 1),
        (0.1, [0.1, *[0.0] * 31], True, 1 / 32),  # the data are among all swaps
    ],
)
def test_p_by_counting(observed: float, swapped: list[float], every: bool, expected: float) -> None:
    assert p_value(observed, np.array(swapped), every) == pytest.approx(expected)


def test_there_is_no_p_if_it_could_not_be_small() -> None:
    """Five patients: 16 swaps. 18 draws: 1 / 19 at best."""
    assert isnan(p_value(0.1, np.zeros(16), every=True))
    assert isnan(p_value(0.1, np.zeros(18), every=False))
    assert p_value(0.1, np.zeros(19), every=False) == 1 / 20
    assert isnan(p_value(0.1, np.array([0.1, np.nan] * 20), every=False))
