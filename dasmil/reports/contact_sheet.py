"""The verb ``contact-sheet``: the QC pictures of a cohort on one page, for a browser.

The page is one self-contained file with pictures, style and script, made from the template
``contact_sheet.html`` in this folder, with one card per slide. A picture has at most
:data:`MAX_PICTURE_BYTES` and all pictures together :data:`MAX_PICTURES_BYTES`, so the page has at
most 60 MB plus one or two kilobytes per slide. Each card is written as soon as it is made.
"""

import base64
import html
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import cv2
import numpy as np
import numpy.typing as npt

from dasmil.errors import InputError, join_few
from dasmil.files import atomic_path, must_be_file, must_exist
from dasmil.names import name_fault
from dasmil.progress import progress
from dasmil.slides.qc import CAPTION_PX
from dasmil.slides.tile import PARAMETERS, tile_status
from dasmil.slides.tile_slide import qc_path
from dasmil.tables import read_csv

TEMPLATE = Path(__file__).with_suffix(".html")
PICTURE_PX = (640, 320)  # maximum width and height of a card's picture
MAX_PICTURE_BYTES = 20_000  # per JPEG; base64 adds a third
MAX_PICTURES_BYTES = 40_000_000  # of all JPEGs: 2,000 slides have pictures of the full size
MIN_PICTURE_BYTES = 1500
MIN_SIDE_PX = 8  # smaller pictures are not shrunk
QUALITIES = (80, 65, 50, 35)  # of the JPEG; the best one that is small enough is used

Row = Mapping[str, str]


def contact_sheet(tiles: Path, output: Path | None = None, bags: Path | None = None) -> int:
    """Put the QC pictures of a cohort on one HTML page that a browser can sort and filter.

    The status.csv of the tiles is updated first; that of the bags is read as ``embed`` or
    ``status`` wrote it.

    Parameters
    ----------
    tiles:
        folder that ``tile`` has written.
    output:
        the page; TILES/contact_sheet.html if not given.
    bags:
        folder of bags that ``embed`` has written; adds each slide's state there.

    Returns
    -------
    The exit code, 0.

    Raises
    ------
    InputError
        if a folder's status.csv is missing or was written by an older version.
    """
    must_exist(tiles, "give the folder that `tile` has written")
    if (tiles / "extractors.json").is_file() and not (tiles / PARAMETERS).is_file():
        raise InputError(
            f"{tiles}: a folder of bags, which has no pictures; give the folder that `tile` has "
            f"written, and this one as --bags {tiles}"
        )
    if (tiles / PARAMETERS).is_file():
        with suppress(OSError):  # on a read-only folder the table stays as it is
            tile_status(tiles).write()
    rows = _read_status(tiles, "tile", {"tissue_mm2"})
    embedded = None if bags is None else _read_embedded(bags, rows)
    output = tiles / "contact_sheet.html" if output is None else output
    scales = [name.removeprefix("tiles/") for name in rows[0] if name.startswith("tiles/")]
    states = Counter(row["state"] for row in rows)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())

    head, tail = TEMPLATE.read_text(encoding="utf-8").split("<!--cards-->")
    places = {
        "title": html.escape(f"{tiles.resolve().name}: {len(rows)} slides"),
        "counts": html.escape(counts),
        "keys": "".join(_sort_keys(scales, embedded is not None)),
    }
    for name, text in places.items():
        head = head.replace(f"{{{{{name}}}}}", text)
    missing = []
    max_bytes = min(MAX_PICTURE_BYTES, max(MIN_PICTURE_BYTES, MAX_PICTURES_BYTES // len(rows)))
    with atomic_path(output) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(head)
        for row in progress(rows, desc="contact-sheet", unit="slide"):
            path = tiles if name_fault(row["slide_id"]) else qc_path(tiles, row["slide_id"])
            picture = _picture(path, 1 + len(scales))
            if picture is None:
                missing.append(row["slide_id"])
            shown = _picture_html(picture, row["slide_id"], path, output.parent, max_bytes)
            there = None if embedded is None else embedded.get(row["slide_id"], {})
            file.write(_card(row, scales, shown, there))
        file.write(tail)
    without = f", {len(missing)} of them without a picture" if missing else ""
    size_mb = output.stat().st_size / 1e6
    print(f"contact-sheet: {len(rows)} slides ({counts}){without}; see {output} ({size_mb:.1f} MB)")
    return 0


def _read_status(folder: Path, verb: str, columns: set[str]) -> list[Row]:
    path = folder / "status.csv"
    must_be_file(path, f"give the folder that `{verb}` has written")
    names, rows = read_csv(path)
    missing = sorted({"slide_id", "state", "message", *columns} - set(names))
    if missing:
        raise InputError(
            f"{path}: it has no column {', '.join(missing)}, because an older version wrote it; "
            f"run `{verb}` on that folder again, finished slides are kept"
        )
    if not rows:
        raise InputError(f"{path}: it lists no slide; run `{verb}` on that folder")
    return list(rows)


def _read_embedded(bags: Path, rows: Sequence[Row]) -> dict[str, Row]:
    """Rows of the bags' status by slide; all must be slides of the page."""
    embedded = {row["slide_id"]: row for row in _read_status(bags, "embed", set())}
    other = sorted(embedded.keys() - {row["slide_id"] for row in rows})
    if other:
        raise InputError(
            f"{bags / 'status.csv'}: the tiles have no slide {join_few(other)}; give the bags of "
            "these tiles"
        )
    return embedded


def _sort_keys(scales: Sequence[str], has_bags: bool) -> Iterator[str]:
    names = {"table": "cohort table", "slide_id": "slide", "state": "state"}
    names |= {"embedded": "embedded"} if has_bags else {}
    names |= {"tissue_mm2": "tissue area"}
    names |= {f"tiles/{scale}": f"tiles {scale}" for scale in scales}
    for key, name in names.items():
        yield f'<option value="{html.escape(key)}">{html.escape(name)}</option>'


def _picture(path: Path, num_panels: int) -> npt.NDArray[np.uint8] | None:
    """(H, W, 3) BGR for a card; None if there is no readable QC picture.

    It shows the first panel of the QC picture (tissue) and the last one (tiles of the finest
    scale), without the captions.
    """
    picture = None
    with suppress(OSError):  # a name that is too long for a file
        picture = cv2.imread(str(path), cv2.IMREAD_COLOR) if path.is_file() else None
    if picture is None:
        return None
    panels = np.array_split(picture[CAPTION_PX:], num_panels, axis=1)
    picture = np.concatenate([panels[0], panels[-1]], axis=1)
    factor = min(1.0, *(most / side for most, side in zip(PICTURE_PX, picture.shape[1::-1])))
    width, height = (max(1, round(side * factor)) for side in picture.shape[1::-1])
    return np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _jpeg(picture: npt.NDArray[np.uint8], max_bytes: int) -> bytes:
    """A JPEG of the best quality that is small enough; if none is, the picture is shrunk."""
    while True:
        for quality in QUALITIES:
            _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
            if len(data) <= max_bytes or min(picture.shape[:2]) < MIN_SIDE_PX:
                return data.tobytes()
        picture = np.asarray(cv2.resize(picture, None, fx=0.7, fy=0.7), np.uint8)


def _picture_html(
    picture: npt.NDArray[np.uint8] | None,
    slide_id: str,
    path: Path,
    page_folder: Path,
    max_bytes: int,
) -> str:
    """A picture as HTML, with the path of its file relative to the page."""
    if picture is None:
        return '<div class="none">no picture</div>'
    data = base64.b64encode(_jpeg(picture, max_bytes)).decode()
    name = html.escape(slide_id)
    file = html.escape(quote(Path(os.path.relpath(path, page_folder)).as_posix()))
    return (
        f'<button class="picture" type="button" data-file="{file}" aria-label="Enlarge {name}">'
        f'<img alt="Tissue and tiles of {name}" decoding="async" '
        f'src="data:image/jpeg;base64,{data}"></button>'
    )


def _card(row: Row, scales: Sequence[str], picture: str, embedded: Row | None) -> str:
    """The HTML of one slide.

    Parameters
    ----------
    embedded: its row of the bags' status; empty if it is not there, None without bags.
    """
    keys = ["tissue_mm2", *(f"tiles/{scale}" for scale in scales)]
    numbers = {key: float(row[key]) for key in keys if row[key]}
    state, message = html.escape(row["state"]), html.escape(row["message"])
    about = {"slide": row["slide_id"], "state": row["state"], "numbers": json.dumps(numbers)}
    about["message"] = " ".join([row["message"], (embedded or {}).get("message", "")]).strip()
    lines = []
    if words := list(_numbers(row, scales)):
        lines.append(f'<p class="numbers">{" · ".join(words)}</p>')
    if message:
        kind = "failed-message" if state == "failed" else "message"
        lines.append(f'<p class="{kind}">{message}</p>')
    if embedded is not None:
        about["embedded"] = embedded.get("state", "")
        words = [embedded.get("state") or "not in the bags", embedded.get("message", "")]
        text = html.escape(": ".join(word for word in words if word))
        kind = "failed-message" if about["embedded"] == "failed" else "message"
        lines.append(f'<p class="{kind}">embedded: {text}</p>')
    attributes = " ".join(f'data-{name}="{html.escape(value)}"' for name, value in about.items())
    heading = (
        f'<span>{html.escape(row["slide_id"])}</span><span class="state {state}">{state}</span>'
    )
    return f"<article {attributes}>\n<h2>{heading}</h2>\n{picture}\n{''.join(lines)}\n</article>\n"


def _numbers(row: Row, scales: Sequence[str]) -> Iterator[str]:
    if row["tissue_mm2"]:
        covered = f", {float(row['covered']):.1%} in tiles" if row.get("covered") else ""
        yield f"<b>{float(row['tissue_mm2']):.3g} mm²</b> tissue{covered}"
    for scale in scales:
        if row[f"tiles/{scale}"]:
            yield f"{html.escape(scale)} <b>{int(row[f'tiles/{scale}']):,}</b>"
    if row.get("mpp"):
        source = f" ({html.escape(row['mpp_source'])})" if row.get("mpp_source") else ""
        yield f"{float(row['mpp']):.4g} µm/px{source}"
