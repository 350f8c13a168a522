"""Extractors as a user names them: on the command line and in YAML."""

import json

import pytest
import timm
import torch
import yaml
from road import SMALL, copy_first_tiles, embed_command

from dasmil.bags import read_bag
from dasmil.cli import main
from dasmil.embedding.dataset import ChunkDataset
from dasmil.slides.cohort import read_cohort
from dasmil.slides.tile_table import read_tiles, tiles_path

SIZE = 64  # px; the road's tiles have 32
OPTIONS = {"init_values": 1e-5, "dynamic_img_size": True, "mlp_layer": "SwiGLUPacked"}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(scope="module")
def network():
    """As a foundation model: of options that the name of its architecture does not tell."""
    torch.manual_seed(3)
    layers = {"mlp_layer": timm.layers.SwiGLUPacked}
    made = timm.create_model("test_vit", num_classes=0, img_size=SIZE, **{**OPTIONS, **layers})
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "pytorch_model.bin"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def tiles(road, tmp_path_factory):
    """Tiles of two slides."""
    return copy_first_tiles(road, tmp_path_factory.mktemp("two") / "tiles", 2)


def embed(tiles, bags, *arguments):
    command = embed_command(tiles, bags, {})
    return main([*command, *map(str, arguments)])


def records(bags):
    return json.loads((bags / "extractors.json").read_text())


def by_timm(road, network, slide_id, mean=MEAN, std=STD):
    """CLS token and mean of the patch tokens of a slide's x20 tiles."""
    row = next(row for row in read_cohort(road.tiles / "cohort.csv") if row.slide_id == slide_id)
    dataset = ChunkDataset([row], [read_tiles(tiles_path(road.tiles, slide_id))], max_roots=64)
    tiles = torch.cat(
        [chunk.tiles["x20"] for chunk in map(dataset.__getitem__, range(len(dataset)))]
    )
    x = torch.nn.functional.interpolate(tiles.float(), (SIZE, SIZE), mode="bicubic", antialias=True)
    x = x.round().clamp(0, 255) / 255
    x = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.inference_mode():
        tokens = network.forward_features(x)
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)


def first_bag(bags):
    return read_bag(sorted(bags.glob("*.safetensors"))[0])


def test_a_foundation_model_on_the_command_line(road, tiles, network, weights, tmp_path):
    bags = tmp_path / "bags"
    options = "{init_values: 1e-5, dynamic_img_size: true, mlp_layer: SwiGLUPacked, img_size: 64}"
    settings = {
        "model": "test_vit",
        "weights": weights,
        "pooling": "cls_mean",
        "mean": MEAN,
        "std": STD,
        "options": options,
    }
    given = [text for key, value in settings.items() for text in (f"--extractors.x20.{key}", value)]
    assert embed(tiles, bags, "--extractors.x10", road.dino["x10"], *given) == 0
    bag = first_bag(bags)
    expected = by_timm(road, network, bag.slide_id)
    assert len(expected) > 0
    assert torch.allclose(bag.features["x20"].float(), expected, atol=1e-3, rtol=1e-3)  # float16
    assert bag.features["x20"].shape[1] == 128 != bag.features["x10"].shape[1]

    record = records(bags)["x20"]
    asked = {**settings, "weights": str(weights), "options": {**OPTIONS, "img_size": SIZE}}
    assert record["source"] == asked
    assert record["fingerprint"] == bag.header.extractors["x20"].fingerprint
    assert (record["pooling"], record["interpolation"]) == ("cls_mean", "bicubic")
    assert record["image_size"] == SIZE
    assert record["options"] == {**OPTIONS, "img_size": SIZE}
    assert record["trained_on"] is None
    assert records(bags)["x10"]["source"] == str(road.dino["x10"])


def test_the_same_in_yaml_with_a_setting_on_top(tiles, weights, tmp_path):
    source = {
        "model": "test_vit",
        "weights": str(weights),
        "pooling": "cls_mean",
        "options": {**OPTIONS, "img_size": SIZE},
    }
    config = tmp_path / "embed.yaml"
    extractors = {"x10": {"model": "random:test_resnet", "image_size": 32}, "x20": source}
    config.write_text(yaml.safe_dump({"extractors": extractors}))
    whole, mean = tmp_path / "whole", tmp_path / "mean"
    assert embed(tiles, whole, "--config", config) == 0
    assert embed(tiles, mean, "--config", config, "--extractors.x20.pooling", "mean") == 0
    wide, narrow = first_bag(whole), first_bag(mean)
    assert torch.equal(wide.features["x20"][:, 64:], narrow.features["x20"])
    assert torch.equal(wide.features["x10"], narrow.features["x10"])
    assert records(whole)["x10"] == records(mean)["x10"]
    assert records(whole)["x20"]["fingerprint"] != records(mean)["x20"]["fingerprint"]


def test_bags_pooled_otherwise_do_not_mix(tiles, tmp_path, capsys):
    arguments = ["--extractors.x10", SMALL, "--extractors.x20.model", "random:test_vit"]
    assert embed(tiles, tmp_path, *arguments) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    said = capsys.readouterr().out
    assert "embed: x20: tiles at 160 px" in said
    assert "test_vit, own pooling → 64 features" in said
    assert embed(tiles, tmp_path, *arguments, "--extractors.x20.pooling", "mean") == 2
    assert "made with other tiles or extractors than asked for now" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")} == before
    assert embed(tiles, tmp_path, *arguments) == 0  # and what is there is known again


def test_weights_that_do_not_fit_end_the_command_in_one_sentence(tiles, weights, tmp_path, capsys):
    arguments = ["--extractors.x20.model", "test_vit", "--extractors.x20.weights", weights]
    assert embed(tiles, tmp_path, "--extractors.x10", SMALL, *arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {weights}: these weights do not fit test_vit (unexpected: ")
    assert "init_values" in message
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "value"), [("poling", "cls"), ("pooling", "max"), ("image_size", "small")]
)
def test_a_setting_that_does_not_exist_is_refused(tiles, tmp_path, capsys, name, value):
    arguments = ["--extractors.x20.model", "test_vit", f"--extractors.x20.{name}", value]
    assert embed(tiles, tmp_path, "--extractors.x10", SMALL, *arguments) == 2
    assert name in capsys.readouterr().err
