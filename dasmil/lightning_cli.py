"""LightningCLI as dasmil uses it: ``fit`` from YAML, evaluation from a checkpoint alone."""

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
from lightning.pytorch.utilities import rank_zero_only

from dasmil.arguments import SentenceParser, find_configs, trainer_errors
from dasmil.callbacks.evaluation_writer import EvaluationWriter
from dasmil.callbacks.history import History
from dasmil.callbacks.hparams import HyperParameters
from dasmil.callbacks.instance_truth import InstanceTruth
from dasmil.callbacks.log_lines import LogLines
from dasmil.callbacks.predictions import PredictionWriter
from dasmil.callbacks.run_folder import (
    CHECKPOINTS,
    RunFolder,
    Trace,
    folder_of_checkpoint,
    logger_folder,
    refuse_used_folder,
)
from dasmil.data import BagDataModule
from dasmil.embedding.restricted import load_checkpoint
from dasmil.endings import end_on_sigterm, signal_of
from dasmil.errors import InputError, join_few
from dasmil.help import hide_training
from dasmil.lightning_arguments import (
    ABOUT,
    CLASSES,
    EVALUATED,
    HELP,
    NEEDED,
    OPTIONS,
    evaluation_defaults,
    log_into_output,
    refuse_arguments,
    with_resume,
)
from dasmil.modules import MILModule
from dasmil.modules.resume import (
    RestrictedIO,
    explain_restoring,
    refuse_other_settings,
    training_settings,
)
from dasmil.modules.training import TrainingModule
from dasmil.trainer import CommandLineTrainer

PARTS = {"fit": "val", "validate": "val", "test": "test"}  # which split each verb evaluates


def run(verb: str, args: Sequence[str]) -> int:
    """Run one of LightningCLI's verbs; returns the exit code."""
    return DasmilCLI(verb, list(args)).exit_code


class SaveConfig(SaveConfigCallback):
    """Save config.yaml when the first epoch begins: a fit that is refused changes nothing."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing: the first epoch saves the config."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")  # it saves only once


class EndOnSigterm(Callback):
    """Restore dasmil's SIGTERM handler, which Lightning replaces before these hooks."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        end_on_sigterm()

    on_train_start = on_validation_start = on_test_start = on_predict_start = on_sanity_check_start


class LightningSentenceParser(SentenceParser, LightningArgumentParser):
    """LightningCLI's parser, with the errors and help texts of :class:`SentenceParser`."""


class DasmilCLI(LightningCLI):
    """LightningCLI with ``--output`` and, for evaluation, ``--bags`` and ``--ckpt_path`` alone.

    The checkpoint names the model, its classes and its split. Config files and the command line
    override them.
    """

    writer: EvaluationWriter | PredictionWriter

    def __init__(self, verb: str, args: list[str]):
        self.verb = verb
        self.command = [verb, *args]
        self.exit_code = 0
        self.resume_from: Path | None = None
        self.run: RunFolder | None = None
        if verb == "fit":
            args, self.resume_from = with_resume(args)
            if self.resume_from is not None:
                warnings.filterwarnings("ignore", "Checkpoint directory .* is not empty")
        else:  # evaluation saves no checkpoints, wherever the one it reads was saved
            warnings.filterwarnings("ignore", "The dirpath has changed from")
        args = find_configs(args)
        refuse_arguments(verb, args)
        self.defaults, self.card = ({}, None) if verb == "fit" else evaluation_defaults(args)
        super().__init__(
            LightningModule,
            LightningDataModule,
            trainer_class=CommandLineTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=SaveConfig if verb == "fit" else None,
            save_config_kwargs={"overwrite": True},
            args=[verb, *args],
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose errors are sentences."""
        parser = LightningSentenceParser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="file of options, in YAML"
        )
        return parser

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        with trainer_errors():
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
        parser = super()._prepare_subcommand_parser(
            klass, subcommand, **{**kwargs, "description": ABOUT[subcommand]}
        )
        assert isinstance(parser, LightningSentenceParser)
        for name, explanation in OPTIONS[subcommand].items():
            parser.add_argument(f"--{name}", type=str | None, metavar="PATH", help=explanation)
        if subcommand in ("validate", "test"):
            kind = list[str] | None
            parser.add_argument("--truth_classes", type=kind, metavar="[NAME,...]", help=CLASSES)
        parser.needed = NEEDED.get(subcommand, EVALUATED)
        parser.usage = " ".join(
            [f"python -m dasmil {subcommand}", *(f"--{name} PATH" for name in parser.needed)]
        )
        for action in parser._actions:
            if action.dest in HELP:
                action.metavar, action.help = HELP[action.dest]
        parser.set_defaults({"trainer.enable_model_summary": False})
        if subcommand != "fit":
            parser.set_defaults({"trainer.logger": False, **self.defaults})
            hide_training(parser)
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})
        if subcommand in ("validate", "test"):  # Lightning's table has a row per metric and scale
            parser.set_defaults({"verbose": False})
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without Lightning's warning that ``sys.argv`` is set too."""
        self.config = parser.parse_args(args)
        given = self.config[self.verb]
        if "://" in str(given.get("ckpt_path")):
            raise InputError(
                f"{given.ckpt_path}: a checkpoint is read from a file alone; download it first"
            )
        if self.verb == "fit":
            log_into_output(given)
        elif not self.defaults and (given.get("bags") or given.get("ckpt_path")):
            raise InputError(
                f"{self.verb}: give --bags together with --ckpt_path on the command line; "
                "in a config file they are data.bags and model"
            )

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self.card is not None and isinstance(self.model, MILModule):
            self.model.bind(self.card)
        if self.verb == "fit" and self.output is not None:
            for keeper in self.trainer.checkpoint_callbacks:
                if isinstance(keeper, ModelCheckpoint) and keeper.dirpath is None:
                    keeper.dirpath = str(self.output / CHECKPOINTS)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let a checkpoint override YAML and command line."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if self.resume_from is not None:
            kwargs["ckpt_path"] = kwargs["ckpt_path"] or str(self.resume_from)
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb; if it fails, end other processes and clean up the folder."""
        self._add_callbacks(EndOnSigterm())
        bar = self.trainer.progress_bar_callback
        if bar is not None and not sys.stdout.isatty():
            self.trainer.callbacks.remove(bar)  # type: ignore[attr-defined]
            self._add_callbacks(LogLines())
        try:
            checkpoint = self._get(self.config, "ckpt_path") or self.resume_from
            with explain_restoring(checkpoint, trains=subcommand == "fit"):
                super()._run_subcommand(subcommand)
        except BaseException as error:
            if self.trainer.strategy.launcher is not None:
                self.trainer.strategy.launcher.kill(signal.SIGTERM)
            if self.run is not None:
                self._clean_up(self.run, error)
            raise

    def _clean_up(self, run: RunFolder, error: BaseException) -> None:
        """Remove the folder of a fit that has not begun; otherwise print how to resume it."""
        folder = self.trace.folder
        if not run.begun:
            if self.trainer.is_global_zero:
                self.trace.remove()
        elif folder is not None and signal_of(error) is not None:
            error.add_note(f"go on with: python -m dasmil fit --resume {shlex.quote(str(folder))}")

    @property
    def output(self) -> Path | None:
        """The output folder: as given, or inside the run that wrote the checkpoint."""
        given, checkpoint = self._get(self.config, "output"), self._get(self.config, "ckpt_path")
        if given or not checkpoint or self.verb not in ("validate", "test"):
            return Path(given) if given else None
        run = folder_of_checkpoint(Path(checkpoint))
        return None if run is None else run / PARTS[self.verb]

    def before_fit(self) -> None:
        checkpoint = self._get(self.config, "ckpt_path") or self.resume_from
        if checkpoint is not None and Path(checkpoint).is_file():  # before anything is written
            settings = training_settings(self.trainer, self.model, self.datamodule)
            content = load_checkpoint(Path(checkpoint))
            refuse_other_settings(content, settings, checkpoint)
            if content.get("epoch") == (self.trainer.max_epochs or 0) - 1:
                rank_zero_only(print)(
                    f"fit: {checkpoint} is of the last epoch; there is nothing left to train"
                )
        if checkpoint is None:
            refuse_used_folder(self.trainer)
        seed = self._get(self.config, "seed_everything")
        self.trace = Trace(logger_folder(self.trainer))
        self.run = RunFolder(self.command, seed)
        self._add_callbacks(self.run, History())
        if isinstance(self.model, TrainingModule):
            self._add_callbacks(HyperParameters())

    def before_validate(self) -> None:
        truth, classes = self._get(self.config, "truth"), self._get(self.config, "truth_classes")
        if classes and not truth:
            raise InputError(f"{self.verb}: --truth_classes needs --truth, the annotations' folder")
        self.writer = EvaluationWriter(self.output)
        self._add_callbacks(self.writer)
        if truth:
            judge = InstanceTruth(Path(truth), output=self.output, classes=classes or None)
            self._add_callbacks(judge)

    before_test = before_validate

    def before_predict(self) -> None:
        if self.output is None:
            raise InputError("predict: give --output, the folder for predictions and overlays")
        self.writer = PredictionWriter(self.output)
        self._add_callbacks(self.writer)

    def _add_callbacks(self, *callbacks: Callback) -> None:
        """Insert callbacks before those that save checkpoints, which must be last."""
        self.trainer.callbacks[:0] = callbacks  # type: ignore[attr-defined]

    def after_validate(self) -> None:
        """Set the exit code, only in the first process: a non-zero one elsewhere would kill it."""
        if self.trainer.is_global_zero:
            self.exit_code = int(self.writer.is_incomplete)

    after_test = after_predict = after_validate

    def after_fit(self) -> None:
        """Print the checkpoint, and evaluate that of a method on the validation slides."""
        keeper, folder = self.trainer.checkpoint_callback, logger_folder(self.trainer)
        if not isinstance(keeper, ModelCheckpoint):
            return
        best = keeper.best_model_path or keeper.last_model_path
        if self.trainer.is_global_zero:
            print(f"fit: checkpoint {best}{self._describe_choice(keeper)}")
        if isinstance(self.model, MILModule) and keeper.best_model_path and folder is not None:
            loggers = self.trainer.loggers
            self.trainer.loggers = []  # the training curves are complete: do not log this
            self.writer = EvaluationWriter(folder / PARTS["fit"], replaces=True)
            self._add_callbacks(self.writer)
            self.trainer.validate(self.model, self.datamodule, ckpt_path=best, verbose=False)
            self.trainer.loggers = loggers
            self.after_validate()

    def _describe_choice(self, keeper: ModelCheckpoint) -> str:
        """Describe the chosen epoch, and the number of slides per class that it was chosen on."""
        score, data = keeper.best_model_score, self.datamodule
        if score is None or not isinstance(data, BagDataModule):
            return ""
        epoch = load_checkpoint(Path(keeper.best_model_path))["epoch"]
        counts = data.class_counts(data.val_part)
        slides = join_few([f"{number} {name}" for name, number in counts.items()])
        chance = "; 0.5 is chance, train longer or check the labels"
        return (
            f": epoch {epoch} (last: {self.trainer.current_epoch - 1}), chosen by {keeper.monitor} "
            f"{float(score):.4f} of {sum(counts.values())} {data.val_part} slides ({slides})"
            + (chance if keeper.monitor == "val/auroc" and score <= 0.5 else "")
        )
