"""DAS-MIL against the tensors of the released code: features, scores, losses and gradients."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from bag_factory import make_bag, neighbours_of
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

from dasmil.bags import BagGraph
from dasmil.bags.graph import BagHeaders
from dasmil.bags.neighbours import union_neighbours
from dasmil.methods.dasmil import DASMILNetwork, ObjectiveOptions, objective


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
    union = union_neighbours(graph.neighbours, {fine: parent})
    changed = replace(graph, parent={fine: parent}, union=union)
    everything, parents = (
        golden.build(coarse_instances=shown)(changed)[coarse] for shown in ("all", "parents")
    )
    assert everything.shown.all()
    assert (~parents.shown).nonzero().tolist() == [[0]]
    assert not torch.allclose(everything.bag_logits, parents.bag_logits)
