"""95 % intervals of the metrics of few slides, with the patient as the unit.

All are score intervals (:mod:`dasmil.metrics.score_intervals`), with standard errors that know
which slides belong to one patient (:mod:`dasmil.metrics.clustered_slides`).

- **AUROC**: the standard error of two normal distributions (Newcombe, Statistics in Medicine
  25:559, 2006, method 5, uses Hanley and McNeil's of two exponential distributions).
- **Proportions** (accuracy, sensitivity, specificity): Wilson's with the effective number of
  slides. F1 is converted to the proportion F / (2 − F) = TP / (TP + FP + FN) (Lam,
  arXiv:2309.14621). Average precision: Wilson's with the effective number of positive slides (Boyd,
  Eng and Page, ECML 2013). Balanced accuracy: from the intervals of its parts (Newcombe, Statistics
  in Medicine 17:873, 1998). Brier score: Wilson's too, but it varies less than a proportion, so up
  to three times the effective number, as far as the jackknife over patients supports it.
- **Other distributions**: if the jackknife over patients gives a larger standard error, the
  interval is stretched by the ratio.
- t is Student's (:attr:`ClusteredSlides.quantile`); a patient with slides of both classes counts
  twice.

``tests/benchmarks/interval_coverage.py`` measures how often the intervals hold the true value.
"""

from collections.abc import Callable
from math import nan

import numpy as np
from scipy.stats import norm

from dasmil.metrics.clustered_slides import ClusteredSlides
from dasmil.metrics.jackknife import auroc_without, average_precision_without, sensitivity_without
from dasmil.metrics.score_intervals import (
    EDGE,
    Interval,
    combined_interval,
    effective_number,
    f1_interval,
    jackknife_error,
    proportion_error,
    proportion_interval,
    score_interval,
    wilson_interval,
)
from dasmil.metrics.slide import (
    Array,
    BoolArray,
    IntArray,
    auroc,
    average_precision,
    sensitivity_at_specificity,
)

MIN_PATIENTS = 5  # in each class: with fewer there is no interval and no p
FEW_PATIENTS = 20  # in each class: with fewer the tables warn
BRIER_SLIDES = 3  # Brier's variance is assumed to be at least a third of that of a proportion


def auroc_interval(
    scores: Array, positive: BoolArray, patients: IntArray, folds: IntArray | None = None
) -> Interval:
    """Of the AUROC over pairs of slides; with folds, over pairs of slides of the same fold.

    Parameters
    ----------
    scores: (..., n).
    positive: (n,); both classes must have slides of two patients.
    patients: (n,) patient of each slide, numbered from 0.
    folds: (n,) fold of each slide, numbered from 0; None compares every pair.
    """
    slides = ClusteredSlides(positive, patients, folds)
    within, across = slides.correlations(scores)
    return score_interval(
        auroc(scores, positive, folds),
        lambda theta: slides.auroc_error(theta, within, across),
        slides.quantile,
        jackknife_error(auroc_without(scores, positive, patients, folds)),
        lambda theta: slides.expected_auroc(theta, across),
    )


def average_precision_interval(scores: Array, positive: BoolArray, patients: IntArray) -> Interval:
    """Of the average precision; parameters as of :func:`auroc_interval`."""
    slides = ClusteredSlides(positive, patients)
    number, _ = slides.effective_numbers(slides.correlations(scores)[0])
    return score_interval(
        average_precision(scores, positive),
        proportion_error(number),
        slides.quantile,
        jackknife_error(average_precision_without(scores, positive, patients)),
    )


def sensitivity_interval(
    scores: Array, positive: BoolArray, patients: IntArray, specificity: float
) -> Interval:
    """Of the sensitivity at a specificity read from the same slides; see :func:`_roc_error`."""
    slides = ClusteredSlides(positive, patients)
    return score_interval(
        sensitivity_at_specificity(scores, positive, specificity),
        _roc_error(slides, scores, specificity),
        slides.quantile,
        jackknife_error(sensitivity_without(scores, positive, patients, specificity)),
    )


def sensitivity_band(
    scores: Array, positive: BoolArray, patients: IntArray, sensitivity: Array, specificity: Array
) -> Interval:
    """Pointwise, of (k,) points of a ROC of (n,) scores; see :func:`_roc_error`.

    The points are in the order of falling specificity. A ROC never falls, and neither do the ends.
    """
    slides = ClusteredSlides(positive, patients)
    error = _roc_error(slides, scores, specificity)
    low, high = score_interval(sensitivity, error, slides.quantile, np.zeros_like(sensitivity))
    return np.maximum.accumulate(low), np.minimum.accumulate(high[::-1])[::-1]


def _roc_error(
    slides: ClusteredSlides, scores: Array, specificity: float | Array
) -> Callable[[Array], Array]:
    """Standard error of a sensitivity at a specificity that is read from the same slides.

    It is the variance of a proportion, plus that of the threshold times the squared slope of the
    ROC there; the slope is that of two normal distributions of one variance.
    """
    number, other = slides.effective_numbers(slides.correlations(scores)[0])
    density = norm.pdf(norm.ppf(np.clip(specificity, EDGE, 1 - EDGE)))

    def error(theta: Array) -> Array:
        slope = norm.pdf(norm.ppf(np.clip(theta, EDGE, 1 - EDGE))) / density
        of_threshold = np.square(slope) * specificity * (1 - specificity) / other
        return np.sqrt(theta * (1 - theta) / number + of_threshold)

    return error


def precision_band(
    scores: Array, positive: BoolArray, patients: IntArray, precision: Array, called: Array
) -> Interval:
    """Pointwise, Wilson's interval of (k,) precisions among (k,) called slides of (n,) scores."""
    slides = ClusteredSlides(positive, patients)
    within, _ = slides.correlations(scores)
    share = effective_number(np.bincount(patients).astype(float), within) / len(positive)
    return wilson_interval(precision, called * share, slides.quantile)


def metric_intervals(
    probabilities: Array,
    labels: IntArray,
    patients: IntArray,
    specificity: float,
    folds: IntArray | None = None,
) -> dict[str, tuple[float, float]]:
    """Of each of :func:`dasmil.metrics.slide.slide_metrics` except ``calibration_error``.

    The expected calibration error of few slides is far too large on average, so no interval around
    it is meaningful. For more than two classes the ends are means over the classes, which is valid
    for any dependence between the classes.

    Parameters
    ----------
    probabilities: (n, P); every class must have slides of two patients.
    labels, patients, folds: (n,), numbered from 0.
    """
    num_classes = probabilities.shape[1]
    two = num_classes == 2
    calls = (probabilities[:, 1] > 0.5).astype(int) if two else probabilities.argmax(axis=1)
    slides = [ClusteredSlides(labels == c, patients) for c in range(num_classes)]
    within = [slides[c].correlations(probabilities[:, c])[0] for c in range(num_classes)]
    common, quantile = np.mean(within, axis=0), slides[-1].quantile
    per_class: dict[str, list[Interval]] = {}
    for c in [1] if two else range(num_classes):
        scores, positive = probabilities[:, c], labels == c
        of_class = {
            "auroc": auroc_interval(scores, positive, patients),
            "average_precision": average_precision_interval(scores, positive, patients),
            "f1": f1_interval(calls == c, positive, patients, within[c], slides[c].quantile),
            f"sensitivity_at_specificity_{specificity:g}": sensitivity_interval(
                scores, positive, patients, specificity
            ),
        }
        if folds is not None:
            of_class["auroc_same_fold"] = np.array(nan), np.array(nan)
            if min(ClusteredSlides(positive, patients, folds).num_patients) >= MIN_PATIENTS:
                of_class["auroc_same_fold"] = auroc_interval(scores, positive, patients, folds)
        for name, interval in of_class.items():
            per_class.setdefault(name, []).append(interval)
    intervals = {name: _as_floats(np.mean(each, axis=0)) for name, each in per_class.items()}

    def proportion(hits: Array, of: BoolArray, **options: float) -> tuple[float, float]:
        return _as_floats(proportion_interval(hits, of, patients, common, quantile, **options))

    right, every = (calls == labels).astype(float), np.ones(len(labels), dtype=bool)
    intervals["accuracy"] = proportion(right, every)
    of_classes = [labels == c for c in range(num_classes)]
    intervals["balanced_accuracy"] = combined_interval(
        [right[of].mean() for of in of_classes],
        [proportion(right, of) for of in of_classes],
        [1 / num_classes] * num_classes,
    )
    # for more than two classes it is at most 2, so half of it is in [0, 1]
    errors = np.square(probabilities - np.eye(num_classes)[labels]).sum(axis=1) / 2
    low, high = proportion(errors, every, most=BRIER_SLIDES)
    intervals["brier"] = (low, high) if two else (2 * low, 2 * high)
    return intervals


def threshold_intervals(
    margin: Array, scores: Array, positive: BoolArray, patients: IntArray
) -> dict[str, tuple[float, float]]:
    """Of each of :func:`dasmil.metrics.slide.threshold_metrics`.

    Parameters
    ----------
    margin: (n,) probabilities less the threshold.
    scores: (n,) probabilities of the positive class.
    positive: (n,); both classes must have slides of two patients.
    patients: (n,) patient of each slide, numbered from 0.
    """
    called, slides = margin > 0, ClusteredSlides(positive, patients)
    within, _ = slides.correlations(scores)
    rest = patients, within, slides.quantile
    intervals = {
        name: _as_floats(proportion_interval(hits.astype(float), of, *rest))
        for name, hits, of in (
            ("accuracy", called == positive, np.ones_like(positive)),
            ("sensitivity", called, positive),
            ("specificity", ~called, ~positive),
        )
    }
    intervals["balanced_accuracy"] = combined_interval(
        [called[positive].mean(), (~called)[~positive].mean()],
        [intervals["sensitivity"], intervals["specificity"]],
        [0.5, 0.5],
    )
    intervals["f1"] = _as_floats(f1_interval(called, positive, *rest))
    return intervals


def _as_floats(interval: Interval | Array) -> tuple[float, float]:
    return float(interval[0]), float(interval[1])
