"""Repositories of a hub, in a cache as huggingface_hub lays it out; no request goes out."""

import json

import huggingface_hub
import pytest
import timm
import torch
from no_network import network  # noqa: F401 - a fixture
from safetensors.torch import save_file

from dasmil.embedding import hub
from dasmil.embedding.extractor import ExtractorSource, load_extractor
from dasmil.errors import InputError
from dasmil.units import Scale

X20 = Scale.parse("x20")
COMMITS = ("0123456789" * 4, "abcdef0123" * 4)
CONFIG = {
    "architecture": "test_vit",
    "num_classes": 0,
    "model_args": {"init_values": 1e-5, "num_classes": 0, "in_chans": 3},
    "pretrained_cfg": {
        **{"input_size": [3, 160, 160], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.5]},
        **{"url": "http://attacker.example/x.pth", "file": "/etc/passwd", "custom_load": "hf"},
        **{"hf_hub_id": "attacker/net", "source": "hf-hub", "tag": "x"},
    },
}


def load(model, **settings):
    return load_extractor(ExtractorSource(model, **settings), X20, 64)


@pytest.fixture
def cache(tmp_path, monkeypatch, network):  # noqa: F811
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    yield tmp_path
    assert network.requests == []


def put(cache, repository, config=CONFIG, commit=COMMITS[0], **options):
    """A snapshot of a repository, which is its newest; returns its folder and network."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    torch.manual_seed(len(commit.strip("0")) + commit.startswith("a"))
    made = timm.create_model("test_vit", num_classes=0, **options).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(made.state_dict(), snapshot / "model.safetensors")
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (snapshot / "config.json").write_text(text)
    return snapshot, made


def test_a_repository_is_taken_from_the_cache_at_a_commit_that_is_recorded(cache, capsys):
    _, made = put(cache, "lab/small", init_values=1e-5)
    extractor = load("hf-hub:lab/small", pooling="cls")
    assert extractor.card.name == "hf-hub:lab/small"
    assert extractor.card.mean == (0.5, 0.4, 0.3)
    assert extractor.repository == f"lab/small@{COMMITS[0]}"
    assert f"read from hf-hub:lab/small@{COMMITS[0]}" in capsys.readouterr().out
    tiles = torch.randint(256, (3, 3, 160, 160), dtype=torch.uint8)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in ((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    )
    with torch.inference_mode():
        tokens = made.forward_features((tiles / 255 - mean) / std)
        assert torch.allclose(extractor(tiles), tokens[:, 0], atol=1e-5)


def test_a_revision_pins_the_weights(cache):
    _, first = put(cache, "lab/small", init_values=1e-5)
    _, second = put(cache, "lab/small", commit=COMMITS[1], init_values=1e-5)
    for name, commit, made in (
        (f"hf-hub:lab/small@{COMMITS[0]}", COMMITS[0], first),
        ("hf_hub:lab/small", COMMITS[1], second),
        ("hf-hub:lab/small@main", COMMITS[1], second),
    ):
        extractor = load(name)
        assert extractor.repository == f"lab/small@{commit}"
        assert torch.equal(extractor.backbone.state_dict()["cls_token"], made.cls_token)


def test_pretrained_weights_of_timm_come_from_its_repository(cache):
    _, made = put(cache, "timm/test_vit.r160_in1k", config=None)
    extractor = load("test_vit")
    assert extractor.card.name == "test_vit"
    assert extractor.repository == f"timm/test_vit.r160_in1k@{COMMITS[0]}"
    assert torch.equal(extractor.backbone.state_dict()["cls_token"], made.cls_token)


def test_weights_that_do_not_fit_the_options_are_not_called_missing(cache):
    put(cache, "timm/test_vit.r160_in1k", config=None)
    with pytest.raises(InputError, match=r"options {'mlp_ratio': 2.0} \(RuntimeError: Error"):
        load("test_vit", options={"mlp_ratio": 2.0})


def test_weights_of_a_file_go_into_the_network_of_a_repository(cache, tmp_path):
    snapshot, made = put(cache, "lab/small", init_values=1e-5)
    (snapshot / "model.safetensors").unlink()
    torch.save(made.state_dict(), tmp_path / "weights.bin")
    extractor = load("hf-hub:lab/small", weights=str(tmp_path / "weights.bin"))
    assert torch.equal(extractor.backbone.state_dict()["cls_token"], made.cls_token)


def test_a_pickle_in_a_repository_is_not_taken(cache, monkeypatch):
    """Neither ours nor timm's search for another file finds it."""
    snapshot, made = put(cache, "lab/small", init_values=1e-5)
    torch.save(made.state_dict(), snapshot / "pytorch_model.bin")
    (snapshot / "model.safetensors").unlink()
    asked = []

    def fetch(repository, file, revision=None):
        asked.append(file)
        if not (snapshot / file).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(file)
        return str(snapshot / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(InputError, match=r"holds no model\.safetensors, .*give that as weights"):
        load("hf-hub:lab/small")
    assert asked == ["config.json", "model.safetensors"]


def test_weights_that_are_no_numbers_are_refused(cache):
    snapshot, made = put(cache, "lab/small", init_values=1e-5)
    state = {key: value * torch.nan for key, value in made.state_dict().items()}
    save_file(state, snapshot / "model.safetensors")
    with pytest.raises(InputError, match=rf"lab/small@{COMMITS[0]}: values are NaN"):
        load("hf-hub:lab/small")


CONFIGS = [
    "no JSON",
    "[" * 10**5,
    "[1]",
    "5",
    " " * (hub.MAX_CONFIG_BYTES + 1),
    {},
    {"architecture": 5},
    {"architecture": "hf-hub:attacker/net"},
    {"architecture": "local-dir:/tmp"},
    {"architecture": "no_such_network"},
    *({**CONFIG, "model_args": value} for value in (5, [1], "x", {"pretrained": True})),
    {**CONFIG, "model_args": {"pretrained_cfg_overlay": {"url": "http://attacker.example"}}},
    {**CONFIG, "model_args": {"embed_dim": 4096, "num_heads": 16}},  # larger than its file
    {**CONFIG, "model_args": {"depth": 10**9}},
    {**CONFIG, "pretrained_cfg": 5},
    {**CONFIG, "pretrained_cfg": {"mean": [0.5, 0.5]}},
    {**CONFIG, "pretrained_cfg": {"std": [0, 0, 0]}},
    {**CONFIG, "pretrained_cfg": {"input_size": [3, 10**9, 10**9]}},
    {**CONFIG, "pretrained_cfg": {"interpolation": "os.system"}},
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_a_configuration_is_data(cache, config):
    put(cache, "lab/small", config, init_values=1e-5)
    with pytest.raises(InputError, match=r"^extractor 'hf-hub:lab/small': ") as refused:
        load("hf-hub:lab/small")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    ["hf-hub:", "hf-hub:a/b/c", "hf-hub:../x", "hf-hub:a/b@c@d", "hf-hub:a b", "hf-hub:http://x/y"],
)
def test_a_name_that_is_no_repository_is_refused(cache, name):
    with pytest.raises(InputError, match=r"write hf-hub:ORG/NAME|cannot be\s+downloaded"):
        load(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf-hub:lab/gone", r"hf-hub:lab/gone.*cannot be\s+downloaded"),
        ("test_vit.no_such_tag", r"test_vit\.no_such_tag"),
        ("legacy_xception.tf_in1k", "not on the hub as safetensors; download them"),
        ("local-dir:/tmp", "neither a checkpoint file nor a timm model"),
    ],
)
def test_missing_files_are_named(cache, name, words):
    with pytest.raises(InputError, match=words):
        load(name)
