"""Lightning's Trainer, as the command line creates it."""

from typing import Any

from lightning.pytorch import Trainer

from dasmil.errors import InputError


class CommandLineTrainer(Trainer):
    """Lightning's Trainer, for which ``limit_train_batches: 1`` is one batch, not all of them.

    These options have no union as their type: ``typing`` gives one object for ``Union[int, float]``
    and ``Union[float, int]``, whichever a process asks for first, and with the second jsonargparse
    reads 1 as 1.0.

    Raises
    ------
    InputError
        if one of them is no number.
    """

    def __init__(
        self,
        *,
        limit_train_batches: Any = None,
        limit_val_batches: Any = None,
        limit_test_batches: Any = None,
        limit_predict_batches: Any = None,
        overfit_batches: Any = 0.0,
        val_check_interval: Any = None,
        **kwargs: Any,
    ):
        numbers = {
            "limit_train_batches": limit_train_batches,
            "limit_val_batches": limit_val_batches,
            "limit_test_batches": limit_test_batches,
            "limit_predict_batches": limit_predict_batches,
            "overfit_batches": overfit_batches,
        }
        for name, number in numbers.items():
            if number is not None and type(number) not in (int, float):
                raise InputError(f"trainer.{name}: {number!r} is no number of batches")
        super().__init__(**numbers, val_check_interval=val_check_interval, **kwargs)
