"""GAT on a hand-made graph of 4 nodes against its formula in plain loops."""

from itertools import combinations
from math import exp

import pytest
import torch
from torch import Tensor

from dasmil.nn import GAT

X = [[1.0, 2.0], [-1.0, 0.5], [0.0, -2.0], [3.0, 1.0]]
EDGES = [(0, 1), (1, 0), (1, 2), (2, 0)]  # source, target; node 3 stands alone
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
    edge_index = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T
    with torch.no_grad():
        return gat(torch.tensor(X, dtype=torch.float64), edge_index)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-12)


def test_the_layer_is_its_formula() -> None:
    assert close(run(make_gat().eval(), EDGES), by_formula(EDGES))


def test_an_edge_carries_its_source_to_its_target_only() -> None:
    gat = make_gat().eval()
    without, along = run(gat, EDGES), run(gat, [*EDGES, (0, 3)])
    assert torch.equal(along[:3], without[:3])
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
    x = torch.arange(4000, dtype=torch.float32)[:, None]
    gat = GAT(1, 1, heads=1, attention_dropout=0.0, node_dropout=probability).train()
    with torch.no_grad():
        gat.conv.lin.weight.fill_(1.0)
        gat.conv.att_src.zero_()
        gat.conv.att_dst.zero_()
        changed = (gat(x, pairs) != x)[1::2].float().mean()  # a target that sees its source too
    assert low < changed < high
