"""Mean and max pooling against loops over the tiles."""

import pytest
import torch
from bag_factory import make_graphs
from models import make_network
from torch import Tensor

from dasmil.bags import join_graphs
from dasmil.nn import PoolingHead

PTR = torch.tensor([0, 4, 4, 7])  # the second bag holds no tile


def head_and_tiles(pooling, num_logits=2, seed=0):
    torch.manual_seed(seed)
    return PoolingHead(5, num_logits, pooling).double(), torch.randn(7, 5, dtype=torch.float64)


def logits_by_loop(head: PoolingHead, h: Tensor, shown: list[bool]) -> list[list[float]]:
    z = head.instance_classifier(head.transform(h)).tolist()
    bags = []
    for start, stop in ((0, 4), (4, 4), (4, 7)):
        seen = [z[row] for row in range(start, stop) if shown[row]]
        pool = max if head.pooling == "max" else (lambda values: sum(values) / len(values))
        bags.append([pool(list(column)) for column in zip(*seen)] if seen else [0.0, 0.0])
    return bags


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("hidden", [(), (1, 2), (4, 5, 6)])
def test_a_bag_s_logit_is_the_mean_or_the_largest_of_the_tiles_shown(pooling, hidden):
    head, h = head_and_tiles(pooling)
    shown = [row not in hidden for row in range(7)]
    output = head(h, PTR, torch.tensor(shown))
    torch.testing.assert_close(
        output.bag_logits, torch.tensor(logits_by_loop(head, h, shown)).double()
    )
    assert (output.attention[[not s for s in shown]] == 0).all()
    for start, stop in ((0, 4), (4, 7)):
        expected = 1.0 if any(shown[start:stop]) else 0.0
        torch.testing.assert_close(
            output.attention[start:stop].sum(0), torch.full((2,), expected).double()
        )


def test_of_equal_largest_tiles_one_alone_counts():
    head, h = head_and_tiles("max")
    h[1] = h[0]
    output = head(h[[0, 1]], torch.tensor([0, 2]))
    assert output.attention.tolist() == [[1, 1], [0, 0]]
    torch.testing.assert_close(output.bag_logits[0], output.instance_logits[0])


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_pooling_heads_give_a_batch_what_they_give_single_bags(pooling):
    torch.manual_seed(0)
    model = make_network({"x10": 6, "x20": 6}, 1, 8, 8, pooling=pooling, contextualize=False).eval()
    graphs = make_graphs([5, 9])
    together = model(join_graphs(graphs))
    for number, graph in enumerate(graphs):
        alone = model(graph)
        for scale in ("x10", "x20"):
            torch.testing.assert_close(
                together[scale].bag_logits[number], alone[scale].bag_logits[0]
            )


def test_of_equal_largest_tiles_the_first_alone_learns():
    head, h = head_and_tiles("max")
    h = h[[0, 0, 0, 1]].requires_grad_()
    output = head(h, torch.tensor([0, 3, 4]))
    output.bag_logits.sum().backward()
    assert h.grad[0].any() and not h.grad[1:3].any()
    alone = h.detach()[[0, 3]].requires_grad_()
    head(alone, torch.tensor([0, 1, 2])).bag_logits.sum().backward()
    torch.testing.assert_close(h.grad[[0, 3]], alone.grad)


def test_logits_are_not_rounded_to_half_precision():
    head, h = head_and_tiles("mean")
    h = h[:1].float() + 1e-4 * torch.randn(30, 5)
    with torch.autocast("cpu", torch.bfloat16):
        output = head.float()(h, torch.arange(31))
    assert output.bag_logits.dtype == torch.float32
    assert len(output.bag_logits[:, 0].unique()) == 30
