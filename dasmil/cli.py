"""The command line: LightningCLI's verbs and the pipeline's verbs, nothing else."""

import inspect
import json
import re
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from dasmil.errors import InputError
from dasmil.quiet import hush

USAGE = """\
usage: python -m dasmil VERB [--config FILE] [options]

slides → predictions
  tile      find tissue and lay an aligned tile pyramid over every slide
  embed     tiles → bag files, with one frozen extractor per scale
  fit       train: an extractor (configs/dino.yaml) or DAS-MIL (configs/dasmil.yaml)
  validate  the validation figures of a checkpoint
  test      the test figures of a checkpoint
  predict   scores, instance tables and overlays for a folder of bags

  contact-sheet  the QC pictures of a cohort on one page, sortable, for a browser
  status    what has become of every slide of a folder of tiles or bags
  import    files of others → ours: features of TRIDENT, CLAM, STAMP; weights of DINO; mil4wsi's
            graphs and models; CRCHisto
  export    bags → feature files as TRIDENT writes them
  sweep     fit and test configs × seeds, and the table of their figures (configs/sweep/)
  compare   tested runs side by side: intervals, and paired tests against the first
  demo      the whole road on a small synthetic cohort, no download

`python -m dasmil VERB --help` shows the options of a verb, --print_config a complete YAML.
"""

IMPORT_USAGE = """\
usage: python -m dasmil import KIND [options]

  trident             TRIDENT's features, a folder a magnification → a folder of bags
  clam                CLAM's features and patches, a folder a magnification → a folder of bags
  stamp               STAMP's features, a folder a magnification → a folder of bags
  crchisto            CRCHistoPhenotypes → a cohort of slides, labels and nuclei
  dino-checkpoint     weights of facebookresearch/dino → an extractor for `embed`
  mil4wsi-bags        the released code's graphs → a folder of bags
  mil4wsi-checkpoint  the released code's model → a checkpoint for `predict` and `test`

`python -m dasmil import KIND --help` shows the options of a kind.
"""

# kind → its module and function; only the one that is asked for is imported
IMPORTERS = {
    "crchisto": "crchisto",
    "dino-checkpoint": "dino_checkpoint",
    "mil4wsi-bags": "mil4wsi_bags",
    "clam": "clam",
    "mil4wsi-checkpoint": "mil4wsi_checkpoint",
    "stamp": "stamp",
    "trident": "trident",
}
FEATURE_KINDS = ("clam", "stamp", "trident")
LIGHTNING_VERBS = ("fit", "validate", "test", "predict")


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (0 well, 1 something failed, 2 bad input)."""
    args = list(sys.argv[1:] if args is None else args)
    hush()
    verb, rest = (args[0], args[1:]) if args else ("", [])
    try:
        if verb in LIGHTNING_VERBS:
            from dasmil.lightning_cli import run

            _keep_whole_numbers()
            return run(verb, rest)
        if verb == "embed":
            return _embed(rest)
        if verb == "tile":
            from jsonargparse import auto_cli

            from dasmil.slides.tile import tile

            return int(auto_cli(tile, as_positional=False, args=rest))
        if verb == "status":
            from dasmil.reports.status import status

            return _with_folders(status, "folders", "of tiles or of bags", rest)
        if verb == "import":
            return _import(rest)
        if verb == "export":
            from jsonargparse import auto_cli

            from dasmil.interop.export import export

            return int(auto_cli(export, prog="dasmil export", args=rest))
        if verb == "sweep":
            from jsonargparse import auto_cli

            from dasmil.sweep.sweep import sweep

            return int(auto_cli(sweep, as_positional=False, args=rest))
        if verb == "compare":
            from dasmil.compare.compare import compare

            return _with_folders(compare, "run_dirs", "one a method", rest)
        if verb == "contact-sheet":
            from jsonargparse import auto_cli

            from dasmil.reports.contact_sheet import contact_sheet

            prog = "dasmil contact-sheet"
            return int(auto_cli(contact_sheet, as_positional=True, prog=prog, args=rest))
        if verb == "demo":
            from jsonargparse import auto_cli

            from dasmil.demo.run import demo

            return int(auto_cli(demo, as_positional=False, args=rest))
    except InputError as error:
        # a reading process wraps the sentence in its traceback
        sentence = str(error).rsplit("InputError: ", 1)[-1].strip()
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    except SystemExit as stop:
        if type(stop).__name__ == "SIGTERMException":  # Lightning's, without an exit code: not done
            print(f"error: {verb} was ended by SIGTERM", file=sys.stderr)
            return 128 + signal.SIGTERM
        raise
    if verb in ("", "-h", "--help"):
        print(USAGE)
        return 0
    if verb == "--version":
        from dasmil import __version__

        print(__version__)
        return 0
    print(f"error: no verb {verb!r}\n\n{USAGE}", file=sys.stderr)
    return 2


def _embed(args: Sequence[str]) -> int:
    from jsonargparse import ActionConfigFile, ArgumentParser
    from lightning.pytorch import Trainer

    from dasmil.embedding.embed import embed

    _keep_whole_numbers()
    parser = ArgumentParser(prog="dasmil embed", description=inspect.getdoc(embed))
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_function_arguments(embed, skip={"trainer"}, as_positional=False)
    parser.add_class_arguments(Trainer, "trainer")
    parser.set_defaults({"trainer.logger": False, "trainer.enable_checkpointing": False})
    parser.set_defaults({"trainer.enable_model_summary": False})
    values = parser.instantiate(parser.parse_args(list(args)))
    values.pop("config", None)
    return embed(**values.as_dict())


def _with_folders(
    function: Callable[..., int], folders: str, about: str, args: Sequence[str]
) -> int:
    """A verb whose first parameter is any number of folders; its others are options."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(prog=f"dasmil {function.__name__}", description=_about(function))
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument(folders, nargs="+", type=Path, metavar=folders[:-1].upper(), help=about)
    parser.add_function_arguments(function, skip={folders}, as_positional=False)
    values = parser.instantiate(parser.parse_args(list(args))).as_dict()
    values.pop("config", None)
    return function(tuple(values.pop(folders)), **values)


def _import(args: Sequence[str]) -> int:
    kind = args[0] if args else "--help"
    if kind in ("-h", "--help"):
        print(IMPORT_USAGE)
        return 0
    if kind not in IMPORTERS:
        print(f"error: import: no kind {kind!r}\n\n{IMPORT_USAGE}", file=sys.stderr)
        return 2
    function = getattr(import_module(f"dasmil.interop.{IMPORTERS[kind]}"), IMPORTERS[kind])
    prog, rest = f"dasmil import {kind}", list(args[1:])
    if kind in FEATURE_KINDS:  # --features.x20 FOLDER is an option, as long as it is required
        from jsonargparse import ActionConfigFile, ArgumentParser

        parser = ArgumentParser(prog=prog, description=_about(function))
        parser.add_argument("--config", action=ActionConfigFile)
        parser.add_argument("dest", type=Path, metavar="BAGS", help="folder for the bags")
        parser.add_function_arguments(function, skip={"dest"}, as_positional=False)
        values = parser.instantiate(parser.parse_args(_scales_together(rest))).as_dict()
        values.pop("config", None)
        return int(function(**values))
    from jsonargparse import auto_cli

    return int(auto_cli(function, as_positional=True, prog=prog, args=rest))


def _scales_together(args: Sequence[str]) -> list[str]:
    """Options such as --features.x2.5 FOLDER as one: for jsonargparse each dot is a level."""
    rest: list[str] = []
    together: dict[str, dict[str, str]] = {}
    words = iter(args)
    for word in words:
        found = re.fullmatch(r"--(features|patches)\.(x[\d.]+)(?:=(.*))?", word)
        value = (found[3] or next(words, None)) if found else None
        if found is None or value is None:
            rest.append(word)
        else:
            together.setdefault(found[1], {})[found[2]] = value
    return [
        *rest,
        *(text for name in together for text in (f"--{name}", json.dumps(together[name]))),
    ]


def _about(function: Callable[..., int]) -> str:
    return (inspect.getdoc(function) or "").split("\n\nParameters")[0]


def _keep_whole_numbers() -> None:
    """``limit_train_batches: 1`` is one batch; as annotated it would be read as 1.0, all data."""
    from lightning.pytorch import Trainer

    annotations = inspect.unwrap(Trainer.__init__).__annotations__
    for part in ("train", "val", "test", "predict"):
        annotations[f"limit_{part}_batches"] = int | float | None
