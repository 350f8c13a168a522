"""Convert CRCHistoPhenotypes into the cohort table and the annotations of the colon benchmark.

    python tests/benchmarks/colon/crchisto.py FOLDER OUTPUT

100 pictures of colon, 500 x 500 px at 0.55 µm/px, in which four types of nuclei are marked by their
centres (Sirinukunwattana et al., IEEE Transactions on Medical Imaging 35(5), 2016). As a task for
multiple-instance learning: does a picture hold epithelial nuclei? (Ilse, Tomczak and Welling, ICML
2018)
"""

import argparse
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterable
from math import isfinite
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from dasmil.errors import InputError
from dasmil.files import must_exist
from dasmil.names import path_inside
from dasmil.slides.cohort import SlideRow, write_cohort
from dasmil.tables import Row, read_csv, write_csv

FloatArray = npt.NDArray[np.float64]

MPP = 0.55
TYPES = ("epithelial", "fibroblast", "inflammatory", "others")
POSITIVE, NEGATIVE = "epithelial", "none"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write OUTPUT/cohort.csv and OUTPUT/truth/ for pictures of colon with "
        "annotated nuclei. A picture that holds an epithelial nucleus has the label epithelial, "
        "all others have the label none."
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="the unpacked download (CRCHistoPhenotypes_2016_04_28), or a folder with bags.csv, "
        "nuclei.csv and the pictures as PNG",
    )
    parser.add_argument("output", type=Path, help="folder for the table and the annotations")
    options = parser.parse_args()
    try:
        convert(options.folder, options.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(folder: Path, output: Path) -> None:
    """Write OUTPUT/cohort.csv, and the epithelial nuclei of each picture as OUTPUT/truth/<id>.csv.

    Pictures stay where they are.

    Raises
    ------
    InputError
        if a file is missing or damaged, or labels and nuclei contradict each other.
    """
    pictures = (_read_tables if (folder / "bags.csv").is_file() else _read_download)(folder)
    rows = []
    for slide_id, (path, nuclei) in sorted(pictures.items()):
        write_csv(
            path_inside(output / "truth", f"{slide_id}.csv"),
            ("x", "y", "type"),
            ({"x": x, "y": y, "type": POSITIVE} for x, y in nuclei.tolist()),
        )
        rows.append(SlideRow(slide_id, path, POSITIVE if len(nuclei) else NEGATIVE, mpp=MPP))
    write_cohort(output / "cohort.csv", rows)
    num_positive = sum(row.label == POSITIVE for row in rows)
    num_nuclei = sum(len(nuclei) for _, nuclei in pictures.values())
    print(
        f"{len(rows)} pictures, {num_positive} of them with epithelial nuclei ({num_nuclei}); see "
        f"{output / 'cohort.csv'}"
    )


def _read_tables(folder: Path) -> dict[str, tuple[Path, FloatArray]]:
    """slide_id → picture and (n, 2) x, y of its epithelial nuclei, from bags.csv and nuclei.csv."""
    bags = _rows(folder / "bags.csv", ("image", "label_epithelial_present"))
    nuclei: dict[str, list[tuple[float, float]]] = defaultdict(list)
    names = {row["image"] for row in bags}
    for row in _rows(folder / "nuclei.csv", ("image", "type", "x", "y")):
        where = f"{folder / 'nuclei.csv'} line {row.line}"
        if row["type"] not in TYPES:
            raise InputError(f"{where}: type {row['type']!r} is none of {', '.join(TYPES)}")
        if row["image"] not in names:
            raise InputError(f"{where}: image {row['image']!r} is not in bags.csv")
        try:
            place = float(row["x"]), float(row["y"])
        except ValueError:
            raise InputError(f"{where}: x and y must be numbers") from None
        if not all(map(isfinite, place)):
            raise InputError(f"{where}: x and y must be finite numbers")
        if row["type"] == POSITIVE:
            nuclei[row["image"]].append(place)
    pictures = {}
    for row in bags:
        name, present = row["image"], row["label_epithelial_present"]
        if present != str(int(name in nuclei)):
            raise InputError(
                f"{folder / 'bags.csv'}: label_epithelial_present of {name} is {present!r}, but "
                f"nuclei.csv lists {len(nuclei.get(name, ()))} epithelial nuclei of it"
            )
        pictures[name] = _present(path_inside(folder, f"{name}.png")), _points(nuclei.get(name, ()))
    return pictures


def _rows(path: Path, needed: Iterable[str]) -> list[Row]:
    columns, rows = read_csv(path)
    missing = [column for column in needed if column not in columns]
    if missing:
        raise InputError(f"{path}: column {' and '.join(missing)} is missing")
    return rows


def _read_download(folder: Path) -> dict[str, tuple[Path, FloatArray]]:
    """The same from the unpacked download; img7 becomes img007, so that names sort as numbers."""
    pictures = {}
    for path in folder.glob("Classification/img*/img*.bmp"):
        number = re.fullmatch(r"img(\d+)", path.stem)
        if number is None:
            continue
        nuclei = {name: _read_nuclei(path.with_name(f"{path.stem}_{name}.mat")) for name in TYPES}
        pictures[f"img{int(number[1]):03d}"] = path, nuclei[POSITIVE]
    if not pictures:
        must_exist(folder, "give the unpacked download")
        raise InputError(
            f"{folder}: neither bags.csv nor Classification/img*/img*.bmp in it; give the unpacked "
            "download CRCHistoPhenotypes_2016_04_28"
        )
    return pictures


def _read_nuclei(path: Path) -> FloatArray:
    """(n, 2) x, y from the variable ``detection`` of a MATLAB file."""
    _present(path)
    try:
        return _points(loadmat(path)["detection"])
    except (MatReadError, OSError, ValueError, LookupError, TypeError, zlib.error) as error:
        raise InputError(
            f"{path}: not the nuclei of a picture, a MATLAB file with the variable detection "
            f"({type(error).__name__}: {error})"
        ) from error
    except NotImplementedError as error:
        raise InputError(f"{path}: a file of MATLAB 7.3; save it again with -v7") from error


def _points(values: npt.ArrayLike) -> FloatArray:
    """(n, 2); MATLAB writes no points as an empty matrix of any shape."""
    points = np.asarray(values, dtype=np.float64)
    if not np.isfinite(points).all():
        raise ValueError("some nuclei have no coordinates")
    return points.reshape(0, 2) if points.size == 0 else points.reshape(len(points), 2)


def _present(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: no such file; is the folder complete?")
    return path


if __name__ == "__main__":
    sys.exit(main())
