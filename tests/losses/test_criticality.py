"""Eq. 2 against its definition in plain loops, in the printed and the released form."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from losses.numeric import slope
from torch import Tensor

from dasmil.losses import criticality_loss

# Bags of 3, 0, 2 and 1 coarse tiles; rows 1 and 5 have no children, so the last bag has none.
# The fine tiles with parent -1 are orphans: of the first bag and of the last.
PTR = [0, 3, 3, 5, 6]
PARENT = [-1, 0, 0, 0, 2, 3, 3, 4, -1]
SWITCHES = [
    {"children_pooling": pooling, "reduction": reduction}
    for pooling, reduction in product(("mean", "max"), ("mean", "sum"))
]


def make_scores(num_logits: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(num_logits)
    return (
        torch.randn(PTR[-1], num_logits, dtype=torch.float64, requires_grad=True),
        torch.randn(len(PARENT), num_logits, dtype=torch.float64, requires_grad=True),
    )


def loss(coarse: Tensor, fine: Tensor, **switches: object) -> Tensor:
    return criticality_loss(coarse, fine, torch.tensor(PARENT), torch.tensor(PTR), **switches)  # type: ignore[arg-type]


def equation_2(
    coarse: list[list[float]],
    fine: list[list[float]],
    children_pooling: str = "mean",
    reduction: str = "mean",
) -> list[float]:
    """L_CRIT of each bag."""
    of_bags = []
    for start, end in pairwise(PTR):
        squares = []
        for row in range(start, end):
            children = [fine[c] for c, parent in enumerate(PARENT) if parent == row]
            if children:
                by_class = list(zip(*children))
                pool = max if children_pooling == "max" else lambda z: sum(z) / len(z)
                squares.append(sum((z - pool(zs)) ** 2 for z, zs in zip(coarse[row], by_class)))
        divisor = len(squares) if reduction == "mean" and squares else 1
        of_bags.append(sum(squares) / divisor)
    return of_bags


@pytest.mark.parametrize("num_logits", [1, 3])
@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(s.values()))
def test_equation_2_in_each_of_its_forms(num_logits: int, switches: dict) -> None:
    coarse, fine = make_scores(num_logits)
    found = loss(coarse, fine, **switches).tolist()
    expected = equation_2(coarse.tolist(), fine.tolist(), **switches)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert expected[0] > 0
    assert found[1] == found[3] == 0


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("num_logits", [1, 3])
@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(s.values()))
def test_equation_2_slopes_for_parents_and_children(
    num_logits: int, switches: dict, detach: bool
) -> None:
    """Tiles without children, and orphans, learn nothing."""
    coarse, fine = make_scores(num_logits)
    loss(coarse, fine, **switches, detach_teacher=detach).sum().backward()
    z1, z2 = coarse.detach().numpy(), fine.detach().numpy()
    of_coarse = slope(lambda z: sum(equation_2(z.tolist(), z2.tolist(), **switches)), z1)
    of_fine = slope(lambda z: sum(equation_2(z1.tolist(), z.tolist(), **switches)), z2)
    np.testing.assert_allclose(coarse.grad, of_coarse, atol=1e-8)
    assert not of_coarse[[1, 5]].any() and not of_fine[[0, 8]].any()
    assert of_coarse[[0, 2, 3, 4]].all() and of_fine[1:8].any()
    if detach:
        assert fine.grad is None
    else:
        np.testing.assert_allclose(fine.grad, of_fine, atol=1e-8)


def test_equation_2_in_figures() -> None:
    """Parents 1 and 4, their children (0, 4) and 1: distances 1 and 3 by mean, 3 and 3 by max."""
    coarse = torch.tensor([[1.0], [4.0]])
    fine = torch.tensor([[0.0], [4.0], [1.0]])
    graph = (torch.tensor([0, 0, 1]), torch.tensor([0, 2]))
    found = {
        (pooling, reduction): criticality_loss(
            coarse, fine, *graph, children_pooling=pooling, reduction=reduction
        ).item()
        for pooling, reduction in product(("mean", "max"), ("mean", "sum"))
    }
    assert found == {
        ("mean", "mean"): 5.0,
        ("mean", "sum"): 10.0,
        ("max", "mean"): 9.0,
        ("max", "sum"): 18.0,
    }


def test_the_largest_of_negative_children_is_taken_and_not_zero() -> None:
    found = criticality_loss(
        torch.tensor([[0.0]]),
        torch.tensor([[-3.0], [-2.0]]),
        torch.tensor([0, 0]),
        torch.tensor([0, 1]),
        children_pooling="max",
    )
    assert found.tolist() == [4.0]


def test_the_defaults_are_those_of_the_documented_choice() -> None:
    coarse, fine = make_scores(3)
    found = loss(coarse, fine)
    expected = equation_2(coarse.tolist(), fine.tolist(), "mean", "mean")
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-12)
    found.sum().backward()
    assert fine.grad is None


def test_a_bag_of_orphans_alone_costs_nothing_and_teaches_nothing() -> None:
    coarse = torch.ones(2, 1, requires_grad=True)
    found = criticality_loss(
        coarse, torch.zeros(3, 1), torch.full((3,), -1), torch.tensor([0, 2]), reduction="sum"
    )
    found.sum().backward()
    assert found.tolist() == [0.0]
    assert not coarse.grad.any()


def test_scores_equal_to_their_childrens_mean_cost_nothing() -> None:
    coarse = torch.tensor([[2.0], [-1.0]])
    fine = torch.tensor([[1.0], [3.0], [-1.0]])
    found = criticality_loss(coarse, fine, torch.tensor([0, 0, 1]), torch.tensor([0, 2]))
    assert found.tolist() == [0.0]


def test_the_mean_does_not_grow_with_the_bag_and_the_sum_does() -> None:
    coarse, fine, parent = torch.ones(50, 1), torch.zeros(100, 1), torch.arange(100) // 2

    def both(count: int, reduction: str) -> float:
        rows = (coarse[:count], fine[: 2 * count], parent[: 2 * count])
        ends = torch.tensor([0, count])
        return criticality_loss(*rows, ends, reduction=reduction).item()  # type: ignore[arg-type]

    assert both(1, "mean") == both(50, "mean") == 1.0
    assert (both(1, "sum"), both(50, "sum")) == (1.0, 50.0)


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(s.values()))
def test_bags_without_tiles_cost_nothing_and_teach_nothing(switches: dict) -> None:
    coarse = torch.empty(0, 2, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    ends = torch.tensor([0, 0, 0])
    found = criticality_loss(coarse, torch.empty(0, 2), none, ends, **switches)
    assert found.tolist() == [0.0, 0.0]
    found.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_tiles_are_counted_right_in_half_precision(dtype: torch.dtype) -> None:
    """Sums of thousands of ones stall in half precision."""
    parent, ptr = torch.arange(5000), torch.tensor([0, 5000])
    coarse, fine = torch.full((5000, 1), 2.0, dtype=dtype), torch.zeros(5000, 1, dtype=dtype)
    assert criticality_loss(coarse, fine, parent, ptr).item() == 4
    assert criticality_loss(coarse, fine, parent, ptr, reduction="sum").item() == 20_000


def test_of_equal_largest_children_the_first_alone_learns() -> None:
    """The slopes sum to that of the loss if all children rise together."""
    coarse = torch.tensor([[3.0], [-1.0]], dtype=torch.float64)
    fine = np.array([[0.5], [0.5], [-2.0], [0.5], [2.0], [2.0]])
    graph = (torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 2]))

    def loss(children: Tensor) -> Tensor:
        return criticality_loss(
            coarse, children, *graph, children_pooling="max", detach_teacher=False
        )

    children = torch.from_numpy(fine).requires_grad_()
    loss(children).sum().backward()
    for rows in (slice(0, 4), slice(4, 6)):
        family = np.zeros_like(fine)
        family[rows] = 1
        together = slope(
            lambda t, of=family: float(loss(torch.from_numpy(fine + t * of))), np.zeros(1)
        )
        np.testing.assert_allclose(children.grad[rows][0], together, atol=1e-7)
        assert not children.grad[rows][1:].any()


@pytest.mark.parametrize("children_pooling", ["mean", "max"])
def test_tiles_without_parent_change_nothing(children_pooling: str) -> None:
    """Also where their bag is not the first, and their neighbour has no children."""
    torch.manual_seed(0)
    parent, ptr = torch.tensor([-1, 1, 1, -1, 2, 2]), torch.tensor([0, 2, 4])
    found = []
    for kept in (slice(None), parent >= 0):
        coarse = torch.linspace(-1, 1, 4).double()[:, None].requires_grad_()
        fine = torch.linspace(2, -3, 6).double()[:, None].requires_grad_()
        loss = criticality_loss(
            *(coarse, fine[kept], parent[kept], ptr),
            children_pooling=children_pooling,
            detach_teacher=False,
        )
        loss.sum().backward()
        found.append([loss, coarse.grad, fine.grad])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
