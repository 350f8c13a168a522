"""The gathered neighbour sum against GATConv: outputs, gradients, precision, memory."""

from collections.abc import Callable

import pytest
import torch
from bag_factory import make_bag, make_graphs
from models import make_network, with_gatconv
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from dasmil.bags import BagGraph, Neighbours, bag_graph, join_graphs
from dasmil.methods.dasmil import ObjectiveOptions, objective
from dasmil.nn.gat import GAT
from dasmil.nn.neighbour_attention import Coefficients, coefficients
from dasmil.nn.neighbour_sums import AttendedSum, ProjectedSum

SCALES = ("x5", "x10", "x20")
WIDTH, HEADS = 32, 3


def make_graph(
    num_tiles: int = 300, scales: tuple[str, ...] = SCALES, width: int = WIDTH
) -> BagGraph:
    bags = [
        make_bag(f"slide{n}", scales, width, num_tiles=size, side=24, seed=n)
        for n, size in enumerate((num_tiles, 1, num_tiles // 2))
    ]
    graphs = [bag_graph(bag, n % 2) for n, bag in enumerate(bags)]
    return join_graphs(graphs).in_dtype(torch.float32)


def small() -> tuple[Neighbours, list[Tensor]]:
    """Lists of a union, and what goes into the layer: W x and both scores, in float64."""
    (graph,) = make_graphs([5])
    lists = graph.union
    torch.manual_seed(0)
    shapes = ((len(lists), HEADS, 4), (len(lists), HEADS), (len(lists), HEADS))
    return lists, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def test_each_step_has_its_exact_gradient() -> None:
    lists, (projected, source, target) = small()
    assert gradcheck(lambda s, t: Coefficients.apply(s, t, lists), (source, target))
    alpha = torch.rand(len(lists.index), HEADS, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda p, a: ProjectedSum.apply(p, a, lists), (projected, alpha))
    x = projected[:, 0].detach().clone().requires_grad_()
    assert gradcheck(lambda x, a: AttendedSum.apply(x, a, lists), (x, alpha))


def test_rows_are_summed_before_or_after_the_projection() -> None:
    lists, _ = small()
    alpha = torch.rand(len(lists.index), HEADS, dtype=torch.float64)
    x, weight = torch.randn(len(lists), 5).double(), torch.randn(HEADS, 4, 5).double()
    after = ProjectedSum.apply(torch.einsum("hck,nk->nhc", weight, x), alpha, lists)
    before = torch.einsum("hck,nhk->nc", weight, AttendedSum.apply(x, alpha, lists))
    torch.testing.assert_close(before, after)


def attend(
    projected: Tensor, source: Tensor, target: Tensor, lists: Neighbours, dropout: float = 0.0
) -> Tensor:
    alpha = coefficients(source, target, lists, dropout) / HEADS
    return ProjectedSum.apply(projected, alpha, lists)


def test_the_layer_has_its_exact_gradient_with_dropout() -> None:
    lists, inputs = small()

    def layer(*tensors: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same coefficients are dropped at each call
        return attend(*tensors, lists, 0.4)

    assert gradcheck(layer, inputs)


def test_the_coefficients_of_a_node_sum_to_one() -> None:
    lists, (_, source, target) = small()
    alpha = Coefficients.apply(1e3 * source, 1e3 * target, lists)  # exp(1000) would overflow
    sums = torch.zeros(len(lists), HEADS, dtype=alpha.dtype)
    sums.index_add_(0, lists.seers.long(), alpha)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_dropped_coefficients_keep_the_expected_sum() -> None:
    """α / (1 - p) where it is kept; over many draws the mean is that without dropout."""
    lists, inputs = small()
    projected, source, target = (tensor.detach() for tensor in inputs)
    torch.manual_seed(0)
    draws = [attend(projected, source, target, lists, 0.5) for _ in range(1000)]
    mean = torch.stack(draws).mean(0)
    expected = attend(projected, source, target, lists)
    assert not torch.allclose(draws[0], expected)
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.12)


def pair_of_models(scales: tuple[str, ...] = SCALES) -> tuple[nn.Module, nn.Module]:
    """The same weights, biases too, with our layer and PyG's; without dropout."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        rates = {"attention_dropout": 0.0, "node_dropout": 0.0}
        dims = dict.fromkeys(scales, WIDTH)
        model = make_network(dims, 1, WIDTH, 24, query_dim=8, **rates)
        for name, parameter in model.named_parameters():
            if name.endswith("conv.bias"):
                torch.nn.init.normal_(parameter)
        models.append(model)
    return models[0], with_gatconv(models[1])


def learn(model: nn.Module, graph: BagGraph) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All outputs, and all gradients of Eq. 3."""
    model.zero_grad()
    output = model(graph)
    total, _ = objective(output, graph.parent, graph.ptr, graph.labels, ObjectiveOptions())
    total.sum().backward()
    parts = ("bag_logits", "instance_logits", "attention")
    found = {f"{s}/{p}": getattr(output[s], p).detach() for s in output for p in parts}
    return found, {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("scales", [("x20",), ("x10", "x20"), SCALES], ids="+".join)
def test_a_training_step_is_that_with_gatconv(scales: tuple[str, ...]) -> None:
    """Within 1e-5 in every output, and in every gradient relative to its largest entry."""
    gather, gatconv = pair_of_models(scales)
    graph = make_graph(scales=scales)
    (outputs, gradients), (expected, expected_gradients) = (
        learn(gather, graph),
        learn(gatconv, graph),
    )
    for name, tensor in outputs.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        largest = expected_gradients[name].abs().max()
        assert (gradient - expected_gradients[name]).abs().max() <= 1e-5 * max(largest, 1), name


def test_gradients_are_the_same_at_every_run() -> None:
    gather, _ = pair_of_models()
    graph = make_graph()
    first, second = learn(gather, graph)[1], learn(gather, graph)[1]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_both_layers_start_and_drop_nodes_alike() -> None:
    """One seed: the same initial weights, and the same nodes lose their edges."""
    graph = make_graph(scales=("x20",))
    found = []
    for change in (lambda gat: gat, with_gatconv):
        torch.manual_seed(3)
        gat = change(GAT(WIDTH, 8, attention_dropout=0.0, node_dropout=0.5))
        found.append(gat.train()(graph.features["x20"], graph.union))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1], ids=["ours", "gatconv"])
def test_bfloat16_is_close(layer: int) -> None:
    """Autocast, as with ``precision: bf16-mixed``: outputs to 2 digits, gradients in direction."""
    model = pair_of_models()[layer]
    graph = make_graph()
    expected, expected_gradients = learn(model, graph)
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = learn(model, graph)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), expected[name], rtol=0.02, atol=0.02)
    ours, theirs = (
        torch.cat([g.flatten() for g in each.values()]) for each in (gradients, expected_gradients)
    )
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.999
    assert abs(ours.norm() / theirs.norm() - 1) < 0.02


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func: Callable[..., object], types, args=(), kwargs=None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_has_a_row_of_features_for_each_edge() -> None:
    """Forward and backward: at most W x, (N, H, C); with GATConv (E, H, C)."""
    gather, gatconv = pair_of_models(("x20",))
    bag = make_bag(scales=("x20",), dims=WIDTH, num_tiles=24 * 24, side=24)
    graph = bag_graph(bag, 1).in_dtype(torch.float32)
    largest = {}
    for name, model in (("gather", gather), ("gatconv", gatconv)):
        with Largest() as seen:
            learn(model, graph)
        largest[name] = seen.numel
    assert largest["gather"] == len(graph.union) * HEADS * WIDTH
    assert largest["gatconv"] == len(graph.union.index) * HEADS * WIDTH
