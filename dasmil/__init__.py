"""DAS-MIL: multi-scale multiple-instance learning with self-distillation across magnifications.

slide file → ``slides`` (tissue, aligned tiles) → ``embedding`` (frozen extractors) → bag file
→ ``bags`` (graphs) → ``methods`` (DAS-MIL and peers), trained by ``modules`` with ``losses``
→ scores → ``reports`` (tables, overlays).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dasmil.bags import Bag, read_bag
    from dasmil.methods.load import load

__version__ = "0.2.0"
__all__ = ["Bag", "load", "losses", "methods", "nn", "read_bag"]

_HOMES = {"Bag": "dasmil.bags", "read_bag": "dasmil.bags", "load": "dasmil.methods.load"}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are asked for: verbs without torch start at once."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in ("losses", "methods", "nn"):
        return import_module(f"dasmil.{name}")
    raise AttributeError(f"module 'dasmil' has no attribute {name!r}")
