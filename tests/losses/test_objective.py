"""Eq. 3 against its definition in plain float64 numbers, bag by bag, in each of its forms."""

import random
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations, pairwise, product
from math import exp, log
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from losses.numeric import slope
from torch import Tensor

from dasmil.bags.output import ScaleOutput
from dasmil.errors import InputError
from dasmil.methods.dasmil import ObjectiveOptions, objective

# Three bags, the second without tiles. -1 are orphans; row 2 of x5 and row 3 of x10 have no
# children; row 1 of x5 has a child at x10 and, with that, none at x20.
SCALES = ("x5", "x10", "x20")
SIZES = {"x5": (3, 0, 1), "x10": (4, 0, 2), "x20": (7, 0, 4)}
PARENT = {"x10": [-1, 0, 0, 1, 3, 3], "x20": [-1, 0, 1, 1, 1, 2, 2, 4, 4, 4, 5]}
IN_X5 = [-1, -1, 0, 0, 0, 0, 0, 3, 3, 3, 3]  # the ancestor of each x20 tile
LABELS = {1: [1, 0, 0], 3: [2, 0, 1]}
WEIGHTS = [
    dict(zip(("distillation", "criticality", "instance", "temperature"), values))
    for values in product((0.0, 0.3, 1.0), (0.0, 0.8), (0.5, 1.0), (1.0, 1.5, 3.0))
]
KINDS = ("bag_logits", "instance_logits", "attention")
SWITCHES: dict[str, tuple[Any, ...]] = {
    "discounted": ("coarse", "fine"),
    "distillation_pairs": ("neighbours", "finest"),
    "kl_direction": ("teacher_student", "student_teacher"),
    "squared_temperature": (True, False),
    "class_distribution": ("softmax", "per_class"),
    "epsilon": (False, True),
    "criticality_scores": ("logits", "attention"),
    "children_pooling": ("mean", "max"),
    "criticality_reduction": ("mean", "sum"),
    "detach_teacher": (True, False),
}

Values = dict[str, dict[str, np.ndarray]]  # by kind and scale


@dataclass(frozen=True)
class Inputs:
    """What a model says of the bags at some scales, coarse to fine."""

    output: dict[str, ScaleOutput]
    labels: Tensor

    @property
    def scales(self) -> tuple[str, ...]:
        return tuple(self.output)

    @property
    def ptr(self) -> dict[str, Tensor]:
        return {s: torch.tensor([0, *SIZES[s]]).cumsum(0) for s in self.scales}

    @property
    def parent(self) -> dict[str, Tensor]:
        return {
            fine: torch.tensor(parents_of(coarse, fine)) for coarse, fine in pairwise(self.scales)
        }

    def values(self) -> Values:
        return {
            kind: {s: getattr(out, kind).detach().numpy() for s, out in self.output.items()}
            for kind in KINDS
        }


def parents_of(coarse: str, fine: str) -> list[int]:
    return IN_X5 if (coarse, fine) == ("x5", "x20") else PARENT[fine]


def make_inputs(
    num_logits: int, scales: tuple[str, ...] = SCALES, parents_only: bool = False
) -> Inputs:
    torch.manual_seed(num_logits)

    def draw(rows: int) -> Tensor:
        return (2 * torch.randn(rows, num_logits, dtype=torch.float64)).requires_grad_()

    output = {}
    for number, scale in enumerate(scales):
        rows = sum(SIZES[scale])
        shown = [True] * rows
        if parents_only and scale != scales[-1]:
            shown = [row in parents_of(scale, scales[number + 1]) for row in range(rows)]
        bag_index = torch.arange(3).repeat_interleave(torch.tensor(SIZES[scale]))
        output[scale] = ScaleOutput(draw(3), draw(rows), draw(rows), bag_index, torch.tensor(shown))
    return Inputs(output, torch.tensor(LABELS[num_logits]))


def run(inputs: Inputs, options: ObjectiveOptions) -> tuple[Tensor, dict[str, Tensor]]:
    return objective(inputs.output, inputs.parent, inputs.ptr, inputs.labels, options)


def probabilities(logits: list[float], tau: float = 1.0) -> list[float]:
    """Of the classes in their order; one logit is the second class's."""
    raised = [exp(y / tau) for y in ([0.0, *logits] if len(logits) == 1 else logits)]
    return [value / sum(raised) for value in raised]


def kl(student: list[float], teacher: list[float], o: ObjectiveOptions) -> float:
    """L_KD."""
    several = len(student) > 1
    groups = [(student, teacher)]
    if o.class_distribution == "per_class":
        groups = [([s], [t]) for s, t in zip(student, teacher)]
    total = 0.0
    for ours, theirs in groups:
        p, q = probabilities(theirs, o.temperature), probabilities(ours, o.temperature)
        if o.kl_direction == "student_teacher":
            p, q = q, p
        if o.epsilon:
            p, q = ([(x + 1e-7) / (1 + 1e-8) for x in xs] for xs in (p, q))
        total += sum(a * log(a / b) for a, b in zip(p, q))
    total *= 0.5 if several and o.class_distribution == "per_class" else 1.0
    return total * (o.temperature**2 if o.squared_temperature else 1.0)


def crit(
    z: np.ndarray, of_children: np.ndarray, rows: range, parent: list[int], o: ObjectiveOptions
) -> float:
    """L_CRIT."""
    squares = []
    for row in rows:
        children = [of_children[c] for c, up in enumerate(parent) if up == row]
        if children:
            pooled = np.max(children, 0) if o.children_pooling == "max" else np.mean(children, 0)
            squares.append(((z[row] - pooled) ** 2).sum())
    if not squares:
        return 0.0
    return float(np.sum(squares) if o.criticality_reduction == "sum" else np.mean(squares))


def by_hand(
    inputs: Inputs, o: ObjectiveOptions, bag: int, at: Values, teacher: Values | None = None
) -> tuple[float, dict[str, float]]:
    """The total and the terms of one bag, with these values; other ones for who teaches."""
    teacher = at if teacher is None else teacher
    scales = inputs.scales
    label = inputs.labels[bag].item()
    rows = {s: range(*inputs.ptr[s][bag : bag + 2].tolist()) for s in scales}
    terms, total = {}, 0.0
    for scale in scales:
        ce = -log(probabilities(at["bag_logits"][scale][bag].tolist())[label])
        seen = [r for r in rows[scale] if inputs.output[scale].shown[r]]
        top = 0.0
        if seen:
            largest = at["instance_logits"][scale][seen].max(0).tolist()
            top = -log(probabilities(largest)[label])
        discounted = (scale == scales[-1]) if o.discounted == "fine" else (scale != scales[-1])
        weight = 1 - o.distillation if discounted and len(scales) > 1 else 1
        terms[f"bag/{scale}"], terms[f"instance/{scale}"] = ce, top
        total += weight * ce + o.instance * top
    for number, coarse in enumerate(scales[:-1]):
        fine = scales[-1] if o.distillation_pairs == "finest" else scales[number + 1]
        kd = kl(
            at["bag_logits"][coarse][bag].tolist(), teacher["bag_logits"][fine][bag].tolist(), o
        )
        kind = "attention" if o.criticality_scores == "attention" else "instance_logits"
        z, of_children = at[kind][coarse], teacher[kind][fine]
        c = crit(z, of_children, rows[coarse], parents_of(coarse, fine), o)
        terms[f"distillation/{coarse}"], terms[f"criticality/{coarse}"] = kd, c
        total += o.distillation * kd + o.criticality * c
    return total, terms


def assert_is_equation_3(inputs: Inputs, options: ObjectiveOptions) -> None:
    total, terms = run(inputs, options)
    assert total.shape == (3,)
    at = inputs.values()
    for bag in range(3):
        expected_total, expected_terms = by_hand(inputs, options, bag, at)
        assert set(terms) == set(expected_terms)
        np.testing.assert_allclose(total[bag].item(), expected_total, rtol=1e-9)
        for name, expected in expected_terms.items():
            np.testing.assert_allclose(terms[name][bag].item(), expected, rtol=1e-9, atol=1e-15)


def test_every_option_is_among_those_that_are_tested() -> None:
    """A new one must be written down in plain numbers here, with all its values."""
    names = {field.name for field in fields(ObjectiveOptions)}
    assert names == set(SWITCHES) | set(WEIGHTS[0])
    for name, kind in get_type_hints(ObjectiveOptions).items():
        if name in SWITCHES:
            assert set(SWITCHES[name]) == set(get_args(kind) or (True, False))
            assert getattr(ObjectiveOptions(), name) == SWITCHES[name][0]


@pytest.mark.parametrize("scales", [("x20",), ("x5", "x20"), SCALES], ids="+".join)
@pytest.mark.parametrize("num_logits", [1, 3])
def test_equation_3_for_all_weights(num_logits: int, scales: tuple[str, ...]) -> None:
    inputs = make_inputs(num_logits, scales)
    for weights in WEIGHTS:
        assert_is_equation_3(inputs, ObjectiveOptions(**weights))


@pytest.mark.parametrize("name", list(SWITCHES))
@pytest.mark.parametrize("num_logits", [1, 3])
def test_equation_3_with_each_switch(num_logits: int, name: str) -> None:
    inputs = make_inputs(num_logits)
    for weights in WEIGHTS[::5]:
        assert_is_equation_3(inputs, ObjectiveOptions(**weights, **{name: SWITCHES[name][1]}))


@pytest.mark.parametrize("parents_only", [False, True], ids=["all", "parents"])
@pytest.mark.parametrize("num_logits", [1, 3])
def test_equation_3_with_several_switches_together(num_logits: int, parents_only: bool) -> None:
    """32 combinations drawn at random, which hold every pair of values."""
    inputs = make_inputs(num_logits, parents_only=parents_only)
    rng = random.Random(0)
    drawn = [{name: rng.choice(both) for name, both in SWITCHES.items()} for _ in range(32)]
    pairs = {pair for each in drawn for pair in combinations(each.items(), 2)}
    assert len(pairs) == 4 * len(SWITCHES) * (len(SWITCHES) - 1) / 2
    for number, switches in enumerate(drawn):
        weights = WEIGHTS[7 * number % len(WEIGHTS)]
        assert_is_equation_3(inputs, ObjectiveOptions(**weights, **switches))


PRINTED = ObjectiveOptions(
    instance=0.0,
    discounted="fine",
    kl_direction="student_teacher",
    criticality_scores="attention",
    criticality_reduction="sum",
    detach_teacher=False,
)
RELEASED = ObjectiveOptions(
    squared_temperature=False, class_distribution="per_class", epsilon=True, children_pooling="max"
)


@pytest.mark.parametrize(
    ("options", "num_logits", "parents_only", "detach"),
    [
        (ObjectiveOptions(), 1, False, True),
        (ObjectiveOptions(), 3, True, False),
        (PRINTED, 1, True, False),
        (PRINTED, 3, False, True),
        (RELEASED, 1, False, False),
        (RELEASED, 3, True, True),
        (replace(RELEASED, distillation_pairs="finest"), 3, False, False),
    ],
)
def test_equation_3_slopes(
    options: ObjectiveOptions, num_logits: int, parents_only: bool, detach: bool
) -> None:
    """Of every bag logit, instance logit and attention, at every scale."""
    inputs = make_inputs(num_logits, parents_only=parents_only)
    options = replace(options, distillation=0.7, criticality=0.8, detach_teacher=detach)
    run(inputs, options)[0].sum().backward()
    base = inputs.values()
    for kind, scale in product(KINDS, SCALES):

        def total(values: np.ndarray, kind: str = kind, scale: str = scale) -> float:
            moved = {**base, kind: {**base[kind], scale: values}}
            teacher = base if detach else moved
            return sum(by_hand(inputs, options, bag, moved, teacher)[0] for bag in range(3))

        expected = slope(total, base[kind][scale])
        found = getattr(inputs.output[scale], kind).grad
        np.testing.assert_allclose(0 if found is None else found, expected, atol=1e-7)


def test_one_scale_has_undiscounted_label_losses_only() -> None:
    inputs = make_inputs(1, ("x20",))
    for discounted in SWITCHES["discounted"]:
        total, terms = run(inputs, ObjectiveOptions(discounted=discounted))
        assert set(terms) == {"bag/x20", "instance/x20"}
        assert torch.equal(total, terms["bag/x20"] + terms["instance/x20"])


def with_more(inputs: Inputs, scale: str) -> Inputs:
    """The same with the bag logits of a scale one larger."""
    says = inputs.output[scale]
    more = replace(says, bag_logits=says.bag_logits.detach() + 1)
    return replace(inputs, output={**inputs.output, scale: more})


@pytest.mark.parametrize(
    ("pairs", "of_x5"), [("neighbours", {"x5", "x10"}), ("finest", {"x5", "x20"})]
)
def test_each_scale_but_the_finest_is_taught_by_one_finer_scale(pairs: Any, of_x5: set) -> None:
    inputs, options = make_inputs(1), ObjectiveOptions(distillation_pairs=pairs)
    _, terms = run(inputs, options)
    taught = {name.split("/")[1] for name in terms if name.startswith("distillation")}
    assert taught == {"x5", "x10"}
    depends = {}
    for scale in SCALES:
        _, changed = run(with_more(inputs, scale), options)
        for name in ("distillation/x5", "distillation/x10"):
            if not torch.equal(terms[name], changed[name]):
                depends.setdefault(name, set()).add(scale)
    assert depends == {"distillation/x5": of_x5, "distillation/x10": {"x10", "x20"}}


@pytest.mark.parametrize("num_logits", [1, 3])
def test_the_finest_scale_learns_from_labels_alone(num_logits: int) -> None:
    inputs = make_inputs(num_logits)
    total, terms = run(inputs, ObjectiveOptions(0.7, 0.8, 0.6, 1.5))
    finest = [inputs.output["x20"].bag_logits, inputs.output["x20"].instance_logits]
    found = torch.autograd.grad(total.sum(), finest, retain_graph=True)
    label_losses = terms["bag/x20"] + 0.6 * terms["instance/x20"]
    expected = torch.autograd.grad(label_losses.sum(), finest)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_logits", [1, 3])
def test_a_scale_between_two_learns_as_student_and_not_as_teacher(num_logits: int) -> None:
    inputs = make_inputs(num_logits)
    options = ObjectiveOptions(0.7, 0.8, 0.6, 1.5)
    middle = [inputs.output["x10"].bag_logits, inputs.output["x10"].instance_logits]
    found = torch.autograd.grad(run(inputs, options)[0].sum(), middle)

    finer = replace(inputs, output={s: inputs.output[s] for s in ("x10", "x20")})
    expected = torch.autograd.grad(run(finer, options)[0].sum(), middle)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("discounted", "sees_labels"),
    [
        ("coarse", {"x5": False, "x10": False, "x20": True}),
        ("fine", {"x5": True, "x10": True, "x20": False}),
    ],
)
def test_with_lambda_one_the_discounted_bag_heads_see_no_label(
    discounted: Any, sees_labels: dict[str, bool]
) -> None:
    """In the printed form the teacher's head learns from Eq. 1 alone (D6)."""
    inputs = make_inputs(1)
    other = replace(inputs, labels=1 - inputs.labels)
    options = ObjectiveOptions(
        distillation=1.0, instance=0.0, discounted=discounted, detach_teacher=False
    )
    for scale, sees in sees_labels.items():
        ours, theirs = (
            torch.autograd.grad(run(i, options)[0].sum(), inputs.output[scale].bag_logits)[0]
            for i in (inputs, other)
        )
        assert ours.any()
        assert torch.equal(ours, theirs) is not sees


def test_the_defaults_are_the_papers() -> None:
    defaults = asdict(ObjectiveOptions())
    weights = {name: defaults[name] for name in WEIGHTS[0]}
    expected = {"distillation": 1.0, "criticality": 1.0, "temperature": 1.5, "instance": 1.0}
    assert weights == expected


def test_a_bag_without_tiles_keeps_its_bag_terms_only() -> None:
    _, terms = run(make_inputs(3), ObjectiveOptions())
    for name, term in terms.items():
        assert (term[1] == 0) == name.startswith(("instance", "criticality"))


@pytest.mark.parametrize("discounted", SWITCHES["discounted"])
@pytest.mark.parametrize(("num_logits", "weights"), [(1, [0.5, 3.0]), (3, [0.5, 2.0, 3.0])])
def test_a_slides_class_weighs_its_label_losses_and_nothing_else(
    num_logits: int, weights: list[float], discounted: Any
) -> None:
    """In the total; the terms are those without weights."""
    inputs = make_inputs(num_logits)
    options = ObjectiveOptions(0.3, 0.8, 0.6, 1.5, discounted=discounted)
    arguments = (inputs.output, inputs.parent, inputs.ptr, inputs.labels, options)
    plain, terms = objective(*arguments)
    label_weight = torch.tensor(weights, dtype=torch.float64)[inputs.labels]  # (B,)
    total, weighted_terms = objective(*arguments, label_weight)
    assert {n: t.tolist() for n, t in weighted_terms.items()} == {
        n: t.tolist() for n, t in terms.items()
    }
    for bag, label in enumerate(LABELS[num_logits]):
        label_losses = 0.0
        for scale in SCALES:
            undiscounted = (scale == "x20") == (discounted == "coarse")
            label_losses += (1.0 if undiscounted else 0.7) * terms[f"bag/{scale}"][bag].item()
            label_losses += 0.6 * terms[f"instance/{scale}"][bag].item()
        more = (weights[label] - 1) * label_losses
        assert total[bag].item() - plain[bag].item() == pytest.approx(more)


@pytest.mark.parametrize(
    "wrong",
    [{"distillation": 1.2}, {"criticality": -0.1}, {"instance": -1.0}, {"temperature": 0.0}],
)
def test_weights_without_meaning_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        ObjectiveOptions(**wrong)
