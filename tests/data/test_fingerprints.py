"""Bags of mixed or foreign extractors, as each verb refuses them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bag_factory import CLASSES, make_bag, make_card, write_bags
from road import fit_dasmil

import dasmil
from dasmil.bags import bag_graph, bag_path, read_bag, write_bag
from dasmil.cli import main
from dasmil.tables import read_csv

SPLIT = {
    f"{letter}{number}": part
    for number, part in enumerate(("train", "train", "val", "test"))
    for letter in "nt"
}
DIMS = {"x10": 16, "x20": 24}  # as of two foundation models
QUIET = ["--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]
OTHER = "0123456789ab" + "0" * 52


def write_folder(folder: Path) -> Path:
    labels = {s: CLASSES[s[0] == "t"] for s in SPLIT}
    return write_bags(folder, labels, SPLIT, dims=DIMS)


def replace_card(path: Path, scale: str, **changes: Any) -> None:
    bag = read_bag(path)
    cards = {**bag.header.extractors}
    cards[scale] = replace(cards[scale], **changes)
    write_bag(path, replace(bag, extractors=cards))


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("fingerprints") / "bags")


@pytest.fixture(scope="module")
def trained(bags: Path) -> Path:
    """Checkpoint of a model whose scales are of different widths."""
    runs = bags.parent / "runs"
    assert main([*fit_dasmil(bags, runs), "--model.standardize", "true"]) == 0
    return runs / "dasmil" / "checkpoints" / "last.ckpt"


def command(verb: str, bags: Path, trained: Path, output: Path) -> list[str]:
    if verb == "fit":
        return fit_dasmil(bags, output)
    checkpoint = ["--ckpt_path", str(trained), "--bags", str(bags)]
    return [verb, *checkpoint, *QUIET, "--output", str(output)]


# what `embed` with another pooling, or another network, changes of a card
CHANGES = {
    "pooling": ({"pooling": "mean"}, "vit_small_patch16_224 with mean pooling (0123456789ab)"),
    "network": ({"name": "resnet50"}, "resnet50 (0123456789ab)"),
}


@pytest.mark.parametrize(
    ("verb", "kind"),
    [
        ("fit", "pooling"),
        pytest.param("validate", "network", marks=pytest.mark.slow),
        pytest.param("test", "pooling", marks=pytest.mark.slow),
        ("predict", "network"),
    ],
)
def test_bags_of_mixed_extractors_are_refused(
    verb: str, kind: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentence names the slide, the scale and both extractors; predict goes on with others."""
    changes, words = CHANGES[kind]
    folder = write_folder(tmp_path / "bags")
    replace_card(bag_path(folder, "t1"), "x20", fingerprint=OTHER, **changes)
    sentence = (
        f"{folder}: the bag t1 holds x20 features of the extractor {words} instead of "
        "vit_small_patch16_224 (ffffffffffff) (as in n0); embed all slides in the same way"
    )
    code = main(command(verb, folder, trained, tmp_path / "out"))
    if verb == "predict":
        _, rows = read_csv(tmp_path / "out" / "predictions.csv")
        messages = {row["slide_id"]: row["message"] for row in rows}
        assert (code, messages) == (1, {**dict.fromkeys(SPLIT, ""), "t1": sentence})
        return
    assert code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {sentence}"
    assert not list((tmp_path / "out").rglob("*.c[sk]*"))  # neither a table nor a checkpoint


@pytest.mark.parametrize(
    ("verb", "kind"), [("validate", "network"), ("test", "pooling"), ("predict", "network")]
)
def test_bags_of_a_foreign_extractor_are_refused(
    verb: str, kind: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, words = CHANGES[kind]
    folder = write_folder(tmp_path / "bags")
    for slide_id in SPLIT:
        replace_card(bag_path(folder, slide_id), "x10", fingerprint=OTHER, **changes)
    assert main(command(verb, folder, trained, tmp_path / "out")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {folder}: the bags hold x10 features of the extractor {words} instead of "
        "vit_small_patch16_224 (ffffffffffff), which this model knows"
    )
    assert not list((tmp_path / "out").rglob("*.csv"))


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_bags_of_the_models_own_extractors_are_taken(
    verb: str, bags: Path, trained: Path, tmp_path: Path
) -> None:
    """Without which the refusals would show nothing."""
    assert main(command(verb, bags, trained, tmp_path)) == 0


def test_going_on_with_bags_of_a_foreign_extractor_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "bags")
    assert main(fit_dasmil(folder, tmp_path / "runs")) == 0
    for slide_id in SPLIT:
        replace_card(bag_path(folder, slide_id), "x20", fingerprint=OTHER)
    resume = ["fit", "--resume", str(tmp_path / "runs" / "dasmil")]
    assert main(resume) == 2
    assert "x20 features of the extractor vit_small_patch16_224 (0123456789ab) instead of" in (
        capsys.readouterr().err
    )


def test_features_of_another_width_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All features that are imported from mil4wsi count as one extractor's, of whatever width."""
    labels = {s: CLASSES[s[0] == "t"] for s in SPLIT}
    folder = write_bags(tmp_path / "bags", labels, SPLIT, dims={**DIMS, "x10": 12})
    assert main(command("predict", folder, trained, tmp_path / "out")) == 2
    assert "the bags hold x10 features 12 wide instead of 16" in capsys.readouterr().err


def test_an_older_bag_says_no_pooling_and_is_of_the_networks_own() -> None:
    card = make_card()
    older = {k: v for k, v in card.__dict__.items() if k not in ("pooling", "interpolation")}
    del older["options"]
    assert type(card).from_dict(older) == card
    assert (card.pooling, card.interpolation, dict(card.options)) == ("own", "bilinear", {})


# Widths that differ from scale to scale


def test_a_model_of_different_widths_survives_its_checkpoint(trained: Path, bags: Path) -> None:
    model = dasmil.load(trained)
    gats = model.network.pgnn.scale_gats
    assert {s: gats[s].conv.lin.in_channels for s in DIMS} == DIMS
    held = model.card.bag_format["scales"]
    assert {s: card["extractor"]["feature_dim"] for s, card in held.items()} == DIMS
    assert model.standardize is not None
    graph = bag_graph(read_bag(bag_path(bags, "t3")))
    with torch.inference_mode():
        outputs = [dasmil.load(trained)(graph) for _ in range(2)]
    for scale in DIMS:
        assert torch.equal(outputs[0][scale].bag_logits, outputs[1][scale].bag_logits)
        moved = replace(graph, features={**graph.features, scale: graph.features[scale] + 1})
        with torch.inference_mode():
            other = model(moved)[scale].bag_logits
        assert not torch.allclose(other, outputs[0][scale].bag_logits)


@pytest.mark.parametrize(
    "switches",
    [
        pytest.param(
            [
                "--model.network.contextualize",
                "false",
                "--model.network.concatenate_parents",
                "true",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(["--model.network.concatenate_parents", "true"], marks=pytest.mark.slow),
        ["--model.network.pooling", "mean", "--data.cache", "ram", "--data.batch_size", "2"],
    ],
)
def test_every_kind_of_model_takes_different_widths(
    switches: list[str], bags: Path, tmp_path: Path
) -> None:
    assert main([*fit_dasmil(bags, tmp_path), *switches, "--trainer.max_epochs", "1"]) == 0
    checkpoint = tmp_path / "dasmil" / "checkpoints" / "last.ckpt"
    assert main(command("predict", bags, checkpoint, tmp_path / "out")) == 0
    assert (tmp_path / "out" / "predictions.csv").is_file()


def test_a_bag_of_different_widths_is_valid() -> None:
    bag = make_bag(dims=DIMS)
    bag.validate()
    assert {s: x.shape[1] for s, x in bag.features.items()} == DIMS
