"""One slide → its tile table and QC picture."""

from pathlib import Path

from dasmil.slides.qc import draw_qc, write_png
from dasmil.slides.reader import Slide
from dasmil.slides.tiling import (
    TilePyramid,
    TilingParameters,
    tile_pyramid,
    tiles_path,
    write_tiles,
)
from dasmil.slides.tissue import tissue_mask

StatusRow = dict[str, str | int | float]


def qc_path(folder: Path, slide_id: str) -> Path:
    return folder / "qc" / f"{slide_id}.png"


def tile_slide(slide: Slide, output: Path, parameters: TilingParameters) -> StatusRow:
    """Find tissue, lay the tiles, draw the picture; the tile table is written last."""
    slide_id = slide.row.slide_id
    thumbnail = slide.thumbnail(parameters.tissue.mpp)
    thumbnail_mpp = slide.mpp * slide.size_px0[0] / thumbnail.shape[1]
    mask = tissue_mask(thumbnail, thumbnail_mpp, parameters.tissue)
    tiles = tile_pyramid(slide_id, mask, slide.size_px0, slide.mpp, parameters)
    write_png(qc_path(output, slide_id), draw_qc(thumbnail, mask, tiles))
    write_tiles(tiles_path(output, slide_id), tiles)
    if any(tiles.num_tiles().values()):
        message = ""
    elif not mask.any():
        message = "no tissue found"
    elif not all(tiles.geometry.shape(0, slide.size_px0)):
        message = f"smaller than one tile of {tiles.scales[0].name}"
    else:
        message = "tissue, but no tile holds enough"
    return summary(tiles, slide.physical_scale.source, message)


def summary(tiles: TilePyramid, mpp_source: str, message: str) -> StatusRow:
    """What the status table says of a slide that has been tiled."""
    num_tiles = tiles.num_tiles()
    return {
        "state": "done" if any(num_tiles.values()) else "empty",
        **{f"tiles/{name}": count for name, count in num_tiles.items()},
        "mpp": tiles.slide_mpp,
        "mpp_source": mpp_source,
        "message": message,
    }
