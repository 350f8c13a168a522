"""Files of weights, written here from random networks of timm."""

import pytest
import torch
from safetensors.torch import save_file

from dasmil.embedding.networks import create_network
from dasmil.embedding.restricted import load_checkpoint
from dasmil.embedding.weights import load_weights
from dasmil.errors import InputError

NAME = "test_vit"


def network(name=NAME, **options):
    return create_network(name, options)


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(1)
    return {k: torch.randn_like(v) for k, v in network().state_dict().items()}


def loaded(path, name=NAME, **options):
    made = network(name, **options)
    load_weights(made, name, path)
    return made.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def save(path, content):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


# What is taken


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt", "bin"])
def test_every_kind_of_file(weights, tmp_path, suffix):
    assert same(loaded(save(tmp_path / f"w.{suffix}", weights)), weights)


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "teacher"])
def test_wrappers_and_prefixes(weights, tmp_path, wrapper, prefix):
    content = {prefix + key: weight for key, weight in weights.items()}
    if wrapper:
        content = {wrapper: content, "epoch": 3}
    assert same(loaded(save(tmp_path / "w.pth", content)), weights)


def test_of_teacher_and_student_the_teacher_is_taken_and_it_is_said(weights, tmp_path, capsys):
    student = {key: weight + 1 for key, weight in weights.items()}
    path = save(tmp_path / "dino.pth", {"student": student, "teacher": weights})
    assert same(loaded(path), weights)
    assert "holds a teacher and a student; the teacher is used" in capsys.readouterr().out


def test_a_classifier_is_left_out_by_name(weights, tmp_path, capsys):
    head = {"head.weight": torch.ones(1000, 64), "head.bias": torch.ones(1000)}
    assert same(loaded(save(tmp_path / "w.pth", {**weights, **head})), weights)
    assert "classifier is not needed and is left out: head.weight, head.bias" in (
        capsys.readouterr().out
    )


def test_the_dino_heads_are_separate_from_the_backbone(weights, tmp_path, capsys):
    content = {f"module.backbone.{key}": weight for key, weight in weights.items()}
    content |= {"module.head.mlp.0.weight": torch.ones(2, 2)}
    assert same(loaded(save(tmp_path / "w.pth", {"teacher": content})), weights)
    assert "head.mlp.0.weight" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_classifiers_as_timm_names_them(tmp_path, name, capsys):
    """``fc``, ``classifier``, and ``head.fc``, beside which ``head.norm`` is no classifier."""
    import timm

    torch.manual_seed(2)
    whole = timm.create_model(name).state_dict()
    found = loaded(save(tmp_path / "w.safetensors", whole), name)
    assert same(found, {k: whole[k] for k in network(name).state_dict()})
    assert len(whole) - len(found) == 2
    assert "is left out: " in capsys.readouterr().out


def test_half_precision_becomes_float32(weights, tmp_path):
    half = {key: weight.half() for key, weight in weights.items()}
    found = loaded(save(tmp_path / "w.safetensors", half))
    assert same(found, {key: weight.float() for key, weight in half.items()})


# What is refused


def refused(path, name=NAME, **options):
    with pytest.raises(InputError) as caught:
        loaded(path, name, **options)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: ")
    assert "\n" not in sentence
    return sentence


def test_the_first_keys_of_every_kind_are_named(weights, tmp_path):
    wrong = {k: w for k, w in weights.items() if not k.startswith("blocks.1.")}
    wrong |= {"decoder.weight": torch.ones(1), "norm.weight": torch.ones(65)}
    sentence = refused(save(tmp_path / "w.pth", wrong))
    assert "do not fit test_vit" in sentence
    named = [key for key in weights if key.startswith("blocks.1.")]
    assert f"missing: {', '.join(named[:5])} and {len(named) - 5} more; " in sentence
    assert "unexpected: decoder.weight; " in sentence
    assert "of another shape: norm.weight (65,) instead of (64,)" in sentence
    assert "another architecture" in sentence


def test_one_missing_key_is_enough(weights, tmp_path):
    wrong = {k: w for k, w in weights.items() if k != "norm.bias"}
    assert "(missing: norm.bias)" in refused(save(tmp_path / "w.pth", wrong))


def test_one_key_too_many_is_enough(weights, tmp_path):
    path = save(tmp_path / "w.pth", {**weights, "fcn.weight": torch.ones(1)})
    assert "(unexpected: fcn.weight)" in refused(path)


def test_a_prefix_of_half_the_keys_is_not_taken_off(weights, tmp_path):
    mixed = {f"module.{k}" if k.startswith("blocks") else k: w for k, w in weights.items()}
    assert "unexpected: module.blocks" in refused(save(tmp_path / "w.pth", mixed))


def test_another_prefix_is_named(weights, tmp_path):
    path = save(tmp_path / "w.pth", {f"encoder.{key}": w for key, w in weights.items()})
    assert "all keys begin with 'encoder.': save them without it" in refused(path)


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4}, {"no_embed_class": True}])
def test_another_image_size_is_named(tmp_path, options):
    path = save(tmp_path / "w.pth", network(img_size=96, **options).state_dict())
    sentence = refused(path, **options)
    assert "pos_embed" in sentence
    assert "trained at another image size: give `options: {img_size: 96}`" in sentence
    assert same(loaded(path, img_size=96, **options), torch.load(path, weights_only=True))


@pytest.mark.parametrize(
    ("option", "value"), [("init_values", 1e-5), ("reg_tokens", 2), ("qk_norm", True)]
)
def test_a_missing_option_is_named(tmp_path, option, value):
    path = save(tmp_path / "w.pth", network(**{option: value}).state_dict())
    assert f"the network's options ({option})" in refused(path)


def test_a_network_with_another_pooling_is_named(tmp_path):
    path = save(tmp_path / "w.pth", network(global_pool="avg").state_dict())
    assert "the network's options (global_pool)" in refused(path)


def test_two_sets_of_weights_are_not_chosen_from(weights, tmp_path):
    path = save(tmp_path / "w.pth", {"model": weights, "state_dict": weights})
    assert "several sets of weights (state_dict, model)" in refused(path)


def test_a_student_alone_is_not_taken(weights, tmp_path):
    assert "a student is not accepted" in refused(save(tmp_path / "w.pth", {"student": weights}))


def test_a_file_without_weights_says_what_it_holds(tmp_path):
    assert "but epoch, loss; save only" in refused(
        save(tmp_path / "w.pth", {"epoch": 1, "loss": 2.0})
    )


def test_missing_and_broken_files(tmp_path):
    for suffix in ("safetensors", "pth"):
        assert "does not exist" in refused(tmp_path / f"gone.{suffix}")
        path = tmp_path / f"broken.{suffix}"
        path.write_bytes(b"\x08\x00\x00\x00")
        assert "broken" in refused(path)
        folder = tmp_path / f"folder.{suffix}"
        folder.mkdir()
        assert "folder" in refused(folder)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    flag = tmp_path / "run"

    class Hostile:
        def __reduce__(self):
            return (flag.touch, ())

    for suffix in ("ckpt", "pth", "bin"):
        path = tmp_path / f"hostile.{suffix}"
        torch.save({"state_dict": Hostile()}, path)
        with pytest.raises(InputError, match=r"hostile\.\w+: is not loaded: it asks for"):
            load_checkpoint(path)
        assert "is not loaded: it asks for" in refused(path)
    assert not flag.exists()
