"""Intervals against published ones and exact variances; a short form of the simulation."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm, t

from dasmil.metrics.clustered_slides import ClusteredSlides
from dasmil.metrics.intervals import auroc_interval
from dasmil.metrics.score_intervals import (
    combined_interval,
    effective_number,
    f1_interval,
    jackknife_error,
    wilson_interval,
)

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def clusters(num_positive: int, num_negative: int, slides: int = 1) -> ClusteredSlides:
    """So many patients of each class, each with so many slides."""
    positive = np.repeat([True, False], [num_positive, num_negative]).repeat(slides)
    patients = np.arange(num_positive + num_negative).repeat(slides)
    return ClusteredSlides(positive, patients)


def test_a_difference_of_proportions_is_newcombe_s() -> None:
    """56 / 70 less 48 / 80: method 10 of Statistics in Medicine 17:873 gives 0.0524 to 0.3339."""
    values = np.array([56 / 70, 48 / 80])
    low, high = wilson_interval(values, np.array([70, 80]))
    found = combined_interval(values.tolist(), list(zip(low, high)), [1, -1])
    assert found == pytest.approx((0.0524, 0.3339), abs=1e-4)


@pytest.mark.parametrize("auroc", [0.6, 0.9, 0.99])
def test_the_error_of_an_auroc_is_exact_for_one_slide_per_patient(auroc: float) -> None:
    """The variance of Mann and Whitney's statistic, from two pairs that share a slide."""
    m, n, level = 7, 12, norm.ppf(auroc)
    shared = multivariate_normal(cov=[[1, 0.5], [0.5, 1]]).cdf([level, level]) - auroc**2
    variance = (auroc * (1 - auroc) + (m + n - 2) * shared) / (m * n)
    zero = np.zeros(())
    found = clusters(m, n).auroc_error(np.array(auroc), zero, zero)
    assert found == pytest.approx(variance**0.5, rel=1e-4)


def test_equal_slides_of_a_patient_are_one_slide() -> None:
    one = np.ones(())
    for auroc in np.array([0.7, 0.95]):
        several = clusters(7, 12, 5).auroc_error(auroc, one, one)
        assert several == pytest.approx(clusters(7, 12).auroc_error(auroc, one, one))
    assert effective_number(np.full(12, 5.0), one) == pytest.approx(12)
    assert effective_number(np.full(12, 5.0), 0 * one) == pytest.approx(60)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_the_correlation_inside_a_patient_is_found_however_far_the_classes_are_apart(
    correlation: float,
) -> None:
    rng = np.random.default_rng(0)
    of_slides = clusters(20, 20, 4)
    shared = rng.standard_normal((200, 40))[:, of_slides.patients]
    scores = correlation**0.5 * shared + (1 - correlation) ** 0.5 * rng.standard_normal((200, 160))
    for apart in (0, 100):
        within, across = of_slides.correlations(np.exp((scores + apart * of_slides.positive) / 50))
        assert within.mean() == pytest.approx(correlation, abs=0.04)
        assert (across == 0).all()


def test_the_correlation_of_three_patients_by_hand() -> None:
    """Ranks 1, 2 | 3, 5 | 4, 6 in both classes: 0.625 by analysis of variance, raised by 1/4."""
    within, across = clusters(3, 3, 2).correlations(np.array([1, 2, 3, 5, 4, 6] * 2, dtype=float))
    assert within == pytest.approx(2 * np.sin(np.pi * 0.625 / 6) * 1.25)
    assert across == 0


@pytest.mark.parametrize(("slides", "degrees"), [(1, 2 * 17), (5, 1.2 * 17)])
def test_the_degrees_of_freedom_are_those_of_the_patients(slides: int, degrees: float) -> None:
    assert clusters(7, 12, slides).quantile == pytest.approx(t.ppf(0.975, degrees))


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.array([1.0, 4.0, 2.0, 9.0, 3.0])
    without = (values.sum() - values) / 4
    assert jackknife_error(without) == pytest.approx(values.std(ddof=1) / np.sqrt(5))


def test_pairs_of_one_fold_are_fewer_so_their_auroc_is_less_certain() -> None:
    rng = np.random.default_rng(0)
    positive = np.arange(40) % 2 == 0
    scores, patients = rng.standard_normal((20, 40)) + positive, np.arange(40)
    every = auroc_interval(scores, positive, patients)
    one_fold = auroc_interval(scores, positive, patients, np.zeros(40, dtype=int))
    np.testing.assert_array_equal(every, one_fold)
    ten_folds = auroc_interval(scores, positive, patients, np.arange(40) // 4)
    assert np.mean(ten_folds[1] - ten_folds[0]) > 1.03 * np.mean(every[1] - every[0])


def test_f1_without_an_error_is_that_of_the_positive_slides() -> None:
    """TP / (TP + FP + FN) = 20 / 20: Wilson's lower end is 20 / (20 + z²)."""
    positive = np.repeat([True, False], 20)
    low, high = f1_interval(positive, positive, np.arange(40), np.zeros(()), 1.959964)
    share = 20 / (20 + 1.959964**2)
    assert (low, high) == pytest.approx((2 * share / (1 + share), 1), abs=1e-6)


def test_the_intervals_hold_the_true_auroc(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short form of the benchmark: 200 draws of each cell, so 93 % may look like 90 %."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import interval_coverage as coverage  # type: ignore[import-not-found]

    wanted = [
        coverage.design("", "one slide each", (12, 1, 0), (28, 0, 1)),
        coverage.design("", "five each", (8, 5, 0), (18, 0, 5)),
        coverage.design("", "both classes", (3, 8, 0), (4, 0, 8), (3, 4, 4)),
    ]
    found = list(coverage.cells(200, wanted, areas=(0.85, 0.99)))
    assert len(found) == 2 * (1 + 3 + 3)
    assert min(cell.coverage["ours"] for cell in found) >= 0.92
    assert min(cell.coverage["DeLong"] for cell in found) < 0.6  # it would be seen
    assert max(c.coverage["ours"] for c in found if c.design.name == "one slide each") <= 0.99


def test_the_paired_test_errs_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import interval_coverage as coverage  # type: ignore[import-not-found]

    design = coverage.design("", "both classes", (3, 5, 0), (4, 0, 5), (3, 3, 2))
    assert coverage.rejections(design, (0.85, 0.85), 0.5, 0.5, draws=200) <= 0.06
    assert coverage.rejections(design, (0.99, 0.6), 0.5, 0.5, draws=50) >= 0.5
