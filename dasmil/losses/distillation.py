"""Eq. 1: agreement of the bag predictions of two scales."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dasmil.tensors import at_least_float32

EPSILON, EPSILON_SCALE = 1e-7, 1e-8  # of the released code (D5)

Direction = Literal["teacher_student", "student_teacher"]
ClassDistribution = Literal["softmax", "per_class"]


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.5,
    *,
    direction: Direction = "teacher_student",
    squared_temperature: bool = True,
    class_distribution: ClassDistribution = "softmax",
    epsilon: bool = False,
    detach_teacher: bool = True,
) -> Tensor:
    """L_KD of Eq. 1, with the finer scale as teacher: τ² KL(p_teacher ‖ p_student).

    p = softmax(y/τ); one logit stands for the two-point distribution (σ(y/τ), σ(−y/τ)).

    Parameters
    ----------
    student: (B, C) bag logits of the coarser scale.
    teacher: (B, C) bag logits of the finer scale.
    temperature: τ.
    direction: ``teacher_student`` is the released code's KL(fine ‖ coarse), ``student_teacher`` the
        printed KL(coarse ‖ fine) (D1).
    squared_temperature: the printed factor τ²; the released code has none (D2).
    class_distribution: for C > 1 a ``softmax`` over the classes as printed, or, as released, half
        the sum over ``per_class`` two-point divergences (D3).
    epsilon: (p + 1e-7) / (1 + 1e-8) for every p, as released, instead of log space (D5).
    detach_teacher: no gradient reaches the teacher (D11).

    Returns
    -------
    (B,)
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)  # close ones differ
    if detach_teacher:
        teacher = teacher.detach()
    log_student = _log_probabilities(student / temperature, class_distribution)  # (B, D, P)
    log_teacher = _log_probabilities(teacher / temperature, class_distribution)
    if epsilon:
        log_student, log_teacher = _with_epsilon(log_student), _with_epsilon(log_teacher)
    if direction == "student_teacher":
        log_student, log_teacher = log_teacher, log_student
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum((1, 2))
    if class_distribution == "per_class" and student.shape[1] > 1:
        divergence = divergence / 2
    return temperature**2 * divergence if squared_temperature else divergence


def _log_probabilities(logits: Tensor, class_distribution: ClassDistribution) -> Tensor:
    """(B, C) → (B, D, P): D distributions over P outcomes."""
    if logits.shape[1] == 1 or class_distribution == "per_class":
        return F.logsigmoid(torch.stack([logits, -logits], dim=2))
    return F.log_softmax(logits, dim=1)[:, None]


def _with_epsilon(log_probabilities: Tensor) -> Tensor:
    return ((log_probabilities.exp() + EPSILON) / (1 + EPSILON_SCALE)).log()
