"""Slides of one class against the rest, clustered by patient: correlations and standard errors.

Obuchowski, Biometrics 53:567, 1997, with the variance of two normal distributions in place of her
non-parametric one. The correlation of two slides of a patient and class is estimated from ranks
inside the class, so it is known even if the classes are separated perfectly.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import norm, rankdata, t

from dasmil.metrics.jackknife import sum_by_patient
from dasmil.metrics.score_intervals import EDGE, effective_number
from dasmil.metrics.slide import Array, BoolArray, IntArray

NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)


@dataclass(frozen=True)
class ClusteredSlides:
    """The slides of one class (positive) and of the rest, by patient.

    Parameters
    ----------
    positive: (n,).
    patients: (n,) patient of each slide, numbered from 0.
    folds: (n,) fold of each slide, numbered from 0: only pairs of one fold are compared. None
        compares every pair.
    """

    positive: BoolArray
    patients: IntArray
    folds: IntArray | None = None

    @cached_property
    def _counts(self) -> tuple[Array, Array]:
        """(folds, patients) slides of each class."""
        folds = np.zeros_like(self.patients) if self.folds is None else self.folds
        counts = np.zeros((2, int(folds.max()) + 1, int(self.patients.max()) + 1))
        np.add.at(counts, ((~self.positive).astype(int), folds, self.patients), 1)
        return counts[0], counts[1]

    @cached_property
    def _compared(self) -> tuple[Array, Array]:
        """``_counts`` of the folds that hold pairs."""
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

        The degrees of freedom are one to two times the number of patients less two: with many
        slides per patient the patients alone determine the correlation, with one slide per patient
        no correlation is estimated.
        """
        patients = sum(self.num_patients)
        slides = float(sum(counts.sum() for counts in self._compared))
        return float(t.ppf(0.975, max(patients - 2, 1) * (1 + patients / slides)))

    def correlations(self, scores: Array) -> tuple[Array, Array]:
        """Correlation of the scores of two slides of a patient: same class, and different classes.

        Moments of the ranks inside each class (analysis of variance), converted to the correlation
        of normal scores, 2 sin(π r / 6), and raised by one over the patients' degrees of freedom,
        because few patients show too little of it.

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
        for of_class, counts in zip((self.positive, ~self.positive), self._counts):
            slides = counts.sum(axis=0)
            ranks = rankdata(scores[..., of_class], axis=-1)
            ranks = ranks - ranks.mean(axis=-1, keepdims=True)
            spread = np.sqrt(np.square(ranks).mean(axis=-1, keepdims=True))
            ranks = ranks / np.where(spread > 0, spread, 1)
            sums = sum_by_patient(ranks, self.patients[of_class], len(slides))
            means.append(sums / np.maximum(slides, 1))
            explained = (sums * means[-1]).sum(axis=-1)
            between = between + explained
            inside = inside + np.square(ranks).sum(axis=-1) - explained
            present = slides[slides > 0]
            num_between += len(present) - 1
            num_inside += int(present.sum()) - len(present)
            size += present.sum() - np.square(present).sum() / present.sum()
        within = np.zeros(scores.shape[:-1])
        if num_inside and num_between:
            between, inside = between / num_between, inside / num_inside
            size /= num_between
            total = between + (size - 1) * inside
            # scores without any spread: the slides of a patient count as one
            within = np.where(total > 0, (between - inside) / np.where(total > 0, total, 1), 1)
            within = _of_normal(within) * (1 + 1 / num_between)
        across = np.zeros(scores.shape[:-1])
        both = self._counts[0].any(axis=0) & self._counts[1].any(axis=0)
        if both.sum() > 1:
            product = (means[0] * means[1])[..., both].sum(axis=-1)
            across = _of_normal(product / (both.sum() - 1))
            across = np.minimum(across, within) if num_inside else across
        return np.clip(within, 0, 1), np.clip(across, 0, 1)

    def effective_numbers(self, within: Array) -> tuple[Array, Array]:
        """(...,) effective number of positive slides, and of the others."""
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
        common: the slide, the patient, nothing. Then twice the share in which the positive slide
        of one and the negative slide of the other belong to one patient. Last, the share of pairs
        whose own two slides belong to one patient.
        """
        positive, negative = self._compared
        num_positive, num_negative = positive.sum(axis=1), negative.sum(axis=1)
        weights = num_positive * num_negative / (num_positive * num_negative).sum()
        both = np.outer(weights, weights)
        by_patient = positive / num_positive[:, None], negative / num_negative[:, None]
        shares = []
        for of_class, total in zip(by_patient, (num_positive, num_negative)):
            same = np.diag(1 / total)
            patient = of_class @ of_class.T - same
            shares.append(np.stack([same, patient, 1 - same - patient]))
        cross = by_patient[0] @ by_patient[1].T
        table = np.einsum("fg,ufg,vfg->uv", both, *shares)
        return table, float((both * (cross + cross.T)).sum()), float(weights @ np.diag(cross))

    def auroc_error(self, auroc: Array, within: Array, across: Array) -> Array:
        """Standard error of the AUROC of these slides if this is the true one, (...,).

        The scores of each class are normal with one variance, so two pairs of slides are both in
        order with the probability of a bivariate normal distribution.
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
        """The mean AUROC of these slides if this is the AUROC of slides of different patients.

        It is higher, because what two slides of a patient share does not change their order.
        """
        inside = self._pairs[2]
        if inside == 0:
            return auroc
        level = norm.ppf(np.clip(auroc, EDGE, 1 - EDGE))
        of_patient = norm.cdf(level / np.sqrt(np.maximum(1 - across, EDGE)))
        return auroc + inside * np.maximum(of_patient - auroc, 0)


def _of_normal(correlation: Array) -> Array:
    """Correlation of ranks → of the normal scores behind them (Pearson, 1907)."""
    return 2 * np.sin(np.pi * np.clip(correlation, 0, 1) / 6)


def _excess(level: Array, correlation: Array) -> Array:
    """P(x < a, y < a) − P(x < a)² of standard normal x and y of a correlation (Plackett, 1954)."""
    end = np.arcsin(np.clip(correlation, -1, 1))[..., None]
    angle = (NODES + 1) / 2 * end
    density = np.exp(-np.square(level)[..., None] / (1 + np.sin(angle)))
    return (density * WEIGHTS).sum(axis=-1) * end[..., 0] / (4 * np.pi)
