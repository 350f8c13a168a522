import json

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform
from torch import nn

from dasmil.bags import ExtractorCard
from dasmil.embedding.extractor import Extractor, ExtractorSource, load_extractor
from dasmil.embedding.restricted import load_checkpoint
from dasmil.errors import InputError
from dasmil.slides.study import SlideRecord
from dasmil.units import Scale

X20 = Scale.parse("x20")
PATCH_14 = {"model": "random:test_vit", "options": {"patch_size": 14, "dynamic_img_size": False}}
SMALL = "random:test_vit"  # timm's own tiny test network, 160 px
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def load(model=SMALL, **settings):
    return load_extractor(ExtractorSource(model, **settings), X20, 64)


def save_weights(path, name="test_vit", seed=5, **options):
    """A file of random weights, and the network that they are of, made by timm."""
    torch.manual_seed(seed)
    network = timm.create_model(name, num_classes=0, **options).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    save_file(network.state_dict(), path)
    return network


def some_tiles(side=160):
    return torch.randint(256, (3, 3, side, side), dtype=torch.uint8)


def normalised(tiles, mean, std):
    """As timm's transform does it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (tiles / 255 - mean) / std


class MeanColour(nn.Module):
    """Features that can be computed by hand."""

    def __init__(self, gain: float = 1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x):
        return self.gain * x.mean((2, 3))


def test_tiles_are_normalised_as_the_card_says():
    extractor = Extractor(MeanColour(), "mean", 8, MEAN, STD)
    tile = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    expected = [(1 - m) / s for m, s in zip(MEAN, STD, strict=True)]
    assert torch.allclose(extractor(tile)[0], torch.tensor(expected))
    assert extractor.card.feature_dim == 3


class Pixels(nn.Module):
    """What enters the network."""

    def forward(self, x):
        return x.flatten(1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("tile_px", [32, 16])
def test_tiles_of_another_size_are_resampled_whole_as_timm_does_it(interpolation, tile_px):
    """PIL rounds after rows and again after columns: one grey value more or less, in few pixels."""
    tile = np.random.default_rng(0).integers(90, 166, (tile_px, tile_px, 3), dtype=np.uint8)

    def by_timm(interpolation):
        options = {"interpolation": interpolation, "mean": MEAN, "std": STD, "crop_pct": 1.0}
        return create_transform((3, 24, 24), **options)(Image.fromarray(tile))

    extractor = Extractor(Pixels(), "pixels", 24, MEAN, STD, interpolation=interpolation)
    found = extractor(torch.from_numpy(tile).permute(2, 0, 1)[None]).view(3, 24, 24)
    grey = 255 * torch.tensor(STD).view(3, 1, 1)
    difference = (found - by_timm(interpolation)).abs() * grey
    assert difference.max() < 1.01
    assert difference.mean() < 0.3
    other = {"bilinear": "bicubic", "bicubic": "bilinear"}[interpolation]
    assert ((found - by_timm(other)).abs() * grey).mean() > 2


def test_resampled_values_stay_pixel_values():
    """Bicubic resampling alone would overshoot at the edges of nuclei."""
    tile = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    tile[..., 8:] = 255
    extractor = Extractor(Pixels(), "pixels", 24, (0.0,) * 3, (1.0,) * 3, interpolation="bicubic")
    values = extractor(tile) * 255
    assert (values.min(), values.max()) == (0, 255)
    assert torch.allclose(values, values.round(), atol=1e-4)
    assert len(values.round().unique()) > 2


def test_fingerprint_tells_all_apart_that_changes_features():
    def fingerprint(gain=1.0, name="mean", size=8, mean=MEAN, std=STD, **more):
        return Extractor(MeanColour(gain), name, size, mean, std, **more).card.fingerprint

    different = [
        fingerprint(),
        fingerprint(gain=2.0),
        fingerprint(name="other"),
        fingerprint(size=16),
        fingerprint(mean=STD),
        fingerprint(std=MEAN),
        fingerprint(interpolation="bicubic"),
        fingerprint(options={"num_heads": 2}),
        fingerprint(options={"num_heads": 3}),
    ]
    assert len(set(different)) == len(different)
    assert fingerprint() == fingerprint(trained_on=[SlideRecord("slide")])


def test_fingerprint_tells_poolings_apart():
    extractors = [load(pooling=pooling) for pooling in ("own", "cls", "mean", "cls_mean")]
    assert len({extractor.card.fingerprint for extractor in extractors}) == 4
    assert [extractor.card.feature_dim for extractor in extractors] == [64, 64, 64, 128]


@pytest.mark.parametrize("tile_px", [160, 200])
def test_half_precision_embeds_tiles_of_any_size(tile_px):
    extractor, tiles = load(), some_tiles(tile_px)
    with torch.inference_mode():
        expected = extractor(tiles)
        found = extractor.bfloat16()(tiles)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected, atol=0.1)


def test_a_std_of_nought_is_refused():
    with pytest.raises(InputError, match=r"std .* must be above 0"):
        Extractor(MeanColour(), "mean", 8, MEAN, (0.5, 0.0, 0.5))


def test_random_weights_are_the_same_at_every_call_and_frozen():
    first, second = (load_extractor(SMALL, X20, 64) for _ in range(2))
    assert first.card == second.card
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert first.card.image_size == 160


def test_random_weights_leave_the_random_state_alone():
    torch.manual_seed(3)
    load_extractor(SMALL, X20, 64)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


def test_pretrained_weights_without_a_network_fail_in_one_sentence(monkeypatch):
    """The library reads the variable HF_HUB_OFFLINE only when it is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"test_vit.*cannot be\s+downloaded.*random:test_vit"):
        load_extractor("test_vit", X20, 64)


def test_an_unknown_name_is_refused_with_names_near_it():
    with pytest.raises(InputError, match=r"neither a checkpoint file nor a timm model.*resnet"):
        load_extractor("resnet1800", X20, 64)


def test_missing_checkpoint_is_named():
    with pytest.raises(InputError, match=r"gone\.ckpt: does not exist"):
        load_extractor("gone.ckpt", X20, 64)


def test_a_checkpoint_of_another_scale_is_refused(road):
    with pytest.raises(InputError, match=r"trained on x10 tiles of 32 px.*asked to embed x20"):
        load_extractor(str(road.dino["x10"]), X20, 32)


def test_the_teacher_of_a_dino_checkpoint_is_taken(road):
    extractor = load_extractor(str(road.dino["x20"]), X20, 32)
    state = load_checkpoint(road.dino["x20"])["state_dict"]
    weights = extractor.backbone.state_dict()
    assert all(torch.equal(weights[n], state[f"teacher.backbone.{n}"]) for n in weights)
    assert extractor.card.image_size == 32


# timm networks with weights and settings of one's own


def test_a_file_of_weights_gives_what_timm_gives(tmp_path, capsys):
    network = save_weights(tmp_path / "w.safetensors")
    extractor = load("test_vit", weights=str(tmp_path / "w.safetensors"))
    tiles = some_tiles()
    with torch.inference_mode():
        expected = network(normalised(tiles, (0.5,) * 3, (0.5,) * 3))  # timm's for test_vit
        assert torch.allclose(extractor(tiles), expected, atol=1e-5)
    assert "normalised with timm's mean and std of test_vit; set both" in capsys.readouterr().out
    assert extractor.trained_on is None
    assert extractor.card.interpolation == "bicubic"
    assert "w.safetensors" not in json.dumps(extractor.card.options)


def test_every_setting_reaches_the_network(tmp_path, capsys):
    options = {"init_values": 1e-5, "dynamic_img_size": True, "reg_tokens": 4}
    network = save_weights(tmp_path / "w.safetensors", **options)
    settings = {"pooling": "cls_mean", "image_size": 96, "mean": MEAN, "std": STD}
    extractor = load(
        "test_vit", weights=str(tmp_path / "w.safetensors"), options=options, **settings
    )
    tiles = some_tiles(96)
    with torch.inference_mode():
        tokens = network.forward_features(normalised(tiles, MEAN, STD))  # (3, 1 + 4 + 36, 64)
        expected = torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1)
        assert tokens.shape == (3, 41, 64)
        assert torch.allclose(extractor(tiles), expected, atol=1e-5)
    assert "set mean and std" not in capsys.readouterr().out
    card = extractor.card
    assert (card.image_size, card.mean, card.std) == (96, MEAN, STD)
    assert (card.pooling, card.options) == ("cls_mean", options)


def test_layers_are_given_by_name(tmp_path):
    """As Virchow is made."""
    layers = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}
    network = save_weights(tmp_path / "w.safetensors", **layers)
    weights, names = (
        str(tmp_path / "w.safetensors"),
        {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"},
    )
    extractor = load("test_vit", weights=weights, options=names)
    tiles = some_tiles()
    with torch.inference_mode():
        expected = network(normalised(tiles, (0.5,) * 3, (0.5,) * 3))
        assert torch.allclose(extractor(tiles), expected, atol=1e-5)
    assert isinstance(extractor.backbone.blocks[0].mlp, timm.layers.GluMlp)
    assert isinstance(extractor.backbone.blocks[0].mlp.act, nn.SiLU)
    short = load("test_vit", weights=weights, options={**names, "act_layer": "silu"})
    assert short.card.fingerprint != extractor.card.fingerprint  # of other words, to be safe
    with torch.inference_mode():
        assert torch.allclose(short(tiles), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_convolutional_networks_take_any_image_size(tmp_path, name):
    network = save_weights(tmp_path / "w.safetensors", name)
    extractor = load(name, weights=str(tmp_path / "w.safetensors"), image_size=64, pooling="mean")
    tiles = some_tiles(64)
    x = normalised(tiles, extractor.card.mean, extractor.card.std)
    with torch.inference_mode():
        expected = network.forward_features(x).mean((2, 3))
        assert torch.allclose(extractor(tiles), expected, atol=1e-5)
    assert extractor.card.mean == network.pretrained_cfg["mean"]
    assert extractor.card.interpolation == network.pretrained_cfg["interpolation"]


def test_a_vit_that_pads_sees_the_border_of_any_image():
    options = {"patch_size": 14, "dynamic_img_size": True, "dynamic_img_pad": True}
    extractor = load("random:test_vit", options=options, image_size=100)
    tiles = some_tiles(100)
    other = tiles.clone()
    other[..., -1] = 255 - other[..., -1]
    assert not torch.equal(extractor(tiles), extractor(other))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_vit_of_another_size_resamples_its_position_embedding(tmp_path, dynamic):
    network = save_weights(tmp_path / "w.safetensors")
    network.set_input_size((96, 96))
    options = {"dynamic_img_size": dynamic}
    settings = {"weights": str(tmp_path / "w.safetensors"), "image_size": 96, "options": options}
    extractor, tiles = load("test_vit", **settings), some_tiles(96)
    with torch.inference_mode():
        expected = network(normalised(tiles, (0.5,) * 3, (0.5,) * 3))
        assert torch.allclose(extractor(tiles), expected, atol=1e-5)


def test_img_size_is_that_of_the_weights(tmp_path):
    save_weights(tmp_path / "w.safetensors", img_size=96)
    weights, options = str(tmp_path / "w.safetensors"), {"img_size": 96}
    assert load("test_vit", weights=weights, options=options).card.image_size == 96
    smaller = load("test_vit", weights=weights, options=options, image_size=64)
    assert smaller.card.image_size == 64
    assert smaller.backbone.pos_embed.shape == (1, 1 + 4 * 4, 64)
    with pytest.raises(InputError, match="trained at another image size"):
        load("test_vit", weights=weights)


def test_the_card_survives_the_bag_file():
    card = load(pooling="mean", options={"img_size": 64, "init_values": 1e-5}).card
    plain = json.loads(json.dumps(card.__dict__))
    assert ExtractorCard.from_dict(plain) == card


def test_a_dino_checkpoint_can_be_pooled_otherwise(road):
    plain, wide = (load_extractor(s, X20, 32) for s in (str(road.dino["x20"]), source_of(road)))
    assert wide.card.feature_dim == 2 * plain.card.feature_dim
    assert wide.trained_on == plain.trained_on
    tiles = some_tiles(32)
    with torch.inference_mode():
        assert torch.equal(wide(tiles)[:, : plain.card.feature_dim], plain(tiles))


def source_of(road, **settings):
    return ExtractorSource(str(road.dino["x20"]), pooling="cls_mean", **settings)


def test_a_dino_checkpoint_says_the_rest_itself(road):
    with pytest.raises(InputError, match="holds image_size, options itself"):
        load_extractor(source_of(road, image_size=64, options={"depth": 2}), X20, 32)


def test_a_border_that_does_nothing_yet_is_no_cut_patch():
    """Before training, the residual branches of a ResNet are zero, and strides pass the border."""
    assert load(model="random:resnet18").card.image_size == 224


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": SMALL, "weights": "w.pth"}, r"both random weights and the file w\.pth"),
        ({"model": "w.safetensors"}, "name its network too: model NAME and weights FILE"),
        ({"options": {"depht": 2}}, r"options: 'depht' cannot be set; did you mean depth"),
        ({"options": {"act_layer": "silly"}}, r"timm cannot create it .*KeyError.*silly"),
        (  # an assertion without words
            {"model": "random:test_resnet", "options": {"output_stride": 7}},
            r"'output_stride': 7} \(AssertionError\)$",
        ),
        (
            {"options": {"mlp_layer": "SwiGluPacked"}},
            r"did you mean SwiGLUPacked",
        ),
        ({"options": {"mlp_layer": "Format"}}, "is no layer of timm.layers or torch.nn"),
        ({"options": {"act_layer": nn.SiLU}}, r"act_layer .*is not a word"),
        ({"options": {"num_classes": 5}}, "options: 'num_classes' cannot be set"),
        ({"options": {"checkpoint_path": "w.pth"}}, "options: 'checkpoint_path' cannot be set"),
        ({"options": {"global_pool": ""}}, "does not pool by itself; name a pooling"),
        ({"image_size": 100}, r"test_vit.*100 px .*such as 96 or 112"),
        ({"image_size": 0}, r"test_vit"),
        ({**PATCH_14, "image_size": 100}, "image of 100 px.*choose an image_size of 98 or 112"),
        (
            {"model": "random:test_convnext", "image_size": 250},
            "250 px.*choose an image_size of 224 or 256",
        ),
        ({"options": {"img_size": [64, 64]}}, "img_size must be one whole number"),
        ({"model": "random:test_resnet", "pooling": "cls"}, r"'test_resnet': pooling cls needs a"),
    ],
)
def test_impossible_values_are_refused_in_one_sentence(settings, words):
    with pytest.raises(InputError, match=words) as caught:
        load(**{"model": SMALL, **settings})
    assert "\n" not in str(caught.value)
