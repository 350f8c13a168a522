"""Polygons as ASAP and Camelyon16 write them: XML, corners in level-0 pixels."""

from array import array
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

import numpy as np

from dasmil.errors import InputError, explaining
from dasmil.geometry import Extent
from dasmil.slides.annotation.areas import (
    FAR_PX0,
    FloatArray,
    Polygons,
    Rings,
    polygons_on,
    refuse_other_slide,
)
from dasmil.slides.annotation.classes import Classes
from dasmil.slides.annotation.limits import ADVICE, read_file, refuse_many, shorten

GROUPS = Classes(
    lesions=frozenset(["_0", "_1", "tumor", "metastases", "none"]),
    excluded=frozenset(["_2", "exclusion", "normal"]),
    noun="group",
)
POLYGON_TYPES = frozenset(["Polygon", "Spline", "Rectangle"])
MAX_DEPTH = 100  # of nested elements; ASAP nests five
MAX_OTHERS = 1_000_000  # elements other than corners
MAX_NAMES = 10_000  # of elements and attributes, which the parser stores
MAX_TAG_BYTES = 1_000_000  # the parser re-reads an unfinished tag with every piece


@dataclass
class Mark:
    """One annotation of a file.

    Parameters
    ----------
    corners: order, x and y of each corner, one after the other.
    wrong: why the corners are not all numbers on a slide; "" if they are.
    """

    name: str
    kind: str | None
    group: str
    corners: "array[float]" = field(default_factory=lambda: array("d"))
    wrong: str = ""

    @property
    def xy_px0(self) -> FloatArray:
        """(V, 2) x, y of the corners, sorted by their order."""
        order, x, y = np.array(self.corners).reshape(-1, 3).T
        return np.stack([x, y], axis=1)[np.lexsort((y, x, order))]


class _Collector:
    """Collects annotations while the parser reads, so that no tree of elements is in memory."""

    def __init__(self, path: Path):
        self.path = path
        self.marks: list[Mark] = []
        self._tags: list[str] = []
        self._open: list[Mark] = []
        self._names: set[str] = set()
        self._num_others = 0

    def refuse_doctype(self, *_: object) -> None:
        """Refuse a document type: it may declare entities that grow without limit or name files."""
        raise InputError(
            f"{self.path}: declares a document type (DOCTYPE), which ASAP does not write; "
            "remove that declaration"
        )

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        tags = self._tags
        tags.append(tag)
        if tag == "Coordinate" and tags[-3:-1] == ["Annotation", "Coordinates"]:
            _add_corner(self._open[-1], attributes)
            if len(attributes) == 3:
                return
        elif len(tags) == 1 and tag != "ASAP_Annotations":
            raise InputError(
                f"{self.path}: its root is {shorten(tag)}, not ASAP_Annotations; export it again"
            )
        elif tag == "Annotation":
            name, group = attributes.get("Name", ""), attributes.get("PartOfGroup", "")
            mark = Mark(name, attributes.get("Type"), group)
            self.marks.append(mark)
            self._open.append(mark)
            refuse_many(self.path, len(self.marks), 0)
        self._names.update([tag, *attributes])
        self._num_others += 1
        for number, limit, what in (
            (self._num_others, MAX_OTHERS, "elements other than corners"),
            (len(tags), MAX_DEPTH, "nested elements"),
            (len(self._names), MAX_NAMES, "names of elements"),
        ):
            if number > limit:
                raise InputError(f"{self.path}: has more than {limit:,} {what}; {ADVICE}")

    def end(self, tag: str) -> None:
        self._tags.pop()
        if tag == "Annotation":
            self._open.pop()


def _add_corner(mark: Mark, attributes: dict[str, str]) -> None:
    try:
        order, x, y = map(float, (attributes["Order"], attributes["X"], attributes["Y"]))
        if not all(abs(value) <= FAR_PX0 for value in (order, x, y)):
            raise ValueError(f"{order}, {x}, {y}")
    except (KeyError, ValueError) as error:
        mark.wrong = mark.wrong or f"{type(error).__name__}: {shorten(error)}"
    else:
        mark.corners.extend((order, x, y))


def read_asap(path: Path, extent: Extent, groups: Classes = GROUPS) -> Polygons:
    """Read annotations of ASAP.

    Groups _0, _1, Tumor, Metastases and None are lesions; _2, Exclusion and Normal are cut out of
    them. Shapes with less than three corners have no area and are ignored.

    Raises
    ------
    InputError
        if the file is not ASAP's XML, or holds an unknown group, a shape other than a polygon, or a
        shape outside the slide.
    """
    polygons: dict[str, list[Rings]] = {"lesion": [], "excluded": []}
    for mark in _marks(path):
        what = shorten(mark.name)
        meaning = groups.meaning(path, what, mark.group)
        if meaning == "other":
            continue
        if mark.kind not in POLYGON_TYPES:
            raise InputError(
                f"{path}: {what} is a {shorten(mark.kind)}, not a polygon; "
                "give points as a CSV table with the columns x and y"
            )
        if mark.wrong:
            raise InputError(
                f"{path}: the corners of {what} are not all numbers on a slide ({mark.wrong})"
            )
        xy = mark.xy_px0
        if len(xy) >= 3:
            refuse_other_slide(path, what, xy, extent)
            polygons[meaning].append([xy])
    return polygons_on(extent, polygons["lesion"], polygons["excluded"])


def asap_groups(path: Path) -> set[str]:
    """Names of the groups that have an annotation."""
    return {mark.group for mark in _marks(path)}


def _marks(path: Path) -> list[Mark]:
    found = _Collector(path)
    parser = expat.ParserCreate(namespace_separator="}")
    parser.StartElementHandler = found.start
    parser.EndElementHandler = found.end
    parser.StartDoctypeDeclHandler = found.refuse_doctype
    data = memoryview(read_file(path))
    # pyexpat tries Python's encodings if Expat does not know one, and some of them fail
    kinds = (expat.ExpatError, ValueError, LookupError, TypeError)
    with explaining(f"{path}: not XML", "export it from ASAP", *kinds):
        for begin in range(0, len(data), MAX_TAG_BYTES):
            parser.Parse(data[begin : begin + MAX_TAG_BYTES], False)
            refuse_many(path, 0, sum(len(mark.corners) for mark in found.marks) // 3)
            if begin - parser.CurrentByteIndex > MAX_TAG_BYTES:
                raise InputError(f"{path}: a tag has no end; export it from ASAP")
        parser.Parse(b"", True)
    return found.marks
