"""A plain Trainer with the callbacks leaves the files of ``fit``, without a command line."""

from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from road import Road, fit_dasmil

from dasmil.callbacks import (
    BestCheckpoint,
    EvaluationWriter,
    History,
    HyperParameters,
    RunFolder,
)
from dasmil.cli import main
from dasmil.data import BagDataModule
from dasmil.methods import DASMIL
from dasmil.methods.dasmil import NetworkOptions
from dasmil.tables import read_csv


def test_a_plain_trainer_leaves_the_files_of_fit(road: Road, tmp_path: Path) -> None:
    assert main(fit_dasmil(road.bags, tmp_path, "command")) == 0
    ours, plain = tmp_path / "command", tmp_path / "plain"

    seed_everything(0)
    best = BestCheckpoint(dirpath=plain / "checkpoints")
    last = ModelCheckpoint(plain / "checkpoints", "last", enable_version_counter=False)
    writer = EvaluationWriter(plain / "val")
    trainer = Trainer(
        accelerator="auto",
        max_epochs=2,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=TensorBoardLogger(plain, name="", version="", default_hp_metric=False),
        callbacks=[RunFolder(), History(), HyperParameters(), writer, best, last],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = BagDataModule(road.bags, ["normal", "tumour"], num_workers=0)
    module = DASMIL(NetworkOptions(hidden_dim=16, out_dim=16, query_dim=8))
    trainer.fit(module, datamodule=data)
    trainer.validate(module, datamodule=data, ckpt_path=best.best_model_path, verbose=False)

    assert names(plain) == names(ours) - {"config.yaml"}  # of what was on the command line
    for table in ("history.csv", "split.csv"):
        assert read_csv(plain / table) == read_csv(ours / table)
    for part in ("slides", "metrics"):
        assert values(plain / "val" / f"val_{part}.csv") == values(ours / "val" / f"val_{part}.csv")


def names(folder: Path) -> set[str]:
    """Of all files; TensorBoard's hold the time."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {"events" if "tfevents" in path.name else str(path) for path in files}


def values(table: Path) -> list[dict[str, str]]:
    """Rows without the checkpoint's hash, which holds the paths of its folder."""
    _, rows = read_csv(table)
    return [{k: v for k, v in row.items() if k != "checkpoint_sha256"} for row in rows]
