"""Annotations as QuPath writes them: GeoJSON, in level-0 pixels from the slide's bounds.

QuPath counts from the bounds of a slide (MIRAX, Leica), OpenSlide from the glass around them, so
the origin of the bounds is added to all coordinates.

Files are read as QuPath reads them (qupath/lib/io/QuPathTypeAdapters.java, versions 0.2 to 0.6): a
FeatureCollection, a Feature, a list of them or a bare geometry, with objects nested in
``properties.childObjects``.

Only annotations count, which a person has marked. Detections, cells, tiles and TMA cores, which
QuPath makes itself, are ignored.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from dasmil.slides.annotation.classes import Classes, Meaning
from dasmil.slides.annotation.limits import (
    JSON_BYTES,
    read_file,
    refuse_costly_text,
    refuse_many,
    shorten,
)
from dasmil.slides.annotation.points import Points, points_of

UNCLASSIFIED = "None"  # as QuPath displays an object without a class
CLASSES = Classes(
    lesions=frozenset({"tumor", "tumour", "cancer", "carcinoma", "malignant", "positive"})
    | {"lesion", "metastasis", "metastases"},
    excluded=frozenset(["exclusion", "normal", "ignore*"]),
    others=frozenset(["stroma", "immune cells", "necrosis", "other", "negative"]),
)
NOT_MARKED = {  # object types; version 0.2 wrote the second kind into the id
    **dict.fromkeys(("detection", "PathDetectionObject"), "detection"),
    **dict.fromkeys(("cell", "PathCellObject"), "cell"),
    **dict.fromkeys(("tile", "PathTileObject"), "tile"),
    **dict.fromkeys(("tmaCore", "tma_core", "TMACoreObject"), "TMA core"),
}
ROOTS = frozenset(["root", "PathRootObject"])  # of a hierarchy; holds objects, is none itself

MAX_NAMES = 50  # that form a derived class

GEOMETRIES = frozenset(
    many + kind for many in ("", "Multi") for kind in ("Point", "LineString", "Polygon")
)


@dataclass(frozen=True)
class Mark:
    """One annotation.

    Parameters
    ----------
    what: its name or number, for errors.
    names: base and full name of its class, such as Tumor and Tumor: Positive.
    """

    what: str
    names: tuple[str, ...]
    geometry: dict[str, Any]

    def meaning(self, path: Path, classes: Classes) -> Meaning:
        if self.names == (UNCLASSIFIED,) and not classes.all_else:
            raise InputError(
                f"{path}: {self.what} has no class; give it one in QuPath, or count annotations "
                f"without a class as lesions with --truth_classes '[{UNCLASSIFIED}]'"
            )
        return classes.meaning(path, self.what, self.names[-1], self.names[0])


def read_geojson(path: Path, extent: Extent, classes: Classes = CLASSES) -> Polygons | Points:
    """Read polygons or points that QuPath exported.

    Classes of ``CLASSES.lesions`` are positive, and so are their derived classes (Tumor: Positive).
    An annotation without a class is refused, because QuPath outlines tissue without one. Shapes
    with less than three corners have no area and are ignored.

    Raises
    ------
    InputError
        if the file is no GeoJSON, a class is not known, a lesion is a line, or the file marks both
        points and areas.
    """
    polygons: dict[Meaning, list[Rings]] = {"lesion": [], "excluded": []}
    points: list[FloatArray] = []
    num_rings = num_corners = 0
    for mark in _marks(path):
        meaning = mark.meaning(path, classes)
        if meaning == "other":
            continue
        for kind, coordinates in _parts(path, mark):
            if kind.endswith("LineString"):
                raise InputError(f"{path}: {mark.what} is a line, without an area; draw a polygon")
            if kind.endswith("Polygon"):
                for lists in coordinates if kind == "MultiPolygon" else [coordinates]:
                    rings = _arrays(path, mark, lists, extent.bounds_px0)
                    num_rings += len(rings)
                    num_corners += sum(map(len, rings))
                    refuse_many(path, num_rings, num_corners)
                    if rings and len(rings[0]) >= 3:
                        refuse_other_slide(path, mark.what, rings[0], extent)
                        polygons[meaning].append([xy for xy in rings if len(xy) >= 3])
            elif meaning == "lesion":
                positions = coordinates if kind == "MultiPoint" else [coordinates]
                points += _arrays(path, mark, [positions], extent.bounds_px0)
                refuse_many(path, len(points), 0)
    if points and polygons["lesion"]:
        raise InputError(f"{path}: marks lesions by points and by areas; keep one of the two")
    if points:
        return points_of(path, np.concatenate(points), extent)
    return polygons_on(extent, polygons["lesion"], polygons["excluded"])


def marks_points(path: Path, classes: Classes = CLASSES) -> bool:
    """Whether lesions are points."""
    lesions = [mark for mark in _marks(path) if mark.meaning(path, classes) == "lesion"]
    return any(kind.endswith("Point") for mark in lesions for kind, _ in _parts(path, mark))


def geojson_classes(path: Path) -> set[str]:
    """Names of the annotations' classes, with the bases of derived classes."""
    return {name for mark in _marks(path) for name in mark.names}


def _marks(path: Path) -> list[Mark]:
    """All annotations; raises :class:`InputError` if all objects are of other kinds."""
    found: list[Mark] = []
    left_out: dict[str, int] = {}
    for number, feature in enumerate(_features(path, _parsed(path))):
        properties = feature.get("properties") or {}
        kind = properties.get("objectType") or properties.get("object_type")
        kind = kind or properties.get("type") or feature.get("id")
        kind = kind if isinstance(kind, str) else ""
        if kind in NOT_MARKED:
            left_out[NOT_MARKED[kind]] = left_out.get(NOT_MARKED[kind], 0) + 1
        elif kind not in ROOTS:
            what = shorten(properties.get("name") or f"annotation {number + 1}")
            geometry = feature.get("geometry")
            if not isinstance(geometry, dict):
                raise InputError(f"{path}: {what} has no geometry; export it from QuPath again")
            found.append(Mark(what, _names(path, what, properties), geometry))
    if left_out and not found:
        kinds = ", ".join(f"{count} of the kind {kind}" for kind, count in left_out.items())
        raise InputError(
            f"{path}: no annotation, only objects that QuPath made itself ({kinds}); export the "
            "annotations, or an empty FeatureCollection if there are none"
        )
    return found


def _parsed(path: Path) -> Any:
    data = read_file(path)
    with explaining(f"{path}: not GeoJSON", "export it from QuPath", ValueError, RecursionError):
        text = data.decode(json.detect_encoding(data), "surrogatepass")
        del data  # up to 200 MB
        refuse_costly_text(path, text, JSON_BYTES)
        return json.loads(text)


def _features(path: Path, found: Any) -> Iterator[dict[str, Any]]:
    """All objects with the nested ones; each before its children."""
    waiting = [found]  # no recursion: Python's limit depends on the caller
    while waiting:
        found = waiting.pop()
        if isinstance(found, list):
            waiting += reversed(found)
            continue
        kind = _kind(found)
        properties = (found.get("properties") or {}) if kind else {}
        if kind == "FeatureCollection" and isinstance(found.get("features"), list):
            waiting.append(found["features"])
        elif kind == "Feature" and isinstance(properties, dict):
            yield found
            waiting.append(properties.get("childObjects") or properties.get("children") or [])
        elif kind in GEOMETRIES or kind == "GeometryCollection":
            yield {"geometry": found}
        else:
            raise InputError(
                f"{path}: not GeoJSON of QuPath: holds {shorten(found)} instead of a Feature or a "
                "FeatureCollection; export it from QuPath"
            )


def _kind(found: Any) -> str:
    """The type of a GeoJSON object; "" if it is none."""
    kind = found.get("type") if isinstance(found, dict) else None
    return kind if isinstance(kind, str) else ""


def _parts(path: Path, mark: Mark) -> Iterator[tuple[str, list[Any]]]:
    """Kind and coordinates of each simple geometry of an annotation."""
    waiting: list[Any] = [mark.geometry]
    while waiting:
        geometry = waiting.pop()
        kind = _kind(geometry)
        if kind == "GeometryCollection" and isinstance(geometry.get("geometries") or [], list):
            waiting += reversed(geometry.get("geometries") or [])
        elif kind in GEOMETRIES and isinstance(geometry.get("coordinates"), list):
            yield kind, geometry["coordinates"]
        else:
            raise InputError(
                f"{path}: {mark.what} is no geometry of GeoJSON, but {shorten(geometry)}; export "
                "it from QuPath again"
            )


def _arrays(path: Path, mark: Mark, lists: Any, bounds_px0: tuple[int, int]) -> list[FloatArray]:
    """Each list of positions as (V, 2) on the slide; a position may have a third number."""
    what = f"{path}: the coordinates of {mark.what} are not all"
    kinds = (TypeError, ValueError, IndexError, KeyError, OverflowError)
    with explaining(f"{what} pairs of numbers", "export it from QuPath again", *kinds):
        arrays = [
            np.stack([_numbers([p[axis] for p in positions]) for axis in (0, 1)], axis=1)
            for positions in lists
        ]
    if not all((np.abs(xy) <= FAR_PX0).all() for xy in arrays):
        raise InputError(f"{what} numbers on a slide")
    return [xy + bounds_px0 for xy in arrays]


def _numbers(values: list[Any]) -> FloatArray:
    """(V,) floats; raises ``TypeError`` for texts that look like numbers, and for lists."""
    if wrong := {*map(type, values)} - {int, float}:
        raise TypeError(f"some are {', '.join(sorted(each.__name__ for each in wrong))}")
    return np.array(values, dtype=np.float64)


def _names(path: Path, what: str, properties: dict[str, Any]) -> tuple[str, ...]:
    """Base and full name of a class.

    QuPath writes a text; {"name": "Tumor"}; {"names": ["Tumor", "Positive"]}; and before version
    0.4 {"name": "Positive", "parentClass": {"name": "Tumor"}}.
    """
    given = properties.get("classification")
    parts: list[Any] = []
    if isinstance(given, str):
        parts = given.split(":", MAX_NAMES)
    elif isinstance(given, dict) and isinstance(given.get("names"), list):
        parts = given["names"][: MAX_NAMES + 1]
    else:
        while isinstance(given, dict) and given and len(parts) <= MAX_NAMES:
            name = given.get("name") or ""
            parts = [*(name.split(":", MAX_NAMES) if isinstance(name, str) else [name]), *parts]
            given = given.get("parentClass")
        if given not in (None, {}):
            raise InputError(f"{path}: the classification of {what} is {shorten(given)}")
    if len(parts) > MAX_NAMES or not all(isinstance(part, str | int | float) for part in parts):
        raise InputError(f"{path}: the class of {what} is no text, but {shorten(parts)}")
    names = [str(part).strip() for part in parts if str(part).strip()]
    return (names[0], ": ".join(names)) if names else (UNCLASSIFIED,)
