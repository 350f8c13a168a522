"""Metrics without each patient are those of the slides that are left."""

import numpy as np
import pytest

from dasmil.metrics.jackknife import (
    auroc_without,
    average_precision_without,
    sensitivity_without,
    sum_by_patient,
)
from dasmil.metrics.slide import auroc, average_precision, sensitivity_at_specificity


def slides(seed: int):
    """Scores with ties of several variants, classes, patients with one to many slides, folds."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(4, 40))
    patients = np.unique(rng.integers(0, rng.integers(2, n + 1), n), return_inverse=True)[1]
    positive = rng.random(n) < rng.uniform(0.1, 0.9)
    positive[:2] = True, False
    scores = np.round(rng.random((3, n)), int(rng.integers(1, 4)))
    return scores, positive, patients, rng.integers(0, 3, n)


@pytest.mark.parametrize("seed", range(30))
def test_without_each_patient(seed):
    scores, positive, patients, folds = slides(seed)
    found = {
        "auroc": auroc_without(scores, positive, patients),
        "same_fold": auroc_without(scores, positive, patients, folds),
        "average_precision": average_precision_without(scores, positive, patients),
        "sensitivity": sensitivity_without(scores, positive, patients, 0.9),
    }
    for patient in range(patients.max() + 1):
        keep = patients != patient
        left, of = scores[:, keep], positive[keep]
        wanted = {
            "auroc": auroc(left, of),
            "same_fold": auroc(left, of, folds[keep]),
            "average_precision": average_precision(left, of),
            "sensitivity": sensitivity_at_specificity(left, of, 0.9),
        }
        for name, values in wanted.items():
            close = {"rel": 1e-12} if name == "average_precision" else {"rel": 0, "abs": 0}
            assert found[name][patient] == pytest.approx(values, nan_ok=True, **close), name


def test_sums_of_patients():
    values = np.array([[1.0, 2, 3], [4, 5, 6]])
    assert sum_by_patient(values, np.array([2, 0, 2]), 4).tolist() == [[2, 0, 4, 0], [5, 0, 10, 0]]
