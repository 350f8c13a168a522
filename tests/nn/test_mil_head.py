"""The MIL head against DSMIL's dual stream in plain loops, bag by bag."""

from collections.abc import Iterable
from itertools import pairwise
from math import exp, sin, sqrt, tanh
from typing import Literal

import pytest
import torch
from torch import Tensor

from dasmil.nn import MILHead, ScaleOutput

WIDTH, QUERY = 5, 4
SIZES = (6, 0, 1, 9)
PARTS = ("bag_logits", "instance_logits", "attention")


def make_head(num_logits: int) -> MILHead:
    torch.manual_seed(num_logits)
    return MILHead(WIDTH, num_logits, QUERY).double()


def make_rows(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Features of the tiles of several bags, and the bags' boundaries."""
    h = 2 * torch.randn(sum(sizes), WIDTH, dtype=torch.float64)
    return h, torch.tensor([0, *sizes]).cumsum(0)


@pytest.mark.parametrize(("init", "variance"), [("lecun", 1.0), ("torch", 1 / 3)])
def test_the_variance_of_the_bag_classifiers_first_weights(
    init: Literal["lecun", "torch"], variance: float
) -> None:
    torch.manual_seed(0)
    weight = MILHead(2_000, 2, QUERY, init).bag_classifier.weight
    assert weight.var().item() * weight[0].numel() == pytest.approx(variance, rel=0.05)


def linear(layer: dict[str, Tensor], name: str, x: list[float]) -> list[float]:
    weight, bias = layer[f"{name}.weight"].tolist(), layer[f"{name}.bias"].tolist()
    return [sum(w * v for w, v in zip(row, x)) + b for row, b in zip(weight, bias)]


def dual_stream(
    head: MILHead, tiles: list[list[float]]
) -> tuple[list[float], list[list[float]], list[list[float]]]:
    """Bag logits, instance logits and attention of one bag."""
    weights = head.state_dict()
    instance = [linear(weights, "instance_classifier", tile) for tile in tiles]
    f = [[max(v, 0.0) for v in linear(weights, "transform.0", tile)] for tile in tiles]
    q = [[tanh(v) for v in linear(weights, "query.0", row)] for row in f]
    v = [linear(weights, "value", row) for row in f]

    num_logits = len(weights["bag_classifier.bias"])
    attention = [[0.0] * num_logits for _ in tiles]
    embedding = [[0.0] * WIDTH for _ in range(num_logits)]
    for c in range(num_logits if tiles else 0):
        critical = 0
        for n in range(len(tiles)):
            if instance[n][c] > instance[critical][c]:
                critical = n
        u = [exp(sum(a * b for a, b in zip(row, q[critical])) / sqrt(QUERY)) for row in q]
        for n in range(len(tiles)):
            attention[n][c] = u[n] / sum(u)
            for k in range(WIDTH):
                embedding[c][k] += attention[n][c] * v[n][k]

    kernel, bias = (
        weights["bag_classifier.weight"].tolist(),
        weights["bag_classifier.bias"].tolist(),
    )
    bag = [
        bias[c]
        + sum(kernel[c][d][k] * embedding[d][k] for d in range(num_logits) for k in range(WIDTH))
        for c in range(num_logits)
    ]
    return bag, instance, attention


def assert_is_dual_stream(output: ScaleOutput, head: MILHead, h: Tensor, ptr: Tensor) -> None:
    bags, instances, attentions = [], [], []
    for start, end in pairwise(ptr.tolist()):
        bag, instance, attention = dual_stream(head, h[start:end].tolist())
        bags.append(bag)
        instances += instance
        attentions += attention
    for found, expected in (
        (output.bag_logits, bags),
        (output.instance_logits, instances),
        (output.attention, attentions),
    ):
        expected_rows = torch.tensor(expected, dtype=torch.float64).reshape(found.shape)
        torch.testing.assert_close(found, expected_rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_logits", [1, 3])
def test_the_head_is_dsmils_dual_stream(num_logits: int) -> None:
    head = make_head(num_logits)
    h, ptr = make_rows(SIZES)
    output = head(h, ptr)
    assert output.bag_logits.shape == (4, num_logits)
    assert output.bag_index.tolist() == [0] * 6 + [2] + [3] * 9
    assert_is_dual_stream(output, head, h, ptr)


def test_attention_sums_to_one_in_each_bag_with_tiles() -> None:
    h, ptr = make_rows(SIZES)
    attention = make_head(3)(1e4 * h, ptr).attention
    sums = torch.stack([part.sum(0) for part in attention.split(SIZES)])
    expected = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)[:, None].expand_as(sums)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-12)


def test_of_equal_instance_logits_the_first_is_critical() -> None:
    head = make_head(3)
    torch.nn.init.zeros_(head.instance_classifier.weight)
    h, ptr = make_rows(SIZES)
    output = head(h, ptr)
    assert_is_dual_stream(output, head, h, ptr)
    last_first = torch.cat([part.flip(0) for part in h.split(SIZES)])
    assert not torch.allclose(head(last_first, ptr).bag_logits[3], output.bag_logits[3])


@pytest.mark.parametrize("num_logits", [1, 3])
@pytest.mark.parametrize("sizes", [(0,), (0, 0), (0, 3, 0)])
def test_a_bag_without_tiles_gets_the_bias_of_the_bag_classifier(
    num_logits: int, sizes: tuple[int, ...]
) -> None:
    head = make_head(num_logits)
    output = head(*make_rows(sizes))
    assert output.instance_logits.shape == output.attention.shape == (sum(sizes), num_logits)
    for bag, size in enumerate(sizes):
        if size == 0:
            assert torch.equal(output.bag_logits[bag], head.bag_classifier.bias)


def test_bags_in_one_pass_equal_bags_one_by_one() -> None:
    """Outputs, the gradients of the features and those of every weight."""
    head = make_head(3)
    h, ptr = make_rows(SIZES)

    def loss(output: ScaleOutput) -> Tensor:
        parts = (output.bag_logits, output.instance_logits, output.attention)
        return sum((part.sin() * (1 + part)).sum() for part in parts)

    together, alone = h.clone().requires_grad_(), h.clone().requires_grad_()
    in_one = head(together, ptr)
    loss(in_one).backward()
    weight_gradients = {name: p.grad for name, p in head.named_parameters()}

    head.zero_grad()
    singles = [head(rows, torch.tensor([0, len(rows)])) for rows in alone.split(SIZES)]
    sum(map(loss, singles)).backward()

    for name in ("bag_logits", "instance_logits", "attention"):
        expected = torch.cat([getattr(single, name) for single in singles])
        torch.testing.assert_close(getattr(in_one, name), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(together.grad, alone.grad, rtol=0, atol=1e-10)
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(weight_gradients[name], parameter.grad, rtol=0, atol=1e-10)
        assert parameter.grad.abs().sum() > 0


def test_gradients_are_those_of_finite_differences() -> None:
    """Also through the critical instance's query, which all attention of a bag depends on."""
    head = make_head(3)
    h, ptr = make_rows(SIZES)

    def outputs(rows: Tensor, query_weight: Tensor) -> tuple[Tensor, Tensor]:
        weights = {"query.0.weight": query_weight}
        found = torch.func.functional_call(head, weights, (rows, ptr))
        return found.bag_logits, found.attention

    query_weight = head.query[0].weight.detach().clone()
    assert torch.autograd.gradcheck(outputs, (h.requires_grad_(), query_weight.requires_grad_()))


@pytest.mark.parametrize("num_logits", [1, 3])
def test_gradients_are_the_slopes_of_the_plain_loops(num_logits: int) -> None:
    """Of every feature and every weight: a step to either side in the loops above."""
    head, (h, ptr) = make_head(num_logits), make_rows((3, 0, 1))

    def figure(found: Iterable[list[float]]) -> float:
        values = [value for row in found for value in row]
        return sum((1 + 0.1 * k) * sin(value) for k, value in enumerate(values))

    def by_loops() -> float:
        total = 0.0
        for start, end in pairwise(ptr.tolist()):
            bag, instance, attention = dual_stream(head, h[start:end].tolist())
            total += figure([bag]) + figure(instance) + figure(attention)
        return total

    output, total = head(h.requires_grad_(), ptr), 0.0
    for number, (start, end) in enumerate(pairwise(ptr.tolist())):
        parts = (
            output.bag_logits[number],
            output.instance_logits[start:end].flatten(),
            output.attention[start:end].flatten(),
        )
        total += sum(((1 + 0.1 * torch.arange(len(p)).to(p)) * p.sin()).sum() for p in parts)
    total.backward()
    with torch.no_grad():
        for tensor in (h, *head.parameters()):
            flat = tensor.view(-1)
            for entry, found in enumerate(tensor.grad.flatten().tolist()):
                value, step = flat[entry].item(), 1e-5
                around = []
                for moved in (value + step, value - step):
                    flat[entry] = moved
                    around.append(by_loops())
                flat[entry] = value
                assert found == pytest.approx((around[0] - around[1]) / (2 * step), abs=1e-7)


# Tiles that the head is not shown (D12)

# Of the last bag nothing is shown.
SHOWN = (1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0)
SHOWN_SIZES = (6, 0, 1, 6, 3)


def hide_some(num_logits: int) -> tuple[MILHead, Tensor, Tensor, Tensor]:
    head = make_head(num_logits)
    h, ptr = make_rows(SHOWN_SIZES)
    shown = torch.tensor(SHOWN, dtype=torch.bool)
    h[~shown] *= 5  # a hidden tile would matter, were it seen
    return head, h, ptr, shown


def test_a_bag_gives_what_the_head_gives_for_its_shown_tiles() -> None:
    head, h, ptr, shown = hide_some(3)
    output = head(h, ptr, shown)
    for bag, (start, end) in enumerate(pairwise(ptr.tolist())):
        seen = h[start:end][shown[start:end]]
        bag_logits, _, attention = dual_stream(head, seen.tolist())
        assert output.bag_logits[bag].tolist() == pytest.approx(bag_logits, abs=1e-12)
        found = output.attention[start:end][shown[start:end]].tolist()
        assert found == [pytest.approx(row, abs=1e-12) for row in attention]
    assert not torch.allclose(head(h, ptr).bag_logits[0], output.bag_logits[0])


def test_a_hidden_tile_has_an_instance_logit_and_no_attention() -> None:
    head, h, ptr, shown = hide_some(3)
    output = head(h, ptr, shown)
    everything = head(h, ptr)
    torch.testing.assert_close(output.instance_logits, everything.instance_logits)
    assert output.attention.shape == everything.attention.shape
    assert not output.attention[~shown].any()
    assert output.attention[shown].all()
    assert torch.equal(output.bag_index, everything.bag_index)
    assert torch.equal(output.shown, shown)
    assert everything.shown.all() and everything.shown.dtype == torch.bool


def test_a_bag_of_which_nothing_is_shown_is_as_one_without_tiles() -> None:
    head, h, ptr, shown = hide_some(3)
    bag_logits = head(h, ptr, shown).bag_logits
    assert torch.equal(bag_logits[1], head.bag_classifier.bias)
    assert torch.equal(bag_logits[4], head.bag_classifier.bias)


def test_with_all_shown_nothing_changes() -> None:
    head = make_head(3)
    h, ptr = make_rows(SIZES)
    output, everything = head(h, ptr, torch.ones(len(h), dtype=torch.bool)), head(h, ptr)
    for name in PARTS:
        assert torch.equal(getattr(output, name), getattr(everything, name))


def test_hidden_tiles_teach_the_bag_nothing() -> None:
    """Gradients of features and weights are those of the shown rows alone."""
    head, h, ptr, shown = hide_some(3)
    ends = torch.tensor([0, *(int(shown[:end].sum()) for end in ptr[1:])])
    whole, part = h.clone().requires_grad_(), h[shown].clone().requires_grad_()

    def loss(output: ScaleOutput) -> Tensor:
        return (output.bag_logits.sin() ** 2).sum() + (output.attention.sin() ** 2).sum()

    loss(head(whole, ptr, shown)).backward()
    found = {name: p.grad for name, p in head.named_parameters()}
    head.zero_grad()
    loss(head(part, ends)).backward()
    torch.testing.assert_close(whole.grad[shown], part.grad, rtol=0, atol=1e-12)
    assert not whole.grad[~shown].any() and part.grad.any()
    for name, parameter in head.named_parameters():
        expected = parameter.grad
        if expected is None:
            assert found[name] is None or not found[name].any()
        else:
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-12)


def test_shown_bags_in_one_pass_equal_bags_one_by_one() -> None:
    head, h, ptr, shown = hide_some(3)
    together = head(h, ptr, shown)
    alone = [
        head(rows, torch.tensor([0, len(rows)]), seen)
        for rows, seen in zip(h.split(SHOWN_SIZES), shown.split(SHOWN_SIZES))
    ]
    for name in PARTS:
        expected = torch.cat([getattr(single, name) for single in alone])
        torch.testing.assert_close(getattr(together, name), expected, rtol=0, atol=1e-12)


def test_the_order_of_the_bags_does_not_matter() -> None:
    head = make_head(3)
    h, ptr = make_rows(SIZES)
    forth = head(h, ptr).bag_logits
    back = head(
        torch.cat(h.split(SIZES)[::-1]), torch.tensor([0, *SIZES[::-1]]).cumsum(0)
    ).bag_logits
    torch.testing.assert_close(back.flip(0), forth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pooled", [False, True])
def test_under_autocast_logits_and_attention_are_those_of_float32(pooled: bool) -> None:
    """In half precision close bags have equal logits, and other tiles are critical."""
    head = make_head(2).float()
    h = torch.randn(1, WIDTH) + 1e-4 * torch.randn(90, WIDTH)
    ptr = torch.arange(0, 91, 3)
    shown = torch.rand(90) < 0.7 if pooled else None
    expected = head(h, ptr, shown)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(h, ptr, shown)
    for part in PARTS:
        assert torch.equal(getattr(found, part), getattr(expected, part))
    assert len(found.bag_logits[:, 0].unique()) >= 29


def test_with_weights_of_half_precision_logits_and_attention_are_float32() -> None:
    head = make_head(2).bfloat16()
    output = head(torch.randn(90, WIDTH).bfloat16(), torch.arange(0, 91, 3))
    assert {getattr(output, part).dtype for part in PARTS} == {torch.float32}
    assert len(output.bag_logits[:, 0].unique()) == 30
