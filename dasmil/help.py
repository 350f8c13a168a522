"""Help texts: the output of ``--help``, with what is required first and without Python's types."""

import argparse
import re
import textwrap
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, get_args

from jsonargparse import DefaultHelpFormatter, Namespace

PAPER_PAGE = ".github/docs/paper.md"
GENERAL = ("help", "config", "print_config")
D_NUMBER = re.compile(r"\bD\d+\b")
ROLE = re.compile(r":\w+:`~?(?:[^`]*\.)?([^`.]+)`")  # of Sphinx: the last name is kept
TEXTS = {  # option → explanation in place of jsonargparse's or Lightning's
    "help": "show this help and exit",
    "print_config": "print the complete YAML of this command and exit",
    "trainer.accelerator": "cpu, gpu or auto",
    "trainer.devices": "number of devices, or their indices such as [0,2]",
    "trainer.num_nodes": "number of machines",
    "trainer.strategy": "how several devices work together, such as ddp",
    "trainer.precision": "32-true, bf16-mixed, 16-mixed or another of Lightning's names",
    "trainer.max_epochs": "number of epochs to train",
    "trainer.limit_train_batches": "batches per epoch: a number (2), or a share of all (0.1)",
    "trainer.accumulate_grad_batches": "batches per step of the optimiser",
    "trainer.check_val_every_n_epoch": "epochs between two validations",
    "trainer.logger": "false for none, or a logger of Lightning such as CSVLogger",
    "trainer.callbacks": "callbacks of Lightning, as a list of class_path and init_args",
    "trainer.deterministic": "true or warn: only deterministic algorithms",
    "trainer.enable_progress_bar": "show a progress bar on a terminal",
}
TRAINING = (  # options of the Trainer that only ``fit`` has use for
    *("trainer.max_epochs", "trainer.limit_train_batches", "trainer.accumulate_grad_batches"),
    *("trainer.check_val_every_n_epoch", "trainer.deterministic", "trainer.logger"),
)
TITLES = {"model": "model", "data": "data", "trainer": "Trainer"}
METAVARS = {int: "INT", float: "NUMBER", str: "TEXT"}


def plain_text(text: str | None) -> str:
    """A docstring's text without its markup."""
    return ROLE.sub(r"\1", text or "").replace("``", "").replace("`", "")


class HelpFormatter(DefaultHelpFormatter):
    """One sentence and the default per option; usage names only what is required."""

    def _format_usage(self, usage: Any, actions: Iterable[argparse.Action], *more: Any) -> str:
        required = [action for action in actions if action.required]
        return super()._format_usage(usage, required, *more).rstrip() + " [options]\n\n"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Paragraphs; an indented one is code and stays as it is."""
        paragraphs = re.split(r"\n\s*\n", plain_text(text))
        return "\n\n".join(
            p if p.startswith(" ") else textwrap.fill(" ".join(p.split()), width)
            for p in paragraphs
        )

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return re.sub(r", \S+\+( \S+)?$", "", super()._format_action_invocation(action))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = plain_text(TEXTS.get(action.dest, action.help)).strip()
        if text == "Path to a configuration file.":
            text = "file with the options of this group, in YAML"
        if text.startswith("Show the help for"):
            text = "show its settings and exit"
        default = "" if action.required else _describe(action.default)
        return text.removesuffix(".") + (f" (default: {default})" if default else "")

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        hint = getattr(action, "_typehint", None)
        kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
        if len(kinds) == 1 and isinstance(kinds[0], type):
            name = METAVARS.get(kinds[0], "PATH" if kinds[0].__name__ == "Path" else "")
            if name:
                return name
        return super()._get_default_metavar_for_optional(action)


def _describe(default: Any) -> str:
    """A default as a user writes it; "" if it is empty."""
    if default in (None, "", argparse.SUPPRESS) or isinstance(default, Namespace | dict):
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list | tuple):
        return f"[{','.join(map(str, default))}]" if default else ""
    return str(default)


def hide_training(parser: argparse.ArgumentParser) -> None:
    """Leave Trainer options out of the help that a verb without training has no use for."""
    for action in parser._actions:
        if action.dest in TRAINING:
            action.help = argparse.SUPPRESS


def arrange(groups: Iterable[Any], needed: Sequence[str]) -> list[Any]:
    """Sort options into sections: required ones, the verb's own, groups, general ones.

    Parameters
    ----------
    groups: argparse's groups.
    needed: names of the options that come first, in this order.
    """
    sections: dict[str, list[argparse.Action]] = {"required": [], "options": []}
    general: list[argparse.Action] = []
    unexplained: list[str] = []
    for group in groups:
        names = {action.dest for action in group._group_actions}
        is_nested = any("." in name and not name.endswith(".help") for name in names)
        title = plain_text(group.title) if is_nested else "options"
        title = next((TITLES[name] for name in TITLES if name in names), title)
        section = sections.setdefault(title, [])
        for action in group._group_actions:
            if action.help is argparse.SUPPRESS:
                continue
            if action.dest in needed:
                sections["required"].append(action)
            elif action.dest in GENERAL:
                general.append(action)
            elif action.dest.startswith("trainer.") and action.dest not in TEXTS:
                unexplained += [] if action.dest.endswith(".help") else [f"--{action.dest}"]
            elif action.dest != "trainer":
                section.append(action)
    sections["required"].sort(key=lambda action: needed.index(action.dest))
    trainer = {TITLES["trainer"]: sections.pop(TITLES["trainer"], [])}
    more = f"more options, explained by Lightning: {', '.join(unexplained)}"
    return [
        SimpleNamespace(
            title=title,
            description=more if title == TITLES["trainer"] else None,
            _group_actions=actions,
        )
        for title, actions in (sections | trainer | {"general": general}).items()
        if actions
    ]
