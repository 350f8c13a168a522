"""The origin of what was scanned, from a slide file to the annotations that QuPath makes of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from bag_factory import make_card

from dasmil.demo.slides import write_pyramid
from dasmil.embedding.embed_slide import bag_header
from dasmil.errors import InputError
from dasmil.geometry import Extent
from dasmil.slides.annotation import read_annotation
from dasmil.slides.cohort import SlideRow
from dasmil.slides.pyramid import TilingParameters
from dasmil.slides.reader import Slide
from dasmil.slides.tile_slide import tile_slide
from dasmil.slides.tile_table import read_tiles, tiles_path
from dasmil.units import Mpp

ORIGIN = (1000, 2000)
GLASS_PX0, SCANNED_PX0 = 4096, 512
NM = 500  # a pixel


def write_scn(path: Path) -> None:
    """A slide as Leica writes it: pink, 512 px wide, at 1000, 2000 of a glass of 4096 px."""

    def image(ifd: int, side: int, nm: int, origin: tuple[int, int], objective: float) -> str:
        left, top = origin
        return (
            f'<image name="{ifd}" uuid="{ifd}"><creationDate>2020-01-01</creationDate>'
            f'<device model="m" version="1"/><pixels sizeX="{side}" sizeY="{side}">'
            f'<dimension sizeX="{side}" sizeY="{side}" r="0" ifd="{ifd}"/></pixels>'
            f'<view sizeX="{side * nm}" sizeY="{side * nm}" offsetX="{left * NM}" '
            f'offsetY="{top * NM}"/><scanSettings><objectiveSettings>'
            f"<objective>{objective:g}</objective></objectiveSettings><illuminationSettings>"
            "<numericalAperture>0.4</numericalAperture><illuminationSource>brightfield"
            "</illuminationSource></illuminationSettings></scanSettings></image>"
        )

    macro, scan = GLASS_PX0 // 16, SCANNED_PX0
    description = (
        '<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01" uuid="0">'
        f'<collection name="c" uuid="1" sizeX="{GLASS_PX0 * NM}" sizeY="{GLASS_PX0 * NM}">'
        f"<barcode/>{image(0, macro, 16 * NM, (0, 0), 0.6)}{image(1, scan, NM, ORIGIN, 20)}"
        "</collection></scn>"
    )
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for side, colour, text in ((macro, (255,) * 3, description), (scan, (205, 140, 175), None)):
            pixels = np.broadcast_to(np.array(colour, np.uint8), (side, side, 3))
            options = {"photometric": "rgb", "tile": (256, 256), "compression": "zlib"}
            tiff.write(pixels, description=text, metadata=None, **options)


def outline(left: int, top: int, right: int, bottom: int) -> dict[str, object]:
    corners = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [corners]},
        "properties": {"classification": {"name": "Tumor"}},
    }


def test_marks_of_qupath_fall_on_the_tiles_of_the_scan(tmp_path: Path) -> None:
    write_scn(tmp_path / "s1.scn")
    with Slide(SlideRow("s1", tmp_path / "s1.scn", mpp=0.5)) as slide:
        assert slide.size_px0 == (GLASS_PX0, GLASS_PX0)
        tile_slide(slide, tmp_path, TilingParameters(("x20",), tile_px=64))
    tiles = read_tiles(tiles_path(tmp_path, "s1"))
    assert tiles.extent.bounds_px0 == ORIGIN
    header = bag_header(tiles, {"x20": make_card()})
    (tmp_path / "s1.geojson").write_text(json.dumps(outline(0, 0, 256, 512)))  # the left half
    found = read_annotation(tmp_path / "s1.geojson", header.extent)
    boxes = tiles.boxes_px0("x20")
    right_of_middle = boxes[:, 0] >= 1000 + 256
    assert len(boxes) >= 49 and right_of_middle.any()
    assert not found.overlap(boxes[right_of_middle]).any()
    assert found.overlap(boxes[~right_of_middle]).max() == 1
    assert found.overlap(np.array([[1000, 2000, 1256, 2512], [0, 0, 256, 512]])).tolist() == [1, 0]


def test_other_slides_begin_at_0_0(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "s1.tiff", np.full((300, 300, 3), 200, np.uint8), 0.5, (1,))
    with Slide(SlideRow("s1", tmp_path / "s1.tiff")) as slide:
        assert slide.extent.bounds_px0 == (0, 0)


def test_only_geojson_is_counted_from_the_bounds(tmp_path: Path) -> None:
    def marked(name: str, text: str) -> list[bool]:
        (tmp_path / name).write_text(text)
        return where(tmp_path / name)

    def where(path: Path) -> list[bool]:
        found = read_annotation(path, Extent((4000, 4000), Mpp(0.5), ORIGIN))
        boxes = np.array([[0, 0, 20, 20], [1000, 2000, 1020, 2020]])
        return (found.overlap(boxes) > 0).tolist()

    point = {**outline(0, 0, 0, 0), "geometry": {"type": "Point", "coordinates": [5, 5]}}
    assert marked("a.geojson", json.dumps(outline(0, 0, 10, 10))) == [False, True]
    assert marked("b.geojson", json.dumps(point)) == [False, True]
    corners = enumerate([(0, 0), (10, 0), (0, 10)])
    text = "".join(f'<Coordinate Order="{n}" X="{x}" Y="{y}"/>' for n, (x, y) in corners)
    xml = f'<Annotation Type="Polygon" PartOfGroup="_0"><Coordinates>{text}</Coordinates>'
    assert marked("a.xml", f"<ASAP_Annotations>{xml}</Annotation></ASAP_Annotations>") == [
        True,
        False,
    ]
    assert marked("a.csv", "x,y\n5,5\n") == [True, False]
    mask = np.zeros((40, 40), np.uint8)
    mask[0, 0] = 255
    tifffile.imwrite(tmp_path / "a.tif", mask)
    assert where(tmp_path / "a.tif") == [True, False]


def test_a_shape_that_fits_the_scan_alone_is_not_outside_the_slide(tmp_path: Path) -> None:
    """And one that lies on the glass only without the origin is."""
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps(outline(-500, -500, -400, -400)))
    assert not read_annotation(path, Extent((4000, 4000), Mpp(0.5), ORIGIN)).is_empty
    path.write_text(json.dumps(outline(3500, 0, 3600, 100)))
    with pytest.raises(InputError, match="is outside the slide"):
        read_annotation(path, Extent((4000, 4000), Mpp(0.5), ORIGIN))
