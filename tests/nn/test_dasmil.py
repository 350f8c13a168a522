"""DAS-MIL as a whole: bags side by side, its size, and the released implementation's figures."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from bag_factory import make_graphs
from safetensors.torch import load_file
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import GlobalStorage

from dasmil.bags import BagGraph, join_graphs
from dasmil.losses import ObjectiveWeights, objective
from dasmil.nn import DASMIL, MILHead, ScaleOutput

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "camelyon16_like"
SCALES = ("x2.5", "x10", "x20")
DIMS = {"x2.5": 3, "x10": 6, "x20": 5}
PARTS = ("bag_logits", "instance_logits", "attention")


def make_model(num_logits: int = 1) -> DASMIL:
    torch.manual_seed(0)
    return DASMIL(DIMS, num_logits, hidden_dim=7, out_dim=8, heads=2, query_dim=4).double()


def doubled(graph: BagGraph) -> BagGraph:
    return replace(graph, features={name: t.double() for name, t in graph.features.items()})


def test_the_default_for_camelyon16_has_the_released_number_of_weights() -> None:
    model = DASMIL({"x10": 384, "x20": 384})
    assert sum(p.numel() for p in model.parameters()) == 1_516_804


def test_every_scale_answers_in_order_from_coarse_to_fine() -> None:
    graph = doubled(join_graphs(make_graphs((9, 4), scales=SCALES, dims=DIMS)))
    output = make_model(num_logits=3)(graph)
    assert tuple(output) == SCALES
    for scale, found in output.items():
        assert found.bag_logits.shape == (2, 3)
        assert found.instance_logits.shape == found.attention.shape
        assert found.attention.shape == (len(graph.features[scale]), 3)
        sizes = graph.ptr[scale].diff().tolist()
        assert found.bag_index.tolist() == [0] * sizes[0] + [1] * sizes[1]


def test_each_scale_has_a_head_of_its_own_on_its_rows_of_the_pgnn() -> None:
    model = make_model().eval()
    graph = doubled(join_graphs(make_graphs((9, 4), scales=SCALES, dims=DIMS)))
    h = model.pgnn(graph)
    for scale, found in model(graph).items():
        head = MILHead(8, 1, 4).double()
        prefix = f"heads.{scale.replace('.', '_')}."
        weights = {n: t for n, t in model.state_dict().items() if n.startswith(prefix)}
        head.load_state_dict({n.removeprefix(prefix): t for n, t in weights.items()})
        assert torch.equal(found.bag_logits, head(h[scale], graph.ptr[scale]).bag_logits)


@pytest.mark.parametrize("num_logits", [1, 3])
def test_bags_in_one_pass_equal_bags_one_by_one(num_logits: int) -> None:
    """Outputs and the gradients of every weight, with a bag without tiles among them."""
    model = make_model(num_logits).eval()
    graphs = [doubled(g) for g in make_graphs((12, 0, 1, 30), scales=SCALES, dims=DIMS)]

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
        for part in PARTS:
            expected = torch.cat([getattr(output[scale], part) for output in alone])
            found = getattr(together[scale], part)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-9)


@dataclass(frozen=True)
class Golden:
    """A slide, a model and what the authors' released code says of them."""

    model: DASMIL
    graph: BagGraph
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


def released_names() -> dict[str, str]:
    """Our name of each weight → theirs."""
    gats = {"scale_gats.x10": "gnn1", "scale_gats.x20": "gnn2", "union_gat": "GNNlast"}
    names = {
        f"pgnn.{ours}.conv.{key}": f"{theirs}.layers.0.{key}"
        for ours, theirs in gats.items()
        for key in GAT_KEYS
    }
    return names | {
        f"heads.{scale}.{ours}.{kind}": f"{head}.{theirs}.{kind}"
        for scale, head in (("x10", "mil2"), ("x20", "mil3"))
        for ours, theirs in HEAD_KEYS.items()
        for kind in ("weight", "bias")
    }


@pytest.fixture(scope="module")
def golden() -> Golden:
    if not GOLDEN.is_dir():
        pytest.skip("the released implementation's figures are not at hand")
    weights = torch.load(GOLDEN / "model.pt", weights_only=True)
    with torch.serialization.safe_globals([Data, DataEdgeAttr, DataTensorAttr, GlobalStorage]):
        data = torch.load(GOLDEN / "processed" / "test" / "data_0.pt", weights_only=True)

    rows = {"x10": (data.level == 2).nonzero()[:, 0], "x20": (data.level == 3).nonzero()[:, 0]}
    local = torch.full((len(data.level),), -1)
    local[rows["x10"]] = torch.arange(len(rows["x10"]))
    graph = BagGraph(
        features={scale: data.x[index] for scale, index in rows.items()},
        parent={"x20": local[data.childof[rows["x20"]]]},
        edge_index={"x10": data.edge_index_2, "x20": data.edge_index_3},
        ptr={scale: torch.tensor([0, len(index)]) for scale, index in rows.items()},
        labels=data.y,
        slide_ids=(data.name,),
    )
    width = data.x.shape[1]
    query_dim, out_dim = weights["mil3.b_classifier.q.0.weight"].shape
    model = DASMIL({"x10": width, "x20": width}, 1, width, out_dim, 3, query_dim=query_dim).eval()
    names = released_names()
    assert sorted(names.values()) == sorted(weights)
    model.load_state_dict({ours: weights[theirs] for ours, theirs in names.items()})
    return Golden(
        model,
        graph,
        rows,
        data.edge_index,
        load_file(GOLDEN / "expected.safetensors"),
        json.loads((GOLDEN / "expected.json").read_text()),
    )


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_union_is_the_released_graph(golden: Golden) -> None:
    numbering = torch.cat([golden.rows["x10"], golden.rows["x20"]])
    ours = numbering[golden.graph.union_edge_index()]
    assert sorted(map(tuple, ours.T.tolist())) == sorted(map(tuple, golden.edges.T.tolist()))


def test_the_pgnn_gives_the_released_features(golden: Golden) -> None:
    found = golden.model.pgnn(golden.graph)
    for scale, rows in golden.rows.items():
        assert_close(found[scale], golden.expected["h"][rows])


@pytest.mark.parametrize(("scale", "theirs"), [("x10", "lower"), ("x20", "higher")])
def test_the_heads_give_the_released_scores(golden: Golden, scale: str, theirs: str) -> None:
    found = golden.model(golden.graph)[scale]
    assert_close(found.instance_logits, golden.expected[f"{theirs}.instance"])
    assert_close(found.attention, golden.expected[f"{theirs}.A"])
    assert_close(found.bag_logits, golden.expected[f"{theirs}.bag"])


def released_loss(golden: Golden, distillation: float) -> Tensor:
    """Our terms put together as the released code does: it has no factor τ² (D2)."""
    tau, beta = 1.5, 0.8
    output = golden.model(golden.graph)
    total, terms = objective(
        {scale: found.bag_logits for scale, found in output.items()},
        {scale: found.instance_logits for scale, found in output.items()},
        golden.graph.parent,
        golden.graph.ptr,
        golden.graph.labels,
        ObjectiveWeights(distillation, beta, instance=1.0, temperature=tau),
    )
    return (total - distillation * (1 - 1 / tau**2) * terms["distillation/x10"]).squeeze()


@pytest.mark.parametrize("distillation", [0.0, 0.5, 1.0])
def test_the_objective_gives_the_released_loss(golden: Golden, distillation: float) -> None:
    key = f"lambda={distillation},beta=0.8,tau=1.5,pool=mean"
    assert abs(released_loss(golden, distillation).item() - golden.record["loss"][key]) < 1e-5


def test_the_objective_gives_the_released_gradients(golden: Golden) -> None:
    assert golden.record["gradient_case"] == "lambda=0.5,beta=0.8,tau=1.5,pool=mean"
    golden.model.zero_grad()
    released_loss(golden, 0.5).backward()
    for ours, theirs in released_names().items():
        assert_close(golden.model.get_parameter(ours).grad, golden.expected[f"grad.{theirs}"])
