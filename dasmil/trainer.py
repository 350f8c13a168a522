"""Lightning's Trainer, as the command line creates it."""

import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator, CUDAAccelerator, MPSAccelerator
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from dasmil.errors import InputError

ON_CPU = "give --trainer.accelerator cpu"


def allows_tf32() -> bool:
    """Whether matrix products of float32 may round their factors to TF32 on NVIDIA GPUs.

    torch's default is no. A user allows it by ``torch.set_float32_matmul_precision("high")`` or,
    before the start, by the environment variable ``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1``.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def match_convolutions() -> None:
    """Let convolutions use TF32 only if matrix products may.

    torch allows it for convolutions by default, among them the patches of a ViT.
    """
    # by the older of torch's two ways: after the newer one, torch raises if a library reads the
    # older
    torch.backends.cudnn.allow_tf32 = allows_tf32()


def name_precision(trainer: Trainer) -> str:
    """The Trainer's precision, such as ``bf16-mixed``, and whether TF32 is allowed beside it."""
    return f"{trainer.precision} with TF32" if allows_tf32() else str(trainer.precision)


class CommandLineTrainer(Trainer):
    """Lightning's Trainer as all verbs use it.

    float32 is float32 in all operations, see :func:`match_convolutions`, and
    ``limit_train_batches: 1`` is one batch, not all of them.

    ``accelerator: auto`` is never Apple's GPU (mps), for which torch lacks kernels of the methods.

    The numbers of batches have no union as their type: ``typing`` gives one object for
    ``Union[int, float]`` and ``Union[float, int]``, whichever a process asks for first, and with
    the second jsonargparse reads 1 as 1.0.

    Raises
    ------
    InputError
        if one of them is no number, or the machine lacks the GPUs that are asked for.
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
        accelerator: str | Accelerator = "auto",
        devices: list[int] | str | int = "auto",
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
        match_convolutions()
        try:
            super().__init__(
                **numbers,
                val_check_interval=val_check_interval,
                accelerator=_choose_accelerator(accelerator),
                devices=devices,
                **kwargs,
            )
        except MisconfigurationException as error:
            if "You requested gpu" not in str(error):
                raise
            raise InputError(
                f"trainer.devices: {devices} asks for GPUs that this machine does not have; it has "
                f"{CUDAAccelerator.auto_device_count() or 1}"
            ) from error


def _choose_accelerator(asked: str | Accelerator) -> str | Accelerator:
    """The accelerator for Lightning, which fails with a list of classes if there is none."""
    has_mps, has_cuda = MPSAccelerator.is_available(), CUDAAccelerator.is_available()
    if asked == "auto" and has_mps:
        _print_cpu_on_mac()
        warnings.filterwarnings("ignore", "GPU available but not used")  # Lightning advises it
        return "cpu"
    if asked == "mps" and not has_mps:
        raise InputError(f"trainer.accelerator: no Apple GPU was found on this machine; {ON_CPU}")
    if asked in ("gpu", "cuda") and not has_cuda and not (asked == "gpu" and has_mps):
        raise InputError(
            f"trainer.accelerator: no GPU was found on this machine; {ON_CPU}, or check that "
            "nvidia-smi lists one and that torch was installed with CUDA"
        )
    return asked


@rank_zero_only
def _print_cpu_on_mac() -> None:
    print(
        "trainer.accelerator: auto is the CPU on a Mac; embed and the training of an extractor may "
        "run on its GPU with --trainer.accelerator mps, which has not been tried"
    )
