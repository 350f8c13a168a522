"""DAS-MIL as a whole: its variants, bags side by side, and the released code's figures."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from bag_factory import make_bag, make_graphs, neighbours_of
from golden import (
    RELEASED,
    assert_released,
    assert_released_gradient,
    released_folder,
    released_terms,
)
from models import make_network
from safetensors.torch import load_file
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import GlobalStorage

from dasmil.bags import BagGraph, join_graphs
from dasmil.bags.graph import BagHeaders
from dasmil.bags.neighbours import union_neighbours
from dasmil.errors import InputError
from dasmil.methods.dasmil import DASMILNetwork, ObjectiveOptions, objective
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


@all_variants
@pytest.mark.parametrize("scales", PYRAMIDS, ids="+".join)
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


@all_variants
@pytest.mark.parametrize("scales", PYRAMIDS, ids="+".join)
def test_each_scale_has_a_head_of_its_own_on_what_is_meant_for_it(
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
@pytest.mark.parametrize("scales", [("x5", "x20"), SCALES], ids="+".join)
@pytest.mark.parametrize("num_logits", [1, 3])
def test_bags_in_one_pass_equal_bags_one_by_one(
    num_logits: int, scales: tuple[str, ...], variant: dict[str, Any]
) -> None:
    """Outputs and the gradients of every weight, with a bag without tiles among them."""
    model = make_model(num_logits, scales, **variant).eval()
    graphs = graphs_of((12, 0, 1, 30), scales)

    def loss(output: dict[str, ScaleOutput]) -> Tensor:
        tensors = [getattr(scale, part) for scale in output.values() for part in PARTS]
        return sum((tensor.sin() * (1 + tensor)).sum() for tensor in tensors)

    together = model(join_graphs(graphs))
    loss(together).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    alone = [model(graph) for graph in graphs]
    sum(map(loss, alone)).backward()

    for scale in scales:
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


# The released implementation, at both of its shapes


@dataclass(frozen=True)
class Golden:
    """A slide, a model and what the authors' released code says of them."""

    build: Callable[..., DASMILNetwork]
    graph: BagGraph
    names: dict[str, str]  # ours of each weight → theirs
    rows: dict[str, Tensor]  # of each scale in the released numbering of all nodes
    edges: Tensor  # of all scales, in the released numbering
    expected: dict[str, Tensor]
    record: dict


HEAD_KEYS = {
    "instance_classifier": "i_classifier.fc.0",
    "transform.0": "b_classifier.lin.0",
    "query.0": "b_classifier.q.0",
    "value": "b_classifier.v.1",
    "bag_classifier": "b_classifier.fcc",
}
GAT_KEYS = ("att_src", "att_dst", "bias", "lin.weight")
KINDS = ("weight", "bias")


def released_names(coarse: str, fine: str, residual: str) -> dict[str, str]:
    """Our name of each weight → theirs."""
    gats = {f"scale_gats.{coarse}": "1", f"scale_gats.{fine}": "2", "union_gat": "last"}
    names = {}
    for ours, number in gats.items():
        theirs = "GNNlast" if number == "last" else f"gnn{number}"
        names |= {f"pgnn.{ours}.conv.{key}": f"{theirs}.layers.0.{key}" for key in GAT_KEYS}
        if residual == "glu":
            names |= {
                f"pgnn.{ours}.gate.mlp.{layer}.{kind}": f"glu{number}.mlp.mlp.{layer}.{kind}"
                for layer, kind in product((0, 2), KINDS)
            }
    return names | {
        f"heads.{scale}.{ours}.{kind}": f"{head}.{theirs}.{kind}"
        for scale, head in ((coarse, "mil2"), (fine, "mil3"))
        for ours, theirs in HEAD_KEYS.items()
        for kind in KINDS
    }


@pytest.fixture(scope="module", params=RELEASED)
def golden(request: pytest.FixtureRequest) -> Golden:
    folder = released_folder(request.param)
    weights = torch.load(folder / "model.pt", weights_only=True)
    residual = "glu" if any(key.startswith("glu") for key in weights) else "none"
    with torch.serialization.safe_globals([Data, DataEdgeAttr, DataTensorAttr, GlobalStorage]):
        data = torch.load(folder / "processed" / "test" / "data_0.pt", weights_only=True)
    record = json.loads((folder / "expected.json").read_text())

    levels = dict(zip((record["scales"][str(n)] for n in record["levels"]), record["levels"]))
    coarse, fine = levels
    rows = {scale: (data.level == level).nonzero()[:, 0] for scale, level in levels.items()}
    local = torch.full((len(data.level),), -1)
    local[rows[coarse]] = torch.arange(len(rows[coarse]))
    neighbours = {
        coarse: neighbours_of(data.edge_index_2, len(rows[coarse])),
        fine: neighbours_of(data.edge_index_3, len(rows[fine])),
    }
    parent = {fine: local[data.childof[rows[fine]]]}
    graph = BagGraph(
        features={scale: data.x[index] for scale, index in rows.items()},
        grid={scale: torch.zeros(len(i), 2, dtype=torch.int32) for scale, i in rows.items()},
        parent=parent,
        ptr={scale: torch.tensor([0, len(index)]) for scale, index in rows.items()},
        labels=data.y,
        headers=BagHeaders([replace(make_bag().header, slide_id=data.name)]),
        neighbours=neighbours,
        union=union_neighbours(neighbours, parent),
    )
    width = data.x.shape[1]
    query_dim, out_dim = weights["mil3.b_classifier.q.0.weight"].shape
    heads = weights["GNNlast.layers.0.att_src"].shape[1]
    num_logits = len(weights["mil3.i_classifier.fc.0.bias"])
    names = released_names(coarse, fine, residual)
    assert sorted(names.values()) == sorted(weights)

    def build(**variant: Any) -> DASMILNetwork:
        options = {"residual": residual, "query_dim": query_dim, **variant}
        dims = dict.fromkeys(levels, width)
        model = make_network(dims, num_logits, width, out_dim, heads, **options)
        model.load_state_dict({ours: weights[theirs] for ours, theirs in names.items()})
        return model.eval()

    expected = load_file(folder / "expected.safetensors")
    return Golden(build, graph, names, rows, data.edge_index, expected, record)


def test_the_union_is_the_released_graph(golden: Golden) -> None:
    numbering = torch.cat(list(golden.rows.values()))
    ours = numbering[golden.graph.union.edge_index()]
    assert sorted(map(tuple, ours.T.tolist())) == sorted(map(tuple, golden.edges.T.tolist()))


def test_the_pgnn_gives_the_released_features(golden: Golden) -> None:
    found = golden.build().pgnn(golden.graph)
    for scale, rows in golden.rows.items():
        assert_released(found[scale], golden.expected["h"][rows])


@pytest.mark.parametrize("shown", ["all", "parents"])
def test_the_heads_give_the_released_scores(golden: Golden, shown: str) -> None:
    """Every coarse tile of theirs has children."""
    output = golden.build(coarse_instances=shown)(golden.graph)
    for found, theirs in zip(output.values(), ("lower", "higher"), strict=True):
        assert_released(found.instance_logits, golden.expected[f"{theirs}.instance"])
        assert_released(found.attention, golden.expected[f"{theirs}.A"])
        assert_released(found.bag_logits, golden.expected[f"{theirs}.bag"])
        record = golden.record[f"bag_logit_{theirs}"]
        assert found.bag_logits[0].tolist() == pytest.approx(record, abs=1e-5)


def released_loss(golden: Golden, model: DASMILNetwork, key: str, **switches: Any) -> Tensor:
    """Eq. 3 as released: no factor τ² (D2)."""
    terms = released_terms(key)
    options = ObjectiveOptions(instance=1.0, squared_temperature=False, **terms, **switches)
    graph = golden.graph
    total, _ = objective(model(graph), graph.parent, graph.ptr, graph.labels, options)
    return total.squeeze()


@pytest.mark.parametrize(
    ("shown", "switches"),
    [("all", {}), ("parents", {"epsilon": True, "class_distribution": "per_class"})],
    ids=["default", "mil4wsi"],
)
def test_the_objective_gives_the_released_losses(
    golden: Golden, shown: str, switches: dict[str, Any]
) -> None:
    model = golden.build(coarse_instances=shown)
    assert golden.record["loss"]
    for key, expected in golden.record["loss"].items():
        found = released_loss(golden, model, key, **switches).item()
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5), key


@pytest.mark.parametrize("epsilon", [False, True])
def test_the_objective_gives_the_released_gradients(golden: Golden, epsilon: bool) -> None:
    model = golden.build()
    released_loss(golden, model, golden.record["gradient_case"], epsilon=epsilon).backward()
    for ours, theirs in golden.names.items():
        found = model.get_parameter(ours).grad
        assert_released_gradient(found, golden.expected[f"grad.{theirs}"], ours)


def test_one_coarse_tile_without_children_tells_all_from_parents(golden: Golden) -> None:
    """D12 on the released weights: the heads differ when a tile loses its children."""
    graph = golden.graph
    coarse, fine = graph.scales
    parent = graph.parent[fine].clone()
    parent[parent == 0] = -1
    changed = with_parents(graph, {fine: parent})
    everything, parents = (
        golden.build(coarse_instances=shown)(changed)[coarse] for shown in ("all", "parents")
    )
    assert everything.shown.all()
    assert (~parents.shown).nonzero().tolist() == [[0]]
    assert not torch.allclose(everything.bag_logits, parents.bag_logits)
