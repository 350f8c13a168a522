"""ABMIL against its official program."""

import pytest
from golden import Case, linear, method_cases

from dasmil.methods import ABMIL
from dasmil.methods.abmil import NetworkOptions

NAMES = {
    **linear("attention.v", "attention_V.0"),
    **linear("attention.w", "attention_w"),
    **linear("classifier", "classifier.0"),
}
OF_GATE = linear("attention.u", "attention_U.0")
PLAIN = {
    **linear("attention.v", "attention.0"),
    **linear("attention.w", "attention.2"),
    **linear("classifier", "classifier.0"),
}


@pytest.mark.parametrize("name", method_cases("abmil_"))
def test_abmil_is_the_official_one(name: str) -> None:
    case = Case(name)
    gated = "attention_U.0.weight" in case.weights
    names = {**NAMES, **OF_GATE} if gated else PLAIN
    width = len(case.weights[names["attention.v.bias"]])
    module = case.bind(ABMIL(NetworkOptions(width, gated)), 2, names)
    graph = case.graph()
    output = module(graph)
    total, terms = module.objective(output, graph)
    case.compare("logit", output["x20"].bag_logits)
    case.compare("attention", output["x20"].attention)
    case.compare("loss.total", total)
    assert list(terms) == ["bag/x20"] and not module.uses_edges
    case.compare_gradients(total.sum(), module.network, graph, "", names)
