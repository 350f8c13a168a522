"""Large bags are worked on in blocks of rows where no gradient is needed, with the same answer."""

import pytest
import torch
from bag_factory import make_bag
from models import make_network

import dasmil.nn.gat
import dasmil.tensors
from dasmil.bags import bag_graph
from dasmil.nn import GAT
from dasmil.tensors import by_rows

BLOCK = 7


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dasmil.tensors, "MANY_ROWS", BLOCK)
    for module in (dasmil.tensors, dasmil.nn.gat):
        monkeypatch.setattr(module, "BLOCK_ROWS", BLOCK)


def make_graph(num_tiles: int = 60):
    return bag_graph(make_bag(scales=("x5", "x10", "x20"), num_tiles=num_tiles, side=16))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"residual": "glu"},
        {"residual": "plain", "concatenate_parents": True},
        {"coarse_instances": "parents"},
        {"contextualize": False},
        {"pooling": "max"},
        {"pooling": "mean", "contextualize": False},
        {"num_logits": 3},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_tiles", [0, 1, 60])
def test_the_answer_in_blocks_is_that_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, options: dict, dtype: torch.dtype, num_tiles: int
) -> None:
    torch.manual_seed(0)
    dims = {"x5": 6, "x10": 6, "x20": 6}
    wide = {"hidden_dim": 6, "out_dim": 6} if "residual" in options else {}
    model = make_network(dims, **wide, **options).to(dtype).eval()
    graph = make_graph(num_tiles)
    whole = {s: out for s, out in model(graph).items()}
    monkeypatch.setattr(dasmil.tensors, "MANY_ROWS", BLOCK)
    for module in (dasmil.tensors, dasmil.nn.gat):
        monkeypatch.setattr(module, "BLOCK_ROWS", BLOCK)
    with torch.inference_mode():
        blocks = model(graph)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    for scale, output in whole.items():
        for name in ("bag_logits", "instance_logits", "attention", "shown"):
            ours, theirs = getattr(blocks[scale], name), getattr(output, name)
            torch.testing.assert_close(ours, theirs.detach(), **tolerance)


def test_a_gradient_takes_the_whole(small_blocks: None) -> None:
    gat, graph = GAT(6, 4), make_graph()
    x = graph.features["x20"].float().requires_grad_()
    gat.eval()(x, graph.neighbours["x20"]).sum().backward()
    assert x.grad is not None and bool((x.grad != 0).any())


def test_the_lists_of_some_nodes_are_those_of_all() -> None:
    union = make_graph().union
    for start, stop in ((0, 5), (3, 40), (40, len(union)), (7, 7)):
        rows, part = union.of_nodes(start, stop)
        assert rows[: stop - start].tolist() == list(range(start, stop))
        assert len(part) == stop - start and len(rows.unique()) == len(rows)
        for node in range(start, stop):
            found = rows[part.index[part.ptr[node - start] : part.ptr[node - start + 1]].long()]
            assert torch.equal(found, union.index[union.ptr[node] : union.ptr[node + 1]])


def test_rows_come_back_in_their_order(small_blocks: None) -> None:
    x = torch.arange(60.0).view(20, 3)
    sizes: list[int] = []

    def double(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return rows[:, :2] * 2

    with torch.no_grad():
        assert torch.equal(by_rows(double, x), x[:, :2] * 2)
    assert sizes == [7, 7, 6]
