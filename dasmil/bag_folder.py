"""A folder of bags, as far as the headers describe it, without torch: its import takes seconds."""

from functools import partial
from pathlib import Path

from dasmil.headers import KNOWN, SHARED, TEXT, Entry, FileKind, read_header_of, refusing
from dasmil.json_text import parse_json, read_json_object
from dasmil.names import path_inside
from dasmil.plain import whole
from dasmil.slides.cohort import read_cohort
from dasmil.work.status import Status

COUNT = whole(0, 2**40)
BAG = FileKind(
    format="dasmil-bag-2",
    unreadable="cannot be read as a bag ({}); delete it and embed again",
    other="its format is {!r}, this version reads {!r}; embed the slide again",
    missing="no such bag file",
    entries={
        **{name: SHARED[name] for name in ("slide_id", "slide_mpp", "size_px0", "tile_px")},
        "scales": Entry(TEXT, is_text=True),  # parsed once for all bags of a folder
        "tiling": SHARED["tiling"],
        "num_tiles": Entry(COUNT),
        "reader": Entry(TEXT, is_text=True),
        "bounds_px0": SHARED["bounds_px0"],
        **KNOWN,
        "slide_digest": SHARED["slide_digest"],
        "num_damaged": Entry(COUNT, "0"),
        "extractors": Entry(TEXT, is_text=True),  # as scales
    },
)
EXTRACTORS = "extractors.json"


def bag_path(folder: Path, slide_id: str) -> Path:
    return path_inside(folder, f"{slide_id}.safetensors")


def bag_status(folder: Path) -> Status:
    """The status of a folder that ``embed`` or ``import`` writes."""
    scales = read_json_object(folder / EXTRACTORS, "run the command that wrote the bags again")
    return Status(
        folder,
        [row.slide_id for row in read_cohort(folder / "cohort.csv")],
        [*(f"tiles/{scale}" for scale in scales), "damaged"],
        path=partial(bag_path, folder),
        describe=describe_bag,
    )


def describe_bag(path: Path) -> dict[str, str | int]:
    """The status row of a slide, from the header of its bag file."""
    header = read_header_of(path, BAG)
    with refusing(path, BAG):
        values = BAG.unpack(header, ["scales", "num_damaged"])
        names = parse_json(values["scales"])
        num_tiles = {name: header.tensors[f"grid/{name}"].shape[0] for name in names}
        return status_row(num_tiles, values["num_damaged"])


def status_row(
    num_tiles: dict[str, int], num_damaged: int = 0, first: str = ""
) -> dict[str, str | int]:
    """The status row of a slide whose bag has been written.

    Parameters
    ----------
    num_damaged: finest tiles that were left out.
    first: what is wrong with the first of them; "" if it is not known.
    """
    state = "done" if any(num_tiles.values()) else "empty"
    message = f"{num_damaged} damaged tiles left out" if num_damaged else ""
    return {
        "state": state,
        **{f"tiles/{scale}": number for scale, number in num_tiles.items()},
        "damaged": num_damaged,
        "message": f"{message}; the first: {first}" if first else message,
    }
