"""Slide-level metrics against pairs and hits counted by hand."""

from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import product
from math import isnan

import numpy as np
import pytest
import torch

from dasmil.metrics.slide import (
    class_probabilities,
    slide_metrics,
    specificity_threshold,
    threshold_metrics,
    youden_threshold,
)


def counted_auroc(scores: list[float], positive: list[bool]) -> float:
    """Share of pairs (positive, negative) in the right order; a tie is half a pair."""
    ours = [s for s, is_positive in zip(scores, positive, strict=True) if is_positive]
    others = [s for s, is_positive in zip(scores, positive, strict=True) if not is_positive]
    won = [1.0 if p > n else 0.5 if p == n else 0.0 for p, n in product(ours, others)]
    return sum(won) / len(won)


def two_columns(positive: Iterable[float]) -> np.ndarray:
    return np.array([[1 - p, p] for p in positive])


def test_four_slides_by_hand() -> None:
    """Three of four pairs are in order; at 0.5 one of two slides of each class is right."""
    metrics = slide_metrics(two_columns([0.1, 0.6, 0.3, 0.8]), np.array([0, 0, 1, 1]))
    assert metrics == pytest.approx(
        {
            "auroc": 3 / 4,
            "average_precision": (1 + 2 / 3) / 2,  # precision at each of the two positive slides
            "accuracy": 1 / 2,
            "balanced_accuracy": 1 / 2,
            "f1": 1 / 2,
            "sensitivity_at_specificity_0.9": 1 / 2,  # above 0.6
            "brier": (0.1**2 + 0.6**2 + 0.7**2 + 0.2**2) / 4,
            "calibration_error": (0.1 + 0.6 + 0.7 + 0.2) / 4,  # each slide in a bin of its own
        }
    )


@pytest.mark.parametrize("seed", range(5))
def test_two_classes_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = (rng.integers(0, 8, 40) / 8 + 1 / 16).tolist()  # many ties, none at 0.5
    labels = rng.integers(0, 2, 40)
    metrics = slide_metrics(two_columns(scores), labels)
    assert metrics["auroc"] == pytest.approx(counted_auroc(scores, (labels == 1).tolist()))
    right = [(score > 0.5) == (label == 1) for score, label in zip(scores, labels, strict=True)]
    assert metrics["accuracy"] == pytest.approx(sum(right) / 40)


@pytest.mark.parametrize("num_classes", [3, 4])
def test_more_classes_are_the_plain_mean_of_one_against_the_rest(num_classes: int) -> None:
    rng = np.random.default_rng(num_classes)
    probabilities = rng.dirichlet(np.ones(num_classes), 50)
    labels = rng.choice(num_classes, 50, p=rng.dirichlet(np.ones(num_classes)))
    labels[:num_classes] = range(num_classes)
    metrics = slide_metrics(probabilities, labels)
    each = [
        counted_auroc(probabilities[:, c].tolist(), (labels == c).tolist())
        for c in range(num_classes)
    ]
    assert metrics["auroc"] == pytest.approx(sum(each) / num_classes)
    called = probabilities.argmax(axis=1)
    assert metrics["accuracy"] == pytest.approx((called == labels).mean())
    recalls = [(called[labels == c] == c).mean() for c in range(num_classes)]
    assert metrics["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    one_hot = np.eye(num_classes)[labels]
    assert metrics["brier"] == pytest.approx(((probabilities - one_hot) ** 2).sum(axis=1).mean())


def test_three_slides_of_three_classes_by_hand() -> None:
    """The third slide is taken for the second class; every class has one slide."""
    probabilities = np.array([[0.8, 0.1, 0.1], [0.1, 0.7, 0.2], [0.3, 0.5, 0.2]])
    metrics = slide_metrics(probabilities, np.array([0, 1, 2]), specificity=0.5)
    assert metrics == pytest.approx(
        {
            "auroc": (1 + 1 + 3 / 4) / 3,  # the last class: one pair in order, one tied
            "average_precision": (1 + 1 + 1 / 2) / 3,
            "accuracy": 2 / 3,
            "balanced_accuracy": 2 / 3,
            "f1": (1 + 2 / 3 + 0) / 3,
            "sensitivity_at_specificity_0.5": 1,
            "brier": (
                (0.2**2 + 0.1**2 + 0.1**2) + (0.1**2 + 0.3**2 + 0.2**2) + (0.3**2 + 0.5**2 + 0.8**2)
            )
            / 3,
            "calibration_error": (0.2 + 0.3 + 0.5) / 3,  # of the most probable class
        },
        rel=1e-6,
    )


@pytest.mark.parametrize("num_positive", [3, 7, 11, 13])
def test_models_with_equal_counts_of_pairs_have_equal_figures_to_the_last_digit(
    num_positive: int,
) -> None:
    """Slides that change places within a class, and ties: the counts decide, not the order."""
    rng = np.random.default_rng(num_positive)
    labels = np.arange(41) < num_positive
    scores = rng.integers(0, 20, 41) / 20
    found = set()
    for _ in range(10):
        for of_class in (labels, ~labels):
            scores[of_class] = rng.permutation(scores[of_class])
        metrics = slide_metrics(two_columns(scores), labels.astype(int))
        found.add((metrics["auroc"], metrics["average_precision"]))
    ((auroc, _),) = found
    won = sum((p > n) + (p == n) / 2 for p, n in product(scores[labels], scores[~labels]))
    assert auroc == won / (num_positive * (41 - num_positive))


@pytest.mark.parametrize(
    ("num_classes", "labels"), [(2, [1, 1, 1]), (2, [0, 0, 0]), (3, [0, 2, 0])]
)
def test_a_class_without_slides_leaves_figures_undefined(
    num_classes: int, labels: list[int]
) -> None:
    probabilities = np.full((3, num_classes), 0.1)
    probabilities[:, 0] = 1 - 0.1 * (num_classes - 1)
    metrics = slide_metrics(probabilities, np.array(labels))
    assert metrics["accuracy"] == pytest.approx(labels.count(0) / 3)
    undefined = {name for name, value in metrics.items() if isnan(value)}
    assert undefined == set(metrics) - {"accuracy", "brier", "calibration_error"}


def test_one_logit_belongs_to_the_second_class() -> None:
    found = class_probabilities(torch.tensor([[0.0], [2.0], [-50.0]]))
    positive = [0.5, 1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(50.0))]
    np.testing.assert_allclose(found[:, 1], positive, rtol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)


def test_more_logits_are_a_softmax() -> None:
    logits = 3 * np.random.default_rng(0).standard_normal((5, 3))
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(class_probabilities(torch.from_numpy(logits)), expected, rtol=1e-12)


def test_a_diverged_model_has_no_metric() -> None:
    probabilities = two_columns([0.2, 0.9, float("nan")])
    labels = np.array([0, 1, 1])
    assert all(isnan(value) for value in slide_metrics(probabilities, labels).values())
    margin = probabilities[:, 1] - 0.5
    assert all(isnan(value) for value in threshold_metrics(margin, labels == 1).values())


def test_only_the_figures_that_are_asked_for() -> None:
    probabilities, labels = two_columns([0.2, 0.9]), np.array([0, 1])
    assert slide_metrics(probabilities, labels, names=["brier", "f1"]).keys() == {"brier", "f1"}


def test_calibration_error_is_per_bin_of_a_fifteenth() -> None:
    """Two slides from 9/15 to 10/15, of mean 0.63 and one positive; one slide from 10/15 on."""
    metrics = slide_metrics(two_columns([0.61, 0.65, 0.69]), np.array([1, 0, 1]))
    expected = 2 / 3 * abs(0.63 - 1 / 2) + 1 / 3 * abs(0.69 - 1)
    assert metrics["calibration_error"] == pytest.approx(expected)


def test_a_probability_of_one_half_is_not_above_it() -> None:
    metrics = slide_metrics(two_columns([0.5, 0.5, 0.9]), np.array([0, 0, 1]))
    assert (metrics["accuracy"], metrics["balanced_accuracy"], metrics["f1"]) == (1, 1, 1)


def test_metrics_at_a_threshold_by_hand() -> None:
    """Above 0.3: two of three positive slides, one of four negative ones; 0.3 is not above."""
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.3, 0.7, 0.9])
    labels = np.array([0, 0, 0, 0, 1, 1, 1])
    assert threshold_metrics(scores - 0.3, labels == 1) == pytest.approx(
        {
            "accuracy": 5 / 7,
            "balanced_accuracy": (2 / 3 + 3 / 4) / 2,
            "f1": 2 * 2 / (2 * 2 + 1 + 1),
            "sensitivity": 2 / 3,
            "specificity": 3 / 4,
        }
    )


@pytest.mark.parametrize(
    ("label", "known"), [(0, {"accuracy", "specificity"}), (1, {"accuracy", "sensitivity"})]
)
def test_one_class_at_a_threshold(label: int, known: set[str]) -> None:
    metrics = threshold_metrics(np.array([-0.4, -0.3]), np.array([label == 1] * 2))
    assert {name for name, value in metrics.items() if not isnan(value)} == known
    assert all(metrics[name] == 1 - label for name in known)


@pytest.mark.parametrize(
    ("positive", "labels", "expected"),
    [
        ([0.1, 0.2, 0.6, 0.8], [0, 0, 1, 1], 0.4),  # between the classes
        ([0.1, 0.5, 0.6, 0.8], [0, 1, 0, 1], 0.7),  # J is 1/2 above 0.3 too: the highest counts
        ([0.8, 0.9, 0.1, 0.2], [0, 0, 1, 1], 0.95),  # best to call nothing positive
        ([1.0, 0.2], [0, 1], 1.0),  # even a certain slide
        ([0.3, 0.3], [1, 1], 0.5),
    ],
)
def test_youden_threshold(positive: list[float], labels: list[int], expected: float) -> None:
    found = youden_threshold(torch.tensor(positive, dtype=torch.float64), torch.tensor(labels))
    assert found == pytest.approx(expected)


def test_equal_youden_indices_are_equal_whatever_their_rounding() -> None:
    """J is 1/6 − 0 above 0.85 and 4/6 − 1/2 above 0.45, the larger one in float32."""
    positive = torch.arange(0.9, 0.1, -0.1, dtype=torch.float64)
    labels = torch.tensor([1, 0, 1, 1, 1, 0, 1, 1])
    assert youden_threshold(positive, labels) == pytest.approx(0.85)


def test_specificity_threshold_by_hand() -> None:
    """Nine of ten negative slides must lie below: the tenth is at 1.0, the next score is 0.95."""
    negative = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0]
    positive = torch.tensor([*negative, 0.95, 0.8], dtype=torch.float64)
    labels = torch.tensor([0] * 10 + [1] * 2)
    assert specificity_threshold(positive, labels, 0.9) == pytest.approx((0.85 + 0.95) / 2)
    assert specificity_threshold(positive, labels, 0.5) == pytest.approx(0.45)
    assert specificity_threshold(positive, labels, 0.95) == 1.0  # none is called positive
    hundred = torch.arange(101, dtype=torch.float64) / 128
    one_positive = (torch.arange(101) == 100).long()  # 0.55 · 100 is 55.00000000000001
    assert specificity_threshold(hundred, one_positive, 0.55) == 54.5 / 128
    assert specificity_threshold(positive, torch.ones(12, dtype=torch.long), 0.9) == 0.5


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("specificity", ["0.5", "0.7", "0.8", "0.9", "0.95", "1"])
def test_the_threshold_of_a_specificity_gives_the_sensitivity_read_from_the_roc(
    seed: int, specificity: str
) -> None:
    """Where it was chosen, and it is the lowest: the next lower score would be too much."""
    rng = np.random.default_rng(seed)
    positive = torch.from_numpy(rng.integers(1, 30, 40) / 32)
    labels = torch.from_numpy(np.arange(40) % 4 == 0).long()  # 30 negative: 0.9 of them is 27
    wanted = float(specificity)
    threshold = specificity_threshold(positive, labels, wanted)
    reached = threshold_metrics((positive - threshold).numpy(), (labels == 1).numpy())
    num_spared = int((positive[labels == 0] <= threshold).sum())
    assert Fraction(num_spared, 30) >= Fraction(specificity)
    at_roc = slide_metrics(two_columns(positive.tolist()), labels.numpy(), wanted)
    assert reached["sensitivity"] == at_roc[f"sensitivity_at_specificity_{wanted:g}"]
    next_lower = positive[positive < threshold].max()
    num_spared = int((positive[labels == 0] < next_lower).sum())
    assert Fraction(num_spared, 30) < Fraction(specificity)


@pytest.mark.parametrize(
    "choose", [youden_threshold, lambda p, y: specificity_threshold(p, y, 1.0)]
)
def test_a_threshold_parts_neighbouring_numbers(
    choose: Callable[[torch.Tensor, torch.Tensor], float],
) -> None:
    """Halfway between two doubles without one in between must not be the upper of them."""
    lower = torch.tensor(1 / (1 + 2.0**-52), dtype=torch.float64)
    scores = torch.stack([lower, torch.nextafter(lower, torch.tensor(2.0).double())])
    for _ in range(3):
        labels = torch.tensor([0, 1])
        margin = (scores - choose(scores, labels)).numpy()
        reached = threshold_metrics(margin, (labels == 1).numpy())
        assert (reached["sensitivity"], reached["specificity"]) == (1.0, 1.0)
        scores = torch.nextafter(scores, torch.zeros(2).double())


def test_sure_slides_keep_their_order() -> None:
    """Probabilities that float32 cannot tell apart: the positive slide is above all the same."""
    probabilities = class_probabilities(torch.tensor([[20.0], [18.0], [19.0]]))
    metrics = slide_metrics(probabilities.numpy(), np.array([1, 0, 0]))
    assert (metrics["auroc"], metrics["average_precision"]) == (1.0, 1.0)
