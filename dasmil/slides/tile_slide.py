"""One slide → its tile table and QC picture."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dasmil.errors import InputError
from dasmil.geometry import Tiles
from dasmil.names import path_inside
from dasmil.slides.artefacts import ArtefactParameters, artefact_masks, exclude
from dasmil.slides.digest import file_state, sample_digest
from dasmil.slides.focus import blurred_tiles
from dasmil.slides.physical_scale import PhysicalScale
from dasmil.slides.pyramid import TilingParameters, covered_share, lay_tiles, without_blurred
from dasmil.slides.qc import PANEL_PX, RgbArray, draw_qc, shrink, write_png
from dasmil.slides.reader import Slide
from dasmil.slides.tiff import bits_per_sample
from dasmil.slides.tile_table import slide_changed, tiles_path, write_tiles
from dasmil.slides.tissue import MaskArray, TissueParameters, has_dark_background, tissue_mask

StatusRow = dict[str, str | int | float]


def qc_path(folder: Path, slide_id: str) -> Path:
    return path_inside(folder / "qc", f"{slide_id}.png")


@dataclass(frozen=True)
class Look:
    """A slide at low power, before tissue is found.

    Parameters
    ----------
    thumbnail: (H, W, 3) uint8 RGB; pen and black are painted white.
    mpp: of the thumbnail.
    picture: (h, w, 3) uint8 RGB, the unpainted slide, for pictures.
    artefacts: ``pen`` and ``black`` → mask, for the rules that are on.
    excluded: (H, W) bool, painted pixels of the thumbnail; None if there are none.
    """

    thumbnail: RgbArray
    mpp: float
    picture: RgbArray
    artefacts: Mapping[str, MaskArray]
    excluded: MaskArray | None

    def find_tissue(self, parameters: TissueParameters) -> MaskArray:
        """(H, W) bool, the tissue on the thumbnail."""
        mask = tissue_mask(self.thumbnail, self.mpp, parameters)
        if self.excluded is not None:  # it may lie in a closed gap or a filled hole
            np.logical_and(mask, ~self.excluded, out=mask)
        return mask


def look_at(
    slide: Slide, mpp: float, parameters: ArtefactParameters, side_px: int = PANEL_PX
) -> Look:
    """Read the thumbnail of a slide and find its pen marks and black areas.

    Parameters
    ----------
    mpp: of the thumbnail, about.
    side_px: longer side of :attr:`Look.picture`.

    Raises
    ------
    InputError
        if the slide has more than 8 bits per colour, or a black background.
    """
    path = slide.row.path
    if (bits := bits_per_sample(slide.file)) > 8:
        raise InputError(
            f"{path}: stored with {bits} bits per colour, but OpenSlide reads only 8; scale the "
            "values to 0..255 and store them with 8 bits"
        )
    thumbnail = slide.thumbnail(mpp)
    picture = shrink(thumbnail, side_px)  # before anything is painted over
    mpp = slide.mpp * slide.size_px0[0] / thumbnail.shape[1]
    artefacts = artefact_masks(thumbnail, mpp, parameters)
    excluded = exclude(artefacts, thumbnail) if artefacts else None
    if has_dark_background(thumbnail):
        raise InputError(
            f"{path}: its background is black, as in fluorescence and dark field, but tissue can "
            "only be found on a bright background; leave the slide out, or add --artefacts.black "
            "true if the black area was not scanned"
        )
    return Look(thumbnail, mpp, picture, artefacts, excluded)


def tile_slide(slide: Slide, output: Path, parameters: TilingParameters) -> StatusRow:
    """Find tissue, lay the tiles, write the QC picture and at last the tile table.

    Returns
    -------
    The slide's row of the status table.
    """
    slide_id, path = slide.row.slide_id, slide.row.path
    state, digest = file_state(path), sample_digest(path)
    look = look_at(slide, parameters.tissue.mpp, parameters.artefacts)
    mask = look.find_tissue(parameters.tissue)
    tiles = lay_tiles(slide_id, mask, slide.extent, parameters, look.artefacts)

    blurred_px0 = None
    if parameters.artefacts.blur:
        blurred = blurred_tiles(slide, tiles, parameters.artefacts)
        blurred_px0 = tiles.boxes_px0(tiles.scales[-1].name)[blurred]
        tiles = without_blurred(tiles, blurred)
    covered = covered_share(mask, tiles)
    tissue = replace(tiles.tissue, covered=covered)
    tiles = replace(tiles, tissue=tissue, slide_digest=digest, slide_state=state)
    write_png(
        qc_path(output, slide_id), draw_qc(look.picture, mask, tiles, look.artefacts, blurred_px0)
    )
    write_tiles(tiles_path(output, slide_id), tiles)
    return summary(tiles, slide.physical_scale)


def what_changed(slide: Slide, tiles: Tiles) -> str:
    """How a slide differs from the one that was tiled before, in words; "" if it does not."""
    words = []
    if slide_changed(slide.row.path, tiles):
        words.append("its file was replaced")
    for what, old, new, unit in (
        ("size", tiles.extent.size_px0, slide.extent.size_px0, "px"),
        ("resolution", tiles.extent.mpp, slide.extent.mpp, "µm/px"),
        ("origin", tiles.extent.bounds_px0, slide.extent.bounds_px0, "px"),
    ):
        if old != new:
            words.append(f"its {what} changed from {_in_words(old)} to {_in_words(new)} {unit}")
    return ", ".join(words)


def _in_words(value: float | tuple[int, int]) -> str:
    return f"{value[0]} x {value[1]}" if isinstance(value, tuple) else f"{value:g}"


def summary(tiles: Tiles, scale: PhysicalScale | None = None) -> StatusRow:
    """The status row of a slide that has been tiled.

    Parameters
    ----------
    scale: of the slide; None if only its table is read.
    """
    num_tiles = tiles.num_tiles()
    warning = scale.warning if scale else ""
    if any(num_tiles.values()):
        message = ""
    elif tiles.tissue.excluded.get("blur"):
        message = "every tile is blurred"
    elif not tiles.tissue.mm2:
        message = "no tissue found"
    else:
        message = "tissue, but no tile holds enough"
    excluded = ", ".join(
        f"{name} {share:.2%}" + (" of the tiles" if name == "blur" else "")
        for name, share in tiles.tissue.excluded.items()
        if share
    )
    return {
        "state": "done" if any(num_tiles.values()) else "empty",
        **{f"tiles/{name}": count for name, count in num_tiles.items()},
        "tissue_mm2": round(tiles.tissue.mm2, 3),
        "covered": round(tiles.tissue.covered, 4) if tiles.tissue.mm2 else "",
        "mpp": tiles.extent.mpp,
        "mpp_source": scale.source if scale else "",
        "message": "; ".join(
            filter(None, [message, warning, excluded and f"left out: {excluded}"])
        ),
        "warning": warning,
        "slide_digest": tiles.slide_digest,
    }
