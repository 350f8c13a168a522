"""DAS-MIL as a whole: its variants, and bags side by side."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from bag_factory import make_graphs
from models import make_network
from torch import Tensor

from dasmil.bags import BagGraph, join_graphs
from dasmil.bags.neighbours import union_neighbours
from dasmil.errors import InputError
from dasmil.methods.dasmil import DASMILNetwork
from dasmil.nn import MILHead, ScaleOutput

SCALES = ("x2.5", "x10", "x20")
DIMS = {"x2.5": 3, "x10": 6, "x20": 5}
PARTS = ("bag_logits", "instance_logits", "attention")
PYRAMIDS = [("x20",), ("x10", "x20"), ("x5", "x20"), SCALES]  # of ratio 2, 4, and 4 and 2
WIDTHS = {**DIMS, "x5": 4}
VARIANTS: list[dict[str, Any]] = [
    {"contextualize": contextualize, "concatenate_parents": concatenate, "coarse_instances": shown}
    for contextualize, concatenate, shown in product(
        (True, False), (False, True), ("all", "parents")
    )
]


def name_of(variant: dict[str, Any]) -> str:
    graph = "graph" if variant["contextualize"] else "features"
    target = "with parent" if variant["concatenate_parents"] else "alone"
    return f"{graph}-{target}-{variant['coarse_instances']}"


all_variants = pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
# every variant at three scales, and one of them at all pyramids
variants_and_pyramids = pytest.mark.parametrize(
    ("variant", "scales"),
    [(variant, SCALES) for variant in VARIANTS] + [(VARIANTS[3], s) for s in PYRAMIDS[:-1]],
    ids=lambda each: name_of(each) if isinstance(each, dict) else "+".join(each),
)


def make_model(
    num_logits: int = 1, scales: tuple[str, ...] = SCALES, **variant: Any
) -> DASMILNetwork:
    torch.manual_seed(0)
    widths = {scale: WIDTHS[scale] for scale in scales}
    model = make_network(widths, num_logits, 7, 8, heads=2, query_dim=4, **variant).double()
    for parameter in model.parameters():  # biases are zero at the start
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)
    return model


def doubled(graph: BagGraph) -> BagGraph:
    return replace(graph, features={name: t.double() for name, t in graph.features.items()})


def with_orphans(graph: BagGraph) -> BagGraph:
    """Every third tile of each scale but the coarsest loses its parent."""
    parent = {name: rows.clone() for name, rows in graph.parent.items()}
    for rows in parent.values():
        rows[::3] = -1
    return with_parents(graph, parent)


def with_parents(graph: BagGraph, parent: dict[str, Tensor]) -> BagGraph:
    return replace(graph, parent=parent, union=union_neighbours(graph.neighbours, parent))


def graphs_of(sizes: tuple[int, ...], scales: tuple[str, ...] = SCALES) -> list[BagGraph]:
    made = make_graphs(sizes, scales=scales, dims={s: WIDTHS[s] for s in scales})
    return [with_orphans(doubled(graph)) for graph in made]


def head_of(model: DASMILNetwork, scale: str, width: int, num_logits: int = 1) -> MILHead:
    """A fresh head of that width with the weights of the model's."""
    head = MILHead(width, num_logits, 4).double()
    prefix = f"heads.{scale.replace('.', '_')}."
    weights = {n: t for n, t in model.state_dict().items() if n.startswith(prefix)}
    head.load_state_dict({n.removeprefix(prefix): t for n, t in weights.items()})
    return head


def test_the_default_for_camelyon16_has_the_released_number_of_weights() -> None:
    model = make_network({"x10": 384, "x20": 384})
    assert sum(p.numel() for p in model.parameters()) == 1_516_804


def test_the_gated_residual_for_lung_has_the_released_number_of_weights() -> None:
    model = make_network({"x5": 384, "x20": 384}, out_dim=384, residual="glu")
    assert sum(p.numel() for p in model.parameters()) == 2_470_724


def test_the_residual_reaches_the_pgnn() -> None:
    with pytest.raises(InputError, match="residual 'plain'"):
        make_network({"x10": 384, "x20": 384}, residual="plain")


@variants_and_pyramids
def test_every_scale_answers_in_order_from_coarse_to_fine(
    scales: tuple[str, ...], variant: dict[str, Any]
) -> None:
    graph = join_graphs(graphs_of((9, 4), scales))
    output = make_model(3, scales, **variant)(graph)
    assert tuple(output) == scales
    for scale, found in output.items():
        assert found.bag_logits.shape == (2, 3)
        assert found.instance_logits.shape == found.attention.shape
        assert found.attention.shape == (len(graph.features[scale]), 3)
        assert found.shown.shape == found.bag_index.shape == (len(graph.features[scale]),)
        sizes = graph.ptr[scale].diff().tolist()
        assert found.bag_index.tolist() == [0] * sizes[0] + [1] * sizes[1]


def rows_by_hand(graph: BagGraph, h: dict[str, Tensor], scale: str) -> Tensor:
    """[parent ‖ own] of each tile, zeros for an orphan; the own alone at the coarsest scale."""
    if scale == graph.scales[0]:
        return h[scale]
    coarser = h[graph.scales[graph.scales.index(scale) - 1]]
    none = coarser.new_zeros(coarser.shape[1])
    above = [none if row < 0 else coarser[row] for row in graph.parent[scale].tolist()]
    return torch.stack([torch.cat(pair) for pair in zip(above, h[scale], strict=True)])


def parents_by_hand(graph: BagGraph, scale: str) -> Tensor:
    """Which tiles have a child; all of the finest scale."""
    if scale == graph.scales[-1]:
        return torch.ones(len(graph.features[scale]), dtype=torch.bool)
    finer = graph.scales[graph.scales.index(scale) + 1]
    parents = set(graph.parent[finer].tolist())
    return torch.tensor([row in parents for row in range(len(graph.features[scale]))]).bool()


@variants_and_pyramids
def test_each_scale_has_its_own_head_and_input(
    scales: tuple[str, ...], variant: dict[str, Any]
) -> None:
    """Rows of the PGNN or of the extractor, its parents' before them, and D12, all by hand.

    The gradients of the features too: also parents learn from their children's head.
    """
    model = make_model(1, scales, **variant).eval()
    graph = join_graphs(graphs_of((9, 0, 4, 1), scales))
    leaves = [features.requires_grad_() for features in graph.features.values()]
    h = dict(graph.features) if model.pgnn is None else model.pgnn(graph)
    assert (model.pgnn is None) is not variant["contextualize"]
    for number, (scale, found) in enumerate(model(graph).items()):
        rows = rows_by_hand(graph, h, scale) if variant["concatenate_parents"] else h[scale]
        widths = [8 if variant["contextualize"] else WIDTHS[s] for s in scales]
        width = widths[number]
        if variant["concatenate_parents"] and number > 0:
            width += widths[number - 1]
        shown = torch.ones(len(rows), dtype=torch.bool)
        if variant["coarse_instances"] == "parents":
            shown = parents_by_hand(graph, scale)
            assert scale == scales[-1] or not shown.all()
        assert torch.equal(found.shown, shown)
        head = head_of(model, scale, width)
        expected = head(rows, graph.ptr[scale], shown)
        slopes = []
        for output in (found, expected):
            loss = sum((getattr(output, part).sin() ** 2).sum() for part in PARTS)
            slopes.append(
                torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
            )
        for part in PARTS:
            torch.testing.assert_close(
                getattr(found, part), getattr(expected, part), rtol=0, atol=1e-12
            )
        for ours, by_hand in zip(*slopes, strict=True):
            torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-10)


def test_without_the_graph_there_are_no_weights_of_it_and_no_neighbours() -> None:
    """A tile's instance logit is then its own features' alone."""
    model = make_model(contextualize=False).eval()
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"heads"}
    (graph,) = graphs_of((20,))
    features = {**graph.features, "x20": graph.features["x20"].clone()}
    features["x20"][0] += 1
    before, after = model(graph), model(replace(graph, features=features))
    changed = (before["x20"].instance_logits != after["x20"].instance_logits).nonzero()[:, 0]
    assert changed.tolist() == [0]
    assert torch.equal(before["x10"].bag_logits, after["x10"].bag_logits)


def test_the_parents_vector_is_the_contextualised_one_and_not_twice_concatenated() -> None:
    """[x10 ‖ x20] also at three scales, where x10's own head sees [x2.5 ‖ x10]."""
    model = make_model(concatenate_parents=True)
    inputs = [head.instance_classifier.in_features for head in model.heads.values()]
    assert inputs == [8, 16, 16]
    without = make_model(concatenate_parents=True, contextualize=False)
    inputs = [head.instance_classifier.in_features for head in without.heads.values()]
    assert inputs == [3, 3 + 6, 6 + 5]


@all_variants
def test_bags_in_one_pass_equal_bags_one_by_one(variant: dict[str, Any]) -> None:
    """Outputs and the gradients of every weight, with a bag without tiles among them."""
    model = make_model(3, **variant).eval()
    graphs = graphs_of((12, 0, 1, 30))

    def loss(output: dict[str, ScaleOutput]) -> Tensor:
        tensors = [getattr(scale, part) for scale in output.values() for part in PARTS]
        return sum((tensor.sin() * (1 + tensor)).sum() for tensor in tensors)

    together = model(join_graphs(graphs))
    loss(together).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    alone = [model(graph) for graph in graphs]
    sum(map(loss, alone)).backward()

    for scale in SCALES:
        for part in (*PARTS, "shown"):
            expected = torch.cat([getattr(output[scale], part) for output in alone])
            found = getattr(together[scale], part)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("residual", ["plain", "glu"])
def test_with_a_residual_bags_in_one_pass_equal_bags_one_by_one(residual: Any) -> None:
    torch.manual_seed(0)
    model = (
        make_network({"x10": 6, "x20": 6}, 1, 6, 6, query_dim=4, residual=residual).double().eval()
    )
    graphs = [with_orphans(doubled(graph)) for graph in make_graphs((12, 0, 1, 30))]
    together, alone = model(join_graphs(graphs)), [model(graph) for graph in graphs]
    for scale, part in product(together, PARTS):
        expected = torch.cat([getattr(output[scale], part) for output in alone])
        torch.testing.assert_close(getattr(together[scale], part), expected, rtol=0, atol=1e-10)


@all_variants
def test_a_bag_of_orphans_alone_passes(variant: dict[str, Any]) -> None:
    """No tile has a parent: the coarse heads are shown nothing, or the fine ones zeros."""
    (graph,) = graphs_of((9,))
    nobody = with_parents(graph, {s: torch.full_like(p, -1) for s, p in graph.parent.items()})
    model = make_model(**variant).eval()
    output = model(nobody)
    if variant["coarse_instances"] == "parents":
        for scale in ("x2.5", "x10"):
            bias = model.heads[scale.replace(".", "_")].bag_classifier.bias
            assert torch.equal(output[scale].bag_logits[0], bias)
    assert all(out.bag_logits.isfinite().all() for out in output.values())
