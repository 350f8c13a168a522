"""What a picture shows where there is too much, and how it shows names.

A picture has a size of its own, whatever the number of classes, scales, runs or epochs: the first
or the most frequent ones are drawn, and the picture says how many are left out.
"""

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")

MAX_SCALES = 6  # in one picture; the finest ones
MAX_NAME = 28  # characters of a name


def show_line(name: str, most: int = MAX_NAME) -> str:
    """A name on one line, without control characters, and not too long."""
    line = "".join(char if char.isprintable() else "\ufffd" for char in " ".join(name.split()))
    return line if len(line) <= most else f"{line[: most - 1]}…"


def show_name(name: str, most: int = MAX_NAME) -> str:
    """:func:`show_line` for matplotlib, which shows it literally.

    Matplotlib takes what stands between dollar signs for a formula, and hides a line from the
    legend if its label begins with an underscore.
    """
    line = show_line(name, most).replace("$", r"\$")
    return f" {line}" if line.startswith("_") else line


def show_first(items: Sequence[Item], most: int, what: str) -> tuple[Sequence[Item], str]:
    """The first items, and what the picture says of the others; "" if there are none."""
    return items[:most], say_left_out(len(items), most, what)


def show_finest(scales: Sequence[str]) -> tuple[Sequence[str], str]:
    """The finest of scales that lie coarse to fine, and what the picture says of the others."""
    return scales[-MAX_SCALES:], say_left_out(len(scales), MAX_SCALES, "scales")


def say_left_out(total: int, most: int, what: str) -> str:
    """``12 more classes are left out``; "" if none is."""
    return f"{total - most} more {what} are left out" if total > most else ""
