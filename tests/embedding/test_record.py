"""Records of strangers: tried 100, refused 100, wrong 0, requests 0; each in one sentence."""

import resource

import pytest
import timm
import torch
from no_network import network  # noqa: F401 - a fixture

from dasmil.embedding.extractor import load_extractor
from dasmil.embedding.networks import OPTIONS, create_network
from dasmil.errors import InputError
from dasmil.units import Scale

X20 = Scale.parse("x20")
URL = "http://attacker.example/weights.pth"
NAN, INF = float("nan"), float("inf")
RECORD = {
    "name": "test_vit",
    "options": {},
    "image_size": 64,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "scale": "x20",
    "mpp": 0.5,
    "tile_px": 64,
    "trained_on": None,
}
NO_OPTIONS = [
    {"pretrained": True},
    {"pretrained": URL},
    {"pretrained_cfg": {"url": URL}},
    {"pretrained_cfg": "r160_in1k"},
    {"pretrained_cfg_overlay": {"url": URL}},
    {"pretrained_cfg_overlay": {"file": "/etc/passwd"}},
    {"pretrained_cfg_overlay": {"hf_hub_id": "lab/net", "source": "hf-hub"}},
    {"pretrained_strict": False, "pretrained": True},
    {"pretrained_filter_fn": "os.system"},
    {"checkpoint_path": URL},
    {"checkpoint_path": "/etc/passwd"},
    {"cache_dir": "/tmp"},
    {"features_only": True},
    {"feature_cfg": {"out_indices": [0]}},
    {"out_indices": [0]},
    {"model_cfg": {}},
    {"kwargs_filter": ["depth"]},
    {"scriptable": True},
    {"exportable": True},
    {"no_jit": True},
    {"num_classes": 5},
    {"in_chans": 4},
    {"device": "cuda"},
    {"dtype": "float16"},
    {"block_fn": "Block"},
    {"name": "resnet18"},
    {"image_size": 64},
    {"depth": 10**9},
    {"depth": -1},
    {"depth": True},
    {"depth": 2.0},
    {"depth": "2"},
    {"depth": [[2]]},
    {"depth": 2**14, "embed_dim": 2**14},
    {"embed_dim": 10**9},
    {"embed_dim": 0},
    {"embed_dim": 128},
    {"num_heads": 10**9},
    {"num_heads": 0},
    {"patch_size": 0},
    {"patch_size": [16] * 1000},
    {"patch_size": 10**9},
    {"reg_tokens": 10**6},
    {"mlp_ratio": NAN},
    {"mlp_ratio": INF},
    {"mlp_ratio": 1e9},
    {"mlp_ratio": 1j},
    {"mlp_ratio": 1e4},
    {"drop_path_rate": "0.1; rm"},
    {"qkv_bias": 1},
    {"class_token": None, "depth": {}},
    {"norm_layer": "os.system"},
    {"norm_layer": "Format"},
    {"norm_layer": "torch.hub.load"},
    {"norm_layer": {"class_path": "os.system"}},
    {"act_layer": "no_such_layer"},
    {"act_layer": ["gelu"]},
    {"global_pool": "../x"},
    {"pos_embed": 5},
    {5: 5},
]
NO_NAMES = [
    *("hf-hub:lab/net", "hf_hub:lab/net", "HF-HUB:lab/net", "hf-hub:lab/net@main"),
    *("local-dir:/tmp", "file:/etc/passwd", URL, "timm/test_vit", "../test_vit", "test_vit@main"),
    *(
        "test_vit.no_such_tag",
        "test_vit.a.b",
        "random:test_vit",
        "resnet18",
        "os.system",
        "x" * 10**6,
    ),
    *("", "test_vit\n", "test\0vit", None, 5, ["test_vit"], {"model": "test_vit"}),
]
NO_VALUES = [
    *(
        {"image_size": value}
        for value in (0, -64, 10**9, 8192, 63, 64.0, NAN, "64", None, [64, 64])
    ),
    *({"mean": value} for value in ((NAN, 0.5, 0.5), (0.5,), "abc", None, (1j, 0, 0))),
    *({"std": value} for value in ((0.0, 0.0, 0.0), (INF, 1.0, 1.0), (-1.0, 1.0, 1.0), [])),
    *({"scale": value} for value in ("/x/y", "x0", 20, "x20/../..")),
    *({"mpp": value} for value in (NAN, INF, -0.5, 0, 1j, "0.5")),
    *({"tile_px": value} for value in (0, 10**9, 64.5, "64")),
    *({"trained_on": value} for value in (5, "abc", [5], [{}], [{"slide_id": 5}], {"a": "b"})),
    *({"trained_on": [{"slide_id": "a", "split": value}]} for value in ("other", None, 5)),
    {"trained_on": [{"slide_id": "a", "path": "/etc/passwd"}]},
    {"url": URL},
    {"options": None},
    {"options": [1]},
]
HOSTILE = [
    *({"options": options} for options in NO_OPTIONS),
    *({"name": name} for name in NO_NAMES),
    *NO_VALUES,
]


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    made = timm.create_model("test_vit", num_classes=0, img_size=64, dynamic_img_size=True)
    return {f"teacher.backbone.{key}": value for key, value in made.state_dict().items()}


def load(folder, weights, record):
    path = folder / "dino.ckpt"
    torch.save({"extractor": record, "state_dict": weights}, path)
    return load_extractor(str(path), X20, 64)


@pytest.mark.slow
def test_hostile_records_fetch_nothing_and_take_no_memory(tmp_path, weights, network):  # noqa: F811
    assert load(tmp_path, weights, RECORD).card.name == "test_vit"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {"tried": 0, "refused": 0, "wrong": []}
    for changed in HOSTILE:
        figures["tried"] += 1
        try:
            load(tmp_path, weights, {**RECORD, **changed})
        except InputError as error:
            one_line = str(error).startswith(str(tmp_path)) and "\n" not in str(error)
            figures["refused"] += one_line and len(str(error)) < 1000 + len(str(tmp_path))
        except BaseException as error:  # what a user would see as a traceback
            figures["wrong"].append((changed, repr(error)[:200]))
    assert figures == {"tried": len(HOSTILE), "refused": len(HOSTILE), "wrong": []}
    assert len(HOSTILE) >= 100
    assert network.requests == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize("missing", RECORD)
def test_a_record_without_a_value_is_refused(tmp_path, weights, missing):
    record = {key: value for key, value in RECORD.items() if key != missing}
    with pytest.raises(InputError, match=f"{missing} is missing"):
        load(tmp_path, weights, record)


@pytest.mark.parametrize("record", [None, [], "test_vit", 5, {}])
def test_a_value_that_is_no_record_is_refused(tmp_path, weights, record):
    with pytest.raises(InputError, match=r"dino\.ckpt: its record of the extractor"):
        load(tmp_path, weights, record)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: None, "holds no weights by name"),
        (lambda w: {}, "holds no weights by name"),
        (lambda w: [*w.values()], "holds no weights by name"),
        (lambda w: {**w, "teacher.backbone.norm.weight": 5}, "holds no weights by name"),
        (lambda w: {**w, "teacher.backbone.more": torch.ones(1)}, "unexpected: more"),
        (lambda w: {**w, "teacher.backbone.norm.weight": torch.ones(65)}, "another shape: norm"),
        (lambda w: dict(list(w.items())[1:]), "missing: cls_token"),
        (lambda w: {k: v * NAN for k, v in w.items()}, "NaN or infinite in cls_token"),
        (lambda w: {k: v / 0 for k, v in w.items()}, "NaN or infinite in cls_token"),
        (lambda w: {k: v + 0j for k, v in w.items()}, "ComplexFloatStorage"),
    ],
)
def test_weights_that_are_none_are_refused(tmp_path, weights, change, words):
    with pytest.raises(InputError, match=rf"dino\.ckpt: .*{words}"):
        load(tmp_path, change(weights), RECORD)


def test_the_network_that_counts_counts(network):  # noqa: F811
    with pytest.raises(OSError, match="no network in tests"):
        torch.hub.load_state_dict_from_url(URL, progress=False)
    assert network.requests


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {"norm_layer": "groupnorm1"}),
        ("test_vit", {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU", "init_values": 1e-5}),
        ("test_vit", {"reg_tokens": 4, "no_embed_class": True, "qk_norm": True, "fc_norm": None}),
        ("test_vit.r160_in1k", {"img_size": [96, 96], "global_pool": "avg", "mlp_ratio": 2.5}),
        ("test_convnext", {"depths": (1, 1, 1, 1), "drop_path_rate": 0.1}),
    ],
)
def test_options_of_an_architecture_are_taken(name, options, network):  # noqa: F811
    assert create_network(name, options) is not None
    assert network.requests == []


def test_no_option_names_a_place_of_weights():
    words = ("pretrained", "checkpoint", "file", "url", "cfg", "dir", "hub", "_fn")
    assert not [name for name in OPTIONS if any(word in name for word in words)]
