"""The command line: a table of verbs, and one way to call them."""

import inspect
import os
import re
import select
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dasmil.endings import ending_on_sigterm, signal_of
from dasmil.errors import InputError, escape_controls, input_error_in, near, os_error_in
from dasmil.quiet import hush, is_first_process


@dataclass(frozen=True)
class Verb:
    """One row of the table.

    Parameters
    ----------
    function: module within dasmil and name; imported only if the verb is run.
    about: what the verb does, for the list of verbs.
    by_place: parameters that are given without an option's name, in this order.
    resumes: the verb does only what is not done yet, so the same command goes on.
    parses: the function parses the arguments itself.
    """

    function: str
    about: str
    by_place: tuple[str, ...] = ()
    resumes: bool = False
    parses: bool = False


LIGHTNING = "lightning_cli:run"
SECTIONS = {
    "slides → predictions": {
        "tile": Verb(
            "slides.tile:tile", "find tissue and lay aligned tiles over every slide", resumes=True
        ),
        "tile --preview": Verb(
            "slides.preview:preview", "draw the tissue that several settings find", ("slides",)
        ),
        "embed": Verb(
            "embedding.embed:embed", "tiles → bags, with a frozen extractor per scale", resumes=True
        ),
        "fit": Verb(LIGHTNING, "train a method on bags, or an extractor on tiles", parses=True),
        "validate": Verb(LIGHTNING, "evaluate a checkpoint on validation slides", parses=True),
        "test": Verb(LIGHTNING, "evaluate a checkpoint on test slides", parses=True),
        "predict": Verb(LIGHTNING, "write scores, instance tables and overlays", parses=True),
    },
    "cohorts and experiments": {
        "status": Verb(
            "reports.status_summary:status",
            "show the status of every slide in a folder of tiles or bags",
            ("folders",),
        ),
        "contact-sheet": Verb(
            "reports.contact_sheet:contact_sheet",
            "put the QC pictures of a cohort on one page",
            ("tiles",),
        ),
        "sweep": Verb(
            "experiments.sweep.sweep:sweep",
            "fit and test several configs and seeds, and write a table",
            resumes=True,
        ),
        "compare": Verb(
            "experiments.compare.compare:compare",
            "compare tested runs: intervals and paired tests",
            ("run_dirs",),
        ),
        "demo": Verb(
            "demo.run:demo", "run the whole pipeline on a small synthetic cohort", resumes=True
        ),
    },
    "other tools": {
        "import trident": Verb(
            "interop.features.trident:trident", "TRIDENT's features → bags", ("dest",), True
        ),
        "import clam": Verb(
            "interop.features.clam:clam", "CLAM's features and patches → bags", ("dest",), True
        ),
        "import stamp": Verb(
            "interop.features.stamp:stamp", "STAMP's features → bags", ("dest",), True
        ),
        "import dino-checkpoint": Verb(
            "interop.dino:dino_checkpoint",
            "weights of facebookresearch/dino → an extractor",
            ("file", "out"),
            True,
        ),
        "import mil4wsi-bags": Verb(
            "interop.mil4wsi.bags:mil4wsi_bags", "mil4wsi's graphs → bags", ("src", "dest"), True
        ),
        "import mil4wsi-checkpoint": Verb(
            "interop.mil4wsi.checkpoint:mil4wsi_checkpoint",
            "mil4wsi's model → a checkpoint",
            ("file", "out"),
            True,
        ),
        "export": Verb(
            "interop.features.export:export", "bags → TRIDENT's feature files", ("bags", "output")
        ),
    },
}
VERBS = {name: verb for section in SECTIONS.values() for name, verb in section.items()}
HANDED = ("trainer", "run_verb")  # parameters that are no options of the verb itself
FIRST_PRINTS_S = 10.0  # in which the first of several processes prints its error
ENDED = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (0 success, 1 something failed, 2 bad input)."""
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
            name = _name(args)
            how = f"{name} was ended by {ENDED[number]}"
            print(f"{how}; {_advice(name, stop)}", file=sys.stderr)
        return 128 + number
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would complain
        return 128 + signal.SIGPIPE
    except Exception as error:
        # Lightning raises this if its options contradict each other
        misconfigured = type(error).__name__ == "MisconfigurationException"
        message = escape_controls(str(error)) if misconfigured else input_error_in(error)
        message = message or os_error_in(error)
        if not message and isinstance(error, RuntimeError):
            from dasmil.reading import describe_lost_reader  # here, since it imports torch

            message = describe_lost_reader(error)
        if not message:
            raise
        if not is_first_process():
            time.sleep(FIRST_PRINTS_S)  # the first one prints the same if it can, and ends this one
        # a reading process wraps the sentence in its traceback
        print(f"error: {message.rsplit('InputError: ', 1)[-1].strip()}", file=sys.stderr)
        return 2


def _output_is_closed() -> bool:
    """Whether the other end of the output's pipe is closed, as ``| head`` closes it."""
    output = select.poll()
    output.register(sys.stdout, select.POLLERR)
    return bool(output.poll(0))


def _advice(name: str, stop: BaseException) -> str:
    """How to go on with a verb that was ended."""
    again = "run the same command again"
    if name in VERBS and VERBS[name].resumes:  # also in a fit of the demo, which runs it itself
        return f"{again}, what is done is kept"
    return " ".join(getattr(stop, "__notes__", ())) or again


def run(args: Sequence[str]) -> int:
    """Run one verb; raises :class:`InputError` for bad input."""
    word = args[0] if args else "--help"
    if word == "--version":
        from dasmil import __version__

        print(__version__)
        return 0
    if word in ("-h", "--help") or (word == "import" and (*args, "-h")[1] in ("-h", "--help")):
        print(usage(word.removeprefix("--help")))
        return 0
    name = _name(args)
    if name == "import crchisto":
        raise InputError(
            "import crchisto: it is a script beside its benchmark now; run "
            "`python tests/benchmarks/colon/crchisto.py FOLDER OUTPUT` in a clone of the repository"
        )
    if name not in VERBS:
        raise InputError(f"no verb {name!r}{near(name, VERBS) or ', see --help'}")
    verb = VERBS[name]
    module, _, attribute = verb.function.partition(":")
    function = getattr(import_module(f"dasmil.{module}"), attribute)
    hush()  # again: Lightning, once imported, has set its own format
    if verb.parses:
        return int(function(name, args[1:]))
    words = name.split()[1:]
    return _call(function, verb, name, [word for word in args[1:] if word not in words])


def _name(args: Sequence[str]) -> str:
    """The name of the verb that a command line asks for."""
    if args[0] == "import":
        return " ".join(args[:2])
    return "tile --preview" if args[0] == "tile" and "--preview" in args else args[0]


def usage(prefix: str = "") -> str:
    """The list of verbs, or of those that begin with a prefix."""
    lines = [f"usage: python -m dasmil {prefix or 'VERB'} [options]"]
    for title, verbs in SECTIONS.items():
        shown_verbs = {name: verb for name, verb in verbs.items() if name.startswith(prefix)}
        lines += ["", title] if shown_verbs else []
        lines += [f"  {name:25} {verb.about}" for name, verb in shown_verbs.items()]
    lines += ["", "VERB --help shows the options of a verb, VERB --print_config its complete YAML."]
    return "\n".join(lines)


def _call(function: Callable[..., int], verb: Verb, name: str, args: Sequence[str]) -> int:
    """Parse arguments by a function's signature and docstring, and call it."""
    from jsonargparse import ActionConfigFile

    from dasmil.arguments import SentenceParser, find_configs, join_scales, trainer_errors

    document = inspect.getdoc(function) or ""
    about = document.split("\n\nParameters")[0]
    parameters = inspect.signature(function).parameters
    parser = SentenceParser(prog=f"python -m dasmil {name}", description=about)
    parser.add_argument("--config", action=ActionConfigFile, help="file of options, in YAML")
    for parameter in verb.by_place:
        explanation = re.search(rf"^{parameter}:\s+((?:.+\n?)(?:    .+\n?)*)", document, re.M)
        is_list = parameters[parameter].annotation != Path
        parser.add_argument(
            parameter,
            type=Path,
            metavar=parameter.upper().removesuffix("S") if is_list else parameter.upper(),
            nargs="+" if is_list else None,
            help=textwrap.dedent(explanation[1]) if explanation else "",
        )
    parser.add_function_arguments(function, skip={*verb.by_place, *HANDED}, sub_configs=True)
    if "trainer" in parameters:
        _add_trainer(parser)
    parsed = parser.parse_args(join_scales(find_configs(args)))
    with trainer_errors() if "trainer" in parameters else nullcontext():
        values = parser.instantiate(parsed).as_dict()
    values.pop("config", None)
    if "run_verb" in parameters:  # the demo cannot import this module, it would be a circle
        values["run_verb"] = run
    return int(function(**values))


def _add_trainer(parser: Any) -> None:
    """Add Lightning's Trainer for a verb that trains nothing."""
    from dasmil.help import hide_training
    from dasmil.trainer import CommandLineTrainer

    parser.add_class_arguments(CommandLineTrainer, "trainer")
    for option in ("logger", "enable_checkpointing", "enable_model_summary"):
        parser.set_defaults({f"trainer.{option}": False})
    hide_training(parser)
