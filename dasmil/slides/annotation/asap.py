"""Polygons as ASAP and Camelyon16 write them: XML, corners in level-0 pixels."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from dasmil.errors import InputError
from dasmil.slides.annotation.areas import FloatArray, Polygons, Rings, refuse_other_slide
from dasmil.slides.annotation.classes import Classes

GROUPS = Classes(
    lesions=frozenset(["_0", "_1", "tumor", "metastases", "none"]),
    excluded=frozenset(["_2", "exclusion", "normal"]),
    noun="group",
)
POLYGON_TYPES = frozenset(["Polygon", "Spline", "Rectangle"])


def read_asap(
    path: Path,
    size_px0: tuple[int, int],
    groups: Classes = GROUPS,
    size_is_extent: bool = False,
) -> Polygons:
    """Annotations of ASAP.

    Groups _0, _1, Tumor, Metastases and None are lesions; _2, Exclusion and Normal are cut out of
    them. What has less than three corners has no area, and is left out.
    """
    polygons: dict[str, list[Rings]] = {"lesion": [], "excluded": []}
    for annotation in _annotations(path):
        name = annotation.get("Name", "")
        meaning = groups.meaning(path, repr(name), _group(annotation))
        if meaning == "other":
            continue
        if annotation.get("Type") not in POLYGON_TYPES:
            raise InputError(
                f"{path}: {name!r} is a {annotation.get('Type')}, not a polygon; "
                "points are given as a CSV table with the columns x and y"
            )
        xy = _corners(path, name, annotation)
        if len(xy) >= 3:
            refuse_other_slide(path, repr(name), xy, size_px0, size_is_extent)
            polygons[meaning].append([xy])
    return Polygons(size_px0, polygons["lesion"], polygons["excluded"], size_is_extent)


def asap_groups(path: Path) -> set[str]:
    """Names of the groups that have an annotation."""
    return {_group(annotation) for annotation in _annotations(path)}


def _annotations(path: Path) -> list[ElementTree.Element]:
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise InputError(f"{path}: not XML ({error})") from error
    if root.tag != "ASAP_Annotations":
        raise InputError(
            f"{path}: its root is {root.tag!r}, not ASAP_Annotations; save it from ASAP"
        )
    return list(root.iter("Annotation"))


def _group(annotation: ElementTree.Element) -> str:
    return annotation.get("PartOfGroup", "")


def _corners(path: Path, name: str, annotation: ElementTree.Element) -> FloatArray:
    """(V, 2) in their order."""
    corners = annotation.findall("Coordinates/Coordinate")
    try:
        values = sorted((float(c.attrib["Order"]), _xy(c)) for c in corners)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{path}: the corners of {name!r} are not all numbers ({type(error).__name__}: {error})"
        ) from error
    return np.array([xy for _, xy in values], dtype=np.float64).reshape(-1, 2)


def _xy(corner: ElementTree.Element) -> tuple[float, float]:
    x, y = float(corner.attrib["X"]), float(corner.attrib["Y"])
    if not np.isfinite((x, y)).all():
        raise ValueError(f"{x},{y}")
    return x, y
