"""Slide-level figures against pairs and hits counted by hand."""

from itertools import product
from math import isnan

import numpy as np
import pytest
import torch

from dasmil.metrics import class_probabilities, slide_metrics


def counted_auroc(scores: list[float], positive: list[bool]) -> float:
    """Share of pairs (positive, negative) in the right order; a tie is half a pair."""
    ours = [s for s, is_positive in zip(scores, positive, strict=True) if is_positive]
    others = [s for s, is_positive in zip(scores, positive, strict=True) if not is_positive]
    won = [1.0 if p > n else 0.5 if p == n else 0.0 for p, n in product(ours, others)]
    return sum(won) / len(won)


def two_columns(positive: list[float]) -> torch.Tensor:
    return torch.tensor([[1 - p, p] for p in positive])


def test_four_slides_by_hand() -> None:
    """Three of four pairs are in order; at 0.5 two of four slides are right."""
    figures = slide_metrics(two_columns([0.1, 0.6, 0.3, 0.8]), torch.tensor([0, 0, 1, 1]))
    assert figures == {"auroc": 0.75, "accuracy": 0.5}


@pytest.mark.parametrize("seed", range(5))
def test_two_classes_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = (rng.integers(0, 8, 40) / 8 + 1 / 16).tolist()  # many ties, none at 0.5
    labels = rng.integers(0, 2, 40)
    figures = slide_metrics(two_columns(scores), torch.from_numpy(labels))
    assert figures["auroc"] == pytest.approx(counted_auroc(scores, (labels == 1).tolist()))
    right = [(score > 0.5) == (label == 1) for score, label in zip(scores, labels, strict=True)]
    assert figures["accuracy"] == pytest.approx(sum(right) / 40)


@pytest.mark.parametrize("num_classes", [3, 4])
def test_more_classes_are_the_plain_mean_of_one_against_the_rest(num_classes: int) -> None:
    rng = np.random.default_rng(num_classes)
    probabilities = rng.dirichlet(np.ones(num_classes), 50)
    labels = rng.choice(num_classes, 50, p=rng.dirichlet(np.ones(num_classes)))
    labels[:num_classes] = range(num_classes)
    figures = slide_metrics(torch.from_numpy(probabilities), torch.from_numpy(labels))
    each = [
        counted_auroc(probabilities[:, c].tolist(), (labels == c).tolist())
        for c in range(num_classes)
    ]
    assert figures["auroc"] == pytest.approx(sum(each) / num_classes)
    assert figures["accuracy"] == pytest.approx((probabilities.argmax(axis=1) == labels).mean())


@pytest.mark.parametrize(
    ("num_classes", "labels"), [(2, [1, 1, 1]), (2, [0, 0, 0]), (3, [0, 2, 0])]
)
def test_a_class_without_slides_leaves_auroc_undefined(num_classes: int, labels: list[int]) -> None:
    probabilities = torch.full((3, num_classes), 0.1)
    probabilities[:, 0] = 1 - 0.1 * (num_classes - 1)
    figures = slide_metrics(probabilities, torch.tensor(labels))
    assert isnan(figures["auroc"])
    assert figures["accuracy"] == pytest.approx(labels.count(0) / 3)


def test_one_logit_is_the_second_classs() -> None:
    found = class_probabilities(torch.tensor([[0.0], [2.0], [-50.0]]))
    positive = [0.5, 1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(50.0))]
    np.testing.assert_allclose(found[:, 1], positive, rtol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)


def test_more_logits_are_a_softmax() -> None:
    logits = 3 * np.random.default_rng(0).standard_normal((5, 3))
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(class_probabilities(torch.from_numpy(logits)), expected, rtol=1e-12)


def test_sure_slides_keep_their_order():
    """In float32 the probability is 1 from a logit of 17 on."""
    probabilities = class_probabilities(torch.tensor([[18.0], [20.0]]))
    assert slide_metrics(probabilities, torch.tensor([0, 1]))["auroc"] == 1.0
