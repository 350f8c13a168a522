"""The verb ``status``: the current state of every slide of a folder."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from dasmil.errors import InputError
from dasmil.files import must_exist
from dasmil.work.status import STATES, Status


def status(folders: tuple[Path, ...]) -> int:
    """Count the slides of TILES or BAGS folders by state, and update status.csv.

    Run it at any time and on any machine, also while other commands work on the folder.

    Parameters
    ----------
    folders:
        folders that tile, embed or import has written.
    """
    for folder in folders:
        slides = find_status(folder)
        slides.write()
        print("\n".join(describe_status(slides)))
    return 0


def find_status(folder: Path) -> Status:
    """The status of a folder, whichever verb wrote it."""
    from dasmil.slides.tile import PARAMETERS, tile_status

    if (folder / PARAMETERS).is_file():
        return tile_status(folder)
    from dasmil.bag_folder import EXTRACTORS, bag_status  # importing torch takes seconds

    if (folder / EXTRACTORS).is_file():
        return bag_status(folder)
    must_exist(folder, "give a folder that tile, embed or import has written")
    raise InputError(
        f"{folder}: it contains neither {PARAMETERS} nor {EXTRACTORS}; give a folder that tile, "
        "embed or import has written"
    )


def describe_status(slides: Status) -> Iterator[str]:
    """The lines that the verb prints: counts by state, tiles per scale, seconds, complaints."""
    rows = slides.rows
    states = Counter(row["state"] for row in rows)
    counts = ", ".join(f"{states[state]:,} {state}" for state in STATES if states[state])
    yield f"{slides.folder}: {len(rows):,} slides: {counts}"
    for column in slides.columns:
        if column.startswith("tiles/"):
            total = sum(int(row.get(column) or 0) for row in rows)
            yield f"  {column.removeprefix('tiles/')}: {total:,} tiles"
    timed = [row for row in rows if row.get("seconds") and row["state"] in ("done", "empty")]
    if timed:
        slowest = max(timed, key=lambda row: row["seconds"])
        typical = median(row["seconds"] for row in timed)
        yield (
            f"  seconds per slide: median {typical:.1f}, most {slowest['seconds']:.1f} "
            f"({slowest['slide_id']})"
        )
    yield from (f"  {line}" for line in slides.complaints())
    yield f"  all slides: {slides.table}"
