"""Checkpoints of strangers: tried 236, refused 236, wrong 0; each in one sentence."""

import resource
from copy import deepcopy

import pytest
import torch
from models import make_module

import dasmil
from dasmil.errors import InputError
from dasmil.methods import DASMIL
from dasmil.modules.card import OF_CARD
from dasmil.modules.options import group_of

NAN, INF = float("nan"), float("inf")
CARD = {"feature_dim": 6, "fingerprint": "f", "name": "n", "mean": [0.5] * 3, "std": [0.5] * 3}
SCALES = {"x10": {"mpp": 1.0, "extractor": CARD}, "x20": {"mpp": 0.5, "extractor": CARD}}
HPARAMS = {
    **{"hidden_dim": 8, "out_dim": 8, "query_dim": 4, "classes": ["normal", "tumour"]},
    "bag_format": {"tile_px": 256, "scales": SCALES},
    "thresholds": {"x20": {"youden": 0.5, "specificity_0.9": 1.0}},
    "split": [{"slide_id": "a", "patient_id": None, "split": "train", "digest": "", "label": "0"}],
    "_class_path": "dasmil.modules.DASMILModule",
    "_instantiator": "lightning.pytorch.cli.instantiate_module",
}
OTHER_HPARAMS = [
    {"_class_path": "os.system"},
    {"_class_path": "dasmil.modules.DINOModule"},
    {"_class_path": None},
    {"class_path": "os.system"},
    {"network": "os.system"},
    *({"hidden_dim": value} for value in (10**9, 0, -1, 8.0, "8", True, None, NAN, [8])),
    *({"out_dim": value} for value in (10**9, 16)),
    *({"heads": value} for value in (10**9, 0, 4)),
    *({"query_dim": value} for value in (2**16, {})),
    *({"attention_dropout": value} for value in (2.0, NAN, -1.0, "0.1", 1j)),
    *({"residual": value} for value in ("other", None, 5, {"class_path": "os.system"})),
    *({"pooling": value} for value in ("os.system", "mean")),
    *({"contextualize": value} for value in (1, "yes", False)),
    *({"classes": value} for value in (None, "ab", [1, 2], ["a"], [], ["a", "a"], ["a", None])),
    *({"classes": value} for value in (["a", "b\n"], ["a"] * 10**5, {"a": 1}, ["a", ["b"]])),
    *({"thresholds": {"x20": {"youden": value}}} for value in (NAN, INF, 1.5, -0.1, 0.5j, "0.5")),
    *({"thresholds": value} for value in (0.5, {"x5": {}}, {"x20": 0.5}, {"x20": {"/x": 0.5}})),
    *({"specificity": value} for value in (NAN, 1.0, 2, "0.9")),
    *({"class_weights": value} for value in ([NAN, 1.0], [1.0], [-1.0, 1.0], "other", [1j, 1])),
    *({"betas": value} for value in ([0.5], [NAN, 0.9], None)),
    *({"split": value} for value in (5, [5], [{"slide_id": "a", "split": "other"}], {"a": "b"})),
    {"val_part": "../train"},
    {"learning_rate": INF},
    {"bag_format": None},
]
OTHER_FORMATS = [
    *({"tile_px": value} for value in (0, 10**9, "256", NAN)),
    *(
        {"scales": value}
        for value in ({}, [], None, {"x10": 5}, {"x10": {}}, {"x10": {"mpp": 1.0}})
    ),
    *({"scales": {name: SCALES["x20"]}} for name in ("/x/y", "../x", "x0", "x20\n", 5)),
    {"scales": {"x20": SCALES["x20"], "x10": SCALES["x10"]}},
    {"scales": {"x20": {**SCALES["x20"], "mpp": NAN}}},
    {"class_path": "os.system", "init_args": {"command": "touch x"}},
    {"scales": {"x20": {"mpp": 0.5, "extractor": {**CARD, "feature_dim": 10**9}}}},
    {"scales": {"x20": {"mpp": 0.5, "extractor": {**CARD, "feature_dim": 6.0}}}},
    {"scales": {"x20": {"mpp": 0.5, "extractor": {**CARD, "class_path": "os.system"}}}},
    {"scales": {"x20": {"mpp": 0.5, "extractor": {**CARD, "mean": [NAN] * 3}}}},
]
OTHER_WEIGHTS = {
    "none": lambda w: None,
    "empty": lambda w: {},
    "a list": lambda w: list(w.values()),
    "a number": lambda w: {**w, next(iter(w)): 5},
    "one is missing": lambda w: dict(list(w.items())[1:]),
    "one too many": lambda w: {**w, "network.more": torch.ones(1)},
    "another shape": lambda w: {key: value[..., None] for key, value in w.items()},
    "NaN": lambda w: {key: value * NAN for key, value in w.items()},
    "infinite": lambda w: {key: value + INF for key, value in w.items()},
    "complex": lambda w: {key: value + 0j for key, value in w.items()},
    "keys are numbers": lambda w: dict(enumerate(w.values())),
}


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return make_module(**{key: value for key, value in HPARAMS.items() if key[0] != "_"})


@pytest.fixture(scope="module")
def content(module):
    return {"state_dict": module.state_dict(), **module.description()}


@pytest.fixture(scope="module")
def older(module):
    """As versions before 0.2 wrote it."""
    return {"state_dict": module.state_dict(), "hyper_parameters": HPARAMS}


def with_entries(content, changed):
    """Options or entries of the card of a checkpoint are others."""
    content = deepcopy({**content, "state_dict": None}) | {"state_dict": content["state_dict"]}
    for name, value in changed.items():
        if "card" not in content:
            content["hyper_parameters"][name] = value
        elif name in OF_CARD and name != "class_weights":
            content["card"][name] = value
        elif name == "_class_path":
            content["method"] = value
        else:
            group = group_of(DASMIL, name)
            options = content["hyper_parameters"]
            (options[group] if group else options)[name] = value
    return content


def hostile_contents(content):
    """All checkpoints that are tried, by what is wrong with them."""
    for changed in OTHER_HPARAMS:
        yield changed, with_entries(content, changed)
    for changed in OTHER_FORMATS:
        bag_format = {**HPARAMS["bag_format"], **changed}
        yield changed, with_entries(content, {"bag_format": bag_format})
    for name, change in OTHER_WEIGHTS.items():
        yield name, {**content, "state_dict": change(content["state_dict"])}
    for missing in content:
        yield f"no {missing}", {k: v for k, v in content.items() if k != missing}
    for other in (None, [], "text", {}, {5: 5}, {"hyper_parameters": []}, torch.ones(3)):
        yield "something else", other


@pytest.mark.slow
@pytest.mark.parametrize("version", ["content", "older"])
def test_hostile_checkpoints_run_nothing_and_take_no_memory(tmp_path, version, request):
    path, content = tmp_path / "model.ckpt", request.getfixturevalue(version)
    torch.save(content, path)
    assert dasmil.load(path).classes == ("normal", "tumour")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {"tried": 0, "refused": 0, "wrong": []}
    for what, hostile in hostile_contents(content):
        figures["tried"] += 1
        torch.save(hostile, path)
        try:
            dasmil.load(path)
        except InputError as error:
            one_line = str(error).startswith(f"{path}: ") and "\n" not in str(error)
            figures["refused"] += one_line and len(str(error)) < 1000 + len(str(path))
        except BaseException as error:  # what a user would see as a traceback
            figures["wrong"].append((what, repr(error)[:200]))
        else:
            figures["wrong"].append((what, "loaded"))
    assert figures["wrong"] == []
    assert figures["refused"] == figures["tried"] >= 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_an_older_checkpoint_without_newer_options_is_taken(tmp_path, older):
    hparams = {k: v for k, v in HPARAMS.items() if k not in ("thresholds", "split", "query_dim")}
    torch.save({**older, "hyper_parameters": {**hparams, "query_dim": 4}}, tmp_path / "model.ckpt")
    assert dasmil.load(tmp_path / "model.ckpt").scales == ("x10", "x20")
