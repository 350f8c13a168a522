"""``tile --preview``: one picture per slide with the tissue found at several sensitivities."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dasmil.errors import DiskFullError, InputError, error_text, escape_controls
from dasmil.names import path_inside
from dasmil.slides.artefacts import ArtefactParameters
from dasmil.slides.cohort import SlideRow, read_cohort, refuse_twice, slide_name
from dasmil.slides.qc import RgbArray, caption, draw_mask, shrink, write_png
from dasmil.slides.reader import Slide
from dasmil.slides.tile_slide import look_at
from dasmil.slides.tissue import MaskArray, TissueParameters
from dasmil.work.worker import STALE_AFTER_S

SENSITIVITIES = (0.5, 1.0, 1.5, 2.5)  # min_saturation and min_texture are divided by these
NO_TEXTURE = 255.0
DETAIL_PX = 1800  # longer side of the picture from which the tissue is cut out
PANEL_PX = 800  # longer side of a panel; its text needs MIN_WIDTH_PX
MIN_WIDTH_PX = 620
COLUMNS = 3


def preview(
    slides: tuple[Path, ...],
    output: Path,
    cohort: Path | None = None,
    tissue: TissueParameters = TissueParameters(),  # noqa: B008 - frozen, and the CLI shows its fields
    artefacts: ArtefactParameters = ArtefactParameters(),  # noqa: B008 - as above
    scales: tuple[str, ...] = (),
    tile_px: int = 256,
    min_tissue: float = 0.25,
    max_upsampling: float = 1.15,
    workers: int | None = None,
    stale_after: float = STALE_AFTER_S,
) -> int:
    """Draw the tissue that is found at several sensitivities, with the options of each.

    The pictures are ``OUTPUT/preview/<slide_id>.png``, one per slide. No tiles are made. A slide
    that fails is reported, and the others continue. The other options of ``tile`` are accepted, so
    that one config serves both, but have no effect here.

    Parameters
    ----------
    slides:
        slide files, or slide_ids of the cohort.
    output:
        folder of the tiles; the pictures are written to preview/ in it.
    cohort:
        cohort table or folder of slides, for slide_ids and for slides whose mpp is only in the
        table.
    tissue:
        the middle sensitivity; the others are derived from it.
    artefacts:
        excluded artefacts, as in tile.
    scales:
        not used.
    tile_px:
        not used.
    min_tissue:
        not used.
    max_upsampling:
        not used.
    workers:
        not used.
    stale_after:
        not used.

    Returns
    -------
    The exit code: 1 if a slide failed, else 0.
    """
    rows = [] if cohort is None else read_cohort(cohort, leave_out=output)
    found = list(dict.fromkeys(_find_row(slide, rows) for slide in slides))
    refuse_twice(Path("--preview"), found)  # else one picture would replace the other
    failed = 0
    for row in found:
        try:
            if row.fault:
                raise InputError(row.fault)
            path = path_inside(output / "preview", f"{row.slide_id}.png")
            with Slide(row) as slide:
                write_png(path, draw_preview(slide, tissue, artefacts))
        except DiskFullError:
            raise
        except Exception as error:  # printed, and in the exit code
            failed += 1
            print(f"failed: {escape_controls(row.slide_id)}: {error_text(error)}")
        else:
            print(f"tile: {path}")
    return int(failed > 0)


def _find_row(slide: Path, rows: Sequence[SlideRow]) -> SlideRow:
    for row in rows:
        if str(slide) == row.slide_id or slide.absolute() == row.path.absolute():
            return row
    if slide.exists():
        return SlideRow(slide_name(slide.absolute().name), slide)
    known = "the cohort has no such slide_id" if rows else "for a slide_id, --cohort is needed"
    raise InputError(f"--preview {slide}: no such file, and {known}")


def sensitivities(tissue: TissueParameters) -> list[tuple[TissueParameters, str]]:
    """Parameters below and above the given ones, and the options that set them."""
    choices = [(replace(tissue, min_texture=NO_TEXTURE), f"--tissue.min_texture {NO_TEXTURE:g}")]
    for sensitivity in SENSITIVITIES:
        choice = replace(
            tissue,
            min_saturation=min(255, round(tissue.min_saturation / sensitivity)),
            min_texture=float(f"{tissue.min_texture / sensitivity:.2g}"),
        )
        choice = tissue if sensitivity == 1 else choice
        text = (
            f"--tissue.min_saturation {choice.min_saturation} "
            f"--tissue.min_texture {choice.min_texture:g}"
        )
        choices.append((choice, f"{text}  (as set)" if sensitivity == 1 else text))
    return choices


def draw_preview(slide: Slide, tissue: TissueParameters, artefacts: ArtefactParameters) -> RgbArray:
    """Draw the slide, then one panel per sensitivity with its outline and its options.

    Returns
    -------
    (height, width, 3) uint8 RGB.
    """
    look = look_at(slide, tissue.mpp, artefacts, DETAIL_PX)
    choices = sensitivities(tissue)
    masks = [look.find_tissue(choice) for choice, _ in choices]
    whole = look.picture
    top, bottom, left, right = _part_to_show(np.any(masks, axis=0), whole.shape[1::-1])
    panels = [_panel(whole[top:bottom, left:right], slide.row.slide_id)]
    for mask, (_, text) in zip(masks, choices, strict=True):
        size_mm2 = float(mask.mean() * np.prod(slide.size_px0) * slide.mpp**2 / 1e6)
        part = draw_mask(whole, mask)[top:bottom, left:right]
        panels.append(_panel(part, f"{text}:  {size_mm2:.1f} mm2"))
    lines = [panels[start : start + COLUMNS] for start in range(0, len(panels), COLUMNS)]
    return np.concatenate([np.concatenate(line, axis=1) for line in lines])


def _part_to_show(mask: MaskArray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the tissue with a margin, in pixels of the picture."""
    edges: list[int] = []
    for axis, length in ((1, size[1]), (0, size[0])):
        hit = np.flatnonzero(mask.any(axis))
        first, last = (hit[0], hit[-1] + 1) if len(hit) else (0, mask.shape[1 - axis])
        factor = length / mask.shape[1 - axis]
        margin = 0.04 * length
        edges.append(max(0, int(first * factor - margin)))
        edges.append(min(length, round(last * factor + margin) + 1))
    return edges[0], edges[1], edges[2], edges[3]


def _panel(picture: RgbArray, text: str) -> RgbArray:
    shown = shrink(picture, PANEL_PX)
    missing = max(0, MIN_WIDTH_PX - shown.shape[1])
    return caption(np.pad(shown, ((0, 0), (0, missing), (0, 0)), constant_values=255), text)
