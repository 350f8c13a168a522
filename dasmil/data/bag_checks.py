"""What must hold for a folder of bags before its slides are trained on or evaluated."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from heapq import nlargest
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from dasmil.bags import BagHeader, bag_path, describe_difference, read_header
from dasmil.bags.store import graph_bytes, step_bytes
from dasmil.errors import InputError, join_few
from dasmil.files import map_files
from dasmil.json_text import read_json_object
from dasmil.progress import progress
from dasmil.slides.cohort import SlideRow
from dasmil.slides.study import Study, read_records

Value = TypeVar("Value")

PINNED_ROUNDING = 1.5  # CUDA allocates pinned memory in powers of two


def read_headers(
    folder: Path, slide_ids: Sequence[str]
) -> tuple[dict[str, BagHeader], dict[str, InputError]]:
    """The headers of bags, and per bag whose header cannot be read the error."""
    read = dict(zip(slide_ids, _map_bags(_header_or_error, folder, slide_ids), strict=True))
    headers = {name: header for name, header in read.items() if isinstance(header, BagHeader)}
    return headers, {name: e for name, e in read.items() if isinstance(e, InputError)}


def _header_or_error(path: Path) -> BagHeader | InputError:
    try:
        return read_header(path)
    except InputError as error:
        return error


def _map_bags(read: Callable[[Path], Value], folder: Path, slide_ids: Sequence[str]) -> list[Value]:
    """Read many bag files at once, with a progress bar if that takes long."""
    values = map_files(read, (bag_path(folder, slide_id) for slide_id in slide_ids))
    options = {"total": len(slide_ids), "unit": "bag", "delay": 2, "leave": False}
    return list(progress(values, "opening bags", **options))


def first_header(
    headers: Mapping[str, BagHeader], scales: Sequence[str] | None, wanted: Any
) -> BagHeader:
    """The header of the first bag, or of the first that has the bag format ``wanted``."""
    wanted_ones = (
        header
        for header in headers.values()
        if wanted and not describe_difference(wanted, header.bag_format(scales))
    )
    return next(wanted_ones, None) or next(iter(headers.values()))


def choose_scales(folder: Path, held: Sequence[str], given: Sequence[str] | None) -> list[str]:
    """The scales to read, of those that the bags hold; all if None are given.

    Raises
    ------
    InputError
        if the bags do not hold a given scale, or the list is empty.
    """
    missing = [name for name in given or () if name not in held]
    if missing or given == []:
        raise InputError(
            f"{folder}: data.scales asks for {', '.join(missing) or 'none'}, its bags "
            f"hold {', '.join(held)}"
        )
    return [name for name in held if name in (given or held)]


def describe_foreign_bag(
    path: Path,
    header: BagHeader,
    scales: Sequence[str] | None,
    wanted: Mapping[str, Any],
    first: str,
) -> str:
    """Why the bag file ``path`` does not belong to the others; "" if it does.

    Parameters
    ----------
    scales: scales that are read; None: all.
    wanted: the bag format that all must have.
    first: slide_id of the bag that has it.
    """
    slide_id = path.stem
    if header.slide_id != slide_id:
        return f"{path}: it is the bag of {header.slide_id}; give the file its own name back"
    difference = describe_difference(wanted, header.bag_format(scales))
    if difference:
        return (
            f"{path.parent}: the bag {slide_id} holds {difference} (as in {first}); "
            "embed all slides in the same way"
        )
    return ""


def refuse_other_labels(folder: Path, cohort: Sequence[SlideRow], classes: Sequence[str]) -> None:
    """Refuse a slide whose label is none of the classes."""
    for row in cohort:
        if row.label is not None and row.label not in classes:
            raise InputError(
                f"{folder / 'cohort.csv'}: slide {row.slide_id} has the label "
                f"{row.label!r}, data.classes are {', '.join(classes)}"
            )


def refuse_missing_classes(folder: Path, split: str, counts: Mapping[str, int]) -> None:
    """Refuse a split that has no slide of a class.

    Parameters
    ----------
    counts: number of its slides per class.
    """
    missing = [name for name, count in counts.items() if not count]
    if missing:
        raise InputError(
            f"{folder}: the split {split!r} has no slide of class {', '.join(missing)}; fill the "
            "split column of cohort.csv, or change the fractions or the seed of data.split"
        )


def refuse_large_cache(
    folder: Path,
    train_ids: Sequence[str],
    val_ids: Sequence[str],
    scales: Sequence[str] | None,
    cache: str,
    device: torch.device,
    num_processes: int,
    batch_size: int,
) -> None:
    """Refuse to cache the graphs of these slides if they need more memory than is free.

    On a GPU a training step on the largest training slides must fit beside them.

    Parameters
    ----------
    train_ids, val_ids: the slides.
    scales: scales that are read; None: all.
    cache: ram or device.
    device: of this process.
    num_processes: on this machine; each caches its own graphs.
    batch_size: slides per training step.
    """
    slide_ids = [*train_ids, *val_ids]
    need = sum(_map_bags(partial(graph_bytes, scales=scales), folder, slide_ids))
    step, copies = 0, 1
    if cache == "device" and device.type == "cuda":
        reused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free, where = torch.cuda.mem_get_info(device)[0] + reused, str(device)
        steps = _map_bags(partial(step_bytes, scales=scales), folder, train_ids)
        step = sum(nlargest(batch_size, steps))
    else:
        free, where = psutil.virtual_memory().available, "memory"
        copies = num_processes
        need = int(need * (PINNED_ROUNDING if device.type == "cuda" else 1))
    if need * copies + step > free:
        each = f" in each of {copies} processes" if copies > 1 else ""
        beside = f" and {step / 1e9:,.1f} GB for a training step" if step else ""
        raise InputError(
            f"{folder}: data.cache: {cache} takes {need / 1e9:,.1f} GB for its {len(slide_ids)} "
            f"training and validation slides{each}{beside}, but {free / 1e9:,.1f} GB of {where} "
            "are free; choose another (none, ram, device), or fewer data.scales"
        )


def refuse_seen_slides(
    folder: Path,
    scales: Sequence[str],
    make_study: Callable[[Any], Study],
    held_out: Sequence[SlideRow],
) -> None:
    """Refuse to evaluate slides on which an extractor was trained, or slides of their patients.

    Warns if it is not known on which slides the extractors were trained.

    Parameters
    ----------
    make_study: the slides of an extractor from its records.
    held_out: the val and test slides.
    """
    path = folder / "extractors.json"
    if not path.exists():
        return
    records = read_json_object(path, "embed or import again, what is done is kept")
    records = {scale: records[scale] for scale in scales if scale in records}
    for scale, record in records.items():
        if not isinstance(record, dict) or "trained_on" not in record:
            raise InputError(f"{path}: {scale} has no record of an extractor; embed again")
    unknown = [scale for scale, record in records.items() if record["trained_on"] is None]
    if unknown:
        warnings.warn(
            f"{path}: which slides the {', '.join(unknown)} extractors were trained on is not "
            "known; held-out slides may be among them",
            stacklevel=2,
        )
    for scale, record in records.items():
        if scale in unknown:
            continue
        study = make_study(read_records(record["trained_on"]))
        seen = [row.slide_id for row in held_out if study.find(row) or study.part_of_patient(row)]
        if seen:
            raise InputError(
                f"{path}: the {scale} extractor was trained on {len(seen)} slide(s) that are "
                f"held out here, or on their patients ({join_few(seen)}); use the same split "
                "for both, set data.other_cohort if equal slide_ids and patient_ids belong to "
                "another cohort, or data.allow_seen_slides if that is meant"
            )


def warn_missing(folder: Path, kind: str, slide_ids: Sequence[str]) -> None:
    """Warn of the slides of cohort.csv that have no file of a kind."""
    if slide_ids:
        warnings.warn(
            f"{folder}: {len(slide_ids)} slide(s) of cohort.csv have no {kind} and are left out: "
            f"{', '.join(slide_ids[:10])}; see status.csv there",
            stacklevel=2,
        )
