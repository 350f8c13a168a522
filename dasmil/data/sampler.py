"""The order of the training slides: set by seed and epoch, and shared by all processes."""

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DistributedSampler

from dasmil.data.seeds import draw_seed
from dasmil.errors import InputError


class TrainingSampler(DistributedSampler[int]):
    """Slides in random order, or drawn with weights; every step of the optimiser is full.

    If a step has several batches, the order is repeated from its start until the last step is as
    large as the others. Processes take turns in the order, batch by batch. So W processes see the
    same batches in the same steps as one process that accumulates the gradients of W batches.

    Parameters
    ----------
    num_slides: number of training slides.
    world: number of processes.
    rank: number of this process.
    seed: seed of the order, with the epoch number.
    batch_size: slides per batch.
    accumulated: batches per process and step.
    weights: (num_slides,) draw as many slides with replacement, with these weights; None: each
        slide once.
    """

    def __init__(
        self,
        num_slides: int,
        world: int = 1,
        rank: int = 0,
        seed: int = 0,
        batch_size: int = 1,
        accumulated: int = 1,
        weights: Tensor | None = None,
    ):
        super().__init__(range(num_slides), world, rank, seed=seed)  # type: ignore[arg-type]
        self.num_slides = num_slides
        self.weights = weights
        self.batch_size = batch_size
        batches = world * accumulated
        slides_per_step = batches * batch_size if batches > 1 else 1
        self.total_size = ceil(num_slides / slides_per_step) * slides_per_step
        self.num_samples = self.total_size // world

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(draw_seed(self.seed, self.epoch))
        if self.weights is None:
            order = torch.randperm(self.num_slides, generator=generator)
        else:
            order = torch.multinomial(
                self.weights, self.num_slides, replacement=True, generator=generator
            )
        rounds = ceil(self.total_size / self.num_slides)
        filled = order.repeat(rounds)[: self.total_size]
        mine = torch.cat(filled.split(self.batch_size)[self.rank :: self.num_replicas])
        return iter(mine.tolist())


def set_resumed_epoch(sampler: DistributedSampler[Any], trainer: Trainer | None) -> None:
    """Set the sampler of a resumed training to its epoch.

    Lightning sets the epoch too late: reading processes may already be prefetching.

    Parameters
    ----------
    trainer: after its checkpoint was read; None outside of a training.

    Raises
    ------
    InputError
        if the checkpoint was saved within an epoch.
    """
    if trainer is None:
        return
    loop: Any = trainer.fit_loop
    epochs, batches = loop.epoch_progress, loop.epoch_loop.batch_progress
    if not batches.is_last_batch and batches.current.processed:
        raise InputError(
            f"{trainer.ckpt_path}: saved within an epoch, and a training can only be resumed after "
            "a whole epoch; give the last.ckpt of its run"
        )
    # the last batch was trained on, but the epoch is not yet counted
    has_ended = batches.is_last_batch and epochs.total.processed < epochs.total.started
    sampler.set_epoch(epochs.current.processed + has_ended)


def sampling_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """Weights (n,) with which each class is drawn equally often."""
    counts = torch.bincount(torch.tensor(labels), minlength=num_classes)
    return 1.0 / counts[torch.tensor(labels)].double()
