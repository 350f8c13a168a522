"""GAT on a hand-made graph of 4 nodes against its formula in plain loops, and against PyG's."""

from itertools import combinations
from math import exp

import pytest
import torch
from bag_factory import make_graphs, neighbours_of
from models import with_gatconv
from torch import Tensor
from torch_geometric.nn import GATConv

from dasmil.bags import Neighbours
from dasmil.errors import InputError
from dasmil.nn import GAT, PGNN

X = [[1.0, 2.0], [-1.0, 0.5], [0.0, -2.0], [3.0, 1.0]]
EDGES = [(0, 1), (1, 0), (1, 2), (2, 1)]  # source, target; node 3 stands alone
HEADS, OUT = 2, 3
W = [  # of each head, (2, 3)
    [[0.5, -1.0, 0.25], [1.5, 0.5, -0.75]],
    [[-0.5, 2.0, 1.0], [0.0, -1.0, 0.5]],
]
A_SRC = [[1.0, -0.5, 2.0], [0.25, 0.75, -1.5]]
A_DST = [[-1.0, 0.5, 0.5], [2.0, -0.25, 1.0]]
BIAS = [0.125, -0.25, 0.375]


def make_gat(attention_dropout: float = 0.0, node_dropout: float = 0.0) -> GAT:
    gat = GAT(2, OUT, HEADS, attention_dropout, node_dropout).double()
    with torch.no_grad():
        weight = torch.tensor(W).transpose(1, 2).reshape(HEADS * OUT, 2)  # rows: head, then channel
        gat.conv.lin.weight.copy_(weight)
        gat.conv.att_src.copy_(torch.tensor(A_SRC)[None])
        gat.conv.att_dst.copy_(torch.tensor(A_DST)[None])
        gat.conv.bias.copy_(torch.tensor(BIAS))
    return gat


def dot(a: list[float], b: list[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))


def by_formula(edges: list[tuple[int, int]]) -> Tensor:
    """h_i = mean over heads of Σ_j α_ij W x_j over j in N(i) and i, plus the bias."""
    rows = []
    for i in range(len(X)):
        row = list(BIAS)
        for head in range(HEADS):
            wx = [[dot(x, [w[c] for w in W[head]]) for c in range(OUT)] for x in X]
            seen = [j for j, target in edges if target == i] + [i]
            e = [dot(A_SRC[head], wx[j]) + dot(A_DST[head], wx[i]) for j in seen]
            e = [value if value > 0 else 0.2 * value for value in e]
            total = sum(exp(value) for value in e)
            for c in range(OUT):
                row[c] += (
                    sum(exp(v) / total * wx[j][c] for v, j in zip(e, seen, strict=True)) / HEADS
                )
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def run(gat: GAT, edges: list[tuple[int, int]]) -> Tensor:
    neighbours = neighbours_of(torch.tensor(edges).reshape(-1, 2).T.long(), len(X))
    with torch.no_grad():
        return gat(torch.tensor(X, dtype=torch.float64), neighbours)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-12)


def test_the_layer_is_its_formula() -> None:
    assert close(run(make_gat().eval(), EDGES), by_formula(EDGES))


def test_an_edge_changes_its_two_ends_only() -> None:
    gat = make_gat().eval()
    without, along = run(gat, EDGES), run(gat, [*EDGES, (2, 3), (3, 2)])
    assert torch.equal(along[:2], without[:2])
    assert not torch.allclose(along[2], without[2])
    assert not torch.allclose(along[3], without[3])


def test_an_isolated_node_sees_itself() -> None:
    heads = torch.tensor(W, dtype=torch.float64)
    own = torch.einsum("i,hic->hc", torch.tensor(X[3], dtype=torch.float64), heads).mean(0)
    out = run(make_gat().eval(), EDGES)
    assert close(out[3], own + torch.tensor(BIAS, dtype=torch.float64))


def test_dropouts_do_nothing_in_evaluation() -> None:
    gat = make_gat(attention_dropout=0.9, node_dropout=1.0).eval()
    assert close(run(gat, EDGES), by_formula(EDGES))


def test_no_dropout_in_training_is_evaluation() -> None:
    assert close(run(make_gat().train(), EDGES), by_formula(EDGES))


def test_attention_dropout_acts_in_training() -> None:
    torch.manual_seed(0)
    gat = make_gat(attention_dropout=0.5).train()
    assert not close(run(gat, EDGES), by_formula(EDGES))


def test_with_all_nodes_dropped_each_keeps_its_features_and_sees_itself() -> None:
    assert close(run(make_gat(node_dropout=1.0).train(), EDGES), by_formula([]))


def test_node_dropout_cuts_all_edges_of_the_nodes_it_drops() -> None:
    """Each training pass is the formula with some nodes cut off; over many, all subsets occur."""
    graphs = {}
    for dropped in (set(c) for size in range(5) for c in combinations(range(4), size)):
        left = tuple(edge for edge in EDGES if not dropped & set(edge))
        graphs[left] = by_formula(list(left))
    gat = make_gat(node_dropout=0.5).train()
    torch.manual_seed(0)
    seen = set()
    for _ in range(100):
        out = run(gat, EDGES)
        matches = [left for left, expected in graphs.items() if close(out, expected)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert seen == set(graphs)


@pytest.mark.parametrize(("probability", "low", "high"), [(0.1, 0.77, 0.85), (0.7, 0.06, 0.12)])
def test_an_edge_survives_when_both_its_ends_do(
    probability: float, low: float, high: float
) -> None:
    """(1 - p)²: 0.81 and 0.09, over 2000 pairs of nodes."""
    torch.manual_seed(0)
    pairs = torch.arange(4000).reshape(2000, 2).T
    pairs = neighbours_of(torch.cat([pairs, pairs.flip(0)], dim=1), 4000)
    x = torch.arange(4000, dtype=torch.float32)[:, None]
    gat = GAT(1, 1, heads=1, attention_dropout=0.0, node_dropout=probability).train()
    with torch.no_grad():
        gat.conv.lin.weight.fill_(1.0)
        gat.conv.att_src.zero_()
        gat.conv.att_dst.zero_()
        changed = (gat(x, pairs) != x).float().mean()  # a node that sees its partner too
    assert low < changed < high


# Against torch_geometric, with every residual form written out (D15)

RESIDUALS = ("none", "plain", "glu")
WIDTH, NODES = 6, 30


def make_pair(residual: str, **options: float) -> tuple[GAT, GATConv]:
    """A layer of ours, and PyG's as the method has it with the same weights."""
    torch.manual_seed(0)
    ours = GAT(
        WIDTH,
        WIDTH,
        HEADS,
        **{"attention_dropout": 0.0, "node_dropout": 0.0, **options},
        residual=residual,
    ).double()  # type: ignore[arg-type]
    for parameter in ours.parameters():  # a bias is zero at the start
        torch.nn.init.normal_(parameter, std=0.5)
    theirs = GATConv(
        WIDTH,
        WIDTH,
        HEADS,
        concat=False,
        negative_slope=0.2,
        add_self_loops=True,
        dropout=ours.conv.dropout,
    ).double()
    theirs.load_state_dict(ours.conv.state_dict())
    return ours, theirs


def random_graph() -> tuple[Tensor, Neighbours]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NODES, WIDTH, dtype=torch.float64, generator=generator)
    edges = (torch.rand(NODES, NODES, generator=generator) < 0.05).fill_diagonal_(False)
    return x, neighbours_of((edges | edges.T).nonzero().T, NODES)


def gate_by_hand(h: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """h · σ(W2 ELU(W1 h + b1) + b2)."""
    inner = h @ weights["gate.mlp.0.weight"].T + weights["gate.mlp.0.bias"]
    inner = torch.where(inner > 0, inner, inner.clamp(max=0).exp() - 1)
    outer = inner @ weights["gate.mlp.2.weight"].T + weights["gate.mlp.2.bias"]
    return h / (1 + (-outer).exp())


def with_residual(x: Tensor, h: Tensor, residual: str, weights: dict[str, Tensor]) -> Tensor:
    if residual == "none":
        return h
    return x + (h if residual == "plain" else gate_by_hand(h, weights))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_outputs_and_gradients_are_those_of_torch_geometric(residual: str) -> None:
    ours, theirs = make_pair(residual)
    x, edges = random_graph()
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    copies = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters()}

    found = ours(x_ours, edges)
    expected = with_residual(x_theirs, theirs(x_theirs, edges.edge_index()), residual, copies)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    (found.sin() * found).sum().backward()
    (expected.sin() * expected).sum().backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, rtol=0, atol=1e-10)
    for name, parameter in ours.named_parameters():
        inner = name.startswith("conv.")
        other = theirs.get_parameter(name[5:]) if inner else copies[name]
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=1e-10)
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("residual", RESIDUALS)
def test_attention_dropout_is_that_of_torch_geometric(residual: str) -> None:
    """With PyG's own layer the same seed drops the same coefficients."""
    ours, theirs = make_pair(residual, attention_dropout=0.4)
    with_gatconv(ours)
    x, edges = random_graph()
    torch.manual_seed(5)
    found = ours.train()(x, edges)
    torch.manual_seed(5)
    h = theirs.train()(x, edges.edge_index())
    expected = with_residual(x, h, residual, dict(ours.named_parameters()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(found, ours.eval()(x, edges))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_dropped_node_keeps_its_residual(residual: str) -> None:
    ours, theirs = make_pair(residual, node_dropout=1.0)
    x, edges = random_graph()
    h = theirs(x, torch.empty(2, 0, dtype=torch.int64))
    expected = with_residual(x, h, residual, dict(ours.named_parameters()))
    torch.testing.assert_close(ours.train()(x, edges), expected, rtol=0, atol=1e-12)


def test_only_the_gated_form_has_weights_of_its_own() -> None:
    """An MLP F → F/2 → F beside the layer."""
    counts = [sum(p.numel() for p in make_pair(r)[0].parameters()) for r in RESIDUALS]
    half = WIDTH // 2
    assert counts[0] == counts[1]
    assert counts[2] - counts[0] == WIDTH * half + half + half * WIDTH + WIDTH


@pytest.mark.parametrize("residual", ["plain", "glu"])
def test_a_residual_needs_equal_widths(residual: str) -> None:
    with pytest.raises(InputError, match=rf"residual '{residual}': .*width 4 to 5; give"):
        GAT(4, 5, residual=residual)  # type: ignore[arg-type]
    GAT(4, 5)


@pytest.mark.parametrize("residual", ["plain", "glu"])
@pytest.mark.parametrize("widths", [(5, 6, 6), (6, 6, 5)], ids=["input", "output"])
def test_every_layer_of_the_pgnn_has_the_residual(
    residual: str, widths: tuple[int, int, int]
) -> None:
    in_dim, hidden, out = widths
    with pytest.raises(InputError, match="residual"):
        PGNN({"x10": in_dim, "x20": in_dim}, hidden, out, residual=residual)  # type: ignore[arg-type]
    pgnn = PGNN({"x10": 6, "x20": 6}, 6, 6, residual=residual)  # type: ignore[arg-type]
    gats = [*pgnn.scale_gats.values(), pgnn.union_gat]
    assert [gat.residual for gat in gats] == [residual] * 3


@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_pgnn_is_its_layers_with_their_residuals(residual: str) -> None:
    """With all weights of the graph attention zero, x + h is x twice over, and h is zero."""
    (graph,) = make_graphs([12])
    pgnn = PGNN({"x10": 6, "x20": 6}, 6, 6, node_dropout=0.0, residual=residual).eval()  # type: ignore[arg-type]
    for parameter in pgnn.parameters():
        torch.nn.init.zeros_(parameter)
    for scale, h in pgnn(graph).items():
        expected = torch.zeros_like(h) if residual == "none" else graph.features[scale]
        assert torch.equal(h, expected)
