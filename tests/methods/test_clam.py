"""CLAM against its official program."""

import pytest
import torch
from golden import Case, linear, method_cases

from dasmil.methods import CLAM
from dasmil.methods.clam import NetworkOptions, ObjectiveOptions, smooth_svm

TRUNK = {
    **linear("trunk.0", "attention_net.0"),
    **linear("attention.v", "attention_net.3.attention_a.0"),
    **linear("attention.u", "attention_net.3.attention_b.0"),
    **linear("attention.w", "attention_net.3.attention_c"),
}


def clam(case: Case, branches: str, **objective) -> tuple[CLAM, dict[str, str]]:
    """The module with the weights of a case, and the official names of its weights."""
    classifiers = [name for name in case.weights if name.startswith("instance_classifiers")]
    num_classes = len(classifiers) // 2
    names = {**TRUNK, **linear("classifier", "classifiers")}
    for number in range(num_classes):
        theirs = f"instance_classifiers.{number}"
        names |= linear(f"tile_classifiers.{number}", theirs)
    if branches == "multi":  # one classifier of one output per class
        for kind in ("weight", "bias"):
            for entries in (case.weights, case.expected):
                for prefix in {
                    k.rsplit("classifiers.0.", 1)[0]
                    for k in entries
                    if k.endswith(f"classifiers.0.{kind}") and "instance" not in k
                }:
                    parts = [entries[f"{prefix}classifiers.{n}.{kind}"] for n in range(num_classes)]
                    entries[f"{prefix}classifiers.{kind}"] = torch.cat(parts)
    hidden_dim, attention_dim = (
        len(case.weights[names[n]]) for n in ("trunk.0.bias", "attention.v.bias")
    )
    options = NetworkOptions(branches, hidden_dim, attention_dim)
    module = CLAM(options, ObjectiveOptions(**objective))
    return case.bind(module, num_classes, names), names


@pytest.mark.parametrize("instance_loss", ["cross_entropy", "svm"])
@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("name", method_cases("clam_"))
def test_clam_is_the_official_one(name: str, subtyping: bool, instance_loss: str) -> None:
    case = Case(name)
    branches = "multi" if "classifiers.0.weight" in case.weights else "single"
    module, names = clam(case, branches, subtyping=subtyping, instance_loss=instance_loss)
    graph = case.graph()
    output = module(graph)
    total, terms = module.objective(output, graph)
    key = f"{'sub' if subtyping else 'nosub'}.{'svm' if instance_loss == 'svm' else 'ce'}."
    case.compare("bag_logits", output["x20"].bag_logits)
    num_attentions = len(case.expected["attention"])
    case.compare("attention", output["x20"].attention[:, :num_attentions].T)
    case.compare("instance_hidden", output["x20"].hidden)
    case.compare("loss.bag_ce", terms["bag/x20"])
    case.compare(f"{key}loss.inst", terms["instance/x20"])
    case.compare(f"{key}loss.total", total)
    case.compare_gradients(total.sum(), module.network, graph, key, names)


def test_the_smooth_svm_on_bag_logits() -> None:
    case = Case("clam_sb")
    logits = case.expected["bag_logits"].double()
    case.compare("loss.bag_svm", smooth_svm(logits, torch.tensor([case.label])).mean())


def test_a_bag_of_fewer_tiles_than_k_takes_all() -> None:
    case = Case("clam_sb")
    case.inputs["features"] = case.inputs["features"][:3]
    module, _ = clam(case, "single")
    graph = case.graph()
    total, _ = module.objective(module(graph), graph)
    assert total.isfinite().all()
