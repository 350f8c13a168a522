"""DINO's loss, the same in every precision of the networks."""

from typing import Any

import torch
from lightly.loss import DINOLoss
from torch import Tensor


class PreciseLoss(DINOLoss):
    """lightly's loss; its centre and temperatures stay in float32 with half-precision networks."""

    center: Tensor
    teacher_temp_schedule: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # the last entry is for all later epochs; for these lightly creates a tensor of the default
        # dtype, which Lightning sets to half precision for bf16-true
        rise = self.teacher_temp_schedule
        self.teacher_temp_schedule = torch.cat([rise, rise.new_tensor([self.teacher_temp])])
        self.warmup_teacher_temp_epochs = len(self.teacher_temp_schedule)

    def forward(self, teacher_out: list[Tensor], student_out: list[Tensor], epoch: int) -> Tensor:
        """Mean loss of views (B, K) of both networks."""
        return super().forward(teacher_out, student_out, epoch=self._entry(epoch))

    def teacher_temperature(self, epoch: int) -> float:
        return float(self.teacher_temp_schedule[self._entry(epoch)])

    def _entry(self, epoch: int) -> int:
        return min(epoch, len(self.teacher_temp_schedule) - 1)

    def _apply(self, fn: Any, recurse: bool = True) -> "PreciseLoss":
        center = self.center
        super()._apply(fn, recurse)
        dtype = torch.promote_types(center.dtype, self.center.dtype)
        self.center = center.to(self.center.device, dtype)
        return self
