import pytest
import torch
from torch import nn

from dasmil.embedding.extractor import Extractor, load_checkpoint, load_extractor
from dasmil.errors import InputError
from dasmil.units import Scale

X20 = Scale.parse("x20")
SMALL = "random:test_vit"  # timm's own tiny test network, 160 px
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


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


def test_tiles_of_another_size_are_resampled():
    extractor = Extractor(MeanColour(), "mean", 8, (0.0,) * 3, (1.0,) * 3)
    tile = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    assert extractor(tile).shape == (2, 3)


def test_fingerprint_tells_weights_and_normalisation_apart():
    def fingerprint(gain=1.0, mean=MEAN, size=8):
        return Extractor(MeanColour(gain), "mean", size, mean, STD).card.fingerprint

    assert fingerprint() == fingerprint()
    assert (
        len({fingerprint(), fingerprint(gain=2.0), fingerprint(mean=STD), fingerprint(size=16)})
        == 4
    )


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
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"test_vit.*cannot be\s+downloaded.*random:test_vit"):
        load_extractor("test_vit", X20, 64)


def test_an_unknown_name_is_refused_with_names_near_it():
    with pytest.raises(InputError, match=r"neither a checkpoint file nor a timm model.*resnet"):
        load_extractor("resnet1800", X20, 64)


def test_missing_checkpoint_is_named():
    with pytest.raises(InputError, match=r"gone\.ckpt: no such checkpoint"):
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


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    flag = tmp_path / "run"

    class Hostile:
        def __reduce__(self):
            return (flag.touch, ())

    torch.save({"state_dict": Hostile()}, tmp_path / "hostile.ckpt")
    with pytest.raises(InputError, match=r"hostile\.ckpt: cannot be loaded safely"):
        load_checkpoint(tmp_path / "hostile.ckpt")
    assert not flag.exists()
