"""Training steps on a device that only claims to be a GPU: nothing mixes devices, nothing waits."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from bag_factory import make_bag
from foreign_device import DEVICE, ForeignTensor, Watch, abroad, gradients
from models import make_module
from torch import Tensor

from dasmil.bags import BagGraph, bag_graph, join_graphs
from dasmil.methods import ABMIL, CLAM, DASMIL, DTFD
from dasmil.modules import MILModule

SCALES = [("x20",), ("x10", "x20"), ("x5", "x10", "x20")]
SMALL = {"hidden_dim": 8, "out_dim": 8, "query_dim": 4, "heads": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no dropout": {"attention_dropout": 0.0, "node_dropout": 0.0},
    "no graph": {"contextualize": False},
    "plain residual": {"residual": "plain"},
    "gated residual": {"residual": "glu"},
    "torch's bag classifier": {"bag_classifier_init": "torch"},
    "parents' vectors": {"concatenate_parents": True},
    "parents' vectors without a graph": {"concatenate_parents": True, "contextualize": False},
    "parents alone": {"coarse_instances": "parents"},
    "mean pooling": {"pooling": "mean"},
    "max pooling": {"pooling": "max"},
    "mean pooling of parents alone": {"pooling": "mean", "coarse_instances": "parents"},
    "max pooling of parents alone": {"pooling": "max", "coarse_instances": "parents"},
    "fine loss discounted": {"discounted": "fine", "distillation": 0.5},
    "the finest teaches": {"distillation_pairs": "finest"},
    "the other direction": {"kl_direction": "student_teacher", "squared_temperature": False},
    "epsilon": {"epsilon": True},
    "per class": {"class_distribution": "per_class", "one_logit": False},
    "attention compared": {"criticality_scores": "attention"},
    "largest child": {"children_pooling": "max"},
    "sum over tiles": {"criticality_reduction": "sum"},
    "teacher learns": {"detach_teacher": False},
    "standardised": {"standardize": True},
    "weighted classes": {"class_weights": [2.0, 0.5]},
}


def make_step(
    scales: tuple[str, ...],
    method: type[MILModule] = DASMIL,
    num_bags: int = 2,
    num_tiles: int = 30,
    **options: Any,
) -> tuple[MILModule, BagGraph]:
    torch.manual_seed(0)
    side = 16 if num_tiles < 256 else 64
    bags = [make_bag(str(n), scales, 8, num_tiles, side, seed=n) for n in range(num_bags)]
    module = make_module(method, bag_format=bags[0].header.bag_format(), **options)
    graphs = [bag_graph(bag, n % 2, edges=module.uses_edges) for n, bag in enumerate(bags)]
    return module, join_graphs(graphs)


def step(module: MILModule, graph: BagGraph) -> tuple[Tensor, Mapping[str, Tensor | None]]:
    """Loss and gradients of a training step."""
    torch.manual_seed(1)
    loss = module.training_step(graph, 0)
    loss.backward()
    return loss, dict(gradients(module))


def check(module: MILModule, graph: BagGraph, waits: int) -> None:
    here, expected = step(module, graph)
    module.zero_grad()
    with Watch():
        there = graph.to(DEVICE)
    abroad(module)
    with Watch() as watch:
        loss, found = step(module, there)
    torch.testing.assert_close(loss.inner, here)  # a GPU sums rows before the projection
    assert list(found) == list(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert len(watch.waits) <= waits, "\n".join(watch.waits)
    assert not watch.pageable, "\n".join(watch.pageable)
    assert not watch.unordered, "\n".join(watch.unordered)
    assert not watch.one_thread, "\n".join(watch.one_thread)


@pytest.mark.parametrize(
    "scales",
    [pytest.param(s, marks=() if len(s) == 2 else pytest.mark.slow) for s in SCALES],
    ids=" ".join,
)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_training_step_of_dasmil(setting: str, scales: tuple[str, ...]) -> None:
    check(*make_step(scales, **(SMALL | SETTINGS[setting])), waits=2)


@pytest.mark.parametrize("pooling", ["attention", "mean", "max"])
def test_no_bag_is_left_to_one_thread(pooling: str) -> None:
    parts = make_step(SCALES[1], num_tiles=2500, **SMALL, pooling=pooling)
    check(*parts, waits=2)


def test_a_step_of_two_scales_starts_few_kernels() -> None:
    module, graph = make_step(SCALES[1], num_bags=1, **(SMALL | {"heads": 3}))
    with Watch():
        there = graph.to(DEVICE)
    abroad(module)
    with Watch() as watch:
        step(module, there)
    assert watch.launches.total() < 580  # without Triton, whose kernels do the work of seven each


@pytest.mark.parametrize(
    ("method", "options", "waits"),
    [
        (ABMIL, {}, 0),
        (CLAM, {"hidden_dim": 16, "attention_dim": 4, "dropout": 0.0}, 2),
        (DTFD, {"hidden_dim": 16, "attention_dim": 4, "distillation": "maxmins"}, 2),
    ],
)
def test_a_training_step_of_another_method(
    method: type[MILModule], options: dict[str, Any], waits: int
) -> None:
    check(*make_step(("x20",), method, **options), waits=waits)


# The watch itself


def far(*shape: int) -> Tensor:
    return ForeignTensor(torch.arange(float(torch.Size(shape).numel())).view(shape))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 1).any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 1),
        lambda x: x.unique(),
        lambda x: x.long().bincount(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.masked_select(x > 1),
        lambda x: torch.segment_reduce(x, "sum", lengths=x.new_full((1,), 4).long()),
        lambda x: x.new_zeros(4).index_put_((x > 1,), x[0]),
    ],
)
def test_a_wait_is_seen(wait: Callable[[Tensor], object]) -> None:
    x = far(4)
    with Watch() as watch:
        wait(x)
    assert len(watch.waits) == 1


def test_what_does_not_wait_is_not_taken_for_it() -> None:
    x = far(4)
    with Watch() as watch:
        y = torch.where(x > 1, 2.0, x).clamp(min=0) + torch.arange(4, device=DEVICE)
        y = y.scatter(0, torch.zeros(4, dtype=torch.int64, device=DEVICE), 1.0)[:2]
        torch.segment_reduce(x, "sum", offsets=torch.full((2,), 0, device=DEVICE))
        x.repeat_interleave(x.long(), output_size=6)
    assert isinstance(y, ForeignTensor) and not watch.waits
    assert watch.launches["scatter"] == 1 and watch.launches["arange"] == 1


@pytest.mark.parametrize(
    "mix", [lambda x, y: x + y, lambda x, y: torch.cat([x, y]), lambda x, y: y.where(y > 1, x)]
)
def test_mixed_devices_raise_and_a_number_does_not(mix: Callable[..., Tensor]) -> None:
    with Watch(), pytest.raises(RuntimeError, match="mixes devices"):
        mix(far(4), torch.ones(4))
    with Watch():
        far(4) * torch.tensor(2.0)


def test_copies_from_pageable_memory_are_seen() -> None:
    with Watch() as watch:
        torch.ones(3).to(DEVICE)
        torch.tensor([1.0], device=DEVICE)
        far(1).new_tensor([1.0])
    assert len(watch.pageable) == 3


def test_sums_in_no_order_and_sums_by_one_thread_are_seen() -> None:
    x, rows = far(2000), torch.zeros(2000, dtype=torch.int64)
    with Watch() as watch:
        index = rows.to(DEVICE)
        x.new_zeros(1).index_add_(0, index, x)
        x.new_zeros(1).scatter_add_(0, index, x)
        torch.segment_reduce(x, "sum", offsets=far(2).long() * 2000)
        torch.segment_reduce(x, "sum", offsets=torch.arange(2001, device=DEVICE))
    assert len(watch.unordered) == 2 and len(watch.one_thread) == 1
