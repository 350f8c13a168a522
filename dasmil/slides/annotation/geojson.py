"""Annotations as QuPath writes them: GeoJSON, coordinates in level-0 pixels of what it shows.

QuPath shows a slide from its bounds on (MIRAX, Leica), OpenSlide the glass around them, too: the
bounds' origin is added to all coordinates.

Read as QuPath reads its own files (qupath/lib/io/QuPathTypeAdapters.java, of versions 0.2 to 0.6):
a FeatureCollection, a Feature, a list of them or a bare geometry, with objects nested in
``properties.childObjects``.

What a person has marked are annotations. Detections, cells and tiles are QuPath's own findings, and
TMA cores no findings at all: these are left out.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dasmil.errors import InputError
from dasmil.slides.annotation.areas import FloatArray, Polygons, Rings, refuse_other_slide
from dasmil.slides.annotation.classes import Classes, Meaning
from dasmil.slides.annotation.points import Points, points_of

UNCLASSIFIED = "None"  # what QuPath shows for an object without a class
CLASSES = Classes(
    lesions=frozenset(
        [
            *("tumor", "tumour", "cancer", "carcinoma", "malignant", "positive"),
            *("lesion", "metastasis", "metastases"),
        ]
    ),
    excluded=frozenset(["exclusion", "normal", "ignore*"]),
    others=frozenset(["stroma", "immune cells", "necrosis", "other", "negative"]),
)
NOT_MARKED = {  # object types, and what version 0.2 wrote into the id instead
    "detection": "detection",
    "PathDetectionObject": "detection",
    "cell": "cell",
    "PathCellObject": "cell",
    "tile": "tile",
    "PathTileObject": "tile",
    "tmaCore": "TMA core",
    "tma_core": "TMA core",
    "TMACoreObject": "TMA core",
}
ROOTS = frozenset(["root", "PathRootObject"])  # of a hierarchy; it holds objects and is none

GEOMETRIES = frozenset(
    many + kind for many in ("", "Multi") for kind in ("Point", "LineString", "Polygon")
)


@dataclass(frozen=True)
class Mark:
    """One annotation.

    Parameters
    ----------
    what: its name or number, for errors.
    names: of its class, from the base to the whole: Tumor and Tumor: Positive.
    """

    what: str
    names: tuple[str, ...]
    geometry: dict[str, Any]

    def meaning(self, path: Path, classes: Classes) -> Meaning:
        if self.names == (UNCLASSIFIED,) and not classes.all_else:
            raise InputError(
                f"{path}: {self.what} has no class; give it one in QuPath, or let what has none "
                f"count as a lesion with --truth_classes '[{UNCLASSIFIED}]'"
            )
        return classes.meaning(path, self.what, self.names[-1], self.names[0])


def read_geojson(
    path: Path,
    size_px0: tuple[int, int],
    classes: Classes = CLASSES,
    bounds_px0: tuple[int, int] = (0, 0),
    size_is_extent: bool = False,
) -> Polygons | Points:
    """Polygons or points of an export of QuPath.

    Classes are told by their name: those of ``CLASSES.lesions`` are positive, of a derived class
    (Tumor: Positive) the base says so. An annotation without a class is refused: QuPath outlines
    tissue so. What has less than three corners has no area, and is left out.

    Parameters
    ----------
    bounds_px0, size_is_extent: of the slide, as a bag's header has them.

    Raises
    ------
    InputError
        when the file is no GeoJSON, a class is not known, a lesion is a line, or there are points
        beside areas.
    """
    polygons: dict[Meaning, list[Rings]] = {"lesion": [], "excluded": []}
    points: list[FloatArray] = []
    for mark in _marks(path):
        meaning = mark.meaning(path, classes)
        if meaning == "other":
            continue
        for kind, coordinates in _parts(path, mark, mark.geometry):
            if kind.endswith("LineString"):
                raise InputError(f"{path}: {mark.what} is a line, without an area; draw a polygon")
            if kind.endswith("Polygon"):
                for lists in coordinates if kind == "MultiPolygon" else [coordinates]:
                    rings = _arrays(path, mark, lists, bounds_px0)
                    if rings and len(rings[0]) >= 3:
                        refuse_other_slide(path, mark.what, rings[0], size_px0, size_is_extent)
                        polygons[meaning].append([xy for xy in rings if len(xy) >= 3])
            elif meaning == "lesion":
                positions = coordinates if kind == "MultiPoint" else [coordinates]
                points += _arrays(path, mark, [positions], bounds_px0)
    if points and polygons["lesion"]:
        raise InputError(f"{path}: it marks lesions by points and by areas; keep one of the two")
    if points:
        return points_of(path, np.concatenate(points), size_px0, size_is_extent)
    return Polygons(size_px0, polygons["lesion"], polygons["excluded"], size_is_extent)


def marks_points(path: Path, classes: Classes = CLASSES) -> bool:
    """Whether lesions are marked by points."""
    lesions = [mark for mark in _marks(path) if mark.meaning(path, classes) == "lesion"]
    return any(
        kind.endswith("Point") for mark in lesions for kind, _ in _parts(path, mark, mark.geometry)
    )


def geojson_classes(path: Path) -> set[str]:
    """Names of the classes that have an annotation, of derived classes the base, too."""
    return {name for mark in _marks(path) for name in mark.names}


def _marks(path: Path) -> list[Mark]:
    """All annotations; the file is refused when it holds QuPath's findings alone."""
    found: list[Mark] = []
    left_out: dict[str, int] = {}
    for number, feature in enumerate(_features(path, _parsed(path))):
        properties = feature.get("properties") or {}
        kind = properties.get("objectType") or properties.get("object_type")
        kind = str(kind or properties.get("type") or feature.get("id"))
        if kind in NOT_MARKED:
            left_out[NOT_MARKED[kind]] = left_out.get(NOT_MARKED[kind], 0) + 1
        elif kind not in ROOTS:
            what = repr(properties.get("name") or f"annotation {number + 1}")
            geometry = feature.get("geometry")
            if not isinstance(geometry, dict):
                raise InputError(f"{path}: {what} has no geometry; export it from QuPath again")
            found.append(Mark(what, _names(path, what, properties), geometry))
    if left_out and not found:
        kinds = ", ".join(f"{count} of the kind {kind}" for kind, count in left_out.items())
        raise InputError(
            f"{path}: no annotation, only objects that QuPath finds itself ({kinds}); export the "
            "annotations, or an empty FeatureCollection where there is none"
        )
    return found


def _parsed(path: Path) -> Any:
    try:
        data = path.read_bytes()
        return json.loads(gzip.decompress(data) if path.suffix.lower() == ".gz" else data)
    except (ValueError, OSError, EOFError, zlib.error, RecursionError) as error:
        raise InputError(f"{path}: not GeoJSON ({error})") from error


def _features(path: Path, found: Any) -> Iterator[dict[str, Any]]:
    """All objects, those nested in others too."""
    if isinstance(found, list):
        for each in found:
            yield from _features(path, each)
        return
    kind = found.get("type") if isinstance(found, dict) else None
    if kind == "FeatureCollection" and isinstance(found.get("features"), list):
        yield from _features(path, found["features"])
    elif kind == "Feature" and isinstance(found.get("properties") or {}, dict):
        yield found
        properties = found.get("properties") or {}
        children = properties.get("childObjects") or properties.get("children") or []
        yield from _features(path, children)
    elif kind in GEOMETRIES or kind == "GeometryCollection":
        yield {"geometry": found}
    else:
        raise InputError(
            f"{path}: not GeoJSON of QuPath: it holds {_shortened(found)} where a Feature or a "
            "FeatureCollection should be"
        )


def _parts(path: Path, mark: Mark, geometry: Any) -> Iterator[tuple[str, Any]]:
    """Kind and coordinates of a geometry that is none of others."""
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind == "GeometryCollection":
        for part in geometry.get("geometries") or []:
            yield from _parts(path, mark, part)
    elif kind in GEOMETRIES and isinstance(geometry.get("coordinates"), list):
        yield kind, geometry["coordinates"]
    else:
        raise InputError(
            f"{path}: {mark.what} is no geometry of GeoJSON, but {_shortened(geometry)}"
        )


def _arrays(path: Path, mark: Mark, lists: Any, bounds_px0: tuple[int, int]) -> list[FloatArray]:
    """Each list of positions as (V, 2) on the slide; a position may have a third number."""
    try:
        arrays = [
            np.array([(p[0], p[1]) for p in positions], dtype=np.float64).reshape(-1, 2)
            for positions in lists
        ]
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise InputError(
            f"{path}: the coordinates of {mark.what} are not all pairs of numbers ({error})"
        ) from error
    if not all(np.isfinite(xy).all() for xy in arrays):
        raise InputError(f"{path}: the coordinates of {mark.what} are not all finite")
    return [xy + bounds_px0 for xy in arrays]


def _names(path: Path, what: str, properties: dict[str, Any]) -> tuple[str, ...]:
    """Base and whole name of a class, as the versions of QuPath have written it.

    A text; {"name": "Tumor"}; {"names": ["Tumor", "Positive"]}; and before version 0.4
    {"name": "Positive", "parentClass": {"name": "Tumor"}}.
    """
    given = properties.get("classification")
    parts: list[Any] = []
    if isinstance(given, str):
        parts = given.split(":")
    elif isinstance(given, dict) and isinstance(given.get("names"), list):
        parts = given["names"]
    else:
        while isinstance(given, dict) and given:
            parts = [*str(given.get("name") or "").split(":"), *parts]
            given = given.get("parentClass")
        if given not in (None, {}):
            raise InputError(f"{path}: the classification of {what} is {_shortened(given)}")
    names = [str(part).strip() for part in parts if str(part).strip()]
    return (names[0], ": ".join(names)) if names else (UNCLASSIFIED,)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
