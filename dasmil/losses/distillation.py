"""Eq. 1: agreement of the bag predictions of two scales."""

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.5) -> Tensor:
    """L_KD of Eq. 1, with the finer scale as fixed teacher.

    τ² KL(softmax(teacher/τ) ‖ softmax(student/τ)). The order is that of the released code (D1), the
    factor τ² the paper's (D2); no gradient reaches the teacher (D11). One logit stands for the
    two-point distribution (σ(y/τ), σ(−y/τ)) (D3).

    Parameters
    ----------
    student: (B, C) bag logits of the coarser scale.
    teacher: (B, C) bag logits of the finer scale.
    temperature: τ.

    Returns
    -------
    (B,)
    """
    log_student = _log_probabilities(student / temperature)
    log_teacher = _log_probabilities(teacher.detach() / temperature)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)
    return temperature**2 * divergence


def _log_probabilities(logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        logits = torch.cat([logits, torch.zeros_like(logits)], dim=1)
    return F.log_softmax(logits, dim=1)
