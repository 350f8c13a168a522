"""How a figure shows names, what it leaves out if there is too much, and how it is saved.

The size of a figure does not grow with the number of classes, scales, runs or epochs: the first or
the most frequent ones are drawn, and the figure says how many are left out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dasmil.files import atomic_path

if TYPE_CHECKING:  # a sweep shows names before it needs matplotlib
    from matplotlib.figure import Figure

Item = TypeVar("Item")

MAX_SCALES = 6  # per figure; the finest ones
MAX_NAME = 28  # characters of a name


def show_line(name: str, most: int = MAX_NAME) -> str:
    """The name on one line, without control characters, at most ``most`` characters long."""
    line = "".join(char if char.isprintable() else "\ufffd" for char in " ".join(name.split()))
    return line if len(line) <= most else f"{line[: most - 1]}…"


def show_name(name: str, most: int = MAX_NAME) -> str:
    """:func:`show_line`, escaped so that matplotlib shows it literally.

    Matplotlib reads text between dollar signs as a formula, and omits a line from the legend if
    its label begins with an underscore.
    """
    line = show_line(name, most).replace("$", r"\$")
    return f" {line}" if line.startswith("_") else line


def show_first(items: Sequence[Item], most: int, what: str) -> tuple[Sequence[Item], str]:
    """The first items, and :func:`describe_left_out` for the others."""
    return items[:most], describe_left_out(len(items), most, what)


def show_finest(scales: Sequence[str]) -> tuple[Sequence[str], str]:
    """The finest scales, given coarse to fine, and :func:`describe_left_out` for the others."""
    return scales[-MAX_SCALES:], describe_left_out(len(scales), MAX_SCALES, "scales")


def describe_left_out(total: int, most: int, what: str) -> str:
    """``12 more classes are left out``; "" if none is."""
    return f"{total - most} more {what} are left out" if total > most else ""


def save_figure(path: Path, figure: "Figure", dpi: int = 130) -> None:
    """Write a figure, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
