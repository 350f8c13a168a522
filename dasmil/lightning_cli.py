"""LightningCLI as dasmil uses it: ``fit`` from YAML, evaluation from a checkpoint alone."""

import argparse
import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from dasmil.checkpoint import read_checkpoint
from dasmil.errors import InputError
from dasmil.files import write_text
from dasmil.reports.predictions import PredictionWriter


def run(verb: str, args: Sequence[str]) -> int:
    """One of LightningCLI's verbs; returns the exit code."""
    DasmilCLI(verb, list(args))
    return 0


class DasmilCLI(LightningCLI):
    """LightningCLI with ``--bags`` and ``--output`` for evaluation, where ``--ckpt_path`` suffices.

    The checkpoint says which model it is and what its classes and split are; what stands in a
    config file or on the command line comes on top.
    """

    def __init__(self, verb: str, args: list[str]):
        self.verb = verb
        self.defaults = {} if verb == "fit" else _evaluation_defaults(args)
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=SaveConfigCallback if verb == "fit" else None,
            save_config_kwargs={"overwrite": True},
            args=[verb, *args],
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the verb that is run: building the others' parsers takes seconds."""
        return {self.verb: LightningCLI.subcommands()[self.verb]}

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "fit":
            parser.add_argument("--bags", type=str | None, help="folder of bags (as --data.bags)")
            parser.add_argument("--output", type=str | None, help="folder for what is written")
            parser.set_defaults({"trainer.logger": False, **self.defaults})
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Without Lightning's warning that ``sys.argv`` is set too."""
        self.config = parser.parse_args(args)
        given = self.config[self.verb]
        if "://" in str(given.get("ckpt_path")):
            raise InputError(
                f"{given.ckpt_path}: a checkpoint is read from a file alone; download it first"
            )
        if (
            self.verb != "fit"
            and not self.defaults
            and (given.get("bags") or given.get("ckpt_path"))
        ):
            raise InputError(
                f"{self.verb}: give --bags together with --ckpt_path on the command line; "
                "a config file names them data.bags and model"
            )

    def _parse_ckpt_path(self) -> None:
        """Lightning lets a checkpoint override YAML and command line; here it is the other way."""

    @property
    def output(self) -> Path | None:
        folder = self._get(self.config, "output")
        return Path(folder) if folder else None

    def before_predict(self) -> None:
        if self.output is None:
            raise InputError("predict: give --output, the folder for predictions and overlays")
        self.trainer.callbacks.append(PredictionWriter(self.output))  # type: ignore[attr-defined]

    def after_validate(self) -> None:
        self._write_metrics()

    def after_test(self) -> None:
        self._write_metrics()

    def _write_metrics(self) -> None:
        if self.output is not None and self.trainer.is_global_zero:
            figures = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
            metrics = {name: value if isfinite(value) else None for name, value in figures.items()}
            write_text(self.output / f"{self.verb}_metrics.json", json.dumps(metrics, indent=2))

    def after_fit(self) -> None:
        keeper = self.trainer.checkpoint_callback
        if isinstance(keeper, ModelCheckpoint) and self.trainer.is_global_zero:
            score = keeper.best_model_score
            name = "" if score is None else f" ({keeper.monitor} {float(score):.4f})"
            print(f"fit: checkpoint {keeper.best_model_path or keeper.last_model_path}{name}")


def _evaluation_defaults(args: Sequence[str]) -> dict[str, Any]:
    """Defaults of the verb's parser, as far as the checkpoint and the bags determine them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt_path")
    parser.add_argument("--bags")
    given, _ = parser.parse_known_args(list(args))
    if given.ckpt_path is None:
        return {}
    _, hparams = read_checkpoint(Path(given.ckpt_path))
    data = {
        "classes": hparams["classes"],
        "scales": list(hparams["bag_format"]["scales"]),
        "split": hparams["split"],
        "val_part": hparams.get("val_part", "val"),
    }
    if given.bags is not None:
        data["bags"] = given.bags
    return {
        "model": {"class_path": "dasmil.modules.DASMILModule", "init_args": hparams},
        "data": {"class_path": "dasmil.data.BagDataModule", "init_args": data},
    }
