"""What has become of the slides of a folder of bags."""

import json
from functools import partial
from pathlib import Path

from dasmil.bags.store import bag_path, read_num_tiles
from dasmil.slides.cohort import read_cohort
from dasmil.work.status import Status

EXTRACTORS = "extractors.json"


def bag_status(folder: Path) -> Status:
    """The status of a folder that ``embed`` or ``import`` writes."""
    scales = json.loads((folder / EXTRACTORS).read_text())
    return Status(
        folder,
        [row.slide_id for row in read_cohort(folder / "cohort.csv")],
        [*(f"tiles/{scale}" for scale in scales), "damaged"],
        path=partial(bag_path, folder),
        describe=lambda path: status_row(read_num_tiles(path)),
    )


def status_row(num_tiles: dict[str, int], message: str = "") -> dict[str, str | int]:
    """The row of a slide whose bag has been written."""
    state = "done" if any(num_tiles.values()) else "empty"
    return {"state": state, **{f"tiles/{s}": n for s, n in num_tiles.items()}, "message": message}
