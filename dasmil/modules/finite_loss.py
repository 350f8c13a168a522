"""A training whose loss or weights are not finite ends, and writes no checkpoint of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dasmil.data.distributed import gather_lists, is_true_anywhere
from dasmil.errors import InputError, join_few

CHECKED_STEPS = 10  # steps whose losses are read at once
ADVICE = (
    "check the features of these slides, or lower the learning rate, or train with "
    "--trainer.precision 32-true; checkpoints of earlier epochs are sound"
)


class FiniteLoss:
    """Ends a training in all processes if the loss of a step is not finite in one of them.

    The losses of several steps are read at once, because each reading waits for the GPU.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[int, Tensor, Callable[[], Sequence[str]]]] = []

    def watch(self, step: int, loss: Tensor, slides: Callable[[], Sequence[str]]) -> None:
        """Keep the loss of a step for the next check.

        Parameters
        ----------
        step: number of the step.
        loss: a scalar.
        slides: returns the slide_ids of the step; called only if its loss is not finite.
        """
        self._steps.append((step, loss.detach().isfinite(), slides))
        if len(self._steps) == CHECKED_STEPS:
            self.check()

    def check(self) -> None:
        """Check the steps kept so far; every process must call it after the same step.

        Raises
        ------
        InputError
            if a loss is not finite, with the first such step and its slides.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        broken = ~torch.stack([finite for _, finite, _ in steps]).all()
        if not is_true_anywhere(broken):
            return
        here = [(step, list(slides())) for step, finite, slides in steps if not finite]
        everywhere = gather_lists(here)
        first = min(step for step, _ in everywhere)
        names = sorted({name for step, slides in everywhere if step == first for name in slides})
        raise InputError(
            f"fit: the loss of step {first} is not finite; its slides are {join_few(names)}; "
            + ADVICE
        )

    def check_weights(self, state: Mapping[str, Any]) -> None:
        """Check what a checkpoint is about to hold, and the steps kept so far.

        Raises
        ------
        InputError
            if a loss or a weight is not finite.
        """
        self.check()
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        if not all(bool(value.isfinite().all()) for value in tensors):
            raise InputError(
                "fit: weights are not finite after the last step of the epoch, although its loss "
                "is; lower the learning rate, or train with --trainer.precision 32-true; "
                "checkpoints of earlier epochs are sound"
            )
