"""DTFD against its official program."""

import pytest
import torch
from golden import Case, linear, method_cases

from dasmil.errors import InputError
from dasmil.methods import DTFD
from dasmil.methods.dtfd import NetworkOptions

NAMES = {
    "projection.weight": "dim_reduction.fc1.weight",
    **linear("attention.v", "attention.attention_V.0"),
    **linear("attention.u", "attention.attention_U.0"),
    **linear("attention.w", "attention.attention_weights"),
    **linear("classifier", "classifier.fc"),
    **linear("second.attention.v", "att_classifier.attention.attention_V.0"),
    **linear("second.attention.u", "att_classifier.attention.attention_U.0"),
    **linear("second.attention.w", "att_classifier.attention.attention_weights"),
    **linear("second.classifier", "att_classifier.classifier.fc"),
}
OFFICIAL = {"afs": "AFS", "maxs": "MaxS", "maxmins": "MaxMinS"}


def dtfd(case: Case, distillation: str) -> DTFD:
    """The module with the weights of a case, whose tiles are dealt out as there."""
    num_pseudo_bags = len(case.expected["tier1.logits"])
    n = len(case.expected["MaxS.selected_instances"]) // num_pseudo_bags
    options = NetworkOptions(
        num_pseudo_bags,
        distillation,
        n * num_pseudo_bags,
        len(case.weights["dim_reduction.fc1.weight"]),
        len(case.weights["attention.attention_V.0.bias"]),
    )
    module = case.bind(DTFD(options), 2, NAMES)
    module.network.deal = lambda size, slide_id: case.inputs["permutation"].long()
    return module


@pytest.mark.parametrize("distillation", OFFICIAL)
@pytest.mark.parametrize("name", method_cases("dtfd"))
def test_dtfd_is_the_official_one(name: str, distillation: str) -> None:
    case, prefix = Case(name), OFFICIAL[distillation]
    module, graph = dtfd(case, distillation), case.graph()
    output = module(graph)
    _, terms = module.objective(output, graph)
    first, second = terms["pseudo_bag/x20"].sum(), terms["bag/x20"].sum()
    case.compare("tier1.logits", output["x20"].pseudo_logits)
    case.compare(f"{prefix}.tier2.logits", output["x20"].bag_logits)
    case.compare(f"{prefix}.tier1.loss", first)
    case.compare(f"{prefix}.tier2.loss", second)
    in_pseudo_bags = case.expected["instance.attention_in_its_pseudo_bag"]
    attention = output["x20"].attention[:, 0] * len(output["x20"].pseudo_logits)
    torch.testing.assert_close(attention.detach(), in_pseudo_bags)
    first_tier = {name for name in NAMES if not name.startswith("second")}
    of_first = {ours: theirs for ours, theirs in NAMES.items() if ours in first_tier}
    of_second = {ours: f"{theirs}" for ours, theirs in NAMES.items() if ours not in first_tier}
    none = {name: "none" for name in NAMES}
    case.compare_gradients(first, module.network, graph, "", {**none, **of_first})
    case.compare_gradients(second, module.network, graph, f"{prefix}.", {**none, **of_second})


def test_fewer_instances_than_pseudo_bags_are_refused() -> None:
    """The released code would take nothing from the top and everything from the bottom."""
    with pytest.raises(InputError, match="3 are fewer than the 4 pseudo-bags"):
        NetworkOptions(num_instances=3)


def test_a_slide_of_fewer_tiles_than_pseudo_bags_has_fewer() -> None:
    case = Case("dtfd")
    case.inputs |= {"features": case.inputs["features"][:2], "permutation": torch.tensor([1, 0])}
    module, graph = dtfd(case, "maxmins"), case.graph()
    output = module(graph)["x20"]
    assert len(output.pseudo_logits) == 2 and output.bag_logits.isfinite().all()


def test_evaluation_deals_the_tiles_of_a_slide_out_alike_each_time() -> None:
    case = Case("dtfd")
    module, graph = dtfd(case, "afs"), case.graph()
    del module.network.deal
    first, second = (module(graph)["x20"].bag_logits for _ in range(2))
    assert torch.equal(first, second)
