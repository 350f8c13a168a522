"""A folder of bags as far as their headers say; nothing here needs torch, which takes seconds."""

from functools import lru_cache, partial
from pathlib import Path

from dasmil.headers import Header, Kind, read_header_of, refusing
from dasmil.json_text import parse_json, read_json_object
from dasmil.names import path_inside
from dasmil.slides.cohort import read_cohort
from dasmil.work.status import Status

BAG = Kind(
    format="dasmil-bag-2",
    unreadable="cannot be read as a bag ({}); delete it and embed again",
    other="its format is {!r}, this version reads {!r}; embed the slide again",
    missing="no such bag file",
)
EXTRACTORS = "extractors.json"


def bag_path(folder: Path, slide_id: str) -> Path:
    return path_inside(folder, f"{slide_id}.safetensors")


def read_num_tiles(path: Path) -> dict[str, int]:
    """Tiles per scale; from the file's header, no tensor is read."""
    header = read_header_of(path, BAG)
    with refusing(path, BAG):
        return _num_tiles(header)


def _num_tiles(header: Header) -> dict[str, int]:
    names = _scale_names(header.text("scales"))
    return {name: header.tensors[f"grid/{name}"].shape[0] for name in names}


@lru_cache(maxsize=16)
def _scale_names(text: str) -> tuple[str, ...]:
    """All bags of a folder say the same."""
    return tuple(parse_json(text))


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
    """The row of a slide from its bag file; no tensor is read."""
    header = read_header_of(path, BAG)
    with refusing(path, BAG):
        return status_row(_num_tiles(header), header.whole("num_damaged", 0, 2**40, "0"))


def status_row(
    num_tiles: dict[str, int], damaged: int = 0, first: str = ""
) -> dict[str, str | int]:
    """The row of a slide whose bag has been written.

    Parameters
    ----------
    damaged: finest tiles that were left out.
    first: what is wrong with the first of them, if that is known.
    """
    state = "done" if any(num_tiles.values()) else "empty"
    message = f"{damaged} damaged tiles left out" if damaged else ""
    return {
        "state": state,
        **{f"tiles/{scale}": number for scale, number in num_tiles.items()},
        "damaged": damaged,
        "message": f"{message}; the first: {first}" if first else message,
    }
