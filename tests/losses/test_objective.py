"""Eq. 3 against its definition in float64 numpy, bag by bag."""

from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch import Tensor

from dasmil.losses import ObjectiveWeights, objective

SCALES = ("x5", "x10", "x20")
SIZES = {"x5": (2, 0, 1), "x10": (3, 0, 2), "x20": (7, 0, 4)}
PARENT = {"x10": [0, 0, 1, 2, 2], "x20": [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 4]}
LABELS = {1: [1, 0, 0], 3: [2, 0, 1]}
GRID = [
    ObjectiveWeights(distillation, criticality, instance, temperature)
    for distillation, criticality, instance, temperature in product(
        (0.0, 0.3, 1.0), (0.0, 0.8), (0.5, 1.0), (1.0, 1.5, 3.0)
    )
]


@dataclass(frozen=True)
class Inputs:
    """Three bags, the second of them without tiles; scales from coarse to fine."""

    scales: tuple[str, ...]
    bag_logits: dict[str, Tensor]
    instance_logits: dict[str, Tensor]
    labels: Tensor

    @property
    def ptr(self) -> dict[str, Tensor]:
        return {s: torch.tensor([0, *SIZES[s]]).cumsum(0) for s in self.scales}

    @property
    def parent(self) -> dict[str, Tensor]:
        """Rows of the next coarser scale; with x5 and x20 alone those of x10 are skipped."""
        rows = {}
        for coarse, fine in pairwise(self.scales):
            direct = fine != "x20" or coarse == "x10"
            up = PARENT[fine] if direct else [PARENT["x10"][row] for row in PARENT["x20"]]
            rows[fine] = torch.tensor(up)
        return rows


def make_inputs(num_logits: int, scales: tuple[str, ...] = SCALES) -> Inputs:
    torch.manual_seed(num_logits)

    def logits(rows: int) -> Tensor:
        return (2 * torch.randn(rows, num_logits, dtype=torch.float64)).requires_grad_()

    return Inputs(
        scales,
        {s: logits(3) for s in scales},
        {s: logits(sum(SIZES[s])) for s in scales},
        torch.tensor(LABELS[num_logits]),
    )


def run(inputs: Inputs, weights: ObjectiveWeights) -> tuple[Tensor, dict[str, Tensor]]:
    return objective(
        inputs.bag_logits,
        inputs.instance_logits,
        inputs.parent,
        inputs.ptr,
        inputs.labels,
        weights,
    )


def probabilities(logits: np.ndarray, tau: float = 1.0) -> np.ndarray:
    """Of the classes in their order; one logit is the second class's."""
    if len(logits) == 1:
        logits = np.array([0.0, logits[0]])
    raised = np.exp(logits / tau)
    return raised / raised.sum()


def by_hand(inputs: Inputs, weights: ObjectiveWeights, bag: int) -> tuple[float, dict[str, float]]:
    """The total and the terms of one bag."""
    label = inputs.labels[bag].item()
    y = {s: t[bag].detach().numpy() for s, t in inputs.bag_logits.items()}
    z = {s: t.detach().numpy() for s, t in inputs.instance_logits.items()}
    rows = {s: range(*inputs.ptr[s][bag : bag + 2].tolist()) for s in inputs.scales}
    terms, total = {}, 0.0
    for scale in inputs.scales:
        terms[f"bag/{scale}"] = -np.log(probabilities(y[scale])[label])
        own = z[scale][list(rows[scale])]
        top = -np.log(probabilities(own.max(axis=0))[label]) if len(own) else 0.0
        terms[f"instance/{scale}"] = top
        taught = scale != inputs.scales[-1]
        total += (1 - weights.distillation if taught else 1) * terms[f"bag/{scale}"]
        total += weights.instance * top
    for coarse, fine in pairwise(inputs.scales):
        tau = weights.temperature
        teacher, student = probabilities(y[fine], tau), probabilities(y[coarse], tau)
        kd = tau**2 * (teacher * np.log(teacher / student)).sum()
        squares = []
        for row in rows[coarse]:
            children = [c for c, up in enumerate(inputs.parent[fine].tolist()) if up == row]
            squares.append(((z[coarse][row] - z[fine][children].mean(axis=0)) ** 2).sum())
        crit = np.mean(squares) if squares else 0.0
        terms[f"distillation/{coarse}"], terms[f"criticality/{coarse}"] = kd, crit
        total += weights.distillation * kd + weights.criticality * crit
    return total, terms


@pytest.mark.parametrize("scales", [("x20",), ("x5", "x20"), SCALES])
@pytest.mark.parametrize("num_logits", [1, 3])
def test_it_is_equation_3(num_logits: int, scales: tuple[str, ...]) -> None:
    inputs = make_inputs(num_logits, scales)
    for weights in GRID:
        total, terms = run(inputs, weights)
        assert total.shape == (3,)
        for bag in range(3):
            expected_total, expected_terms = by_hand(inputs, weights, bag)
            assert set(terms) == set(expected_terms)
            np.testing.assert_allclose(total[bag].item(), expected_total, rtol=1e-9)
            for name, expected in expected_terms.items():
                np.testing.assert_allclose(terms[name][bag].item(), expected, rtol=1e-9)


def test_one_scale_has_label_losses_only() -> None:
    total, terms = run(make_inputs(1, ("x20",)), ObjectiveWeights())
    assert set(terms) == {"bag/x20", "instance/x20"}
    assert torch.equal(total, terms["bag/x20"] + terms["instance/x20"])


def test_each_scale_but_the_finest_is_taught_by_the_next_finer_one() -> None:
    _, terms = run(make_inputs(1), ObjectiveWeights())
    taught = {name.split("/")[1] for name in terms if name.startswith("distillation")}
    assert taught == {"x5", "x10"}
    other = make_inputs(1)
    other.bag_logits["x20"].data += 1
    _, changed = run(other, ObjectiveWeights())
    assert torch.equal(terms["distillation/x5"], changed["distillation/x5"])
    assert not torch.equal(terms["distillation/x10"], changed["distillation/x10"])


@pytest.mark.parametrize("num_logits", [1, 3])
def test_the_finest_scale_learns_from_labels_alone(num_logits: int) -> None:
    inputs = make_inputs(num_logits)
    total, terms = run(inputs, ObjectiveWeights(0.7, 0.8, 0.6, 1.5))
    finest = [inputs.bag_logits["x20"], inputs.instance_logits["x20"]]
    found = torch.autograd.grad(total.sum(), finest, retain_graph=True)
    label_losses = terms["bag/x20"] + 0.6 * terms["instance/x20"]
    expected = torch.autograd.grad(label_losses.sum(), finest)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_logits", [1, 3])
def test_a_scale_between_two_learns_as_student_and_not_as_teacher(num_logits: int) -> None:
    inputs = make_inputs(num_logits)
    weights = ObjectiveWeights(0.7, 0.8, 0.6, 1.5)
    middle = [inputs.bag_logits["x10"], inputs.instance_logits["x10"]]
    found = torch.autograd.grad(run(inputs, weights)[0].sum(), middle)

    finer = replace(
        inputs,
        scales=("x10", "x20"),
        bag_logits={s: inputs.bag_logits[s] for s in ("x10", "x20")},
        instance_logits={s: inputs.instance_logits[s] for s in ("x10", "x20")},
    )
    expected = torch.autograd.grad(run(finer, weights)[0].sum(), middle)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_with_lambda_one_the_taught_bag_heads_see_no_label() -> None:
    inputs = make_inputs(1)
    other = replace(inputs, labels=1 - inputs.labels)
    weights = ObjectiveWeights(distillation=1.0, instance=0.0)
    for scale, sees_labels in (("x5", False), ("x10", False), ("x20", True)):
        ours, theirs = (
            torch.autograd.grad(run(i, weights)[0].sum(), inputs.bag_logits[scale])[0]
            for i in (inputs, other)
        )
        assert torch.equal(ours, theirs) is not sees_labels


def test_the_defaults_are_the_papers() -> None:
    defaults = ObjectiveWeights()
    assert (defaults.distillation, defaults.criticality, defaults.temperature) == (1.0, 1.0, 1.5)
    assert defaults.instance == 1.0


def test_a_bag_without_tiles_keeps_its_bag_terms_only() -> None:
    _, terms = run(make_inputs(3), ObjectiveWeights())
    for name, term in terms.items():
        assert (term[1] == 0) == name.startswith(("instance", "criticality"))


def test_the_terms_come_unweighted() -> None:
    inputs = make_inputs(1)
    _, plain = run(inputs, ObjectiveWeights(1.0, 1.0, 1.0))
    _, weighted = run(inputs, ObjectiveWeights(0.2, 0.0, 0.1))
    assert {n: t.tolist() for n, t in plain.items()} == {n: t.tolist() for n, t in weighted.items()}
