"""Which accelerator the command line's Trainer takes, and what it says if there is none."""

import warnings
from pathlib import Path

import pytest
import torch
from bag_factory import CLASSES, write_bags
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from road import fit_dasmil

from dasmil.cli import main
from dasmil.data import BagDataModule
from dasmil.errors import InputError
from dasmil.trainer import CommandLineTrainer

QUIET = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has Apple's GPU and no other."""
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: True)
    monkeypatch.setattr(MPSAccelerator, "parse_devices", lambda devices: [0])
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def device_of(**options: object) -> torch.device:
    return CommandLineTrainer(**QUIET, **options).strategy.root_device


@pytest.mark.usefixtures("mac")
def test_auto_is_the_cpu_on_a_mac_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Lightning would advise the GPU
        assert device_of().type == "cpu"
    assert capsys.readouterr().out.startswith("trainer.accelerator: auto is the CPU on a Mac")
    assert device_of(accelerator="cpu").type == "cpu"
    for asked in ("mps", "gpu"):
        assert device_of(accelerator=asked).type == "mps"
    assert not capsys.readouterr().out
    with pytest.raises(InputError, match="no GPU was found"):
        device_of(accelerator="cuda")


@pytest.mark.usefixtures("mac")
def test_a_method_on_bags_is_refused_on_mps(tmp_path: Path) -> None:
    """Also that of a plain Trainer."""
    bags = write_bags(tmp_path, {"a": "normal", "b": "tumour"})
    for stage in ("fit", "validate", "test", "predict"):
        data = BagDataModule(bags, CLASSES)
        data.trainer = Trainer(accelerator="gpu", **QUIET)
        with pytest.raises(
            InputError, match=r"Apple's GPU \(mps\); give --trainer.accelerator cpu"
        ):
            data.setup(stage)


@pytest.mark.usefixtures("mac")
def test_a_fit_on_mps_ends_with_one_sentence_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bags = write_bags(
        tmp_path / "bags", {f"{c}{n}": CLASSES[c == "t"] for n in range(4) for c in "nt"}
    )
    command = [*fit_dasmil(bags, tmp_path), "--trainer.accelerator", "mps"]
    assert main([*command, "--data.classes", str(CLASSES)]) == 2
    assert capsys.readouterr().err.startswith(
        "error: trainer.accelerator: no method runs on Apple's"
    )
    assert not (tmp_path / "dasmil").exists()


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("devices", [3, "3", [2]])
def test_more_gpus_than_there_are_is_one_sentence(devices: object) -> None:
    with pytest.raises(InputError, match=r"trainer.devices: \S+ asks for GPUs .* it has 2$"):
        CommandLineTrainer(accelerator="cuda", devices=devices, **QUIET)
