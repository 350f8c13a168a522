"""Eq. 2 against its definition in plain loops."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dasmil.losses import criticality_loss

# Bags of 3, 0, 2 and 1 coarse tiles; rows 1 and 5 have no children, so the last bag has none.
PTR = [0, 3, 3, 5, 6]
PARENT = [0, 0, 0, 2, 3, 3, 4]


def make_scores(num_logits: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(num_logits)
    return (
        torch.randn(PTR[-1], num_logits, dtype=torch.float64, requires_grad=True),
        torch.randn(len(PARENT), num_logits, dtype=torch.float64, requires_grad=True),
    )


def loss(coarse: Tensor, fine: Tensor) -> Tensor:
    return criticality_loss(coarse, fine, torch.tensor(PARENT), torch.tensor(PTR))


def differences(coarse: Tensor, fine: Tensor, row: int) -> list[float]:
    """Score minus mean of the children's, per class; nothing for a tile without children."""
    children = [child for child, parent in enumerate(PARENT) if parent == row]
    if not children:
        return []
    scores = fine.tolist()
    means = [sum(scores[c][k] for c in children) / len(children) for k in range(fine.shape[1])]
    return [z - mean for z, mean in zip(coarse[row].tolist(), means, strict=True)]


@pytest.mark.parametrize("num_logits", [1, 3])
def test_it_is_the_mean_squared_distance_over_tiles_with_children(num_logits: int) -> None:
    coarse, fine = make_scores(num_logits)
    expected = []
    for start, end in pairwise(PTR):
        squares = [
            sum(d * d for d in differences(coarse, fine, row))
            for row in range(start, end)
            if row in PARENT
        ]
        expected.append(sum(squares) / len(squares) if squares else 0.0)
    found = loss(coarse, fine)
    torch.testing.assert_close(found.detach(), torch.tensor(expected, dtype=torch.float64))
    assert expected[0] > 0
    assert found[1] == found[3] == 0


@pytest.mark.parametrize("num_logits", [1, 3])
def test_only_coarse_tiles_with_children_learn(num_logits: int) -> None:
    """d/d z = 2 (z - mean of the children) / number of tiles with children in the bag."""
    coarse, fine = make_scores(num_logits)
    loss(coarse, fine).sum().backward()
    assert fine.grad is None
    for row, in_bag in ((0, 2), (1, None), (2, 2), (3, 2), (4, 2), (5, None)):
        slope = [2 * d / in_bag for d in differences(coarse, fine, row)] if in_bag else 0.0
        expected = torch.tensor(slope, dtype=torch.float64).expand(num_logits)
        torch.testing.assert_close(coarse.grad[row], expected)


def test_scores_equal_to_their_childrens_mean_cost_nothing() -> None:
    coarse = torch.tensor([[2.0], [-1.0]])
    fine = torch.tensor([[1.0], [3.0], [-1.0]])
    found = criticality_loss(coarse, fine, torch.tensor([0, 0, 1]), torch.tensor([0, 2]))
    assert found.tolist() == [0.0]


def test_it_does_not_grow_with_the_bag() -> None:
    coarse, fine, parent = torch.ones(50, 1), torch.zeros(100, 1), torch.arange(100) // 2
    small = criticality_loss(coarse[:1], fine[:2], parent[:2], torch.tensor([0, 1]))
    large = criticality_loss(coarse, fine, parent, torch.tensor([0, 50]))
    assert small.tolist() == large.tolist() == [1.0]


def test_bags_without_tiles_cost_nothing_and_teach_nothing() -> None:
    coarse = torch.empty(0, 2, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    found = criticality_loss(coarse, torch.empty(0, 2), none, torch.tensor([0, 0, 0]))
    assert found.tolist() == [0.0, 0.0]
    found.sum().backward()
