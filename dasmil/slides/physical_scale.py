"""The µm per pixel of a slide: from the cohort table, else from the file."""

from collections.abc import Mapping
from dataclasses import dataclass

import openslide

from dasmil.errors import InputError
from dasmil.slides.cohort import SlideRow
from dasmil.units import Mpp

PLAUSIBLE_MPP = (0.05, 20.0)  # µm/px; no commercial scanner is outside this range
MAX_ANISOTROPY = 1.05  # mpp-x against mpp-y
CONTRADICTION = 1.2  # the table's mpp against the file's: scanners of one magnification differ less


@dataclass(frozen=True)
class PhysicalScale:
    """The mpp of a slide.

    Parameters
    ----------
    source: where it comes from: ``table``, ``slide`` or ``objective power``.
    warning: sentence if the table contradicts the file; else "".
    """

    mpp: Mpp
    source: str
    warning: str = ""


def physical_scale(row: SlideRow, properties: Mapping[str, str]) -> PhysicalScale:
    """The table's mpp, else the file's, else by its objective power (mpp = 10 / power).

    Raises
    ------
    InputError
        if there is none of them, or it is implausible.
    """
    mpp_x = _recorded(properties, openslide.PROPERTY_NAME_MPP_X)
    mpp_y = _recorded(properties, openslide.PROPERTY_NAME_MPP_Y) or mpp_x
    power = _recorded(properties, openslide.PROPERTY_NAME_OBJECTIVE_POWER)
    low, high = PLAUSIBLE_MPP
    if row.mpp is not None or row.magnification is not None:
        mpp = row.mpp or 10 / (row.magnification or 1)
        own = (mpp_x + mpp_y) / 2 or (10 / power if power else 0.0)
        warning = ""
        if low <= own <= high and not 1 / CONTRADICTION <= mpp / own <= CONTRADICTION:
            warning = f"the table's {mpp:g} µm/px is used, the file has {own:g}"
        scale = PhysicalScale(Mpp(mpp), "table", warning)
    elif mpp_x:
        if not 1 / MAX_ANISOTROPY <= mpp_x / mpp_y <= MAX_ANISOTROPY:
            raise _unknown(row, f"its pixels are not square ({mpp_x:g} by {mpp_y:g} µm)")
        scale = PhysicalScale(Mpp((mpp_x + mpp_y) / 2), "slide")
    elif power:
        scale = PhysicalScale(Mpp(10 / power), "objective power")
    else:
        raise _unknown(row, "the file records neither mpp nor objective power")
    if not low <= scale.mpp <= high:
        found = f"{scale.mpp:g} µm/px (from the {scale.source})"
        raise _unknown(row, f"{found} is outside the plausible {low:g}-{high:g}")
    return scale


def _unknown(row: SlideRow, fault: str) -> InputError:
    return InputError(
        f"slide {row.slide_id} ({row.path}): {fault}; fill the column mpp (or magnification) of "
        "its row in the cohort table"
    )


def _recorded(properties: Mapping[str, str], name: str) -> float:
    """A number from the file; 0 if it is missing, for which some files write 0 too."""
    return float(properties.get(name, 0))
