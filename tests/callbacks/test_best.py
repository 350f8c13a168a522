"""Which of tied epochs is kept."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from dasmil.callbacks import BestCheckpoint
from dasmil.errors import InputError

AUROC = (0.5, 0.8, 0.8, 0.8, 0.8, 0.7)
LOSS = (0.1, 0.9, 0.7, 0.8, 0.7, 0.2)  # the lowest of the ties first comes in epoch 2


class Scripted(LightningModule):
    """One weight, and the metrics of a script."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        sign = -1 if self.trainer.checkpoint_callback.mode == "min" else 1
        self.log("val/auroc", sign * AUROC[self.current_epoch])
        self.log("val/loss", LOSS[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, keeper: ModelCheckpoint, **options) -> dict:
    ckpt_path = options.pop("ckpt_path", None)
    last = ModelCheckpoint(folder, "last", enable_version_counter=False)
    trainer = Trainer(
        max_epochs=len(AUROC),
        accelerator="cpu",
        logger=False,
        callbacks=[keeper, last],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    data = DataLoader([0.0])
    trainer.fit(Scripted(), data, data, ckpt_path=ckpt_path)
    return torch.load(keeper.best_model_path, weights_only=True)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_of_ties_the_epoch_with_the_lowest_loss_is_kept(tmp_path: Path, mode: str) -> None:
    keeper = BestCheckpoint(mode=mode, dirpath=tmp_path)
    assert fit(tmp_path, keeper)["epoch"] == 2
    assert keeper.best_model_path == str(tmp_path / "best.ckpt")
    assert float(keeper.best_model_score) == pytest.approx(-0.8 if mode == "min" else 0.8)
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "last.ckpt"}


def test_lightning_alone_keeps_the_first(tmp_path: Path) -> None:
    """Without which the test above would show nothing."""
    keeper = ModelCheckpoint(tmp_path, "best", monitor="val/auroc", mode="max")
    assert fit(tmp_path, keeper)["epoch"] == 1


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_a_resumed_training_remembers_the_loss_of_the_best_epoch(
    tmp_path: Path, steps: int
) -> None:
    fit(tmp_path, BestCheckpoint(dirpath=tmp_path), max_steps=steps)
    again = BestCheckpoint(dirpath=tmp_path)
    assert fit(tmp_path, again, ckpt_path=tmp_path / "last.ckpt")["epoch"] == 2
    assert again.best_tie == pytest.approx(0.7)


def test_several_best_epochs_are_refused() -> None:
    with pytest.raises(InputError, match="keeps one epoch"):
        BestCheckpoint(save_top_k=3)
