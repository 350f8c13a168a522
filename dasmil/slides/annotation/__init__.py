"""Annotations of a slide, as areas or points, and the tiles that they make positive.

They are for evaluation only: nothing that trains imports this package.

==================================== =============================================================
``<slide_id>.xml``                    polygons in level-0 pixels, as ASAP and Camelyon16 write them
``<slide_id>.geojson, .json,``        polygons or points as QuPath exports them, in level-0 pixels
``.geojson.gz``                       from the origin of the slide's bounds
``<slide_id>.tif, .tiff, .png``       mask over the whole slide, at any resolution; also
                                      ``<slide_id>_mask.tif``, as Camelyon16 names them
``<slide_id>.csv``                    points: columns x and y in level-0 pixels
==================================== =============================================================

Reading a file takes at most 1 GB of memory and 10 s, whatever it holds; larger files are refused.
The limits are:

- 200 MB unpacked, 2 million corners or points, 100,000 outlines, and outlines that cross 20 million
  rows of pixels altogether (XML, GeoJSON, CSV);
- 1 million elements of XML that are no corners, and no document type (DOCTYPE);
- 700 MB of Python objects from GeoJSON or CSV: 100 MB of text if it holds only coordinates;
- 89 million pixels of a mask without tiles, in PNG or TIFF; of a pyramid, 268 million pixels at
  its coarsest level, in tiles of at most 16 million.
"""

from collections.abc import Collection, Iterable
from pathlib import Path

from dasmil.errors import InputError
from dasmil.files import must_be_file
from dasmil.geometry import Extent
from dasmil.slides.annotation import asap, geojson
from dasmil.slides.annotation.areas import MAX_COST, Areas, Polygons
from dasmil.slides.annotation.limits import ADVICE
from dasmil.slides.annotation.mask import read_mask
from dasmil.slides.annotation.points import Points, read_points
from dasmil.slides.cohort import readable

GEOJSON_SUFFIXES = (".geojson", ".json", ".geojson.gz")
MASK_SUFFIXES = (".tif", ".tiff", ".png")
ENDINGS = (
    *(".xml", ".csv", *GEOJSON_SUFFIXES, *MASK_SUFFIXES),
    *(f"_mask{suffix}" for suffix in MASK_SUFFIXES),
)


def find_truths(folder: Path, slide_ids: Iterable[str]) -> dict[str, Path]:
    """Find the annotation of each slide in a folder.

    Blanks around the name of a slide, and capitals in the suffix, are ignored.

    Returns
    -------
    Path per slide_id, without the slides that have no annotation.

    Raises
    ------
    InputError
        if a slide has two annotations.
    """
    wanted, found = set(slide_ids), dict[str, Path]()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.strip().startswith(".") or path.is_dir():
            continue
        for ending in ENDINGS:
            name = readable(path.name[: -len(ending)])
            if path.name[-len(ending) :].lower() != ending or name not in wanted:
                continue
            if name in found:
                raise InputError(f"{found[name]}: {path.name} is of the same slide; keep one")
            found[name] = path
    return found


def read_annotation(
    path: Path, extent: Extent, lesions: Collection[str] | None = None
) -> Points | Areas:
    """Read the annotation of a slide.

    Parameters
    ----------
    extent: of the slide.
    lesions: the classes, or groups of ASAP, that are positive; None for those that the format's
        module names. Masks and tables of points have no classes.

    Raises
    ------
    InputError
        if the file is not of the kind that its name says, does not fit the slide, or would take
        more than the limits above.
    """
    must_be_file(path, "give an annotation of a slide")
    marked = _read(path, extent, lesions)
    if isinstance(marked, Polygons) and (cost := marked.cost) > MAX_COST:
        raise InputError(
            f"{path}: its outlines cross {cost:,} rows of pixels, and "
            f"{MAX_COST:,} are the limit; {ADVICE}"
        )
    return marked


def _read(path: Path, extent: Extent, lesions: Collection[str] | None) -> Points | Areas:
    name = path.name.lower()
    if name.endswith(".csv"):
        return read_points(path, extent)
    if name.endswith(".xml"):
        return asap.read_asap(path, extent, asap.GROUPS.with_lesions(lesions))
    if name.endswith(GEOJSON_SUFFIXES):
        return geojson.read_geojson(path, extent, geojson.CLASSES.with_lesions(lesions))
    if not extent.size_is_known:
        raise InputError(
            f"{path}: a mask covers the whole slide, but the slide's bag was imported without its "
            "size; give polygons or points, or embed the slide with dasmil"
        )
    return read_mask(path, extent.size_px0)


def marks_points(path: Path, lesions: Collection[str] | None = None) -> bool:
    """Whether a file marks points, not areas."""
    must_be_file(path, "give an annotation of a slide")
    if path.name.lower().endswith(GEOJSON_SUFFIXES):
        return geojson.marks_points(path, geojson.CLASSES.with_lesions(lesions))
    return path.suffix.lower() == ".csv"


def class_names(path: Path) -> set[str]:
    """The classes or groups of a file's annotations; empty for masks and tables of points."""
    must_be_file(path, "give an annotation of a slide")
    name = path.name.lower()
    if name.endswith(".xml"):
        return asap.asap_groups(path)
    return geojson.geojson_classes(path) if name.endswith(GEOJSON_SUFFIXES) else set()
