"""The verb ``status``: what has become of the slides of a folder, as of now."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from dasmil.errors import InputError
from dasmil.files import must_exist
from dasmil.work.status import STATES, Status


def status(folders: tuple[Path, ...]) -> int:
    """Count the slides of folders of tiles or bags by what became of them; renews status.csv.

    It may be asked at any time, from any machine, also while others work.

    Parameters
    ----------
    folders:
        folders of tile tables or of bags.
    """
    for folder in folders:
        found = find_status(folder)
        found.write()
        print("\n".join(describe(found)))
    return 0


def find_status(folder: Path) -> Status:
    """The status of a folder, whichever verb wrote it."""
    from dasmil.slides.tile import PARAMETERS, tile_status

    if (folder / PARAMETERS).is_file():
        return tile_status(folder)
    from dasmil.bag_folder import EXTRACTORS, bag_status  # torch takes seconds to come

    if (folder / EXTRACTORS).is_file():
        return bag_status(folder)
    must_exist(folder, "give a folder that tile, embed or import has written")
    raise InputError(
        f"{folder}: neither {PARAMETERS} nor {EXTRACTORS} is in it; give a folder that tile, embed "
        "or import has written"
    )


def describe(found: Status) -> Iterator[str]:
    """Lines for people."""
    rows = found.rows
    states = Counter(row["state"] for row in rows)
    counts = ", ".join(f"{states[state]:,} {state}" for state in STATES if states[state])
    yield f"{found.folder}: {len(rows):,} slides: {counts}"
    for column in found.columns:
        if column.startswith("tiles/"):
            total = sum(int(row.get(column) or 0) for row in rows)
            yield f"  {column.removeprefix('tiles/')}: {total:,} tiles"
    timed = [row for row in rows if row.get("seconds") and row["state"] in ("done", "empty")]
    if timed:
        slowest = max(timed, key=lambda row: row["seconds"])
        typical = median(row["seconds"] for row in timed)
        yield (
            f"  seconds a slide: median {typical:.1f}, most {slowest['seconds']:.1f} "
            f"({slowest['slide_id']})"
        )
    yield from (f"  {line}" for line in found.complaints())
    yield f"  all slides: {found.table}"
