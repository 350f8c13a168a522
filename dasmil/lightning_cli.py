"""LightningCLI as dasmil uses it: ``fit`` from YAML, evaluation from a checkpoint alone."""

import argparse
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from dasmil.arguments import SentenceParser, said_of_trainer, with_configs
from dasmil.checkpoint import RestrictedIO, read_checkpoint, said_of_restoring
from dasmil.data import BagDataModule
from dasmil.embedding.restricted import load_checkpoint
from dasmil.endings import end_on_sigterm, signal_of
from dasmil.errors import InputError, some_of
from dasmil.files import file_sha256
from dasmil.modules import DASMILModule
from dasmil.modules.evaluation import mean_losses
from dasmil.modules.going_on import refuse_other_settings, training_settings
from dasmil.reports.evaluation import auroc_lines, write_evaluation
from dasmil.reports.figures import evaluation_figures, save_figures, show_in_tensorboard
from dasmil.reports.history import History, run_folder
from dasmil.reports.instances import InstanceTruth
from dasmil.reports.kept import KeptMetrics
from dasmil.reports.log_lines import LogLines
from dasmil.reports.predictions import PredictionWriter
from dasmil.run_folder import RunFolder, Trace, run_folder_of, split_resume

STAGES = {"fit": "val", "validate": "val", "test": "test"}  # the part whose figures a verb gives


def run(verb: str, args: Sequence[str]) -> int:
    """One of LightningCLI's verbs; returns the exit code."""
    return DasmilCLI(verb, list(args)).exit_code


class SaveConfig(SaveConfigCallback):
    """Save config.yaml when the first epoch begins: a fit that is refused changes nothing."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Not yet."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")  # which saves once


class EndOnSigterm(Callback):
    """Take SIGTERM back from Lightning, whose own handler is in place when these begin."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        end_on_sigterm()

    on_train_start = on_validation_start = on_test_start = on_predict_start = on_sanity_check_start


class LightningSentenceParser(SentenceParser, LightningArgumentParser):
    """LightningCLI's parser, with our errors."""


class DasmilCLI(LightningCLI):
    """LightningCLI with ``--bags`` and ``--output`` for evaluation, where ``--ckpt_path`` suffices.

    The checkpoint says which model it is and what its classes and split are; what stands in a
    config file or on the command line comes on top.
    """

    def __init__(self, verb: str, args: list[str]):
        self.verb = verb
        self.command = [verb, *args]
        self.exit_code = 0
        self.resume_from: Path | None = None
        self.run: RunFolder | None = None
        if verb == "fit":
            args, self.resume_from = split_resume(args)
            if self.resume_from is not None:
                warnings.filterwarnings("ignore", "Checkpoint directory .* is not empty")
        else:  # evaluation saves no checkpoints, wherever the one it reads has been saved
            warnings.filterwarnings("ignore", "The dirpath has changed from")
        args = with_configs(args)
        _refuse_too_little(verb, args)
        self.defaults = {} if verb == "fit" else _evaluation_defaults(args)
        # the slides of a study are no options; a parser would check and print each of them
        self.study = self.defaults["model"]["init_args"].pop("split") if self.defaults else None
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=SaveConfig if verb == "fit" else None,
            save_config_kwargs={"overwrite": True},
            args=[verb, *args],
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """One whose errors are sentences."""
        parser = LightningSentenceParser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="file of options, in YAML"
        )
        return parser

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        with said_of_trainer():
            trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = RestrictedIO()
        return trainer

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the verb that is run: building the others' parsers takes seconds."""
        return {self.verb: LightningCLI.subcommands()[self.verb]}

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--resume",
                type=str | None,
                help="folder of a fit that was broken off: go on there, with its config.yaml",
            )
        else:
            parser.add_argument("--bags", type=str | None, help="folder of bags (as --data.bags)")
            parser.add_argument("--output", type=str | None, help="folder for what is written")
            parser.set_defaults({"trainer.logger": False, **self.defaults})
        if subcommand in ("validate", "test"):
            parser.add_argument(
                "--truth",
                type=str | None,
                help="folder of annotations, one file a slide: judge instances and lesions too",
            )
            parser.add_argument(
                "--truth_classes",
                type=list[str] | None,
                help="classes (QuPath) or groups (ASAP) of the annotations that are lesions; one "
                "with a colon stands in quotes: '[\"Tumor: Positive\"]'",
            )
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})
        if subcommand in ("validate", "test"):  # Lightning's table has a row per metric and scale
            parser.set_defaults({"verbose": False})
        parser.set_defaults({"trainer.enable_model_summary": False})
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

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self.defaults:
            self.model.hparams["split"] = self.study or []

    def _parse_ckpt_path(self) -> None:
        """Lightning lets a checkpoint override YAML and command line; here it is the other way."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if self.resume_from is not None:
            kwargs["ckpt_path"] = kwargs["ckpt_path"] or str(self.resume_from)
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        """Also leave other processes and the folder in order if it does not end well."""
        self._add_callbacks(EndOnSigterm())
        bar = self.trainer.progress_bar_callback
        if bar is not None and not sys.stdout.isatty():
            self.trainer.callbacks.remove(bar)  # type: ignore[attr-defined]
            self._add_callbacks(LogLines())
        try:
            checkpoint = self._get(self.config, "ckpt_path") or self.resume_from
            with said_of_restoring(checkpoint, trains=subcommand == "fit"):
                super()._run_subcommand(subcommand)
        except BaseException as error:
            if self.trainer.strategy.launcher is not None:
                self.trainer.strategy.launcher.kill(signal.SIGTERM)
            if self.run is not None:
                self._leave_in_order(self.run, error)
            raise

    def _leave_in_order(self, run: RunFolder, error: BaseException) -> None:
        """Remove the folder of a fit that has not begun; else name it to one who goes on."""
        folder = self.trace.folder
        if not run.begun:
            if self.trainer.is_global_zero:
                self.trace.remove()
        elif folder is not None and signal_of(error) is not None:
            error.add_note(f"go on with: python -m dasmil fit --resume {shlex.quote(str(folder))}")

    @property
    def output(self) -> Path | None:
        """The folder for what is written: as given, or inside the run that the checkpoint is of."""
        given, checkpoint = self._get(self.config, "output"), self._get(self.config, "ckpt_path")
        if given or not checkpoint or self.verb not in STAGES:
            return Path(given) if given else None
        run = run_folder_of(Path(checkpoint))
        return None if run is None else run / STAGES[self.verb]

    def before_fit(self) -> None:
        checkpoint = self._get(self.config, "ckpt_path") or self.resume_from
        if checkpoint is not None and Path(checkpoint).is_file():  # before anything is written
            settings = training_settings(self.trainer, self.model, self.datamodule)
            refuse_other_settings(load_checkpoint(Path(checkpoint)), settings, checkpoint)
        seed = self._get(self.config, "seed_everything")
        self.trace = Trace(run_folder(self.trainer))
        self.run = RunFolder(self.command, seed)
        self._add_callbacks(self.run, History())

    def before_validate(self) -> None:
        self._keep_metrics()
        self._judge_instances()

    def before_test(self) -> None:
        self._keep_metrics()
        self._judge_instances()

    def before_predict(self) -> None:
        if self.output is None:
            raise InputError("predict: give --output, the folder for predictions and overlays")
        self._add_callbacks(PredictionWriter(self.output))

    def after_predict(self) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PredictionWriter):
                self._say_failed(callback.failed)
                self._say_unread(callback)

    def _say_failed(self, slide_ids: Sequence[str], consequence: str = "") -> None:
        """Name slides whose output is not finite; the exit code is then 1.

        Of the first process only: one that ends with an error would end the others.
        """
        if slide_ids and self.trainer.is_global_zero:
            print(
                f"error: {self.verb}: the output is not finite for {len(slide_ids)} slide(s), "
                f"which have no class: {some_of(slide_ids)}{consequence}; run it again with "
                "--trainer.precision 32-true, or check their features",
                file=sys.stderr,
            )
            self.exit_code = 1

    def _say_unread(self, writer: PredictionWriter) -> None:
        """Name slides whose bags could not be read; the exit code is then 1."""
        if writer.unread and self.trainer.is_global_zero:
            reason = next(iter(writer.unread.values()))
            print(
                f"error: predict: {len(writer.unread)} bag(s) could not be read, their slides have "
                f"no class: {some_of(list(writer.unread))}; the first: {reason}; "
                f"see {writer.table}",
                file=sys.stderr,
            )
            self.exit_code = 1

    def _keep_metrics(self) -> None:
        if self.output is not None:
            self._add_callbacks(KeptMetrics(self.output))

    def _judge_instances(self) -> None:
        truth, classes = self._get(self.config, "truth"), self._get(self.config, "truth_classes")
        if classes and not truth:
            raise InputError(f"{self.verb}: --truth_classes needs --truth, the annotations' folder")
        if truth:
            judge = InstanceTruth(Path(truth), output=self.output, classes=classes or None)
            self._add_callbacks(judge)

    def _add_callbacks(self, *callbacks: Callback) -> None:
        """Before those that save checkpoints, which Lightning wants last."""
        self.trainer.callbacks[:0] = callbacks  # type: ignore[attr-defined]

    def after_validate(self) -> None:
        self._write_evaluation(self.output, self._get(self.config, "ckpt_path"))

    def after_test(self) -> None:
        self._write_evaluation(self.output, self._get(self.config, "ckpt_path"))

    def after_fit(self) -> None:
        """Says where the checkpoint is, and evaluates DAS-MIL's on the validation slides."""
        keeper, folder = self.trainer.checkpoint_callback, run_folder(self.trainer)
        if not isinstance(keeper, ModelCheckpoint):
            return
        best = keeper.best_model_path or keeper.last_model_path
        if self.trainer.is_global_zero:
            print(f"fit: checkpoint {best}{self._describe_choice(keeper)}")
        if isinstance(self.model, DASMILModule) and keeper.best_model_path and folder is not None:
            loggers, self.trainer.loggers = self.trainer.loggers, []  # its curves have ended
            self.trainer.validate(self.model, self.datamodule, ckpt_path=best, verbose=False)
            self.trainer.loggers = loggers
            self._write_evaluation(folder / STAGES["fit"], best)

    def _describe_choice(self, keeper: ModelCheckpoint) -> str:
        """Which epoch was chosen, of how many, and by how many slides of each class."""
        score, data = keeper.best_model_score, self.datamodule
        if score is None or not isinstance(data, BagDataModule):
            return ""
        epoch = load_checkpoint(Path(keeper.best_model_path))["epoch"]
        counts = data.class_counts(data.val_part)
        slides = some_of([f"{number} {name}" for name, number in counts.items()])
        return (
            f": epoch {epoch} of 0 to {self.trainer.current_epoch - 1}, chosen by {keeper.monitor} "
            f"{float(score):.4f} of {sum(counts.values())} {data.val_part} slides ({slides})"
        )

    def _write_evaluation(self, folder: Path | None, checkpoint: str | None) -> None:
        """Tables, intervals and figures of the last evaluation, by one process."""
        evaluation = getattr(self.model, "evaluation", None)
        self._say_failed(getattr(self.model, "failed", ()), "; so no metrics are written")
        if evaluation is None or not self.trainer.is_global_zero:
            return
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        judge = next((c for c in callbacks if isinstance(c, InstanceTruth)), None)
        refused = {} if judge is None else judge.refused
        self.exit_code = 1 if refused else self.exit_code  # the callback has named them
        stage = STAGES[self.verb]
        if not self.model.failed:
            print(*auroc_lines(stage, evaluation), sep="\n")
        if folder is None:
            return
        more = mean_losses(self.model.results)
        if judge is not None:
            more |= judge.figures
        about: dict[str, str | None] = {"checkpoint": None, "checkpoint_sha256": None}
        if checkpoint:
            path = Path(checkpoint)
            about = {"checkpoint": path.name, "checkpoint_sha256": file_sha256(path)}
        pooling, failed = self.model.hparams["patient_pooling"], self.model.failed
        write_evaluation(
            *(folder, stage, evaluation, more, about),
            pooling=pooling,
            failed=failed,
            refused=refused,
        )
        if failed:
            return
        figures = evaluation_figures(evaluation, stage)
        save_figures(folder / "figures", figures)
        show_in_tensorboard(folder, stage, figures)
        print(f"{self.verb}: figures {folder / f'{stage}_metrics.csv'}, {folder / 'figures'}")


def _refuse_too_little(verb: str, args: Sequence[str]) -> None:
    """Say what a verb cannot do without; the parser would name Python classes."""
    names = {word.split("=")[0] for word in args}
    if names & {"-h", "--help", "--model.help", "--data.help", "-c", "--config", "--model"}:
        return
    if verb == "fit":
        raise InputError(
            "fit: give --config configs/dasmil.yaml (DAS-MIL) or --config configs/dino.yaml (an "
            "extractor)"
        )
    for option, what in (
        ("--ckpt_path", "the checkpoint that fit wrote"),
        ("--bags", "the folder that embed wrote"),
    ):
        if not names & {option, f"--data.{option[2:]}"}:
            raise InputError(f"{verb}: give {option}, {what}")


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
        "val_part": hparams.get("val_part", "val"),
    }
    if given.bags is not None:
        data["bags"] = given.bags
    return {
        "model": {"class_path": "dasmil.modules.DASMILModule", "init_args": hparams},
        "data": {"class_path": "dasmil.data.BagDataModule", "init_args": data},
    }
