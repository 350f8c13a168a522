"""Arguments of fit, validate, test and predict: completed and checked around the parser."""

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from dasmil.arguments import given_options, read_config
from dasmil.callbacks.run_folder import CHECKPOINTS, LAST
from dasmil.errors import InputError
from dasmil.files import must_exist
from dasmil.methods.load import known_methods, read_checkpoint
from dasmil.modules import MILModule
from dasmil.modules.card import ModelCard

LOGGERS = "lightning.pytorch.loggers."
WITH_FOLDERS = ("TensorBoardLogger", "CSVLogger")  # loggers that make folders by name and version
OLD_METHOD = "DASMILModule"  # the only method before version 0.2; its options had no groups
CONFIGS = ("--config", "-c")
MODELS = ("--model", "--model.class_path")
EVALUATES = "Classes, scales and split are in the checkpoint."
ABOUT = {  # verb → its help
    "fit": """\
Train a method on bags, or a DINO extractor on the tiles of one scale. A method's best checkpoint \
is then evaluated on the validation slides.

  python -m dasmil fit --config configs/mil.yaml --data.bags BAGS \\
      --data.classes [normal,tumor] --output RUN
  python -m dasmil fit --config configs/dino.yaml --data.tiles TILES \\
      --data.scale x20 --output EXTRACTOR
  python -m dasmil fit --resume RUN

Options of a method are listed by --model.help METHOD, for example DASMIL or ABMIL; those of the \
data by --data.help BagDataModule (bags) and --data.help TileDataModule (tiles).""",
    "validate": f"""\
Evaluate a checkpoint on the validation slides: metrics, tables and figures. {EVALUATES}

  python -m dasmil validate --ckpt_path RUN/checkpoints/best.ckpt --bags BAGS""",
    "test": f"""\
Evaluate a checkpoint on the test slides: metrics, tables and figures. {EVALUATES}

  python -m dasmil test --ckpt_path RUN/checkpoints/best.ckpt --bags BAGS""",
    "predict": f"""\
Write the scores of all slides in a folder of bags, their instance tables and their overlays. \
{EVALUATES}

  python -m dasmil predict --ckpt_path RUN/checkpoints/best.ckpt --bags BAGS --output OUT""",
}
EVALUATED = ("ckpt_path", "bags")
NEEDED = {"fit": ("config", "output"), "predict": (*EVALUATED, "output")}  # what --help shows first
CLASSES = (
    "classes (QuPath) or groups (ASAP) of the annotations that are lesions; quote one with a "
    "colon: '[\"Tumor: Positive\"]'"
)
_bags = {"bags": "folder of bags that embed or import wrote"}
_evaluation = {
    **_bags,
    "output": "folder for metrics and figures; if not given, inside the run's folder",
    "truth": "folder of annotations, one file per slide: evaluate instances and lesions too",
}
OPTIONS = {  # verb → paths that it takes beside Lightning's options
    "fit": {
        "output": "folder of the run: checkpoints, curves, config.yaml",
        "resume": "folder of a fit that was interrupted: go on with its config.yaml",
    },
    "validate": _evaluation,
    "test": _evaluation,
    "predict": {**_bags, "output": "folder for predictions, tables and overlays"},
}
HELP = {  # option → what its value is called, and its explanation
    "model": ("METHOD", "name of a method, or import path of your own; options: --model.NAME"),
    "model.help": ("METHOD", "show the options of a method and exit"),
    "data": ("DATA", "BagDataModule or TileDataModule; options: --data.NAME"),
    "data.help": ("DATA", "show the options of the data and exit"),
    "ckpt_path": ("PATH", "checkpoint that fit wrote"),
    "seed_everything": ("INT", "seed of all random numbers"),
    **dict.fromkeys(("weights_only", "verbose", "return_predictions"), (None, argparse.SUPPRESS)),
}


def evaluation_defaults(args: Sequence[str]) -> tuple[dict[str, Any], ModelCard | None]:
    """Parser defaults taken from the checkpoint and ``--bags``, and the model's card.

    Raises
    ------
    InputError
        if the checkpoint or the class that ``--model`` names cannot be loaded.
    """
    given = dict(given_options(args, "--ckpt_path", "--bags", *MODELS))
    if not given.get("--ckpt_path"):
        return {}, None
    method = given.get("--model.class_path") or given.get("--model")
    own_class = _import_method(method) if method else None
    _, cls, options, card = read_checkpoint(Path(given["--ckpt_path"]), own_class)
    data: dict[str, Any] = {
        "classes": list(card.classes),
        "scales": list(card.scales),
        "split": {"val_part": card.val_part},
    }
    if given.get("--bags"):
        data["bags"] = given["--bags"]
    return {
        "model": {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": options},
        "data": {"class_path": "dasmil.data.BagDataModule", "init_args": data},
    }, card


def _import_method(name: str) -> type[MILModule] | None:
    """The class that the user names; None for one of dasmil, which the checkpoint names too."""
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


def with_resume(args: Sequence[str]) -> tuple[list[str], Path | None]:
    """Replace ``--resume RUN`` by the config and the output of that fit.

    Its ``config.yaml`` comes first, so the command line still wins.

    Returns
    -------
    The arguments, and the checkpoint to go on from. It is None if there is none yet: then ``fit``
    starts from the beginning with the same seed.

    Raises
    ------
    InputError
        if RUN is not the folder of a fit.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    given, rest = parser.parse_known_args(list(args))
    if given.resume is None:
        return rest, None
    folder = given.resume
    config = folder / "config.yaml"
    must_exist(folder, "give --resume the folder of a fit")
    if not config.is_file():
        raise InputError(f"{folder}: holds no config.yaml; give --resume the folder of a fit")
    _check_config_of_fit(config)
    last = folder / CHECKPOINTS / LAST
    arguments = ["--config", str(config), "--output", str(folder), *rest]
    return arguments, last if last.is_file() else None


def _check_config_of_fit(config: Path) -> None:
    """Check what this module reads from the config of a run."""
    values = read_config(config)
    parts = [values.get(name) for name in ("model", "data", "trainer")]
    logger = parts[2].get("logger") if isinstance(parts[2], dict) else None
    path = logger.get("class_path") if isinstance(logger, dict) else ""
    is_logger = isinstance(logger, dict | bool | None) and isinstance(path, str)
    if not all(isinstance(part, dict) for part in parts) or not is_logger:
        raise InputError(f"{config}: not the config of a fit, of model, data and trainer")


def log_into_output(given: Any) -> None:
    """Make ``--output`` the folder of the logger.

    Parameters
    ----------
    given: parsed options of ``fit``.

    Raises
    ------
    InputError
        if neither an output nor a logger is given.
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


def refuse_arguments(verb: str, args: Sequence[str]) -> None:
    """Refuse old names, unknown methods and missing options before the parser is built.

    The parser would answer with import paths and Python classes.
    """
    for option, value in given_options(args, *MODELS, *CONFIGS):
        is_file = option in CONFIGS and not value.startswith("{")
        if OLD_METHOD in (Path(value).read_text(encoding="utf-8") if is_file else value):
            raise InputError(
                f"{value}: {OLD_METHOD} is DASMIL now, and its options are in the groups network, "
                "objective and optimizer; .github/docs/changes.md lists them"
            )
    known = (*known_methods(), "DINOModule")
    for option, name in given_options(args, *MODELS):
        if name.isidentifier() and name not in known:
            raise InputError(f"{option}: no method {name!r}; there are {', '.join(known)}")
    names = {word.split("=")[0] for word in args}
    if names & {"-h", "--help", "--model.help", "--data.help", "--model", *CONFIGS}:
        return
    if verb == "fit":
        raise InputError(
            "fit: give --config configs/mil.yaml (a method on bags) or --config configs/dino.yaml "
            "(an extractor)"
        )
    if "--ckpt_path" not in names:
        raise InputError(f"{verb}: give --ckpt_path, the checkpoint that fit wrote")
    if not names & {"--bags", "--data.bags"}:
        raise InputError(f"{verb}: give --bags, the folder that embed wrote")
