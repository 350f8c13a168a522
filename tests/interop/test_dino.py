import gzip
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from road import SMALL, embed_command
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from dasmil.bags import bag_path, read_header
from dasmil.cli import main
from dasmil.embedding.extractor import load_extractor
from dasmil.embedding.networks import vit_backbone
from dasmil.embedding.restricted import load_checkpoint
from dasmil.slides.cohort import read_cohort
from dasmil.units import Scale

X20 = Scale.parse("x20")
TINY = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def golden():
    folder = Path(__file__).resolve().parents[3] / "shared" / "golden" / "dino_vit_tiny"
    if not folder.is_dir():
        pytest.skip("tensors of the original are absent: no ../shared/golden beside the checkout")
    return folder


@pytest.fixture(scope="module")
def backbone():
    """Weights of a random ViT-T/16 of 224 px under their own keys."""
    torch.manual_seed(0)
    return vit_backbone(TINY, 224, {}).state_dict()


def checkpoint_of(teacher):
    """A checkpoint as the original writes it, NumPy's scalars and all; the student is zero."""
    head = {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_g": torch.ones(2, 1)}
    return {
        "student": {f"module.backbone.{k}": torch.zeros_like(w) for k, w in teacher.items()}
        | {f"module.{k}": w for k, w in head.items()},
        "teacher": {f"backbone.{k}": w for k, w in teacher.items()} | head,
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-4), "params": [0]}]},
        "epoch": 7,
        "args": Namespace(arch="vit_tiny", patch_size=16),
        "dino_loss": {"center": torch.zeros(1, 2)},
        "fp16_scaler": None,
    }


@pytest.fixture(scope="module")
def checkpoint(backbone, tmp_path_factory):
    path = tmp_path_factory.mktemp("dino") / "checkpoint.pth"
    torch.save(checkpoint_of(backbone), path)
    return path


def import_to(out, file, *options):
    assert main(["import", "dino-checkpoint", str(file), str(out), *options]) == 0
    return load_extractor(str(out), X20, 256)


def refusal(tmp_path, capsys, content, *options):
    """The error message for a file with this content."""
    torch.save(content, tmp_path / "file.pth")
    out = tmp_path / "refused.ckpt"
    command = ["import", "dino-checkpoint", str(tmp_path / "file.pth"), str(out), *options]
    assert main(command) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]
    return capsys.readouterr().err


@pytest.mark.parametrize("image_size", ["224", "256"])
def test_features_are_those_of_the_original(golden, tmp_path, image_size):
    """224 is the size it was trained at; 256 asks for the original's resampling."""
    options = ["--image_size", image_size, "--normalize", "false"]
    extractor = import_to(tmp_path / "out.ckpt", golden / "checkpoint.pth.gz", *options)
    expected = load_file(golden / "expected.safetensors")
    features = extractor(expected[f"image_{image_size}"])
    assert torch.allclose(features, expected[f"features_{image_size}"], rtol=0, atol=1e-5)


def test_the_teacher_is_taken_unless_the_student_is_asked_for(backbone, checkpoint, tmp_path):
    size = ["--image_size", "224"]
    teacher = import_to(tmp_path / "teacher.ckpt", checkpoint, *size).backbone.state_dict()
    assert all(torch.equal(teacher[key], backbone[key]) for key in backbone)
    network = ["--network", "student"]
    student = import_to(tmp_path / "student.ckpt", checkpoint, *size, *network)
    assert not any(weight.any() for weight in student.backbone.state_dict().values())


def test_every_kind_of_file_gives_the_same_extractor(backbone, checkpoint, tmp_path):
    torch.save(backbone, tmp_path / "backbone.pth")
    (tmp_path / "checkpoint.pth.gz").write_bytes(gzip.compress(checkpoint.read_bytes(), 1))
    legacy = tmp_path / "legacy.pth"  # of torch before 1.6 and NumPy before 2
    torch.save(checkpoint_of(backbone), legacy, _use_new_zipfile_serialization=False)
    legacy.write_bytes(legacy.read_bytes().replace(b"numpy._core.", b"numpy.core."))
    files = [checkpoint, *tmp_path.glob("*.pth*")]
    cards = [import_to(tmp_path / f"{i}.ckpt", file).card for i, file in enumerate(files)]
    assert len(cards) == 4
    assert len(set(cards)) == 1


@pytest.mark.slow
def test_width_and_patch_follow_from_the_shapes(tmp_path):
    weights = vit_backbone("vit_small_patch16_224", 224, {"patch_size": 8}).state_dict()
    torch.save(checkpoint_of(weights), tmp_path / "small8.pth")
    extractor = import_to(tmp_path / "s8.ckpt", tmp_path / "small8.pth", "--image_size", "64")
    assert extractor.card.name == "vit_small_patch16_224"
    assert extractor.card.feature_dim == 384
    assert extractor.backbone.patch_embed.patch_size == (8, 8)
    assert extractor.backbone.pos_embed.shape == (1, 1 + 8 * 8, 384)
    assert extractor.backbone.blocks[0].attn.num_heads == 6
    assert load_checkpoint(tmp_path / "s8.ckpt")["extractor"]["options"] == {"patch_size": 8}


def test_normalisation_is_said_on_the_card(checkpoint, tmp_path):
    on = import_to(tmp_path / "on.ckpt", checkpoint).card
    off = import_to(tmp_path / "off.ckpt", checkpoint, "--normalize", "false").card
    assert (on.mean, on.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert (off.mean, off.std) == ((0.0,) * 3, (1.0,) * 3)
    assert on.fingerprint != off.fingerprint


@pytest.mark.slow
def test_only_known_tiles_are_checked(checkpoint, tmp_path, capsys):
    import_to(tmp_path / "any.ckpt", checkpoint)
    for scale, tile_px in (("x5", 64), ("x40", 512)):
        load_extractor(str(tmp_path / "any.ckpt"), Scale.parse(scale), tile_px)
    import_to(tmp_path / "x20.ckpt", checkpoint, "--scale", "x20")
    load_extractor(str(tmp_path / "x20.ckpt"), X20, 64)
    with pytest.raises(ValueError, match=r"trained on x20 tiles \(0\.5 µm/px\), asked .* x10"):
        load_extractor(str(tmp_path / "x20.ckpt"), Scale.parse("x10"), 64)
    import_to(tmp_path / "px.ckpt", checkpoint, "--tile_px", "256")
    with pytest.raises(ValueError, match=r"trained on tiles of 256 px, asked .* tiles of 64 px"):
        load_extractor(str(tmp_path / "px.ckpt"), X20, 64)


def test_an_import_prints_its_counts(checkpoint, tmp_path, capsys):
    import_to(tmp_path / "out.ckpt", checkpoint, "--scale", "x20")
    not_known, imported = capsys.readouterr().out.splitlines()
    assert not_known.startswith("the slides that these weights were trained on are not known")
    for words in (TINY, "patch 16", "teacher of", "epoch 7", "256 px", "with ImageNet's"):
        assert words in imported
    assert imported.endswith(f"embed --extractors.x20 {tmp_path / 'out.ckpt'}")


@pytest.mark.slow
def test_embed_takes_it_at_once(road, checkpoint, tmp_path):
    out, bags = tmp_path / "dino.ckpt", tmp_path / "bags"
    extractor = import_to(out, checkpoint, "--image_size", "32")
    assert main(embed_command(road.tiles, bags, {"x10": SMALL, "x20": out})) == 0
    header = read_header(bag_path(bags, read_cohort(bags / "cohort.csv")[0].slide_id))
    assert header.extractors["x20"] == extractor.card
    assert json.loads((bags / "extractors.json").read_text())["x20"]["trained_on"] is None


def test_keys_that_do_not_fit_are_named(backbone, tmp_path, capsys):
    less = {key: w for key, w in backbone.items() if key not in ("pos_embed", "norm.bias")}
    said = refusal(tmp_path, capsys, checkpoint_of(less))
    assert "missing: pos_embed, norm.bias" in said
    said = refusal(tmp_path, capsys, backbone | {"mask_token": torch.ones(1)})
    assert "unexpected: mask_token" in said
    said = refusal(tmp_path, capsys, backbone | {"norm.bias": torch.ones(7)})
    assert "norm.bias (7,) instead of (192,)" in said
    shallow = {key: w for key, w in backbone.items() if not key.startswith("blocks.11.")}
    said = refusal(tmp_path, capsys, shallow)
    assert said.count("blocks.11.") == 5 and "and 7 more" in said
    oblong = backbone | {"pos_embed": backbone["pos_embed"][:, :-1]}
    assert "pos_embed (1, 196, 192) instead of" in refusal(tmp_path, capsys, oblong)


def test_other_networks_and_other_files_are_refused(backbone, tmp_path, capsys):
    resnet = {f"layer{i}.0.conv1.weight": torch.ones(2, 2, 3, 3) for i in range(7)}
    said = refusal(tmp_path, capsys, checkpoint_of(resnet))
    assert "not a ViT-T, ViT-S or ViT-B" in said and "layer0.0.conv1.weight" in said
    assert "and 2 more" in said
    xcit = {"patch_embed.proj.0.0.weight": torch.ones(48, 3, 3, 3)}
    assert "patch_embed.proj.0.0.weight" in refusal(tmp_path, capsys, checkpoint_of(xcit))
    giant = backbone | {"patch_embed.proj.weight": torch.ones(1024, 3, 16, 16)}
    assert "192, 384, 768 wide" in refusal(tmp_path, capsys, giant)
    said = refusal(tmp_path, capsys, {"state_dict": backbone, "epoch": 3})
    assert "not a checkpoint of DINO with a teacher; it holds state_dict, epoch" in said
    said = refusal(tmp_path, capsys, backbone, "--network", "student")
    assert "not a checkpoint of DINO with a student" in said
    assert "it holds no keys" in refusal(tmp_path, capsys, [1, 2])


def test_a_hostile_checkpoint_runs_nothing(backbone, tmp_path, capsys):
    marker = tmp_path.parent / "marker"

    class Hostile:
        def __reduce__(self):
            return marker.touch, ()

    said = refusal(tmp_path, capsys, checkpoint_of(backbone) | {"args": Hostile()})
    assert "is not loaded: it asks for" in said and "no checkpoint of DINO needs" in said
    assert not marker.exists()


@pytest.mark.parametrize("image_size", ["250", "0", "-16"])
def test_an_image_that_is_no_whole_number_of_patches_is_refused(
    backbone, tmp_path, capsys, image_size
):
    said = refusal(tmp_path, capsys, backbone, f"--image_size={image_size}")
    assert f"image_size: {image_size} is not a multiple of 16" in said


def test_the_source_is_never_overwritten(checkpoint, tmp_path, capsys):
    before = checkpoint.read_bytes()
    for out in (checkpoint, checkpoint.parent):
        assert main(["import", "dino-checkpoint", str(checkpoint), str(out)]) == 2
        assert "give another file to write" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


def test_a_wrong_option_and_a_wrong_kind_are_named(capsys):
    assert main(["import", "dino-checkpoint", "a", "b", "--imge_size", "224"]) == 2
    assert "--imge_size" in capsys.readouterr().err
    assert main(["import", "dino-checkpiont", "a", "b"]) == 2
    assert "did you mean import dino-checkpoint?" in capsys.readouterr().err


def test_options_come_from_a_config_too(checkpoint, tmp_path):
    (tmp_path / "import.yaml").write_text("image_size: 224\nnormalize: false\n")
    config = ["--config", str(tmp_path / "import.yaml")]
    card = import_to(tmp_path / "out.ckpt", checkpoint, *config).card
    assert (card.image_size, card.mean) == (224, (0.0,) * 3)


def test_help_is_there(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["import", "dino-checkpoint", "--help"])
    assert stop.value.code == 0
    assert "facebookresearch/dino" in capsys.readouterr().out
    assert main(["import", "--help"]) == main(["import"]) == 0
    assert capsys.readouterr().out.count("import dino-checkpoint ") == 2
