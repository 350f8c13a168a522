"""Eq. 1: agreement of the bag predictions of two scales.

Paper: Bontempo et al. 2023. D numbers: .github/docs/paper.md.
"""

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
    """L_KD = τ² KL(p_teacher ‖ p_student) of Eq. 1, with the finer scale as teacher.

    p = softmax(y/τ); one logit means the two-point distribution (σ(y/τ), σ(−y/τ)).

    Parameters
    ----------
    student: (B, C) bag logits of the coarser scale (the scale student).
    teacher: (B, C) bag logits of the finer scale (the scale teacher).
    temperature: τ > 0.
    direction: ``teacher_student`` is the released code's KL(fine ‖ coarse), ``student_teacher`` the
        printed KL(coarse ‖ fine) (D1).
    squared_temperature: whether to multiply by τ² as printed; the released code does not (D2).
    class_distribution: for C > 1 a ``softmax`` over the classes as printed, or, as released, half
        the sum over ``per_class`` two-point divergences (D3).
    epsilon: whether to use (p + 1e-7) / (1 + 1e-8) for every p, as released, not log space (D5).
    detach_teacher: whether to stop gradients to the teacher (D11).

    Returns
    -------
    (B,); zero if student and teacher agree.

    Examples
    --------
    >>> student, teacher = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [1.0]])
    >>> distillation_loss(student, teacher)
    tensor([0.7376, 0.0000])
    """
    # close logits would be equal in half precision
    student, teacher = at_least_float32(student), at_least_float32(teacher)
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
