"""Folders of feature files, one per scale, and the table with the labels."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dasmil.errors import InputError, join_few
from dasmil.files import files_below
from dasmil.interop.features.importer import Record, SlideFiles, Source, stand_in_card
from dasmil.interop.features.nesting import Dtype, Orphans, SlideFeatures, make_bag
from dasmil.slides.cohort import (
    SlideRow,
    match_names,
    read_cohort,
    read_rows,
    readable,
    refuse_twice,
)
from dasmil.tables import read_csv
from dasmil.units import Scale, parse_scales

MAX_LINE = 2**20  # characters of a table's first line
CLAM_COLUMNS = ("case_id", "slide_id", "label", "patient_id", "mpp")

FilesBySlide = Mapping[str, Path]


def list_files(folder: Path, suffix: str = ".h5", below: bool = False) -> dict[str, Path]:
    """List the files of a folder by slide.

    Parameters
    ----------
    below: whether to list files in subfolders, too.

    Raises
    ------
    InputError
        if there is none, or two of one slide; DSMIL's CSV files are refused with the reason.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a folder of feature files")
    listed = files_below(folder) if below else folder.iterdir()
    paths = sorted(p for p in listed if p.name.endswith(suffix) and p.name[0] != ".")
    if not paths:
        if any(path.suffix == ".csv" and _is_by_dsmil(path) for path in files_below(folder)):
            raise InputError(
                f"{folder}: it holds CSV files of DSMIL, which lack the coordinates of tiles, so "
                "no graph can be built from them; extract the features with a tool that keeps "
                "coordinates (dasmil embed, TRIDENT, CLAM, STAMP)"
            )
        raise InputError(f"{folder}: no {suffix} file in it; give a folder of feature files")
    files: dict[str, Path] = {}
    for path in paths:
        if (other := files.setdefault(readable(path.name.removesuffix(suffix)), path)) != path:
            raise InputError(f"{other} and {path} are of the same slide; keep one of them")
    return files


def _is_by_dsmil(path: Path) -> bool:
    """Whether it is a table of features, whose columns are named by numbers."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return all(name.strip().isdecimal() for name in file.readline(MAX_LINE).split(","))


def feature_source(
    tool: str,
    folders: Mapping[str, Path],
    read: Callable[[SlideRow, tuple[Scale, ...], list[Path]], SlideFeatures],
    cohort: Path | None,
    orphans: Orphans,
    dtype: Dtype,
    *,
    list_files: Callable[[Path], FilesBySlide] = list_files,
    needs_mpp: bool = False,
    other_files: Callable[[str, Sequence[FilesBySlide]], list[Path]] = lambda slide_id, files: [],
) -> Source:
    """What the importer needs to know of a tool's feature files.

    Parameters
    ----------
    folders: per scale the folder of its files.
    read: a slide from its scales and the paths of its feature files, coarse to fine, and of its
        other files.
    cohort: table with the labels, a cohort table or CLAM's; without it slides have no labels.
    list_files: the files of a folder by slide.
    needs_mpp: whether bags depend on the mpp of the table.
    other_files: of a slide, of which its bag is made; given the feature files per scale.
    """
    if not folders:
        raise InputError("features: give the folder of each scale, as --features.x20 FOLDER")
    scales = parse_scales(folders)
    files = [list_files(Path(folders[scale.name])) for scale in scales]
    rows, left_out = _read_rows(cohort, files)

    def list_of(row: SlideRow) -> list[Path]:
        paths = [of_scale[row.slide_id] for of_scale in files if row.slide_id in of_scale]
        return paths + other_files(row.slide_id, files)

    def read_row(row: SlideRow) -> SlideFiles:
        if missing := [s.name for s, f in zip(scales, files) if row.slide_id not in f]:
            raise InputError(f"{row.slide_id}: no features at {', '.join(missing)}; extract them")
        slide = read(row, scales, list_of(row))
        cards = {}
        for scale, file in zip(scales, slide.files, strict=True):
            fingerprint = f"{tool} {file.encoder} {scale.name} {slide.tile_px}px"
            width = file.features.shape[1] if file.features.ndim == 2 else 0
            cards[scale.name] = stand_in_card(file.encoder, fingerprint, slide.tile_px, width)
        return SlideFiles(
            paths={scale.name: file.path for scale, file in zip(scales, slide.files)},
            cards=cards,
            is_empty=not len(slide.files[-1].features),
            make_bag=lambda shared, tiling: make_bag(slide, shared, tiling, orphans, dtype),
        )

    def describe(done: Sequence[Record]) -> Iterable[str]:
        if left_out:
            yield (
                f"left out: {len(left_out)} slide(s) with features are not in the table: "
                f"{join_few(left_out)}"
            )

    return Source(
        tool=tool,
        rows=rows,
        files=list_of,
        read=read_row,
        options={"orphans": orphans, "dtype": dtype},
        needs_mpp=needs_mpp,
        describe=describe,
    )


def _read_rows(
    cohort: Path | None, files: Sequence[FilesBySlide]
) -> tuple[list[SlideRow], list[str]]:
    """The slides of the table, or all that have features; and slides that the table lacks."""
    any_file = {slide_id: path for of_scale in files for slide_id, path in of_scale.items()}
    if cohort is None:
        return [SlideRow(slide_id, any_file[slide_id]) for slide_id in sorted(any_file)], []
    rows = match_names(_read_table(cohort, any_file), any_file)
    refuse_twice(cohort, rows)
    return rows, sorted(any_file.keys() - {row.slide_id for row in rows})


def _read_table(path: Path, files: FilesBySlide) -> list[SlideRow]:
    """Read our cohort table, or one of CLAM's: case_id, slide_id, label."""
    columns, records = read_csv(path)
    if "path" in columns:
        return read_cohort(path)
    if not {"slide_id", "label"} <= set(columns):
        raise InputError(
            f"{path}: neither a cohort table (slide_id, path, ...) nor one of CLAM's (case_id, "
            "slide_id, label); rename its columns"
        )
    rows = read_rows(path, columns, records, CLAM_COLUMNS, ["case_id", "patient_id"])
    return [replace(row, path=files.get(row.slide_id, row.path)) for row in rows]


def require_mpp(path: Path, scale: Scale, mpp: float, tolerance: float = 0.1) -> None:
    """Refuse tiles of another magnification than the scale's.

    Parameters
    ----------
    mpp: of the tiles, in µm per pixel.
    tolerance: relative; scanners of one magnification differ by less.
    """
    if abs(mpp / scale.mpp - 1) > tolerance:
        raise InputError(
            f"{path}: its tiles have {mpp:.3g} µm/px, {scale.name} is {scale.mpp:g}; give the "
            "folder of that magnification, or the scale that these tiles have"
        )


def require_same(values: Sequence[Any], what: str, path: Path, advice: str = "") -> Any:
    """The one value that all files of a slide share; refused if they differ."""
    if len(set(values)) > 1:
        raise InputError(
            f"{path}: {what} differs between scales ({', '.join(map(str, values))}); extract all "
            f"with the same {advice}".rstrip()
        )
    return values[0]
