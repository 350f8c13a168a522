"""Eq. 1 against its definition in plain float64 numbers, in the printed and the released form."""

from itertools import product
from math import exp, log

import numpy as np
import pytest
import torch
from losses.numeric import slope
from torch import Tensor

from dasmil.losses import distillation_loss

TAUS = (0.5, 1.0, 1.5, 4.0)
DIRECTIONS = ("teacher_student", "student_teacher")
SWITCHES = [
    dict(zip(("direction", "squared_temperature", "class_distribution", "epsilon"), values))
    for values in product(DIRECTIONS, (True, False), ("softmax", "per_class"), (False, True))
]


def distributions(logits: list[float], tau: float, kind: str, epsilon: bool) -> list[list[float]]:
    """One distribution over the classes, or a two-point one for each logit."""
    if len(logits) == 1 or kind == "per_class":
        found = [[1 / (1 + exp(-y / tau)), 1 / (1 + exp(y / tau))] for y in logits]
    else:
        raised = [exp(y / tau) for y in logits]
        found = [[value / sum(raised) for value in raised]]
    return [[(p + 1e-7) / (1 + 1e-8) if epsilon else p for p in points] for points in found]


def equation_1(
    student: list[float],
    teacher: list[float],
    tau: float,
    direction: str,
    squared_temperature: bool,
    class_distribution: str,
    epsilon: bool,
) -> float:
    """L_KD of one bag."""
    ours = distributions(student, tau, class_distribution, epsilon)
    theirs = distributions(teacher, tau, class_distribution, epsilon)
    if direction == "teacher_student":
        ours, theirs = theirs, ours
    total = sum(p * log(p / q) for ps, qs in zip(ours, theirs) for p, q in zip(ps, qs))
    if class_distribution == "per_class" and len(student) > 1:
        total /= 2
    return tau**2 * total if squared_temperature else total


def make_logits(num_logits: int, rows: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(num_logits)
    return tuple(2 * rng.standard_normal((rows, num_logits)) for _ in "st")  # type: ignore[return-value]


def tensors(num_logits: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    student, teacher = make_logits(num_logits, rows)
    return torch.from_numpy(student).requires_grad_(), torch.from_numpy(teacher).requires_grad_()


@pytest.mark.parametrize("num_logits", [1, 3])
@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(map(str, s.values())))
def test_equation_1_in_each_of_its_forms(num_logits: int, switches: dict) -> None:
    student, teacher = tensors(num_logits)
    for tau in TAUS:
        found = distillation_loss(student, teacher, tau, **switches)
        expected = [
            equation_1(s, t, tau, **switches) for s, t in zip(student.tolist(), teacher.tolist())
        ]
        np.testing.assert_allclose(found.detach(), expected, rtol=1e-9)


@pytest.mark.parametrize("num_logits", [1, 3])
@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(map(str, s.values())))
def test_equation_1_slopes_for_student_and_teacher(num_logits: int, switches: dict) -> None:
    """With the teacher detached it gets none, and the student's is the same."""
    for tau, detach in product((1.0, 1.5), (True, False)):
        student, teacher = tensors(num_logits, rows=2)
        distillation_loss(student, teacher, tau, **switches, detach_teacher=detach).sum().backward()
        s, t = student.detach().numpy(), teacher.detach().numpy()

        def total(s: np.ndarray, t: np.ndarray, tau: float = tau) -> float:
            return sum(equation_1(a, b, tau, **switches) for a, b in zip(s.tolist(), t.tolist()))

        of_student = slope(lambda x, t=t, total=total: total(x, t), s)
        of_teacher = slope(lambda x, s=s, total=total: total(s, x), t)
        np.testing.assert_allclose(student.grad, of_student, atol=1e-7)
        assert np.abs(of_teacher).min() > 1e-4
        if detach:
            assert teacher.grad is None
        else:
            np.testing.assert_allclose(teacher.grad, of_teacher, atol=1e-7)


def test_equation_1_in_figures() -> None:
    """Teacher (0.9, 0.1), student (0.5, 0.5): KL 0.368; the other way round 0.511."""
    student, teacher = torch.tensor([[0.0]]), torch.tensor([[log(9.0)]])
    forth = 0.9 * log(0.9 / 0.5) + 0.1 * log(0.1 / 0.5)
    back = 0.5 * log(0.5 / 0.9) + 0.5 * log(0.5 / 0.1)
    np.testing.assert_allclose(distillation_loss(student, teacher, 1.0), [forth], rtol=1e-6)
    printed = distillation_loss(student, teacher, 1.0, direction="student_teacher")
    np.testing.assert_allclose(printed, [back], rtol=1e-6)


def test_released_per_class_divergences_are_halved_for_several_classes_only() -> None:
    """Each class as if it stood alone, and half of their sum."""
    student, teacher = tensors(3)
    together = distillation_loss(student, teacher, class_distribution="per_class")
    alone = [
        distillation_loss(student[:, [c]], teacher[:, [c]], class_distribution="per_class")
        for c in range(3)
    ]
    torch.testing.assert_close(together, sum(alone) / 2)
    as_softmax = distillation_loss(student[:, [0]], teacher[:, [0]])
    assert torch.equal(alone[0], as_softmax)


def test_released_epsilon_bounds_the_loss_of_a_sure_student() -> None:
    """log space grows with the logits; with ε the student's probability is never below 1e-7."""
    student, teacher = torch.tensor([[-300.0]]), torch.tensor([[300.0]])
    exact, bounded = (
        distillation_loss(student, teacher, 1.0, epsilon=e).item() for e in (False, True)
    )
    assert exact == pytest.approx(300.0)
    assert bounded == pytest.approx(-log(1e-7), rel=1e-4)


def test_the_defaults_are_those_of_the_documented_choice() -> None:
    student, teacher = tensors(3)
    default = distillation_loss(student, teacher)
    expected = [
        equation_1(s, t, 1.5, "teacher_student", True, "softmax", False)
        for s, t in zip(student.tolist(), teacher.tolist())
    ]
    np.testing.assert_allclose(default.detach(), expected, rtol=1e-9)
    default.sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("num_logits", [1, 3])
def test_the_student_is_pulled_towards_the_teacher_who_is_fixed(
    num_logits: int, tau: float
) -> None:
    """d/d student = τ (q - p); the other point of a single logit is a constant."""
    student, teacher = tensors(num_logits)
    distillation_loss(student, teacher, tau).sum().backward()
    assert teacher.grad is None
    for row, (s, t) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        (q,), (p,) = (distributions(y, tau, "softmax", False) for y in (s, t))
        expected = (tau * (np.array(q) - np.array(p)))[:num_logits]
        np.testing.assert_allclose(student.grad[row], expected, rtol=1e-9)


@pytest.mark.parametrize("num_logits", [1, 3])
def test_agreement_costs_nothing(num_logits: int) -> None:
    student, _ = tensors(num_logits)
    for switches in SWITCHES:
        assert distillation_loss(student, student.clone(), **switches).abs().max() < 1e-12


@pytest.mark.parametrize("num_logits", [1, 3])
def test_extreme_logits_stay_finite(num_logits: int) -> None:
    """A student sure of the opposite: the loss is τ² times the distance of the logits over τ."""
    student = torch.zeros(2, num_logits)
    student[0, 0], student[1, 0] = 300.0, -300.0
    loss = distillation_loss(student.requires_grad_(), -student.detach(), 1.5)
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach(), [1.5 * 300, 1.5 * 300], rtol=5e-3)
    assert student.grad.isfinite().all()


def test_half_precision_gives_the_loss_of_float32() -> None:
    """The divergence of close logits is smaller than the rounding of bfloat16."""
    torch.manual_seed(0)
    student = torch.randn(20, 2, dtype=torch.bfloat16)
    teacher = (student + 0.02 * torch.randn(20, 2)).bfloat16()
    found = distillation_loss(student, teacher)
    assert torch.equal(found, distillation_loss(student.float(), teacher.float()))
