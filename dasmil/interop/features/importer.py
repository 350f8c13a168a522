"""The one importer: slides that any tool prepared become a folder of bags.

A tool's module reads its files (:class:`Source`); this module does the rest. Several processes may
import into one folder; each skips what is done, and a slide that fails costs one row of status.csv
and import.csv.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dasmil.bag_folder import EXTRACTORS, bag_status, status_row
from dasmil.bags import (
    Bag,
    ExtractorCard,
    bag_path,
    describe_other_bag,
    read_header,
    read_headers,
    write_bag,
)
from dasmil.errors import DiskFullError, InputError, error_text
from dasmil.files import write_text
from dasmil.progress import progress
from dasmil.slides.cohort import SlideRow, refuse_faulty, replace_cohort
from dasmil.tables import write_csv
from dasmil.units import TilePx
from dasmil.work.status import Status
from dasmil.work.worker import Worker

MAX_NAMED = 10  # slides that the report names
COLUMNS = ("orphans", "childless", "rule", "moved", "max_moved_px0")

Cards = Mapping[str, ExtractorCard]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class SlideFiles:
    """One slide as a tool's module has read it from its files.

    Parameters
    ----------
    paths: per scale, from coarse to fine, the file with its features; for messages.
    cards: of the extractors, per scale.
    is_empty: whether the finest scale has no tiles.
    make_bag: from the cards of the folder and the header's JSON to the bag, and its columns of
        import.csv.
    """

    paths: Mapping[str, Path]
    cards: Cards
    is_empty: bool
    make_bag: Callable[[Cards, str], tuple[Bag, dict[str, Any]]]


@dataclass(frozen=True)
class Source:
    """What a tool's module knows of its files.

    Parameters
    ----------
    tool: its name.
    rows: the slides.
    files: all files that a slide's bag is made of; import.csv names the first one.
    read: a slide from its files.
    options: of the import; all bags of a folder share them.
    tile_px: side of a tile as the extractors saw it, unless the fingerprints of the cards tell it.
    columns: of import.csv that only this tool has.
    needs_mpp: whether bags depend on the mpp of the cohort table.
    describe: lines for the report, from the rows of slides that are done.
    """

    tool: str
    rows: Sequence[SlideRow]
    files: Callable[[SlideRow], Sequence[Path]]
    read: Callable[[SlideRow], SlideFiles]
    options: Mapping[str, str] = field(default_factory=dict)
    tile_px: int | None = None
    columns: Sequence[str] = ()
    needs_mpp: bool = False
    describe: Callable[[Sequence[Record]], Iterable[str]] = lambda done: ()


def import_slides(dest: Path, source: Source) -> int:
    """Write one bag per slide into a folder, and report.

    Returns
    -------
    The exit code: 1 if a slide failed, else 0.

    Raises
    ------
    InputError
        if no slide can be read, or the folder holds other bags.
    """
    options = {"imported": source.tool, **source.options}
    cards = _shared_cards(source)
    wants = {"bags": json.dumps([options, [card.fingerprint for card in cards.values()]])}
    with Worker(dest, wants=wants) as worker:
        if other := worker.refused_by("bags"):
            raise InputError(f"{dest}: {other} writes other bags into it now; choose another DEST")
        _refuse_other_bags(dest, source, cards, options)
        replace_cohort(dest / "cohort.csv", source.rows, "import")
        _write_extractors(dest / EXTRACTORS, cards, source.tool)
        rows = refuse_faulty(source.rows, worker)
        worker.write_status = (status := bag_status(dest)).write
        for row in progress(rows, f"import {source.tool}", unit="slide"):
            if worker.claim(row.slide_id):  # else another process works on it
                _import_slide(dest, row, source, options, cards, worker)
    return _report(dest, status, source, cards)


def _import_slide(
    dest: Path,
    row: SlideRow,
    source: Source,
    options: Mapping[str, str],
    cards: Cards,
    worker: Worker,
) -> None:
    """Write the bag of a claimed slide if it is not there yet, and settle the slide."""
    path, files = bag_path(dest, row.slide_id), source.files(row)
    mpp = row.mpp if source.needs_mpp else None
    fault = row.fault_in("mpp") if source.needs_mpp else None
    tiling = json.dumps({**options, "mpp": mpp, "files": _files_digest(files)})
    failed = worker.last_record(row.slide_id)["state"] == "failed"
    if not fault and not failed and _is_done(path, source.tile_px, cards, tiling):
        worker.release(row.slide_id)
        return
    record: dict[str, Any] = {"file": str(files[0]) if files else None}
    try:
        if fault:
            raise InputError(fault)
        slide = source.read(row)
        _refuse_other_cards(slide, cards)
        bag, columns = slide.make_bag(cards, tiling)
        write_bag(path, bag)
        record |= {**status_row(bag.num_tiles()), **columns}
    except DiskFullError:
        raise
    except Exception as error:  # costs one row of the tables; the import goes on
        path.unlink(missing_ok=True)  # the bag of an earlier import
        record |= {"state": "failed", "message": error_text(error)}
    worker.settle(row.slide_id, record)


def _shared_cards(source: Source) -> Cards:
    """The cards of the extractors, which all bags of a folder share.

    They are those of the first two slides that agree, so that one odd file does not decide; if no
    two agree, those of the first slide.

    Raises
    ------
    InputError
        if no slide can be read, or none has a tile.
    """
    reason = "there is no slide"
    known: list[Cards] = []
    for row in source.rows:
        if row.fault:
            continue
        try:
            slide = source.read(row)
        except Exception as error:
            reason = error_text(error)
            continue
        if slide.is_empty or not all(card.feature_dim for card in slide.cards.values()):
            reason = "no slide has a tile"
        elif slide.cards in known:
            return slide.cards
        else:
            known.append(slide.cards)
    if known:
        return known[0]
    raise InputError(f"import: nothing can be imported: {reason}")


def _refuse_other_bags(
    dest: Path, source: Source, cards: Cards, options: Mapping[str, str]
) -> None:
    """Refuse a folder that holds bags of another tool, other extractors or other options.

    Bags of slides that are imported now do not count: they are re-created if need be.
    """
    imported_now = {row.slide_id for row in source.rows}
    for slide_id, header in read_headers(dest).items():
        if slide_id in imported_now or isinstance(header, InputError):
            continue
        given, scales = json.loads(header.tiling), [scale.name for scale in header.scales]
        if "imported" not in given:
            difference = "`embed` wrote it"
        elif scales != list(cards):
            difference = f"scales {', '.join(scales)} instead of {', '.join(cards)}"
        else:
            shared = json.dumps({name: given.get(name) for name in options})
            wanted = replace(
                header,
                tile_px=TilePx(source.tile_px or header.tile_px),
                extractors=dict(cards),
                tiling=json.dumps(dict(options)),
            )
            difference = describe_other_bag(wanted, replace(header, tiling=shared))
        if difference:
            raise InputError(
                f"{bag_path(dest, slide_id)}: the folder holds other bags than this import makes "
                f"({difference}); choose another DEST, or delete that folder to start over"
            )


def _refuse_other_cards(slide: SlideFiles, cards: Cards) -> None:
    """Refuse a slide with other scales or features than those of the folder."""
    if list(slide.cards) != list(cards):
        raise InputError(
            f"{next(iter(slide.paths.values()))}: it has the scales {', '.join(slide.cards)}, the "
            f"other slides have {', '.join(cards)}; import it into another DEST"
        )
    for scale, card in slide.cards.items():
        other = cards[scale]
        if card.feature_dim and card != other:
            raise InputError(
                f"{slide.paths[scale]}: its {scale} features are {card.feature_dim} wide, by "
                f"{card.name} ({card.fingerprint}); those of the other slides are "
                f"{other.feature_dim} wide, by {other.name} ({other.fingerprint}); import it into "
                "another DEST"
            )


def _files_digest(files: Sequence[Path]) -> str:
    """Digest of the paths, sizes and times of files; a missing file is reported when it is read."""
    stats = [(str(file.resolve()), file.stat()) for file in files if file.exists()]
    text = json.dumps([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_done(path: Path, tile_px: int | None, cards: Cards, tiling: str) -> bool:
    """Whether the bag exists and was made from these very files, with these options."""
    if not path.exists():
        return False
    try:
        header = read_header(path)
    except InputError as error:
        print(f"import: {error}; re-creating it")
        return False
    is_same = header.tiling == tiling and dict(header.extractors) == dict(cards)
    return is_same and tile_px in (None, header.tile_px)


def _write_extractors(path: Path, cards: Cards, tool: str) -> None:
    """Which slides the extractors were trained on is not known; `fit` says so."""
    unknown = {"source": tool, "trained_on": None}
    records = {scale: {**asdict(card), **unknown} for scale, card in cards.items()}
    write_text(path, json.dumps(records, indent=2))


def _report(dest: Path, status: Status, source: Source, cards: Cards) -> int:
    """Write import.csv and print what users should know; returns the exit code."""
    tiles = [f"tiles/{scale}" for scale in cards]
    columns = ("slide_id", "file", "state", *tiles, *COLUMNS, *source.columns, "message")
    path = dest / "import.csv"
    write_csv(path, columns, ({c: row.get(c) for c in columns} for row in status.rows))
    done = [row for row in status.rows if row["state"] in ("done", "empty")]
    lines = list(status.complaints())
    orphans, childless = (sum(row.get(c) or 0 for row in done) for c in ("orphans", "childless"))
    if orphans or childless:
        lines.append(
            f"orphans: {orphans} tiles lie in no coarser tile, {childless} hold no finer one "
            f"(rule: {done[0].get('rule')})"
        )
    if moved := [row for row in done if row.get("moved")]:
        most = max(row["max_moved_px0"] for row in moved)
        lines.append(
            f"moved: {len(moved)} slide(s) have pieces of tissue with grids of their own, which "
            f"were moved onto one grid, by {most:g} level-0 px at most"
        )
    lines += source.describe(done)
    print("\n".join([*lines, f"{status.counts(f'import {source.tool}')} and {path}"]))
    return int(len(done) < len(status.rows))


def shorten(lines: Sequence[str]) -> list[str]:
    """The first lines, and how many more there are."""
    more = len(lines) - MAX_NAMED
    return [*lines[:MAX_NAMED], *([f"... and {more} more"] if more > 0 else [])]


def stand_in_card(name: str, fingerprint: str, image_size: int, feature_dim: int) -> ExtractorCard:
    """The card of an extractor of which only the name is known, not its normalisation.

    Parameters
    ----------
    fingerprint: names tool, network and tiles, so that different features are never mixed.
    """
    return ExtractorCard(name, fingerprint, (0.0,) * 3, (1.0,) * 3, image_size, feature_dim)
