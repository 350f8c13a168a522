"""The command line: LightningCLI's verbs and the pipeline's verbs, nothing else."""

import inspect
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from dasmil.endings import ending_on_sigterm, signal_of
from dasmil.errors import InputError, input_error_in, near, os_error_in, shown
from dasmil.quiet import hush, is_first_process

USAGE = """\
usage: python -m dasmil VERB [--config FILE] [options]

slides → predictions
  tile      find tissue and lay an aligned tile pyramid over every slide; with --preview SLIDE...,
            draw the tissue that several settings find
  embed     tiles → bag files, with one frozen extractor per scale
  fit       train: a method on bags (configs/mil.yaml), or an extractor (configs/dino.yaml)
  validate  the validation figures of a checkpoint
  test      the test figures of a checkpoint
  predict   scores, instance tables and overlays for a folder of bags

  contact-sheet  the QC pictures of a cohort on one page, sortable, for a browser
  status    the state of every slide of a folder of tiles or bags
  import    files of others → ours: features of TRIDENT, CLAM, STAMP; weights of DINO; mil4wsi's
            graphs and models
  export    bags → feature files as TRIDENT writes them
  sweep     fit and test configs × seeds, and the table of their figures (configs/sweep/)
  compare   tested runs side by side: intervals, and paired tests against the first
  demo      the whole pipeline on a small synthetic cohort, no download

`python -m dasmil VERB --help` shows the options of a verb, --print_config a complete YAML.
"""

IMPORT_USAGE = """\
usage: python -m dasmil import KIND [options]

  trident             TRIDENT's features, a folder a magnification → a folder of bags
  clam                CLAM's features and patches, a folder a magnification → a folder of bags
  stamp               STAMP's features, a folder a magnification → a folder of bags
  dino-checkpoint     weights of facebookresearch/dino → an extractor for `embed`
  mil4wsi-bags        the released code's graphs → a folder of bags
  mil4wsi-checkpoint  the released code's model → a checkpoint for `predict` and `test`

`python -m dasmil import KIND --help` shows the options of a kind.
"""

# kind → its module in dasmil.interop and its function; only the one that is asked for is imported
IMPORTERS = {
    "dino-checkpoint": ("dino", "dino_checkpoint"),
    "mil4wsi-bags": ("mil4wsi.bags", "mil4wsi_bags"),
    "clam": ("features.clam", "clam"),
    "mil4wsi-checkpoint": ("mil4wsi.checkpoint", "mil4wsi_checkpoint"),
    "stamp": ("features.stamp", "stamp"),
    "trident": ("features.trident", "trident"),
}
FEATURE_KINDS = ("clam", "stamp", "trident")
LIGHTNING_VERBS = ("fit", "validate", "test", "predict")
VERBS = {  # verb → its module; the function has the name of the verb
    "tile": "slides.tile",
    "embed": "embedding.embed",
    "status": "reports.status_summary",
    "export": "interop.features.export",
    "sweep": "experiments.sweep.sweep",
    "compare": "experiments.compare.compare",
    "contact-sheet": "reports.contact_sheet",
    "demo": "demo.run",
}
GOES_ON = ("tile", "embed", "import", "sweep", "demo")  # verbs that do only what is not done
FIRST_SAYS_S = 10.0  # in which the first of several processes says its error
ENDED = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
BY_PLACE = ("export", "contact-sheet")  # verbs whose required parameters are no options
MANY = {  # verbs whose first parameter is any number of folders
    "status": ("folders", "FOLDER", "of tiles or of bags"),
    "compare": ("run_dirs", "RUN_DIR", "one per method"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (0 well, 1 something failed, 2 bad input)."""
    args = list(sys.argv[1:] if args is None else args)
    hush()
    try:
        with ending_on_sigterm():
            code = run(args)
            sys.stdout.flush()
            return code
    except (KeyboardInterrupt, SystemExit) as stop:
        number = signal_of(stop)
        if number is None:
            raise
        if is_first_process():
            how = f"{args[0]} was ended by {ENDED[number]}"
            print(f"{how}; {_advice(args[0], stop)}", file=sys.stderr)
        return 128 + number
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would complain
        return 128 + signal.SIGPIPE
    except Exception as error:
        # Lightning says so what it cannot do with its options
        misconfigured = type(error).__name__ == "MisconfigurationException"
        said = shown(str(error)) if misconfigured else input_error_in(error) or os_error_in(error)
        said = said or _lost_reader(error)
        if not said:
            raise
        if not is_first_process():
            time.sleep(FIRST_SAYS_S)  # the first one says the same, if it can, and ends this one
        # a reading process wraps the sentence in its traceback
        print(f"error: {said.rsplit('InputError: ', 1)[-1].strip()}", file=sys.stderr)
        return 2


def _lost_reader(error: Exception) -> str:
    """What to say of a reading process that has ended; "" for other errors."""
    if not isinstance(error, RuntimeError):
        return ""
    from dasmil.reading import say_lost  # here, since it imports torch

    return say_lost(error)


def _nobody_reads() -> bool:
    """Whether the other end of the output's pipe is closed, as ``| head`` closes it."""
    output = select.poll()
    output.register(sys.stdout, select.POLLERR)
    return bool(output.poll(0))


def _advice(verb: str, stop: BaseException) -> str:
    """How to go on with a verb that was ended, as far as it has not said so itself."""
    if verb in GOES_ON:  # also if it was ended in a fit: the demo makes its fits itself
        return "run the same command again, what is done is kept"
    return " ".join(getattr(stop, "__notes__", ())) or "run the same command again"


def run(args: Sequence[str]) -> int:
    """Run one verb; raises :class:`InputError` for bad input."""
    verb, rest = (args[0], args[1:]) if args else ("--help", [])
    if verb in ("-h", "--help"):
        print(USAGE)
        return 0
    if verb == "--version":
        from dasmil import __version__

        print(__version__)
        return 0
    if verb in LIGHTNING_VERBS:
        from dasmil.lightning_cli import run as run_lightning

        hush()
        _keep_whole_numbers()
        return run_lightning(verb, rest)
    if verb == "import":
        return _import(rest)
    if verb not in VERBS:
        raise InputError(f"no verb {verb!r}{near(verb, (*VERBS, *LIGHTNING_VERBS, 'import'))}")
    if verb == "tile" and "--preview" in rest:
        from dasmil.slides.preview import preview

        first = ("slides", "SLIDE", "slide files, or slide_ids of the cohort")
        words = [word for word in rest if word != "--preview"]
        return _call(preview, "dasmil tile --preview", words, first)
    function = getattr(import_module(f"dasmil.{VERBS[verb]}"), verb.replace("-", "_"))
    return _call(function, f"dasmil {verb}", rest, MANY.get(verb), verb in BY_PLACE)


def _import(args: Sequence[str]) -> int:
    kind = args[0] if args else "--help"
    if kind in ("-h", "--help"):
        print(IMPORT_USAGE)
        return 0
    if kind == "crchisto":
        raise InputError(
            "import crchisto: it is a script beside its benchmark now; run "
            "`python tests/benchmarks/colon/crchisto.py FOLDER OUTPUT` in a clone of the repository"
        )
    if kind not in IMPORTERS:
        raise InputError(f"import: no kind {kind!r}{near(kind, IMPORTERS)}")
    module, name = IMPORTERS[kind]
    function = getattr(import_module(f"dasmil.interop.{module}"), name)
    if kind in FEATURE_KINDS:  # --features.x20 FOLDER is an option, although it is required
        first = ("dest", "BAGS", "folder for the bags")
        return _call(function, f"dasmil import {kind}", args[1:], first)
    return _call(function, f"dasmil import {kind}", args[1:], by_place=True)


def _call(
    function: Callable[..., int],
    prog: str,
    args: Sequence[str],
    first: tuple[str, str, str] | None = None,
    by_place: bool = False,
) -> int:
    """Call a function with what stands on the command line.

    Parameters
    ----------
    first: a parameter that is given by its place, and its name and explanation for --help.
    by_place: all required parameters are.
    """
    from jsonargparse import ActionConfigFile

    from dasmil.arguments import (
        SentenceParser,
        said_of_trainer,
        with_configs,
        with_scales_together,
    )

    parameters = inspect.signature(function).parameters
    parser = SentenceParser(prog=prog, description=_about(function))
    parser.add_argument("--config", action=ActionConfigFile, help="file of options, in YAML")
    skip: set[str | int] = {"trainer", "run_verb"}
    if first is not None:
        name, metavar, explanation = first
        skip.add(name)
        several = "+" if parameters[name].annotation != Path else None
        parser.add_argument(name, type=Path, metavar=metavar, nargs=several, help=explanation)
    parser.add_function_arguments(function, skip=skip, as_positional=by_place, sub_configs=True)
    if "trainer" in parameters:
        _add_trainer(parser)
    parsed = parser.parse_args(with_scales_together(with_configs(args)))
    with said_of_trainer() if "trainer" in parameters else nullcontext():
        values = parser.instantiate(parsed).as_dict()
    values.pop("config", None)
    if "run_verb" in parameters:  # of the demo, which cannot import this module: no circle
        values["run_verb"] = run
    return int(function(**values))


def _add_trainer(parser: Any) -> None:
    """Lightning's Trainer as a verb uses it that trains nothing."""
    from lightning.pytorch import Trainer

    hush()
    _keep_whole_numbers()
    parser.add_class_arguments(Trainer, "trainer")
    parser.set_defaults({"trainer.logger": False, "trainer.enable_checkpointing": False})
    parser.set_defaults({"trainer.enable_model_summary": False})


def _about(function: Callable[..., int]) -> str:
    return (inspect.getdoc(function) or "").split("\n\nParameters")[0]


def _keep_whole_numbers() -> None:
    """``limit_train_batches: 1`` is one batch; as annotated it would be read as 1.0, all data."""
    from lightning.pytorch import Trainer

    annotations = inspect.unwrap(Trainer.__init__).__annotations__
    for part in ("train", "val", "test", "predict"):
        annotations[f"limit_{part}_batches"] = int | float | None
