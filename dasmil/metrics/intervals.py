"""95 % intervals of the metrics of few slides, with the patient as the unit.

One idea serves all of them. A score interval holds the values θ from which the measured value is
at most t standard errors away, with the standard error that belongs to θ itself (Wilson, JASA
22:209, 1927; for AUROC Newcombe, Statistics in Medicine 25:559, 2006, method 5). So it never
shrinks to a point at 0 or 1.

- **Slides of a patient** resemble each other. ``within`` is the correlation of the scores of two
  slides of a patient and class, estimated from ranks inside the class, so it is known even if the
  classes are parted perfectly. It turns slides into an effective number of slides (Obuchowski,
  Biometrics 53:567, 1997).
- **AUROC**: the standard error is that of two normal distributions, with these correlations
  (Newcombe's own is Hanley and McNeil's, of two exponential distributions).
- **Proportions** (accuracy, sensitivity, specificity): Wilson's with the effective number. F1 is
  turned into the proportion F / (2 − F) = TP / (TP + FP + FN) (Lam, arXiv:2309.14621).
  Average precision: Wilson's with the effective number of positive slides (Boyd, Eng and Page,
  ECML 2013). Balanced accuracy: from the intervals of its parts (Newcombe, Statistics in Medicine
  17:873, 1998). Brier score: Wilson's too, but it varies less than a proportion, so up to three
  times the effective number, as far as the jackknife over patients says so.
- **Other distributions**: if the jackknife over patients finds a larger standard error, the
  interval is stretched by the ratio.
- t is Student's. Its degrees of freedom are one to two times the number of patients less two; a
  patient who has slides of both classes counts twice.

``tests/benchmarks/interval_coverage.py`` measures how often the intervals hold the true value.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import nan

import numpy as np
from scipy.stats import norm, rankdata, t

from dasmil.metrics.jackknife import (
    auroc_without,
    average_precision_without,
    sensitivity_without,
    sum_by_patient,
)
from dasmil.metrics.slide import (
    Array,
    BoolArray,
    IntArray,
    average_precision,
    same_fold_auroc,
    sensitivity_at_specificity,
)

Interval = tuple[Array, Array]  # lower and upper ends, of one shape

NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)
HALVINGS = 34  # of the search for an end: to 1e-10
EDGE = 1e-9  # nearer to 0 or 1 than this, θ is taken for this
MIN_PATIENTS = 5  # in each class: with fewer there is no interval and no p
FEW_PATIENTS = 20  # in each class: with fewer a warning stands in the tables
BRIER_SLIDES = 3  # Brier's variance is taken to be at least a third of that of a proportion


@dataclass(frozen=True)
class Sides:
    """The slides of one class (positive) against the rest, and whose they are.

    Parameters
    ----------
    positive: (n,).
    patients: (n,) of each slide; a number from 0.
    folds: (n,) of each slide. Only pairs of one fold are compared; all 0 to compare every pair.
    """

    positive: BoolArray
    patients: IntArray
    folds: IntArray

    @cached_property
    def _classes(self) -> tuple[BoolArray, BoolArray]:
        return self.positive, ~self.positive

    @cached_property
    def _counts(self) -> tuple[Array, Array]:
        """(folds, patients) slides of each class."""
        shape = int(self.folds.max()) + 1, int(self.patients.max()) + 1
        counts = np.zeros((2, *shape))
        np.add.at(counts, ((~self.positive).astype(int), self.folds, self.patients), 1)
        return counts[0], counts[1]

    @cached_property
    def _compared(self) -> tuple[Array, Array]:
        """Of ``_counts`` the folds that hold pairs."""
        positive, negative = self._counts
        both = positive.any(axis=1) & negative.any(axis=1)
        return positive[both], negative[both]

    @cached_property
    def num_patients(self) -> tuple[int, int]:
        """Patients with a positive slide, and with another one, that are compared."""
        positive, negative = (counts.any(axis=0).sum() for counts in self._compared)
        return int(positive), int(negative)

    @cached_property
    def quantile(self) -> float:
        """Student's t at 97.5 %.

        With many slides per patient, the patients alone say how slides hang together, so their
        number less two are the degrees of freedom. With one slide each, nothing of the kind is
        estimated, and they are twice that.
        """
        patients = sum(self.num_patients)
        slides = float(sum(counts.sum() for counts in self._compared))
        return float(t.ppf(0.975, max(patients - 2, 1) * (1 + patients / slides)))

    def correlations(self, scores: Array) -> tuple[Array, Array]:
        """Of the scores of two slides of a patient: of the same class, and of two classes.

        Moments of the ranks inside each class (analysis of variance), turned into the correlation
        of normal scores, 2 sin(π r / 6), and raised by one over the patients' degrees of freedom,
        as few patients show too little of it.

        Parameters
        ----------
        scores: (..., n).

        Returns
        -------
        ``within`` and ``across``, each (...,) from 0 to 1.
        """
        between = inside = np.zeros(scores.shape[:-1])
        num_between = num_inside = 0
        size = 0.0
        means = []
        for of_class, counts in zip(self._classes, self._counts):
            held = counts.sum(axis=0)
            ranks = rankdata(scores[..., of_class], axis=-1)
            ranks = ranks - ranks.mean(axis=-1, keepdims=True)
            spread = np.sqrt(np.square(ranks).mean(axis=-1, keepdims=True))
            ranks = ranks / np.where(spread > 0, spread, 1)
            sums = sum_by_patient(ranks, self.patients[of_class], len(held))
            means.append(sums / np.maximum(held, 1))
            explained = (sums * means[-1]).sum(axis=-1)
            between = between + explained
            inside = inside + np.square(ranks).sum(axis=-1) - explained
            present = held[held > 0]
            num_between += len(present) - 1
            num_inside += int(present.sum()) - len(present)
            size += present.sum() - np.square(present).sum() / present.sum()
        within = np.zeros(scores.shape[:-1])
        if num_inside and num_between:
            between, inside = between / num_between, inside / num_inside
            size /= num_between
            total = between + (size - 1) * inside
            # scores without any spread: a patient's slides are taken for one
            within = np.where(total > 0, (between - inside) / np.where(total > 0, total, 1), 1)
            within = _of_normal(within) * (1 + 1 / num_between)
        across = np.zeros(scores.shape[:-1])
        both = (self._counts[0].any(axis=0)) & (self._counts[1].any(axis=0))
        if both.sum() > 1:
            product = (means[0] * means[1])[..., both].sum(axis=-1)
            across = _of_normal(product / (both.sum() - 1))
            across = np.minimum(across, within) if num_inside else across
        return np.clip(within, 0, 1), np.clip(across, 0, 1)

    def effective(self, within: Array) -> tuple[Array, Array]:
        """(...,) slides of each class that would say as much if no two were of one patient."""
        positive, negative = (
            effective_number(counts.sum(axis=0), within) for counts in self._counts
        )
        return positive, negative

    @cached_property
    def _pairs(self) -> tuple[Array, float, float]:
        """How two pairs of a positive and a negative slide are related, as shares of all of them.

        Returns
        -------
        (3, 3) by what their positive slides (rows) and their negative slides (columns) have in
        common: the slide, the patient, nothing. Then the share in which the positive slide of one
        and the negative slide of the other are of one patient, twice. Last, the share of pairs
        whose own two slides are of one patient.
        """
        positive, negative = self._compared
        num_positive, num_negative = positive.sum(axis=1), negative.sum(axis=1)
        weights = num_positive * num_negative / (num_positive * num_negative).sum()
        both = np.outer(weights, weights)
        ours = positive / num_positive[:, None], negative / num_negative[:, None]
        shares = []
        for of_class, total in zip(ours, (num_positive, num_negative)):
            same = np.diag(1 / total)
            patient = of_class @ of_class.T - same
            shares.append(np.stack([same, patient, 1 - same - patient]))
        cross = ours[0] @ ours[1].T
        table = np.einsum("fg,ufg,vfg->uv", both, *shares)
        return table, float((both * (cross + cross.T)).sum()), float(weights @ np.diag(cross))

    def auroc_error(self, auroc: Array, within: Array, across: Array) -> Array:
        """Standard error of the AUROC of these slides if this is the true one, (...,).

        Scores of each class are normal with one variance, so two pairs of slides are both in order
        with the probability of a bivariate normal distribution.
        """
        table, cross, _ = self._pairs
        level = norm.ppf(np.clip(auroc, EDGE, 1 - EDGE))
        related = [np.ones_like(within), within, np.zeros_like(within)]
        variance = np.zeros(np.broadcast(level, within).shape)
        for row, of_positive in enumerate(related):
            for column, of_negative in enumerate(related):
                if table[row, column] > 0 and (row, column) != (2, 2):
                    excess = _excess(level, (of_positive + of_negative) / 2)
                    variance = variance + table[row, column] * excess
        if cross > 0:
            variance = variance + cross * _excess(level, -across / 2)
        return np.sqrt(np.maximum(variance, EDGE**2))

    def expected_auroc(self, auroc: Array, across: Array) -> Array:
        """What these slides show on average if this is the AUROC of slides of different patients.

        It is higher, as what two slides of a patient have in common does not blur their order.
        """
        inside = self._pairs[2]
        if inside == 0:
            return auroc
        level = norm.ppf(np.clip(auroc, EDGE, 1 - EDGE))
        of_patient = norm.cdf(level / np.sqrt(np.maximum(1 - across, EDGE)))
        return auroc + inside * np.maximum(of_patient - auroc, 0)


def _of_normal(correlation: Array) -> Array:
    """Of ranks → of the normal scores behind them (Pearson, 1907)."""
    return 2 * np.sin(np.pi * np.clip(correlation, 0, 1) / 6)


def _excess(level: Array, correlation: Array) -> Array:
    """P(x < a, y < a) − P(x < a)² of standard normal x and y of a correlation (Plackett, 1954)."""
    end = np.arcsin(np.clip(correlation, -1, 1))[..., None]
    angle = (NODES + 1) / 2 * end
    density = np.exp(-np.square(level)[..., None] / (1 + np.sin(angle)))
    return (density * WEIGHTS).sum(axis=-1) * end[..., 0] / (4 * np.pi)


def effective_number(slides: Array, within: Array) -> Array:
    """(..., patients) slides of each → how many of different patients would say as much."""
    total = slides.sum(axis=-1)
    return np.square(total) / (total + within * (slides * (slides - 1)).sum(axis=-1))


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
    error: of θ, the standard error of the value.
    jackknife: (...,) standard error; if it is larger than that of the value, all are stretched.
    expected: of θ, the mean of the value; only the lower end allows for it.
    """
    own = error(value)
    stretch = np.maximum(1, jackknife / np.where(own > 0, own, np.inf)) * quantile
    ends = []
    for low, expectation in ((True, expected), (False, lambda theta: theta)):
        outer, inner = np.full_like(value, 0.0 if low else 1.0), value
        for _ in range(HALVINGS):
            theta = (outer + inner) / 2
            away = (value - expectation(theta)) * (1 if low else -1)
            held = away <= stretch * error(theta)
            outer, inner = np.where(held, outer, theta), np.where(held, theta, inner)
        ends.append(np.where(held, outer, inner))
    return ends[0], ends[1]


def jackknife_error(without: Array) -> Array:
    """Standard error (Tukey, 1958), of (patients, ...) a measure without each patient."""
    num = len(without)
    return np.sqrt((num - 1) / num * np.square(without - without.mean(axis=0)).sum(axis=0))


def auroc_interval(
    scores: Array, positive: BoolArray, patients: IntArray, folds: IntArray | None = None
) -> Interval:
    """Of the AUROC over pairs of slides, or over pairs of slides of the same fold.

    Parameters
    ----------
    scores: (..., n).
    positive: (n,); both classes must have slides of two patients.
    patients: (n,) of each slide; a number from 0.
    folds: (n,) of each slide, a number from 0; None compares every pair.
    """
    every = np.zeros(len(positive), dtype=int) if folds is None else folds
    sides = Sides(positive, patients, every)
    within, across = sides.correlations(scores)
    without = auroc_without(scores, positive, patients, every)
    return score_interval(
        same_fold_auroc(scores, positive, every),
        lambda theta: sides.auroc_error(theta, within, across),
        sides.quantile,
        jackknife_error(without),
        lambda theta: sides.expected_auroc(theta, across),
    )


def average_precision_interval(scores: Array, positive: BoolArray, patients: IntArray) -> Interval:
    """Of the average precision; see :func:`auroc_interval`."""
    sides = _whole(positive, patients)
    number, _ = sides.effective(sides.correlations(scores)[0])
    without = average_precision_without(scores, positive, patients)
    return score_interval(
        average_precision(scores, positive),
        lambda theta: np.sqrt(theta * (1 - theta) / number),
        sides.quantile,
        jackknife_error(without),
    )


def sensitivity_interval(
    scores: Array, positive: BoolArray, patients: IntArray, specificity: float
) -> Interval:
    """Of the sensitivity at a specificity read from the same slides; see :func:`_roc_error`."""
    sides = _whole(positive, patients)
    without = sensitivity_without(scores, positive, patients, specificity)
    return score_interval(
        sensitivity_at_specificity(scores, positive, specificity),
        _roc_error(sides, scores, specificity),
        sides.quantile,
        jackknife_error(without),
    )


def sensitivity_band(
    scores: Array, positive: BoolArray, patients: IntArray, sensitivity: Array, specificity: Array
) -> Interval:
    """Of points (k,) of a ROC of (n,) scores, one by one; see :func:`_roc_error`.

    The points lie in the order of falling specificity. As no ROC falls, neither do the ends.
    """
    sides = _whole(positive, patients)
    error = _roc_error(sides, scores, specificity)
    low, high = score_interval(sensitivity, error, sides.quantile, np.zeros_like(sensitivity))
    return np.maximum.accumulate(low), np.minimum.accumulate(high[::-1])[::-1]


def _roc_error(sides: Sides, scores: Array, specificity: float | Array) -> Callable[[Array], Array]:
    """Standard error of a sensitivity at a specificity that is read from the same slides.

    To the variance of a proportion comes that of the threshold, times the square of the slope of
    the ROC there, which is that of two normal distributions of one variance.
    """
    number, other = sides.effective(sides.correlations(scores)[0])
    at = norm.pdf(norm.ppf(np.clip(specificity, EDGE, 1 - EDGE)))

    def error(theta: Array) -> Array:
        slope = norm.pdf(norm.ppf(np.clip(theta, EDGE, 1 - EDGE))) / at
        of_threshold = np.square(slope) * specificity * (1 - specificity) / other
        return np.sqrt(theta * (1 - theta) / number + of_threshold)

    return error


def precision_band(
    scores: Array, positive: BoolArray, patients: IntArray, precision: Array, called: Array
) -> Interval:
    """Wilson's, of (k,) precisions among so many called slides of (n,) scores, one by one."""
    sides = _whole(positive, patients)
    within, _ = sides.correlations(scores)
    share = effective_number(np.bincount(patients).astype(float), within) / len(positive)
    return wilson_interval(precision, called * share, sides.quantile)


def wilson_interval(value: Array, number: Array | IntArray, quantile: float = 1.959964) -> Interval:
    """95 % score interval of a proportion of so many."""
    return score_interval(
        value,
        lambda theta: np.sqrt(theta * (1 - theta) / number),
        quantile,
        np.zeros_like(value),
    )


def proportion_interval(
    hits: Array,
    of: BoolArray,
    patients: IntArray,
    within: Array,
    quantile: float,
    most: float = 1,
) -> Interval:
    """Wilson's, of the mean of the hits over the slides that count.

    Parameters
    ----------
    hits: (..., n) numbers in [0, 1].
    of: (..., n) which slides count; at least one must.
    patients: (n,) of each slide; a number from 0.
    within: (...,) correlation of two slides of a patient.
    quantile: of Student's t.
    most: how many slides that are right or wrong a slide may be worth, if the hits lie between.
    """
    num_patients = int(patients.max()) + 1
    num = sum_by_patient(hits * of, patients, num_patients)
    total = sum_by_patient(of.astype(float), patients, num_patients)
    value = num.sum(axis=-1) / total.sum(axis=-1)
    slides = total.sum(axis=-1, keepdims=True)
    number = effective_number(total, within)
    left = np.maximum(slides - total, EDGE)
    without = np.moveaxis((num.sum(axis=-1, keepdims=True) - num) / left, -1, 0)
    jackknife = jackknife_error(without)
    if most > 1:
        variance = value * (1 - value)
        known = np.where(jackknife > 0, variance / np.square(np.maximum(jackknife, EDGE)), np.inf)
        number = np.minimum(np.maximum(number, known), most * number)
    return score_interval(
        value, lambda theta: np.sqrt(theta * (1 - theta) / number), quantile, jackknife
    )


def f1_interval(
    called: BoolArray, positive: BoolArray, patients: IntArray, within: Array, quantile: float
) -> Interval:
    """Of F1: TP / (TP + FP + FN) is a proportion, and F1 is 2 / (1 + its inverse)."""
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
    """Of a weighted sum of quantities that have intervals (Newcombe, 1998; Zou and Donner, 2008).

    Parameters
    ----------
    correlation: of any two of them.
    """
    total = float(np.dot(values, weights))
    ends = []
    for end in (0, 1):
        # what lowers (or raises) the sum: the upper end of what is subtracted
        steps = np.array(
            [
                weight * (interval[end if weight > 0 else 1 - end] - value)
                for value, interval, weight in zip(values, intervals, weights)
            ]
        )
        signs = np.sign(weights)
        related = np.where(np.eye(len(steps)), 1, correlation * np.outer(signs, signs))
        ends.append(total + (1 if end else -1) * float(np.sqrt(max(steps @ related @ steps, 0))))
    return ends[0], ends[1]


def metric_intervals(
    probabilities: Array,
    labels: IntArray,
    patients: IntArray,
    specificity: float,
    folds: IntArray | None = None,
) -> dict[str, tuple[float, float]]:
    """Of each of :func:`dasmil.metrics.slide.metric_arrays` but ``calibration_error``.

    The expected calibration error of few slides is far too large on average, so no interval around
    it means anything. More than two classes: the ends are means over the classes, which holds
    however the classes hang together.

    Parameters
    ----------
    probabilities: (n, P); every class must have slides of two patients.
    labels, patients, folds: (n,); numbers from 0.
    """
    num_classes = probabilities.shape[1]
    two = num_classes == 2
    calls = (probabilities[:, 1] > 0.5).astype(int) if two else probabilities.argmax(axis=1)
    sides = {c: _whole(labels == c, patients) for c in range(num_classes)}
    within = {c: sides[c].correlations(probabilities[:, c])[0] for c in range(num_classes)}
    common, quantile = np.mean(list(within.values()), axis=0), sides[num_classes - 1].quantile
    found: dict[str, list[Interval]] = {}
    for c in [1] if two else range(num_classes):
        scores, positive = probabilities[:, c], labels == c
        of_class = {
            "auroc": auroc_interval(scores, positive, patients),
            "average_precision": average_precision_interval(scores, positive, patients),
            "f1": f1_interval(calls == c, positive, patients, within[c], sides[c].quantile),
            f"sensitivity_at_specificity_{specificity:g}": sensitivity_interval(
                scores, positive, patients, specificity
            ),
        }
        if folds is not None:
            few = min(Sides(positive, patients, folds).num_patients) < MIN_PATIENTS
            of_class["auroc_same_fold"] = (
                (np.array(nan), np.array(nan))
                if few
                else auroc_interval(scores, positive, patients, folds)
            )
        for name, interval in of_class.items():
            found.setdefault(name, []).append(interval)
    ends = {name: _plain(np.mean(each, axis=0)) for name, each in found.items()}

    def proportion(hits: Array, of: BoolArray, **options: float) -> tuple[float, float]:
        return _plain(proportion_interval(hits, of, patients, common, quantile, **options))

    right, every = (calls == labels).astype(float), np.ones(len(labels), dtype=bool)
    ends["accuracy"] = proportion(right, every)
    of_classes = [labels == c for c in range(num_classes)]
    ends["balanced_accuracy"] = combined_interval(
        [right[of].mean() for of in of_classes],
        [proportion(right, of) for of in of_classes],
        [1 / num_classes] * num_classes,
    )
    # of more than two classes it goes to 2: half of it is a number in [0, 1]
    errors = np.square(probabilities - np.eye(num_classes)[labels]).sum(axis=1) / 2
    low, high = proportion(errors, every, most=BRIER_SLIDES)
    ends["brier"] = (low, high) if two else (2 * low, 2 * high)
    return ends


def call_intervals(
    margin: Array, scores: Array, positive: BoolArray, patients: IntArray
) -> dict[str, tuple[float, float]]:
    """Of each of :func:`dasmil.metrics.slide.call_arrays` of (n,) probabilities less a threshold.

    Parameters
    ----------
    scores: (n,) probabilities of the positive class.
    positive: (n,); both classes must have slides of two patients.
    """
    called, sides = margin > 0, _whole(positive, patients)
    within, _ = sides.correlations(scores)
    found = {
        name: _plain(proportion_interval(hits.astype(float), of, patients, within, sides.quantile))
        for name, hits, of in (
            ("accuracy", called == positive, np.ones_like(positive)),
            ("sensitivity", called, positive),
            ("specificity", ~called, ~positive),
        )
    }
    found["balanced_accuracy"] = combined_interval(
        [called[positive].mean(), (~called)[~positive].mean()],
        [found["sensitivity"], found["specificity"]],
        [0.5, 0.5],
    )
    found["f1"] = _plain(f1_interval(called, positive, patients, within, sides.quantile))
    return found


def _whole(positive: BoolArray, patients: IntArray) -> Sides:
    return Sides(positive, patients, np.zeros(len(positive), dtype=int))


def _plain(interval: Interval | Array) -> tuple[float, float]:
    return float(interval[0]), float(interval[1])
