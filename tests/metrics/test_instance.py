"""AUROC of tiles, counted by hand."""

from math import isnan

import pytest
import torch

from dasmil.metrics import class_probabilities
from dasmil.metrics.instance import instance_auroc, instance_auroc_per_slide


def slides(*pairs):
    scores, truth = zip(*pairs, strict=True)
    return (
        [torch.tensor(s, dtype=torch.float64) for s in scores],
        [torch.tensor(t, dtype=torch.bool) for t in truth],
    )


def test_pooled_over_all_slides_and_within_each():
    """Each slide is in order; of the 6 pairs over all, one (0.3, 0.6) is not, and one ties.

    Positive are 0.9, 0.3 and, of the slide without negative tiles, 0.6.
    """
    scores, truth = slides(
        ([0.6, 0.9], [False, True]), ([0.1, 0.3], [False, True]), ([0.6], [True]), ([], [])
    )
    assert instance_auroc(scores, truth) == pytest.approx(4.5 / 6)
    assert instance_auroc_per_slide(scores, truth) == 1


def test_every_slide_counts_once_however_many_tiles_it_has():
    """1 of 1 pair, and 1 of 4 pairs: 0.625; together 6 of 10."""
    scores, truth = slides(
        ([0.2, 0.5], [False, True]), ([0.1, 0.8, 0.3, 0.9, 0.7], [False, False, True, False, False])
    )
    assert instance_auroc_per_slide(scores, truth) == pytest.approx((1 + 1 / 4) / 2)
    assert instance_auroc(scores, truth) == pytest.approx(4 / 10)


def test_large_logits_keep_their_order():
    """In float32 both have the probability 1, and would tie."""
    scores = class_probabilities(torch.tensor([[20.0], [21.0]]))[:, 1]
    assert instance_auroc([scores], [torch.tensor([False, True])]) == 1


@pytest.mark.parametrize("truth", [[False, False], [True, True], []])
def test_not_defined_without_tiles_of_both_kinds(truth):
    scores = [torch.rand(len(truth), dtype=torch.float64)]
    assert isnan(instance_auroc(scores, [torch.tensor(truth, dtype=torch.bool)]))
    assert isnan(instance_auroc_per_slide(scores, [torch.tensor(truth, dtype=torch.bool)]))


def test_not_defined_without_slides():
    assert isnan(instance_auroc([], [])) and isnan(instance_auroc_per_slide([], []))
