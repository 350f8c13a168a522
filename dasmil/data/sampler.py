"""The order in which slides are trained on: by seed and epoch alone, shared by all processes."""

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from dasmil.seeds import draw_seed


class TrainingSampler(DistributedSampler[int]):
    """Slides in random order, or drawn with weights; every step of the optimiser is full.

    The order is filled up from its start until the last step is as large as the others, where a
    step has several batches. Processes take turns in it, batch by batch, so that W processes, and
    one process that accumulates the gradients of W batches, see the very same batches in the same
    steps.

    Parameters
    ----------
    num_slides: of the training part.
    world, rank: number of processes, and which one this is.
    seed: of the order; with the epoch number it decides all.
    batch_size, accumulated: slides of a batch, and batches of each process in a step.
    weights: (num_slides,) draw as many slides with replacement, each as often as its weight says;
        each slide once where None.
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
        self.skipped = 0  # of this process, in the epoch that a resumed training goes on in

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
        start, self.skipped = self.skipped, 0
        return iter(mine[start:].tolist())


class TrainingLoader(DataLoader[Any]):
    """A loader that goes on in the middle of an epoch; see :func:`go_on`.

    How far it is, Lightning's own progress says, so there is nothing to keep here; but what has no
    such methods, Lightning warns of.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def go_on(sampler: Any, trainer: Trainer | None, batch_size: int) -> None:
    """Set the sampler of a resumed training to its epoch, and to its place in there.

    Lightning tells a sampler its epoch when processes may have begun to read already.

    Parameters
    ----------
    sampler: with ``set_epoch`` and ``skipped``.
    trainer: after its checkpoint was read; None outside of a training.
    """
    if trainer is None:
        return
    loop: Any = trainer.fit_loop
    epochs, batches = loop.epoch_progress, loop.epoch_loop.batch_progress
    ended = batches.is_last_batch and epochs.total.processed < epochs.total.started
    sampler.set_epoch(epochs.current.processed + ended)  # it ended, but was not yet counted
    if not batches.is_last_batch:
        sampler.skipped = batches.current.processed * batch_size


def sampling_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """(n,) weights with which slides of each class are drawn equally often."""
    counts = torch.bincount(torch.tensor(labels), minlength=num_classes)
    return 1.0 / counts[torch.tensor(labels)].double()
