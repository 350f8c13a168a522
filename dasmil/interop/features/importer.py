"""Folders of feature files → a folder of bags: what importing from any tool has in common."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from dasmil.bag_folder import EXTRACTORS, bag_status, status_row
from dasmil.bags import (
    ExtractorCard,
    bag_path,
    describe_other_bag,
    read_header,
    read_headers,
    write_bag,
)
from dasmil.errors import DiskFullError, InputError, say_error, some_of
from dasmil.files import files_below, write_text
from dasmil.interop.features.nesting import Dtype, Orphans, SlideFeatures, make_bag
from dasmil.progress import progress
from dasmil.slides.cohort import (
    SlideRow,
    describe_leaving,
    match_names,
    positive_number,
    read_cohort,
    read_patients,
    readable,
    refuse_faulty,
    refuse_twice,
    say_unknown_columns,
    write_cohort,
)
from dasmil.tables import read_csv, write_csv
from dasmil.units import Scale, parse_scales
from dasmil.work.worker import Worker

MAX_NAMED = 10
MAX_LINE = 2**20  # characters of a table's first line
CLAM_COLUMNS = ("case_id", "slide_id", "label", "patient_id", "mpp")
FIGURES = ("orphans", "childless", "rule", "moved", "max_moved_px0")


def parse_folders(folders: Mapping[str, Path]) -> tuple[tuple[Scale, ...], list[Path]]:
    """Scales from coarse to fine, and the folder of each."""
    if not folders:
        raise InputError("features: give the folder of each scale, as --features.x20 FOLDER")
    scales = parse_scales(folders)
    return scales, [Path(folders[scale.name]) for scale in scales]


def files_by_slide(folder: Path, suffix: str = ".h5", below: bool = False) -> dict[str, Path]:
    """The files of a folder by slide, ``below`` those of folders in it, too.

    Raises
    ------
    InputError
        when there is none, or two of a slide; of DSMIL's CSVs with the reason why they can be no
        bags.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found = files_below(folder) if below else folder.iterdir()
    paths = sorted(p for p in found if p.name.endswith(suffix) and p.name[0] != ".")
    tables = [path for path in files_below(folder) if path.suffix == ".csv"] if not paths else []
    if any(map(_is_dsmils, tables)):
        raise InputError(
            f"{folder}: it holds CSV files as DSMIL writes them; they do not say where a tile "
            "lies, so no graph can be made of them: extract the features with a tool that keeps "
            "coordinates (dasmil embed, TRIDENT, CLAM, STAMP)"
        )
    if not paths:
        raise InputError(f"{folder}: no {suffix} file in it")
    files: dict[str, Path] = {}
    for path in paths:
        if (other := files.setdefault(readable(path.name.removesuffix(suffix)), path)) != path:
            raise InputError(f"{other} and {path} are of the same slide; keep one of them")
    return files


def _is_dsmils(path: Path) -> bool:
    """A table of features, whose columns have numbers for names."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return all(name.strip().isdecimal() for name in file.readline(MAX_LINE).split(","))


def import_features(
    dest: Path,
    scales: Sequence[Scale],
    files: Sequence[Mapping[str, Path]],
    read: Callable[[str], tuple[SlideFeatures, dict[str, ExtractorCard]]],
    cohort: Path | None,
    tool: str,
    orphans: Orphans,
    dtype: Dtype,
    mpps: Mapping[str, float] | None = None,
    beside: Callable[[str], list[Path]] = lambda slide_id: [],
) -> int:
    """A bag for each slide; what is wrong with one costs one row of import.csv and status.csv.

    Parameters
    ----------
    files: per scale the files by slide.
    read: a slide, and the cards of its extractors.
    cohort: table with the labels, ours or CLAM's; without it slides have none.
    mpps: of slides, where the places of tiles follow from them.
    beside: other files that a slide is made of.
    """
    slide_ids = sorted(set().union(*files))
    any_file = {slide_id: path for found in files for slide_id, path in found.items()}
    rows, left_out = _cohort_rows(cohort, slide_ids, any_file)
    options = {"imported": tool, "orphans": orphans, "dtype": dtype}
    cards = _first_cards(read, [row for row in rows if not row.fault], scales, files)
    wants = {"bags": json.dumps([options, [card.fingerprint for card in cards.values()]])}
    with Worker(dest, wants=wants) as worker:
        if other := worker.refused_by("bags"):
            raise InputError(f"{dest}: {other} writes other bags into it now; choose another DEST")
        _refuse_other_bags(dest, rows, scales, cards, options)
        if line := describe_leaving(dest / "cohort.csv", rows):
            print(f"import: {line}")
        write_cohort(dest / "cohort.csv", rows)
        rows = refuse_faulty(rows, worker)
        _write_extractors(dest / EXTRACTORS, cards, tool)
        worker.on_beat = (status := bag_status(dest)).write
        for row in progress(rows, f"import {tool}", unit="slide"):
            sources = [found[row.slide_id] for found in files if row.slide_id in found]
            sources += beside(row.slide_id)
            mpp = (mpps or {}).get(row.slide_id)
            fault = None if mpps is None else row.fault_in("mpp")
            tiling = json.dumps({**options, "mpp": mpp, "files": _digest(sources)})
            if not worker.claim(row.slide_id):
                continue  # another command has it
            failed = worker.last(row.slide_id)["state"] == "failed"  # killed before it told more
            if not fault and not failed and _is_done(bag_path(dest, row.slide_id), cards, tiling):
                worker.release(row.slide_id)
                continue
            try:
                if fault:
                    raise InputError(fault)
                if missing := [s.name for s, f in zip(scales, files) if row.slide_id not in f]:
                    raise InputError(f"{row.slide_id}: no feature file at {', '.join(missing)}")
                slide, found = read(row.slide_id)
                _refuse_other_cards(files[-1][row.slide_id], cards, found)
                bag, figures = make_bag(slide, cards, tiling, orphans, dtype)
                write_bag(bag_path(dest, row.slide_id), bag)
                worker.settle(row.slide_id, {**status_row(bag.num_tiles()), **figures})
            except DiskFullError:
                raise
            except Exception as error:  # one row of the tables; the cohort goes on
                bag_path(dest, row.slide_id).unlink(missing_ok=True)  # of an import before
                worker.settle(row.slide_id, {"state": "failed", "message": say_error(error)})
    return _report(dest, status.rows, scales, left_out, tool)


def _cohort_rows(
    cohort: Path | None, slide_ids: Sequence[str], files: Mapping[str, Path]
) -> tuple[list[SlideRow], list[str]]:
    """The slides of the table, or all that have features; and feature files it does not name."""
    if cohort is None:
        return [SlideRow(slide_id, files[slide_id]) for slide_id in slide_ids], []
    rows = match_names(_read_table(cohort, files), slide_ids)
    refuse_twice(cohort, rows)
    named = {row.slide_id for row in rows}
    return rows, [slide_id for slide_id in slide_ids if slide_id not in named]


def _read_table(path: Path, files: Mapping[str, Path]) -> list[SlideRow]:
    """Our cohort table, or one of CLAM's: case_id, slide_id, label."""
    columns, records = read_csv(path)
    if "path" in columns:
        return read_cohort(path)
    if not {"slide_id", "label"} <= set(columns):
        raise InputError(
            f"{path}: neither a cohort table (slide_id, path, ...) nor one of CLAM's (case_id, "
            "slide_id, label)"
        )
    say_unknown_columns(path, columns, CLAM_COLUMNS)
    if empty := [record.line for record in records if not record["slide_id"]]:
        raise InputError(f"{path} line {empty[0]}: slide_id is empty")
    patients = read_patients(path, records, "case_id", "patient_id")
    rows = []
    for record, patient in zip(records, patients, strict=True):
        mpp, bad_cells = positive_number(record, "mpp", f"{path} line {record.line}")
        rows.append(
            SlideRow(
                slide_id=record["slide_id"],
                path=files.get(record["slide_id"], Path(record["slide_id"])),
                label=record["label"] or None,
                patient_id=patient,
                mpp=mpp,
                bad_cells=bad_cells,
            )
        )
    return rows


def table_mpps(cohort: Path | None, files: Sequence[Mapping[str, Path]]) -> dict[str, float]:
    """The mpp of the slides that the table knows it of, by the names of their files."""
    if cohort is None:
        return {}
    rows = match_names(_read_table(cohort, {}), set().union(*files))
    return {row.slide_id: row.mpp for row in rows if row.mpp is not None}


def _first_cards(
    read: Callable[[str], tuple[SlideFeatures, dict[str, ExtractorCard]]],
    rows: Sequence[SlideRow],
    scales: Sequence[Scale],
    files: Sequence[Mapping[str, Path]],
) -> dict[str, ExtractorCard]:
    """Those that two slides share, of the first that can be read and hold a tile, else the first's.

    All others must have the same; one odd file must not decide what they are.
    """
    reason = "no slide of the table has features at every scale"
    known: list[dict[str, ExtractorCard]] = []
    for row in rows:
        if all(row.slide_id in found for found in files):
            try:
                slide, cards = read(row.slide_id)
            except Exception as error:
                reason = say_error(error)
                continue
            if not len(slide.files[-1].features) or not all(c.feature_dim for c in cards.values()):
                reason = "no slide holds a tile"
                continue
            if cards in known:
                return cards
            known.append(cards)
    if known:
        return known[0]
    raise InputError(f"import: nothing can be imported: {reason}")


def _refuse_other_bags(
    dest: Path,
    rows: Sequence[SlideRow],
    scales: Sequence[Scale],
    cards: Mapping[str, ExtractorCard],
    options: Mapping[str, str],
) -> None:
    """A folder holds bags of one tool, with one set of extractors and options.

    The slides that are imported now are re-created if need be; all others must fit beside them.
    """
    ours = {row.slide_id for row in rows}
    for slide_id, found in read_headers(dest).items():
        if slide_id in ours or isinstance(found, InputError):
            continue
        given = json.loads(found.tiling)
        if "imported" in given:
            known = {scale.name: scale for scale in found.scales}
            wanted = replace(
                found,
                scales=tuple(known.get(scale.name, scale) for scale in scales),
                extractors=dict(cards),
                tiling=json.dumps(dict(options)),
            )
            shared = json.dumps({name: given.get(name) for name in options})
            words = describe_other_bag(wanted, replace(found, tiling=shared))
        else:
            words = "embed made it"
        if words:
            raise InputError(
                f"{bag_path(dest, slide_id)}: made otherwise than asked for now ({words}); choose "
                "another DEST, or delete that folder to start over"
            )


def _refuse_other_cards(
    path: Path, wanted: Mapping[str, ExtractorCard], found: Mapping[str, ExtractorCard]
) -> None:
    for scale, card in found.items():
        if card.feature_dim and card != wanted[scale]:
            raise InputError(
                f"{path}: {scale} features of {card.name}, {card.feature_dim} wide "
                f"({card.fingerprint}); the first slide has those of {wanted[scale].name}, "
                f"{wanted[scale].feature_dim} wide ({wanted[scale].fingerprint})"
            )


def _digest(files: Sequence[Path]) -> str:
    """Of the place, size and time of files; that one is gone is said when it is read."""
    stats = [(str(file.resolve()), file.stat()) for file in files if file.exists()]
    text = json.dumps([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_done(path: Path, cards: Mapping[str, ExtractorCard], tiling: str) -> bool:
    """True when the bag is there, of these very files and options, which ``tiling`` says."""
    if not path.exists():
        return False
    try:
        header = read_header(path)
    except InputError as error:
        print(f"import: {error}: it is made anew")
        return False
    return header.tiling == tiling and dict(header.extractors) == dict(cards)


def _write_extractors(path: Path, cards: Mapping[str, ExtractorCard], tool: str) -> None:
    """Which slides the extractors have seen is not known; `fit` says so."""
    unknown = {"source": tool, "trained_on": None}
    records = {scale: {**asdict(card), **unknown} for scale, card in cards.items()}
    write_text(path, json.dumps(records, indent=2))


def _report(
    dest: Path,
    rows: Sequence[Mapping[str, Any]],
    scales: Sequence[Scale],
    left_out: Sequence[str],
    tool: str,
) -> int:
    tiles = [f"tiles/{scale.name}" for scale in scales]
    columns = ("slide_id", "state", *tiles, *FIGURES, "message")
    path = dest / "import.csv"
    write_csv(path, columns, ({c: row.get(c) for c in columns} for row in rows))
    failed = [row for row in rows if row["state"] not in ("done", "empty")]
    for row in failed[:MAX_NAMED]:
        print(f"{row['state']}: {row.get('message')}")
    if len(failed) > MAX_NAMED:
        print(f"failed: and {len(failed) - MAX_NAMED} more")
    if left_out:
        print(
            f"left out: {len(left_out)} slide(s) with features are not in the table: "
            f"{some_of(left_out)}"
        )
    done = [row for row in rows if row not in failed]
    orphans, childless = (sum(row.get(c) or 0 for row in done) for c in ("orphans", "childless"))
    if orphans or childless:
        print(
            f"orphans: {orphans} tiles lie in no coarser tile, {childless} hold no finer one "
            f"(rule: {done[0].get('rule')})"
        )
    moved = [row for row in done if row.get("moved")]
    if moved:
        most = max(row["max_moved_px0"] for row in moved)
        print(
            f"moved: on {len(moved)} slide(s) the grids of pieces of tissue were moved onto one, "
            f"by {most:g} level-0 px at most"
        )
    print(f"import {tool}: {len(done)} done, {len(failed)} failed; see {path}")
    return int(bool(failed))


def imported_card(
    tool: str, encoder: str, scale: Scale, tile_px: int, features: npt.NDArray[Any]
) -> ExtractorCard:
    """Stands for an extractor that only its name is known of; its normalisation is not.

    Its fingerprint says tool, encoder and tiles, so that features of different making never mix.
    """
    return ExtractorCard(
        name=encoder,
        fingerprint=f"{tool} {encoder} {scale.name} {tile_px}px",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        image_size=tile_px,
        feature_dim=features.shape[1] if features.ndim == 2 else 0,
    )
