"""Score intervals: the values from which a measured value is at most t standard errors away.

The standard error is that of each candidate value, not of the measured one, so an interval never
shrinks to a point at 0 or 1 (Wilson, JASA 22:209, 1927). :mod:`dasmil.metrics.intervals` builds the
intervals of all metrics from these functions.
"""

from collections.abc import Callable, Sequence

import numpy as np

from dasmil.metrics.jackknife import sum_by_patient
from dasmil.metrics.slide import Array, BoolArray, IntArray

Interval = tuple[Array, Array]  # lower and upper ends, of one shape

HALVINGS = 34  # steps of the search for an end: to 1e-10
EDGE = 1e-9  # values nearer to 0 or 1 are replaced by this distance


def score_interval(
    value: Array,
    error: Callable[[Array], Array],
    quantile: float,
    jackknife: Array,
    expected: Callable[[Array], Array] = lambda theta: theta,
) -> Interval:
    """All θ from which the value is at most ``quantile`` standard errors away.

    Parameters
    ----------
    value: (...,) in [0, 1].
    error: θ → the standard error of the value if θ is true.
    jackknife: (...,) standard error; if it is larger than ``error(value)``, all are stretched by
        the ratio.
    expected: θ → the mean of the value if θ is true; used for the lower end only.
    """
    own = error(value)
    stretch = np.maximum(1, jackknife / np.where(own > 0, own, np.inf)) * quantile
    ends = []
    for is_low, mean in ((True, expected), (False, lambda theta: theta)):
        outer, inner = np.full_like(value, 0.0 if is_low else 1.0), value
        for _ in range(HALVINGS):
            theta = (outer + inner) / 2
            away = (value - mean(theta)) * (1 if is_low else -1)
            is_inside = away <= stretch * error(theta)
            outer, inner = np.where(is_inside, outer, theta), np.where(is_inside, theta, inner)
        ends.append(np.where(is_inside, outer, inner))
    return ends[0], ends[1]


def proportion_error(number: Array | IntArray) -> Callable[[Array], Array]:
    """θ → the standard error of a proportion θ among ``number`` slides."""
    return lambda theta: np.sqrt(theta * (1 - theta) / number)


def wilson_interval(value: Array, number: Array | IntArray, quantile: float = 1.959964) -> Interval:
    """95 % score interval of a proportion (...,) among (...,) slides."""
    return score_interval(value, proportion_error(number), quantile, np.zeros_like(value))


def jackknife_error(without: Array) -> Array:
    """Standard error (Tukey, 1958), from (patients, ...) a metric without each patient."""
    num = len(without)
    return np.sqrt((num - 1) / num * np.square(without - without.mean(axis=0)).sum(axis=0))


def effective_number(slides: Array, within: Array) -> Array:
    """The number of independent slides with the same information (Obuchowski, 1997).

    Parameters
    ----------
    slides: (..., patients) number of slides of each patient.
    within: (...,) correlation of two slides of a patient.
    """
    total = slides.sum(axis=-1)
    return np.square(total) / (total + within * (slides * (slides - 1)).sum(axis=-1))


def proportion_interval(
    hits: Array, of: BoolArray, patients: IntArray, within: Array, quantile: float, most: float = 1
) -> Interval:
    """Wilson's interval of the mean hit over the slides that count.

    Parameters
    ----------
    hits: (..., n) numbers in [0, 1].
    of: (..., n) which slides count; at least one must.
    patients: (n,) patient of each slide, numbered from 0.
    within: (...,) correlation of two slides of a patient.
    quantile: of Student's t.
    most: for hits between 0 and 1, up to how many slides with a hit of 0 or 1 one slide is worth.
    """
    num_patients = int(patients.max()) + 1
    num = sum_by_patient(hits * of, patients, num_patients)
    total = sum_by_patient(of.astype(float), patients, num_patients)
    value = num.sum(axis=-1) / total.sum(axis=-1)
    number = effective_number(total, within)
    left = np.maximum(total.sum(axis=-1, keepdims=True) - total, EDGE)
    without = np.moveaxis((num.sum(axis=-1, keepdims=True) - num) / left, -1, 0)
    jackknife = jackknife_error(without)
    if most > 1:
        variance = value * (1 - value)
        known = np.where(jackknife > 0, variance / np.square(np.maximum(jackknife, EDGE)), np.inf)
        number = np.minimum(np.maximum(number, known), most * number)
    return score_interval(value, proportion_error(number), quantile, jackknife)


def f1_interval(
    called: BoolArray, positive: BoolArray, patients: IntArray, within: Array, quantile: float
) -> Interval:
    """Of F1 = 2 p / (1 + p), with the proportion p = TP / (TP + FP + FN) (Lam, arXiv:2309.14621).

    Parameters are those of :func:`proportion_interval`, with (..., n) called and (n,) positive.
    """
    low, high = proportion_interval(
        (called & positive).astype(float), called | positive, patients, within, quantile
    )
    return 2 * low / (1 + low), 2 * high / (1 + high)


def combined_interval(
    values: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    weights: Sequence[float],
    correlation: float = 0.0,
) -> tuple[float, float]:
    """Of a weighted sum of quantities with intervals (Newcombe, 1998; Zou and Donner, 2008).

    Parameters
    ----------
    correlation: of any two of the quantities.
    """
    total, signs = float(np.dot(values, weights)), np.sign(weights)
    related = np.where(np.eye(len(signs)), 1, correlation * np.outer(signs, signs))
    low, high = np.transpose(intervals)
    ends = []
    for end, (added, subtracted) in enumerate(((low, high), (high, low))):
        # the lower end of the sum uses the upper end of what is subtracted, and the reverse
        steps = np.multiply(weights, np.where(signs > 0, added, subtracted) - np.array(values))
        ends.append(total + (1 if end else -1) * float(np.sqrt(max(steps @ related @ steps, 0))))
    return ends[0], ends[1]
