"""float32 means float32: what the verbs set in torch before they compute."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dasmil.cli import main
from dasmil.trainer import CommandLineTrainer, name_precision

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}


@pytest.fixture(params=["highest", "high"])
def allowed(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether a user allows TF32; convolutions begin with the contrary."""
    products = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(request.param)
    torch.backends.cudnn.allow_tf32 = request.param == "highest"
    yield request.param == "high"
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


def assert_tf32(allowed: bool) -> None:
    assert torch.backends.cudnn.allow_tf32 == allowed
    assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == allowed
    assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == allowed


@pytest.mark.parametrize(
    "command",
    [
        ["fit", "--config", "configs/mil.yaml", "--data.bags", "bags", "--data.classes", "[a,b]"],
        ["fit", "--config", "configs/dino.yaml", "--data.tiles", "tiles", "--data.scale", "x20"],
        ["embed", "--tiles", "tiles", "--output", "bags", "--extractors.x20", "random:vit"],
    ],
    ids=["fit on bags", "fit on tiles", "embed"],
)
def test_the_verbs_use_tf32_only_if_the_user_allows_it(
    command: list[str],
    allowed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    configs = Path(__file__).parent.parent / "configs"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(configs)
    output = [] if command[0] == "embed" else ["--output", "run"]
    assert main([*command, *output, "--trainer.accelerator", "cpu"]) == 2  # there is no input
    assert_tf32(allowed)
    assert not [warning for warning in recwarn if "TF32" in str(warning.message)]


def test_features_with_tf32_are_of_another_precision(allowed: bool) -> None:
    trainer = CommandLineTrainer(**QUIET, precision="32-true")
    assert_tf32(allowed)
    assert name_precision(trainer) == ("32-true with TF32" if allowed else "32-true")
