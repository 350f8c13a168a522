"""Pooling against timm called directly."""

import pytest
import timm
import torch

from dasmil.embedding.networks import create_network
from dasmil.embedding.pooling import pool
from dasmil.errors import InputError

SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 5, "img_size": 40}


def network(name, **options):
    torch.manual_seed(0)
    made = create_network(name, options).eval()
    for parameter in made.parameters():  # so that no norm or scale is one that changes nothing
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def images(side=160):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def close(found, expected):
    return found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", timm.list_models("test_*"))
@torch.inference_mode()
def test_own_pooling_is_timms_without_a_classifier(name):
    made, x = network(name), images()
    assert close(pool(made, x, "own"), made.forward_head(made.forward_features(x)))


@torch.inference_mode()
def test_the_tokens_of_a_vit():
    made, x = network("test_vit"), images()
    tokens = made.forward_features(x)  # (2, 1 + 100, 64)
    assert tokens.shape == (2, 101, 64)
    assert close(pool(made, x, "cls"), tokens[:, 0])
    assert close(pool(made, x, "mean"), tokens[:, 1:].mean(1))
    assert close(pool(made, x, "cls_mean"), torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1))


@torch.inference_mode()
def test_register_tokens_are_no_patches():
    made, x = network("test_vit", reg_tokens=4), images()
    tokens = made.forward_features(x)  # (2, 1 + 4 + 100, 64)
    assert close(pool(made, x, "cls"), tokens[:, 0])
    assert close(pool(made, x, "mean"), tokens[:, 5:].mean(1))
    assert close(pool(made, x, "cls_mean"), torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1))


@torch.inference_mode()
def test_without_a_class_token_the_first_token_is_a_register():
    made, x = network("test_vit2"), images()
    assert close(pool(made, x, "mean"), made.forward_features(x)[:, 1:].mean(1))
    for pooling in ("cls", "cls_mean"):
        with pytest.raises(InputError, match=f"pooling {pooling} needs a class token"):
            pool(made, x, pooling)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_byobnet", "test_nfnet"])
@torch.inference_mode()
def test_the_map_of_a_convolutional_network(name):
    made, x = network(name), images()
    maps = made.forward_features(x)
    assert maps.ndim == 4
    assert close(pool(made, x, "mean"), maps.mean((2, 3)))
    with pytest.raises(InputError, match="pooling cls needs a class token"):
        pool(made, x, "cls")


@torch.inference_mode()
def test_a_map_with_its_channels_last():
    made, x = network("swin_tiny_patch4_window7_224", **SWIN), images(40)
    maps = made.forward_features(x)
    assert maps.shape == (2, 5, 5, 16)
    assert close(pool(made, x, "mean"), maps.mean((1, 2)))


@torch.inference_mode()
def test_a_network_that_does_not_pool_needs_a_pooling():
    made, x = network("test_vit", global_pool=""), images()
    with pytest.raises(InputError, match="does not pool by itself; name a pooling"):
        pool(made, x, "own")
    assert pool(made, x, "cls").shape == (2, 64)


@torch.inference_mode()
def test_tokens_of_unknown_kind_are_not_guessed_at():
    class Tokens(torch.nn.Module):
        cls_token = torch.zeros(1, 1, 4)

        def forward_features(self, x):
            return torch.zeros(len(x), 5, 4)

    with pytest.raises(InputError, match="which of its tokens are patches is not known"):
        pool(Tokens(), images(), "mean")
    with pytest.raises(InputError, match="pooling cls needs a class token"):
        pool(Tokens(), images(), "cls")
