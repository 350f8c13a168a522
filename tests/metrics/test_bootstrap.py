"""Draws of patients, and the intervals and p that follow, against arithmetic."""

from collections import Counter
from math import isnan, nan

import numpy as np
import pytest
import torch
from scipy.stats import binom

from dasmil.metrics import interval, paired_p_value, resamples

PATIENTS = ["a", "b", "a", "c", "d", "d", "e"]
LABELS = [0, 0, 0, 1, 1, 0, 1]  # d has slides of both classes: a stratum of its own


def drawn_patients(draw: torch.Tensor) -> Counter[str]:
    """How often each patient was drawn; its slides must have come along each time."""
    slides = Counter(draw.tolist())
    times = {}
    for patient in sorted(set(PATIENTS)):
        own = {slides[index] for index, name in enumerate(PATIENTS) if name == patient}
        assert len(own) == 1, f"the slides of {patient} were torn apart"
        times[patient] = own.pop()
    return Counter(times)


def test_slides_come_with_their_patient_and_each_stratum_keeps_its_number() -> None:
    draws = [drawn_patients(draw) for draw in resamples(PATIENTS, LABELS, 200, seed=0)]
    for draw in draws:
        assert (draw["a"] + draw["b"], draw["c"] + draw["e"], draw["d"]) == (2, 2, 1)
    assert {draw["a"] for draw in draws} == {0, 1, 2}  # drawn with replacement


def test_each_patient_is_drawn_once_on_average() -> None:
    """Of 10 000 draws: standard error of the mean 0.007."""
    total = sum(
        (drawn_patients(draw) for draw in resamples(PATIENTS, LABELS, 10_000, 1)), Counter()
    )
    assert all(times / 10_000 == pytest.approx(1, abs=0.04) for times in total.values())


def test_the_seed_decides() -> None:
    def drawn(seed: int) -> list[list[int]]:
        return [draw.tolist() for draw in resamples(PATIENTS, LABELS, 20, seed)]

    assert drawn(3) == drawn(3) != drawn(4)


def test_interval_of_a_thousand_and_one_values() -> None:
    values = np.random.default_rng(0).permutation(1001).astype(float)
    assert interval(values.tolist()) == pytest.approx((25, 975))
    assert interval(values.tolist(), level=0.5) == pytest.approx((250, 750))
    assert all(isnan(end) for end in interval([0.1, nan, 0.3]))


@pytest.mark.parametrize("num_slides", [1, 4])
def test_the_interval_of_an_accuracy_is_the_binomials_of_its_patients(num_slides: int) -> None:
    """Patients with equal slides: four slides each make no interval narrower."""
    right = torch.tensor([1.0] * 40 + [0.0] * 10).repeat_interleave(num_slides)
    patients = [str(number // num_slides) for number in range(50 * num_slides)]
    draws = resamples(patients, [0] * len(patients), 4000, seed=0)
    low, high = interval([float(right[draw].mean()) for draw in draws])
    expected = binom.ppf([0.025, 0.975], 50, 0.8) / 50
    assert (low, high) == pytest.approx(expected.tolist(), abs=0.011)  # steps of 0.02: at most half


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.1] * 99, 1 / 100),  # no draw beyond zero
        ([-0.1] * 99, 1 / 100),
        ([0.1] * 94 + [-0.1] * 5, 11 / 100),
        ([0.1] * 94 + [0.0] * 5, 11 / 100),  # a draw without difference counts as beyond
        ([0.0] * 99, 1.0),
        ([0.1, -0.1] * 50, 1.0),
    ],
)
def test_p_by_counting(differences: list[float], expected: float) -> None:
    assert paired_p_value(differences) == pytest.approx(expected)


def test_p_of_figures_that_are_not_defined() -> None:
    assert isnan(paired_p_value([0.1, nan]))
