import csv
import json
from dataclasses import dataclass, replace

import pytest
import torch
from golden import (
    RELEASED,
    assert_released,
    assert_released_gradient,
    released_folder,
    released_terms,
)
from mil4wsi_cases import RunsCode, import_bags
from models import leaves, make_network
from safetensors.torch import load_file

import dasmil
from dasmil.bags import bag_graph, bag_path, read_bag
from dasmil.cli import main
from dasmil.interop.mil4wsi.checkpoint import released_names
from dasmil.interop.mil4wsi.graph import SCALES, read_prepared
from dasmil.methods.dasmil import objective
from dasmil.slides.cohort import read_cohort, write_cohort

FILES = [(case, "model.pt") for case in RELEASED] + [(c, "model_pyg22.pt") for c in RELEASED[:1]]
QUIET = ["--data.num_workers", "0", "--trainer.enable_progress_bar", "false"]


def import_checkpoint(source, target, *options):
    return main(["import", "mil4wsi-checkpoint", str(source), str(target), *options])


def released_weights(width=6, out_dim=5, num_logits=1, has_gates=False, heads=2):
    """A state dict as mil4wsi saves it."""
    residual = "glu" if has_gates else "none"
    torch.manual_seed(0)
    dims = {"x10": width, "x20": width}
    network = make_network(dims, num_logits, width, out_dim, heads, residual=residual).state_dict()
    return {theirs: network[n] for n, theirs in released_names("x10", "x20", has_gates).items()}


def save(folder, weights):
    torch.save(weights, folder / "weights.pt")
    return folder / "weights.pt"


@dataclass(frozen=True)
class Golden:
    """A golden case, imported by command, and what the released code says of it."""

    checkpoint: object
    bags: object
    model: object
    graph: object
    expected: dict
    record: dict
    rows: dict  # per scale: our row of each of the released ones, in their order
    their_rows: dict


@pytest.fixture(scope="module", params=FILES)
def golden(request, tmp_path_factory):
    case, file = request.param
    source, folder = released_folder(case), tmp_path_factory.mktemp(case)
    checkpoint, bags = folder / "model.ckpt", folder / "bags"
    assert import_checkpoint(source / file, checkpoint) == 0
    assert import_bags(source, bags) == 0
    released = read_prepared(source / "processed" / "test" / "data_0.pt")
    bag = read_bag(bag_path(bags, released.slide_id))
    rows, their_rows = {}, {}
    for level, scale in SCALES.items():
        if scale.name in bag.scales:
            at = {(x, y): i for i, (x, y, _, _) in enumerate(bag.boxes_px0(scale.name).tolist())}
            their_rows[scale.name] = torch.from_numpy((released.level == level).nonzero()[0])
            places = released.place[released.level == level].tolist()
            rows[scale.name] = torch.tensor([at[tuple(place)] for place in places])
    return Golden(
        checkpoint,
        bags,
        dasmil.load(checkpoint),
        bag_graph(bag, released.label),
        load_file(source / "expected.safetensors"),
        json.loads((source / "expected.json").read_text()),
        rows,
        their_rows,
    )


def test_the_network_gives_the_output_of_the_released_one(golden):
    with torch.inference_mode():
        h = golden.model.network.pgnn(golden.graph)
        output = golden.model(golden.graph)
    for scale, theirs in zip(golden.model.scales, ("lower", "higher"), strict=True):
        rows = golden.rows[scale]
        assert_released(h[scale][rows], golden.expected["h"][golden.their_rows[scale]])
        assert_released(output[scale].instance_logits[rows], golden.expected[f"{theirs}.instance"])
        assert_released(output[scale].attention[rows], golden.expected[f"{theirs}.A"])
        assert_released(output[scale].bag_logits, golden.expected[f"{theirs}.bag"])


def test_the_objective_gives_the_released_losses(golden):
    for case, expected in golden.record["loss"].items():
        options = replace(golden.model.objective_options, **released_terms(case))
        with torch.inference_mode():
            output = golden.model(golden.graph)
            graph = golden.graph
            total, _ = objective(output, graph.parent, graph.ptr, graph.labels, options)
        assert total.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_every_gradient_is_the_released_one(golden):
    options = replace(
        golden.model.objective_options, **released_terms(golden.record["gradient_case"])
    )
    graph = golden.graph
    golden.model.zero_grad()
    total, _ = objective(golden.model(graph), graph.parent, graph.ptr, graph.labels, options)
    total.sum().backward()
    names = released_names(*golden.model.scales, golden.model.network_options.residual == "glu")
    theirs = {key.removeprefix("grad.") for key in golden.expected if key.startswith("grad.")}
    assert set(names.values()) == theirs
    for ours, theirs in names.items():
        found = golden.model.network.get_parameter(ours).grad
        assert_released_gradient(found, golden.expected[f"grad.{theirs}"], ours)


def test_predict_needs_only_checkpoint_and_bags(golden, tmp_path):
    command = ["predict", "--ckpt_path", str(golden.checkpoint), "--bags", str(golden.bags)]
    assert main([*command, "--output", str(tmp_path), *QUIET]) == 0
    with open(tmp_path / "predictions.csv", newline="") as file:
        [row] = csv.DictReader(file)
    assert row["slide_id"] == golden.record["slide"]
    for scale, theirs in zip(golden.model.scales, ("lower", "higher"), strict=True):
        [expected] = golden.record[f"bag_logit_{theirs}"]
        assert float(row[f"logit/{scale}/1"]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("case", RELEASED)
def test_validate_gives_the_released_loss_with_the_options_of_the_command_line(case, tmp_path):
    source = released_folder(case)
    assert import_checkpoint(source / "model.pt", tmp_path / "model.ckpt") == 0
    assert import_bags(source, tmp_path / "bags") == 0
    given = ["--ckpt_path", str(tmp_path / "model.ckpt"), "--bags", str(tmp_path / "bags")]
    record = json.loads((source / "expected.json").read_text())
    pairs = released_terms(record["gradient_case"]).items()
    options = [text for name, v in pairs for text in (f"--model.objective.{name}", str(v))]
    output = ["--output", str(tmp_path / "figures"), *QUIET]
    assert main(["validate", *given, *options, *output]) == 0
    figures = json.loads((tmp_path / "figures" / "val_metrics.json").read_text())
    expected = record["loss"][record["gradient_case"]]
    assert figures["val/loss"] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_nothing_is_tested_unless_a_table_names_the_test_slides(tmp_path, capsys):
    """Which slides the released weights were trained on is not known."""
    source = released_folder(RELEASED[0])
    assert import_checkpoint(source / "model.pt", tmp_path / "model.ckpt") == 0
    assert import_bags(source, tmp_path / "bags") == 0
    rows = read_cohort(tmp_path / "bags" / "cohort.csv")
    write_cohort(tmp_path / "bags" / "cohort.csv", [replace(row, split=None) for row in rows])
    given = ["--ckpt_path", str(tmp_path / "model.ckpt"), "--bags", str(tmp_path / "bags"), *QUIET]
    assert main(["test", *given, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "does not know which slides it was trained on" in error and "--data.split.table" in error
    assert main(["predict", *given, "--output", str(tmp_path / "predictions")]) == 0


@pytest.mark.parametrize(
    ("out_dim", "has_gates", "said"),
    [
        (256, False, "1,516,804 parameters, scales x10 and x20, residual none, widths 384 → 384"),
        (384, True, "2,470,724 parameters, scales x5 and x20, residual glu, widths 384 → 384"),
    ],
)
def test_the_released_sizes(out_dim, has_gates, said, tmp_path, capsys):
    weights = released_weights(384, out_dim, has_gates=has_gates, heads=3)
    out = tmp_path / "model.ckpt"
    assert import_checkpoint(save(tmp_path, weights), out) == 0
    assert said in capsys.readouterr().out.splitlines()[-1]
    model = dasmil.load(out)
    options = leaves(model.options)
    assert (options["hidden_dim"], options["out_dim"]) == (384, out_dim)
    assert (options["heads"], options["query_dim"]) == (3, 128)
    content = torch.load(out, weights_only=True)
    assert content["card"]["val_part"] == "test" and content["card"]["split"] == []
    assert options["coarse_instances"] == "parents" and options["children_pooling"] == "max"
    assert options["class_distribution"] == "per_class" and not options["squared_temperature"]


def test_names_of_other_versions_and_wrappings_are_understood(tmp_path):
    weights = released_weights()
    other = {f"module.{key}": tensor for key, tensor in weights.items()}
    other["module.millast.i_classifier.fc.0.weight"] = torch.zeros(1, 3)
    for gat in ("gnn1", "gnn2", "GNNlast"):
        name = f"module.{gat}.layers.0."
        other[f"{name}lin_src.weight"] = other.pop(f"{name}lin.weight")
        other[f"{name}lin_dst.weight"] = other[f"{name}lin_src.weight"].clone()
    assert import_checkpoint(save(tmp_path, weights), tmp_path / "plain.ckpt") == 0
    assert import_checkpoint(save(tmp_path, other), tmp_path / "other.ckpt") == 0
    plain, other = (dasmil.load(tmp_path / f"{n}.ckpt").state_dict() for n in ("plain", "other"))
    assert list(plain) == list(other)
    assert all(torch.equal(plain[key], other[key]) for key in plain)


def test_two_different_weights_for_source_and_target_are_refused(tmp_path, capsys):
    weights = released_weights()
    weights["gnn2.layers.0.lin_src.weight"] = weights.pop("gnn2.layers.0.lin.weight")
    weights["gnn2.layers.0.lin_dst.weight"] = weights["gnn2.layers.0.lin_src.weight"] + 1
    assert import_checkpoint(save(tmp_path, weights), tmp_path / "model.ckpt") == 2
    said = capsys.readouterr().err
    assert "gnn2.layers.0.lin_src.weight and gnn2.layers.0.lin_dst.weight differ" in said
    assert not (tmp_path / "model.ckpt").exists()


def without(*keys):
    return lambda weights: [weights.pop(key) for key in keys]


def with_(**shapes):
    def change(weights):
        weights |= {key.replace("__", "."): torch.zeros(shape) for key, shape in shapes.items()}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("mil3.b_classifier.v.1.bias"), "missing: mil3.b_classifier.v.1.bias"),
        (with_(gnn3__bias=(3,)), "unexpected: gnn3.bias"),
        (
            with_(glu1__mlp__mlp__0__bias=(3,)),
            "missing: glu1.mlp.mlp.0.weight, ",
        ),
        (with_(glu1__mlp__mlp__0__bias=(3,)), "and 6 more"),
        (with_(gnn1__layers__0__lin__weight=(6,)), "gnn1.layers.0.lin.weight has the shape"),
        (
            with_(mil2__b_classifier__q__0__bias=(7,)),
            "mil2.b_classifier.q.0.bias (7,) instead of (128,)",
        ),
        (with_(gnn2__layers__0__bias=(7,)), "gnn2.layers.0.bias (7,) instead of (6,)"),
        (with_(GNNlast__layers__0__bias=(9,)), "do not fit each other (of another shape: GNNlast."),
        (with_(GNNlast__layers__0__bias=(9,)), "more"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message, tmp_path, capsys):
    weights = released_weights()
    change(weights)
    assert import_checkpoint(save(tmp_path, weights), tmp_path / "model.ckpt") == 2
    said = capsys.readouterr().err
    assert message in said and str(tmp_path / "weights.pt") in said
    assert not (tmp_path / "model.ckpt").exists()


def test_widths_that_are_equal_stand_for_plain_residuals(tmp_path, capsys):
    path = save(tmp_path, released_weights(6, 6))
    assert import_checkpoint(path, tmp_path / "model.ckpt") == 0
    said = capsys.readouterr().out
    assert "--residual none is the other possibility" in said
    assert dasmil.load(tmp_path / "model.ckpt").network_options.residual == "plain"
    assert dasmil.load(tmp_path / "model.ckpt").scales == ("x5", "x20")
    assert import_checkpoint(path, tmp_path / "model.ckpt", "--residual", "none") == 0
    assert dasmil.load(tmp_path / "model.ckpt").network_options.residual == "none"
    assert "other possibility" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("residual", "message"),
    [("plain", "with the widths 6 → 6 → 5 has no residuals"), ("glu", "missing: glu1.mlp")],
)
def test_a_residual_that_the_weights_contradict_is_refused(residual, message, tmp_path, capsys):
    path = save(tmp_path, released_weights())
    assert import_checkpoint(path, tmp_path / "model.ckpt", "--residual", residual) == 2
    assert message in capsys.readouterr().err


def test_scales_are_those_of_the_user(tmp_path, capsys):
    path, out = save(tmp_path, released_weights()), tmp_path / "model.ckpt"
    assert import_checkpoint(path, out, "--scales", "[x20,x2.5]") == 0
    assert dasmil.load(out).scales == ("x2.5", "x20")
    assert "taken for" not in capsys.readouterr().out
    assert import_checkpoint(path, out, "--scales", "[x5,x10,x20]") == 2
    assert "has two; name two scales" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_logits", "classes", "code"),
    [(1, "[a,b]", 0), (1, "[a,b,c]", 2), (3, "[a,b,c]", 0), (3, "[a,b]", 2), (2, "[a,b]", 0)],
)
def test_classes_are_as_many_as_the_model_tells_apart(num_logits, classes, code, tmp_path, capsys):
    path = save(tmp_path, released_weights(num_logits=num_logits))
    assert import_checkpoint(path, tmp_path / "model.ckpt", "--classes", classes) == code
    if code == 0:
        model = dasmil.load(tmp_path / "model.ckpt")
        assert model.classes == tuple(classes.strip("[]").split(","))
        assert model.num_logits == num_logits
    else:
        assert f"has {max(2, num_logits)} classes" in capsys.readouterr().err


def test_extractors_are_those_of_the_given_checkpoints(tmp_path, capsys):
    sources = ["--extractors.x10", "random:test_vit", "--extractors.x20", "random:test_vit"]
    path, out = save(tmp_path, released_weights(64)), tmp_path / "model.ckpt"
    assert import_checkpoint(path, out, *sources) == 0
    for scale in dasmil.load(out).card.bag_format["scales"].values():
        assert scale["extractor"]["name"] == "test_vit"
        assert len(scale["extractor"]["fingerprint"]) == 64
    assert import_checkpoint(path, out, *sources[:2]) == 2
    assert "give one for each of them" in capsys.readouterr().err
    assert import_checkpoint(save(tmp_path, released_weights()), out, *sources) == 2
    assert "its features are 64 wide" in capsys.readouterr().err


def test_bags_of_another_extractor_are_refused(tmp_path, capsys):
    source = released_folder(RELEASED[0])
    assert import_bags(source, tmp_path / "bags") == 0
    weights = released_weights(64)
    sources = ["--extractors.x10", "random:test_vit", "--extractors.x20", "random:test_vit"]
    out = tmp_path / "model.ckpt"
    assert import_checkpoint(save(tmp_path, weights), out, *sources) == 0
    command = ["predict", "--ckpt_path", str(out), "--bags", str(tmp_path / "bags"), *QUIET]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "features of the extractor mil4wsi (mil4wsi x10)" in capsys.readouterr().err


def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path, capsys):
    marker = tmp_path / "marker"
    path = save(tmp_path, {**released_weights(), "more": RunsCode(marker)})
    assert import_checkpoint(path, tmp_path / "model.ckpt") == 2
    assert "could run foreign code" in capsys.readouterr().err
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # had it been unpickled


def test_a_file_that_is_no_state_dict_is_refused(tmp_path, capsys):
    out = tmp_path / "model.ckpt"
    for content in ([1, 2], {"epoch": 3}, {"gnn1": torch.tensor([1])}):
        assert import_checkpoint(save(tmp_path, content), out) == 2
        assert "no state dict" in capsys.readouterr().err
    path = save(tmp_path, released_weights())
    path.write_bytes(path.read_bytes()[:900])
    assert import_checkpoint(path, out) == 2
    assert "damaged or cut short, or no state dict" in capsys.readouterr().err
    assert import_checkpoint(tmp_path / "nothing.pt", out) == 2
    assert "does not exist" in capsys.readouterr().err
    assert import_checkpoint(path, path) == 2
    assert "the imported file itself" in capsys.readouterr().err


def test_a_weight_twice_and_a_weight_that_is_no_number_are_refused(tmp_path, capsys):
    twice = released_weights()
    twice["module.mil2.i_classifier.fc.0.bias"] = torch.zeros(1)
    assert import_checkpoint(save(tmp_path, twice), tmp_path / "out.ckpt") == 2
    assert "holds some weights twice" in capsys.readouterr().err
    broken = released_weights()
    broken["mil3.i_classifier.fc.0.bias"][:] = torch.nan
    assert import_checkpoint(save(tmp_path, broken), tmp_path / "out.ckpt") == 2
    assert "NaN or infinite in mil3.i_classifier.fc.0.bias" in capsys.readouterr().err
