"""LightningCLI as dasmil uses it: ``fit`` from YAML, evaluation from a checkpoint alone."""

import argparse
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from dasmil.arguments import SentenceParser, read_config, said_of_trainer, with_configs
from dasmil.callbacks.evaluation import EvaluationWriter, say_not_finite
from dasmil.callbacks.history import History
from dasmil.callbacks.hparams import HyperParameters
from dasmil.callbacks.instances import InstanceTruth
from dasmil.callbacks.log_lines import LogLines
from dasmil.callbacks.predictions import PredictionWriter
from dasmil.callbacks.run_folder import (
    CHECKPOINTS,
    LAST,
    RunFolder,
    Trace,
    run_folder,
    run_folder_of,
)
from dasmil.data import BagDataModule
from dasmil.embedding.restricted import load_checkpoint
from dasmil.endings import end_on_sigterm, signal_of
from dasmil.errors import InputError, some_of
from dasmil.files import must_exist
from dasmil.methods.load import known_methods, read_checkpoint
from dasmil.modules import MILModule
from dasmil.modules.card import ModelCard
from dasmil.modules.going_on import refuse_other_settings, training_settings
from dasmil.restoring import RestrictedIO, said_of_restoring

PARTS = {"fit": "val", "validate": "val", "test": "test"}  # which split each verb evaluates
LOGGERS = "lightning.pytorch.loggers."
WITH_FOLDERS = ("TensorBoardLogger", "CSVLogger")  # loggers that make folders by name and version


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
            args, self.resume_from = _with_resume(args)
            if self.resume_from is not None:
                warnings.filterwarnings("ignore", "Checkpoint directory .* is not empty")
        else:  # evaluation saves no checkpoints, wherever the one it reads has been saved
            warnings.filterwarnings("ignore", "The dirpath has changed from")
        args = with_configs(args)
        _refuse_old_names(args)
        _refuse_unknown_method(args)
        _refuse_too_little(verb, args)
        self.defaults, self.card = ({}, None) if verb == "fit" else _evaluation_defaults(args)
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
        parser.add_argument("--output", type=str | None, help="folder for all that is written")
        if subcommand == "fit":
            parser.add_argument(
                "--resume",
                type=str | None,
                help="folder of a fit that was broken off: go on there, with its config.yaml",
            )
        else:
            parser.add_argument("--bags", type=str | None, help="folder of bags (as --data.bags)")
            parser.set_defaults({"trainer.logger": False, **self.defaults})
        if subcommand in ("validate", "test"):
            parser.add_argument(
                "--truth",
                type=str | None,
                help="folder of annotations, one file per slide: judge instances and lesions too",
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

        if self.verb == "fit":
            _log_into(given)

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self.card is not None and isinstance(self.model, MILModule):
            self.model.bind(self.card)
        if self.verb == "fit" and self.output is not None:
            for keeper in self.trainer.checkpoint_callbacks:
                if isinstance(keeper, ModelCheckpoint) and keeper.dirpath is None:
                    keeper.dirpath = str(self.output / CHECKPOINTS)

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
        if given or not checkpoint or self.verb not in ("validate", "test"):
            return Path(given) if given else None
        run = run_folder_of(Path(checkpoint))
        return None if run is None else run / PARTS[self.verb]

    def before_fit(self) -> None:
        checkpoint = self._get(self.config, "ckpt_path") or self.resume_from
        if checkpoint is not None and Path(checkpoint).is_file():  # before anything is written
            settings = training_settings(self.trainer, self.model, self.datamodule)
            refuse_other_settings(load_checkpoint(Path(checkpoint)), settings, checkpoint)
        seed = self._get(self.config, "seed_everything")
        self.trace = Trace(run_folder(self.trainer))
        self.run = RunFolder(self.command, seed)
        self._add_callbacks(self.run, History())
        if isinstance(self.model, MILModule):
            self._add_callbacks(HyperParameters())

    def before_validate(self) -> None:
        truth, classes = self._get(self.config, "truth"), self._get(self.config, "truth_classes")
        if classes and not truth:
            raise InputError(f"{self.verb}: --truth_classes needs --truth, the annotations' folder")
        self._add_callbacks(EvaluationWriter(self.output))
        if truth:
            judge = InstanceTruth(Path(truth), output=self.output, classes=classes or None)
            self._add_callbacks(judge)

    before_test = before_validate

    def before_predict(self) -> None:
        if self.output is None:
            raise InputError("predict: give --output, the folder for predictions and overlays")
        self._add_callbacks(PredictionWriter(self.output))

    def _add_callbacks(self, *callbacks: Callback) -> None:
        """Before those that save checkpoints, which Lightning wants last."""
        self.trainer.callbacks[:0] = callbacks  # type: ignore[attr-defined]

    def after_validate(self) -> None:
        """The exit code of the first process: one that ends with an error would end the others."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EvaluationWriter) and self.trainer.is_global_zero:
                self.exit_code = int(callback.is_incomplete)

    after_test = after_validate

    def after_predict(self) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PredictionWriter) and self.trainer.is_global_zero:
                if callback.failed:
                    say_not_finite("predict", callback.failed)
                if callback.unread:
                    self._say_unread(callback)
                self.exit_code = int(bool(callback.failed or callback.unread))

    def _say_unread(self, writer: PredictionWriter) -> None:
        """Name slides whose bags could not be read."""
        reason = next(iter(writer.unread.values()))
        print(
            f"error: predict: {len(writer.unread)} bag(s) could not be read, their slides have "
            f"no class: {some_of(list(writer.unread))}; the first: {reason}; "
            f"see {writer.table}",
            file=sys.stderr,
        )

    def after_fit(self) -> None:
        """Say where the checkpoint is, and evaluate a method's on the validation slides."""
        keeper, folder = self.trainer.checkpoint_callback, run_folder(self.trainer)
        if not isinstance(keeper, ModelCheckpoint):
            return
        best = keeper.best_model_path or keeper.last_model_path
        if self.trainer.is_global_zero:
            print(f"fit: checkpoint {best}{self._describe_choice(keeper)}")
        if isinstance(self.model, MILModule) and keeper.best_model_path and folder is not None:
            loggers, self.trainer.loggers = self.trainer.loggers, []  # its curves have ended
            self._add_callbacks(EvaluationWriter(folder / PARTS["fit"], replaces=True))
            self.trainer.validate(self.model, self.datamodule, ckpt_path=best, verbose=False)
            self.trainer.loggers = loggers
            self.after_validate()

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


def _evaluation_defaults(args: Sequence[str]) -> tuple[dict[str, Any], ModelCard | None]:
    """Defaults of the verb's parser that checkpoint and bags determine, and the model's card."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--ckpt_path", "--bags", "--model", "--model.class_path"):
        parser.add_argument(name)
    given, _ = parser.parse_known_args(list(args))
    if given.ckpt_path is None:
        return {}, None
    method = getattr(given, "model.class_path") or given.model
    _, found, cls = read_checkpoint(
        Path(given.ckpt_path), None if method is None else _import_method(method)
    )
    data = {
        "classes": list(found.card.classes),
        "scales": list(found.card.scales),
        "val_part": found.card.val_part,
    }
    if given.bags is not None:
        data["bags"] = given.bags
    path = f"{cls.__module__}.{cls.__qualname__}"
    defaults = {
        "model": {"class_path": path, "init_args": found.options},
        "data": {"class_path": "dasmil.data.BagDataModule", "init_args": data},
    }
    return defaults, found.card


def _import_method(name: str) -> type[MILModule] | None:
    """The class that the user names; None if it is one of ours, which the checkpoint names too."""
    module, _, attribute = name.rpartition(".")
    if not module or module.split(".")[0] == "dasmil":
        return None
    try:
        cls = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"--model: {name} cannot be imported ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, MILModule)):
        raise InputError(f"--model: {name} is no MILModule")
    return cls


def _with_resume(args: Sequence[str]) -> tuple[list[str], Path | None]:
    """Arguments of a ``fit`` that goes on in the folder that ``--resume`` names.

    Its ``config.yaml`` comes first, so that what is on the command line still comes on top.

    Returns
    -------
    The arguments, and the checkpoint to go on from; None if there is none (yet): ``fit`` then
    starts from the beginning, and draws what it drew before.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume")
    given, rest = parser.parse_known_args(list(args))
    if given.resume is None:
        return list(args), None
    folder = Path(given.resume)
    config = folder / "config.yaml"
    must_exist(folder, "give --resume the folder of a fit")
    if not config.is_file():
        raise InputError(f"{folder}: holds no config.yaml; give --resume the folder of a fit")
    _refuse_no_fit(config)
    last = folder / CHECKPOINTS / LAST
    arguments = ["--config", str(config), "--output", str(folder), *rest]
    return arguments, last if last.is_file() else None


def _refuse_no_fit(config: Path) -> None:
    """Check as much of the config of a run as this module reads itself."""
    values = read_config(config)
    parts = [values.get(name) for name in ("model", "data", "trainer")]
    logger = parts[2].get("logger") if isinstance(parts[2], dict) else None
    path = logger.get("class_path") if isinstance(logger, dict) else ""
    is_logger = isinstance(logger, dict | bool | None) and isinstance(path, str)
    if not all(isinstance(part, dict) for part in parts) or not is_logger:
        raise InputError(f"{config}: not the config of a fit, of model, data and trainer")


def _log_into(given: Any) -> None:
    """Make ``--output`` the folder of the logger.

    Parameters
    ----------
    given: parsed options of ``fit``.
    """
    folder, logger = given.get("output"), given.trainer.get("logger")
    if folder is None:
        if logger in (None, True):
            raise InputError("fit: give --output, the folder of the run")
        return
    if logger in (None, True):
        arguments = Namespace(save_dir=folder, name="", version="", default_hp_metric=False)
        path = f"{LOGGERS}TensorBoardLogger"
        given.trainer.logger = Namespace(class_path=path, init_args=arguments)
    elif isinstance(logger, Namespace):
        logger.init_args.save_dir = folder
        if logger.class_path.rsplit(".", 1)[-1] in WITH_FOLDERS:
            logger.init_args.name, logger.init_args.version = "", ""


def _refuse_old_names(args: Sequence[str]) -> None:
    """Say what the class of before 0.2 is called now; its options stood all side by side."""
    old = "DASMILModule"
    for option, value in _given(args, "--model", "--model.class_path", "--config", "-c"):
        is_file = option in ("--config", "-c") and not value.startswith("{")
        if old in (Path(value).read_text(encoding="utf-8") if is_file else value):
            raise InputError(
                f"{value}: {old} is DASMIL now, and its options stand in the groups network, "
                "objective and optimizer; .github/docs/changes.md lists them"
            )


def _refuse_unknown_method(args: Sequence[str]) -> None:
    """Say which methods there are; the parser would speak of import paths."""
    known = (*known_methods(), "DINOModule")
    for option, name in _given(args, "--model", "--model.class_path"):
        if name.isidentifier() and name not in known:
            raise InputError(f"{option}: no method {name!r}; there are {', '.join(known)}")


def _given(args: Sequence[str], *options: str) -> Iterator[tuple[str, str]]:
    """These options and their values, as ``--option value`` or ``--option=value``."""
    for word, following in zip(args, [*args[1:], ""]):
        option, equals, value = word.partition("=")
        if option in options:
            yield option, value if equals else following


def _refuse_too_little(verb: str, args: Sequence[str]) -> None:
    """Say what a verb cannot do without; the parser would name Python classes."""
    names = {word.split("=")[0] for word in args}
    if names & {"-h", "--help", "--model.help", "--data.help", "-c", "--config", "--model"}:
        return
    if verb == "fit":
        raise InputError(
            "fit: give --config configs/mil.yaml (a method on bags) or --config configs/dino.yaml "
            "(an extractor)"
        )
    for option, what in (
        ("--ckpt_path", "the checkpoint that fit wrote"),
        ("--bags", "the folder that embed wrote"),
    ):
        if not names & {option, f"--data.{option[2:]}"}:
            raise InputError(f"{verb}: give {option}, {what}")
