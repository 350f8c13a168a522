"""The label losses against their definition in float64."""

import numpy as np
import pytest
import torch
from losses.numeric import slope

from dasmil.losses import bag_loss, balanced_weights, max_instance_loss

SIZES = (4, 0, 1, 6)


def label_loss(logits: np.ndarray, label: int) -> float:
    """-log of the label's probability: of a sigmoid for one logit, else of a softmax."""
    if len(logits) == 1:
        positive = 1 / (1 + np.exp(-logits[0]))
        return -np.log(positive if label == 1 else 1 - positive)
    return -np.log(np.exp(logits[label]) / np.exp(logits).sum())


def labels_for(num_logits: int, count: int) -> list[int]:
    return [number % max(num_logits, 2) for number in range(count)]


@pytest.mark.parametrize("num_logits", [1, 2, 3])
def test_bag_loss_is_the_cross_entropy_of_each_bag(num_logits: int) -> None:
    logits = 3 * np.random.default_rng(0).standard_normal((7, num_logits))
    labels = labels_for(num_logits, 7)
    found = bag_loss(torch.from_numpy(logits), torch.tensor(labels))
    expected = [label_loss(row, label) for row, label in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_two_equal_logits_cost_as_much_as_one_logit_of_zero() -> None:
    labels = torch.tensor([0, 1])
    assert torch.allclose(bag_loss(torch.zeros(2, 1), labels), bag_loss(torch.ones(2, 2), labels))


@pytest.mark.parametrize("num_logits", [1, 3])
def test_max_instance_loss_is_that_of_the_largest_logit_of_each_class(num_logits: int) -> None:
    rows = 3 * np.random.default_rng(1).standard_normal((sum(SIZES), num_logits)) - 4
    labels = labels_for(num_logits, len(SIZES))
    ends = np.cumsum([0, *SIZES])
    found = max_instance_loss(torch.from_numpy(rows), torch.from_numpy(ends), torch.tensor(labels))
    expected = [
        label_loss(rows[start:end].max(axis=0), label) if end > start else 0.0
        for start, end, label in zip(ends[:-1], ends[1:], labels, strict=True)
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert found[1] == 0


def test_only_the_largest_logit_of_a_class_learns() -> None:
    rows = torch.tensor([[-1.0], [-3.0], [2.0], [1.0]], requires_grad=True)
    loss = max_instance_loss(rows, torch.tensor([0, 2, 2, 4]), torch.tensor([1, 1, 0]))
    loss.sum().backward()
    slope = 1 / (1 + np.exp(-np.array([-1.0, 2.0]))) - np.array([1.0, 0.0])  # sigmoid - label
    np.testing.assert_allclose(rows.grad[:, 0], [slope[0], 0, slope[1], 0], rtol=1e-6)


@pytest.mark.parametrize("num_logits", [1, 3])
def test_bags_without_tiles_cost_nothing_and_teach_nothing(num_logits: int) -> None:
    rows = torch.empty(0, num_logits, requires_grad=True)
    loss = max_instance_loss(rows, torch.tensor([0, 0, 0]), torch.tensor([0, 1]))
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()


SHOWN = [True, False, False, True, False, True, True, False, True, False, True]


@pytest.mark.parametrize("num_logits", [1, 3])
def test_tiles_that_are_not_shown_do_not_count_and_do_not_learn(num_logits: int) -> None:
    """Of the third bag nothing is shown: it counts as one without tiles (D12)."""
    rows = np.random.default_rng(2).standard_normal((sum(SIZES), num_logits)) - 2
    rows[[1, 4]] += 9  # would be the largest
    logits = torch.from_numpy(rows).requires_grad_()
    labels = labels_for(num_logits, len(SIZES))
    ends = np.cumsum([0, *SIZES])
    shown = torch.tensor(SHOWN)
    found = max_instance_loss(logits, torch.from_numpy(ends), torch.tensor(labels), shown)
    expected = []
    for start, end, label in zip(ends[:-1], ends[1:], labels, strict=True):
        seen = [rows[row] for row in range(start, end) if SHOWN[row]]
        expected.append(label_loss(np.max(seen, axis=0), label) if seen else 0.0)
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-12)
    assert found[1] == found[2] == 0
    found.sum().backward()
    assert not logits.grad[~shown].any()
    assert logits.grad[:4].any() and logits.grad[5:].any()


def test_all_shown_is_as_none_said() -> None:
    rows, ends, labels = torch.randn(11, 3), torch.tensor([0, 4, 4, 5, 11]), torch.zeros(4).long()
    everything = torch.ones(11, dtype=torch.bool)
    assert torch.equal(
        max_instance_loss(rows, ends, labels), max_instance_loss(rows, ends, labels, everything)
    )


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("num_logits", [1, 3])
def test_of_equal_largest_logits_the_first_alone_learns(num_logits: int, label: int) -> None:
    """The slopes sum to that of the loss if all logits of the class rise together."""
    rows = np.array([[-1.0], [0.5], [0.5], [0.0], [0.5], [0.5]]).repeat(num_logits, axis=1)
    ends, labels = torch.tensor([0, 6]), torch.tensor([label])

    def loss(shift: np.ndarray) -> float:
        return float(max_instance_loss(torch.from_numpy(rows + shift), ends, labels))

    logits = torch.from_numpy(rows).requires_grad_()
    max_instance_loss(logits, ends, labels).sum().backward()
    np.testing.assert_allclose(logits.grad[1], slope(loss, np.zeros(num_logits)), atol=1e-8)
    assert not logits.grad[[0, 2, 3, 4, 5]].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_logit_that_is_not_finite_makes_a_loss_that_is_not(value: float) -> None:
    rows = torch.tensor([[0.0], [value], [1.0]])
    if value < 0:
        rows[:] = value
    loss = max_instance_loss(rows, torch.tensor([0, 3]), torch.tensor([1 if value < 0 else 0]))
    assert not loss.isfinite().any()


def test_balanced_weights_give_each_class_the_same_share() -> None:
    """n / (P n_c): 12 slides in 3 classes; the weights of all slides add up to their number."""
    counts = [2, 4, 6]
    weights = balanced_weights(counts)
    assert weights == [2.0, 1.0, 12 / 18]
    assert [w * c for w, c in zip(weights, counts)] == pytest.approx([4.0] * 3)
