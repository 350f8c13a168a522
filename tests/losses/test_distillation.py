"""Eq. 1 against its definition in float64."""

import numpy as np
import pytest
import torch

from dasmil.losses import distillation_loss

TAUS = [0.5, 1.0, 1.5, 4.0]


def probabilities(logits: np.ndarray, tau: float) -> np.ndarray:
    """Of the classes; one logit gives the two-point distribution."""
    if len(logits) == 1:
        positive = 1 / (1 + np.exp(-logits[0] / tau))
        return np.array([positive, 1 - positive])
    raised = np.exp(logits / tau)
    return raised / raised.sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


def make_logits(num_logits: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(num_logits)
    return 2 * rng.standard_normal((6, num_logits)), 2 * rng.standard_normal((6, num_logits))


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("num_logits", [1, 2, 3])
def test_it_is_tau_squared_times_kl_of_teacher_from_student(num_logits: int, tau: float) -> None:
    student, teacher = make_logits(num_logits)
    found = distillation_loss(torch.from_numpy(student), torch.from_numpy(teacher), tau).numpy()
    pairs = [
        (probabilities(t, tau), probabilities(s, tau))
        for s, t in zip(student, teacher, strict=True)
    ]
    np.testing.assert_allclose(found, [tau**2 * kl(p, q) for p, q in pairs], rtol=1e-9)


def test_the_teacher_comes_first() -> None:
    """Teacher (0.9, 0.1), student (0.5, 0.5): 0.368; the other way round it would be 0.511."""
    student, teacher = torch.tensor([[0.0]]), torch.tensor([[np.log(9.0)]])
    expected = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    np.testing.assert_allclose(distillation_loss(student, teacher, 1.0), [expected], rtol=1e-6)


def test_the_temperature_of_the_paper_is_the_default() -> None:
    student, teacher = map(torch.from_numpy, make_logits(3))
    default = distillation_loss(student, teacher)
    assert torch.equal(default, distillation_loss(student, teacher, 1.5))


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("num_logits", [1, 3])
def test_the_student_is_pulled_towards_the_teacher_who_is_fixed(
    num_logits: int, tau: float
) -> None:
    """d/d student = τ (q - p); the other point of a single logit is a constant."""
    student, teacher = (torch.from_numpy(a).requires_grad_() for a in make_logits(num_logits))
    distillation_loss(student, teacher, tau).sum().backward()
    assert teacher.grad is None
    for row, (s, t) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        q, p = probabilities(np.array(s), tau), probabilities(np.array(t), tau)
        np.testing.assert_allclose(student.grad[row], (tau * (q - p))[:num_logits], rtol=1e-9)


@pytest.mark.parametrize("num_logits", [1, 3])
def test_agreement_costs_nothing(num_logits: int) -> None:
    student, _ = map(torch.from_numpy, make_logits(num_logits))
    assert distillation_loss(student, student.clone()).abs().max() < 1e-12


@pytest.mark.parametrize("num_logits", [1, 3])
def test_extreme_logits_stay_finite(num_logits: int) -> None:
    """A student sure of the opposite: the loss is τ² times the distance of the logits over τ."""
    student = torch.zeros(2, num_logits)
    student[0, 0], student[1, 0] = 300.0, -300.0
    loss = distillation_loss(student.requires_grad_(), -student.detach(), 1.5)
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach(), [1.5 * 300, 1.5 * 300], rtol=5e-3)
    assert student.grad.isfinite().all()


def test_bags_are_taken_one_by_one() -> None:
    student, teacher = map(torch.from_numpy, make_logits(3))
    together = distillation_loss(student, teacher)
    alone = torch.cat([distillation_loss(s[None], t[None]) for s, t in zip(student, teacher)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
