"""Units of length, and the scales of a pyramid.

Three lengths never mix: level-0 pixels of a slide (suffix ``_px0``), pixels of a tile as the
network sees it (``_px``) and micrometres (``_um``). An mpp (µm per pixel) converts between them.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NewType

from dasmil.errors import InputError

Mpp = NewType("Mpp", float)  # µm per pixel
TilePx = NewType("TilePx", int)  # pixels of a tile

SCALE_NAME = re.compile(r"x(?=[0.]*[1-9])([0-9]{1,6}(?:\.[0-9]{1,6})?)")
MAX_PX = 2**31  # of a slide's side, and of any other number of pixels
MPPS = (1e-6, 1e6)  # possible µm per pixel of slides and scales


@dataclass(frozen=True)
class Scale:
    """One magnification of the pyramid, defined by its ``mpp``; its name is only a label.

    Raises
    ------
    InputError
        if the name is no magnification such as x20, or the mpp is impossible.
    """

    name: str
    mpp: Mpp

    def __post_init__(self) -> None:
        if SCALE_NAME.fullmatch(self.name) is None:
            raise InputError(f"scale {self.name!r}: write a magnification such as x20, x10 or x2.5")
        check_mpp(self.mpp, f"scale {self.name}")

    @classmethod
    def parse(cls, text: str) -> "Scale":
        """``"x20"`` is 0.5 µm/px, ``"x10"`` 1, ``"x2.5"`` 4: mpp = 10 / magnification."""
        match = SCALE_NAME.fullmatch(text)
        return cls(text, Mpp(10 / float(match[1]) if match else 1.0))


def check_mpp(mpp: float, what: str) -> None:
    """Raise :class:`InputError` unless a slide or a scale can have this mpp."""
    if not MPPS[0] <= mpp <= MPPS[1]:
        raise InputError(f"{what}: {mpp:g} µm per pixel are impossible; correct the mpp")


def parse_scales(names: Iterable[str]) -> tuple[Scale, ...]:
    """Scales from coarse to fine; each must be a whole multiple of the next finer one."""
    scales = tuple(sorted(map(Scale.parse, names), key=lambda scale: -scale.mpp))
    require_nesting(scales)
    return scales


def require_nesting(scales: Sequence[Scale], tolerance: float = 1e-6) -> None:
    """Raise :class:`InputError` unless scales go from coarse to fine with whole ratios."""
    if not scales:
        raise InputError("scales: give at least one, for example [x10,x20]")
    for coarse, fine in pairwise(scales):
        ratio = coarse.mpp / fine.mpp
        if round(ratio) < 2 or abs(ratio - round(ratio)) > tolerance:
            raise InputError(
                f"scales {coarse.name} and {fine.name}: the ratio {ratio:g} is not a whole number "
                "of at least 2, so their tiles cannot nest"
            )
