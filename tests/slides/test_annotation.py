"""Truth of tiles from polygons, masks and points whose areas are known by arithmetic."""

import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage.draw import polygon

from dasmil.errors import InputError
from dasmil.geometry import Extent
from dasmil.slides.annotation import (
    Points,
    Polygons,
    class_names,
    find_truths,
    marks_points,
    read_annotation,
)
from dasmil.slides.annotation import (
    areas as areas_module,
)
from dasmil.slides.annotation import (
    mask as mask_module,
)
from dasmil.units import Mpp

SIZE = (1000, 800)  # width and height of the slide
EXTENT = Extent(SIZE, Mpp(0.5))


def asap(*annotations: tuple[str, list[tuple[float, float]]], kind: str = "Polygon") -> str:
    """ASAP's XML; corners are written in reverse, as only their Order counts."""
    lines = ['<?xml version="1.0"?>', "<ASAP_Annotations>", "<Annotations>"]
    for number, (group, corners) in enumerate(annotations):
        lines.append(f'<Annotation Name="A{number}" Type="{kind}" PartOfGroup="{group}">')
        lines.append("<Coordinates>")
        for order, (x, y) in reversed(list(enumerate(corners))):
            lines.append(f'<Coordinate Order="{order}" X="{x}" Y="{y}" />')
        lines.append("</Coordinates></Annotation>")
    groups = '<AnnotationGroups><Group Name="Tumor" PartOfGroup="None"/></AnnotationGroups>'
    return "\n".join([*lines, f"</Annotations>{groups}</ASAP_Annotations>"])


def box(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def tiles(side: int, *cells: tuple[int, int]) -> np.ndarray:
    return np.array([(c * side, r * side, (c + 1) * side, (r + 1) * side) for r, c in cells])


def read_xml(tmp_path, *annotations, **kind):
    path = tmp_path / "a.xml"
    path.write_text(asap(*annotations, **kind))
    return read_annotation(path, EXTENT)


class TestPolygons:
    def test_share_of_a_box_is_its_area(self, tmp_path):
        areas = read_xml(tmp_path, ("_0", box(0, 0, 150, 50)), ("_1", box(300, 300, 400, 400)))
        share = areas.overlap(tiles(100, (0, 0), (0, 1), (1, 0), (3, 3), (7, 9)))
        assert share.tolist() == [0.5, 0.25, 0, 1, 0]

    @pytest.mark.parametrize("group", ["_2", "Exclusion", "normal"])
    def test_exclusions_are_cut_out_in_any_order(self, tmp_path, group):
        areas = read_xml(tmp_path, (group, box(0, 0, 50, 100)), ("Tumor", box(0, 0, 100, 100)))
        assert areas.overlap(tiles(100, (0, 0))).tolist() == [0.5]

    @pytest.mark.parametrize("group", ["_0", "_1", "Tumor", "metastases", "None"])
    def test_groups_of_lesions(self, tmp_path, group):
        assert read_xml(tmp_path, (group, box(0, 0, 100, 100))).finest.sum() == 100 * 100

    def test_the_groups_that_are_asked_for_are_the_only_lesions(self, tmp_path):
        """Other groups say nothing, of whatever type; what is cut out stays cut out."""
        text = asap(
            ("Gland", box(0, 0, 100, 100)),
            ("_0", box(100, 0, 200, 100)),
            ("_2", box(0, 0, 50, 100)),
        )
        (tmp_path / "a.xml").write_text(text)
        areas = read_annotation(tmp_path / "a.xml", EXTENT, ["gland"])
        assert areas.overlap(tiles(100, (0, 0), (0, 1))).tolist() == [0.5, 0]
        assert class_names(tmp_path / "a.xml") == {"Gland", "_0", "_2"}
        (tmp_path / "b.xml").write_text(asap(("_0", [(5, 5)]), kind="Dot"))
        assert read_annotation(tmp_path / "b.xml", EXTENT, ["gland"]).is_empty

    def test_overlapping_lesions_count_once(self, tmp_path):
        areas = read_xml(tmp_path, ("_0", box(0, 0, 100, 100)), ("_0", box(50, 0, 150, 100)))
        assert areas.finest.sum() == 150 * 100

    def test_half_a_tile_is_enough_and_a_pixel_less_is_not(self, tmp_path):
        areas = read_xml(tmp_path, ("_0", box(0, 0, 50, 100)), ("_0", box(100, 0, 149, 100)))
        boxes = tiles(100, (0, 0), (0, 1))
        overlap = areas.overlap(boxes)
        assert areas.positive(overlap).tolist() == [True, False]
        assert areas.positive(overlap, 0.49).tolist() == [True, True]
        assert areas.positive(overlap, 0.51).tolist() == [False, False]

    def test_beyond_the_border_of_the_slide_a_tile_does_not_count(self, tmp_path):
        width, height = SIZE
        areas = read_xml(tmp_path, ("_0", box(0, 0, width, height)))
        boxes = np.array([[width - 30, 0, width + 70, 100], [width - 1, height - 1, 9999, 9999]])
        assert areas.overlap(boxes) == pytest.approx([1, 1])
        assert areas.overlap(boxes + width + 70).tolist() == [0, 0]

    def test_a_mask_has_the_pixels_whose_centre_is_inside(self):
        """As scikit-image finds them, by a slower way; also of shapes that cross themselves."""
        rng = np.random.default_rng(0)
        for downsample in (1, 7.3, 32):
            xy = rng.uniform(-200, 1200, size=(9, 2))
            found = Polygons(SIZE, [[xy]]).mask(downsample)
            wanted = np.zeros_like(found)
            x, y = (xy / downsample - 0.5).T
            wanted[polygon(y, x, found.shape)] = True
            assert found.shape == (round(800 / downsample), round(1000 / downsample))
            assert found.any() and (found == wanted).all()

    def test_a_large_slide_is_marked_coarsely_enough_for_memory(self):
        """16 level-0 pixels a pixel; shares are still those of the areas."""
        lesion = [np.array(box(51_200, 102_400, 51_456, 102_912))]
        areas = Polygons((100_000, 200_000), [lesion])
        assert areas.finest.shape == (12_500, 6_250)
        assert areas.finest.size <= areas_module.MAX_MASK_PX
        boxes = np.array([[51_200, 102_400, 51_712, 102_912], [51_712, 102_400, 52_224, 102_912]])
        assert areas.overlap(boxes).tolist() == [0.5, 0]

    def test_shapes_without_area_are_ignored(self, tmp_path):
        areas = read_xml(tmp_path, ("_0", [(5, 5), (9, 9)]), ("_0", []))
        assert areas.is_empty
        assert areas.overlap(tiles(100, (0, 0))).tolist() == [0]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (asap(("Necrosis", box(0, 0, 9, 9))), "'A0' has the unknown group 'Necrosis'"),
            (
                asap(("_0", [(5, 5)]), kind="Dot"),
                "'A0' is a 'Dot', not a polygon; give",
            ),
            (asap(("_0", box(1000, 0, 1200, 9)), ("_0", box(1001, 0, 1200, 9))), "'A1' is outside"),
            (asap(("_0", box(0, -9, 5, -1))), "'A0' is outside the slide of 1000 x 800 px"),
            (asap(("_0", [("1,5", 2), (3, 4)])), "corners of 'A0' are not all numbers"),
            (asap(("_0", [("nan", 2), (3, 4)])), "corners of 'A0' are not all numbers"),
            ("<Annotations><Annotation/></Annotations>", "root is 'Annotations', not ASAP_Ann"),
            ("<ASAP_Annotations>", "a.xml: not XML"),
        ],
    )
    def test_files_that_are_not_ours_are_refused(self, tmp_path, text, message):
        (tmp_path / "a.xml").write_text(text)
        with pytest.raises(InputError, match=message):
            read_annotation(tmp_path / "a.xml", EXTENT)


def write_pyramid(path, mask: np.ndarray, downsamples=(1, 2, 4), values=1, **options) -> None:
    """Tiled grey TIFF; levels by nearest neighbour, as ASAP makes them."""
    with tifffile.TiffWriter(path) as tiff:
        for d in downsamples:
            tiff.write(
                mask[::d, ::d] * np.array(values, dtype=mask.dtype),
                tile=(256, 256),
                compression="zlib",
                subfiletype=int(d > 1),
                photometric=options.get("photometric", "minisblack"),
                metadata=None,
            )


class TestMasks:
    def test_a_coarse_picture_covers_the_whole_slide(self, tmp_path):
        """One pixel is 4 x 4; the third tile is cut in the middle of mask pixels."""
        mask = np.zeros((200, 250), dtype=np.uint8)
        mask[:25, :25] = 255
        Image.fromarray(mask).save(tmp_path / "a.png")
        areas = read_annotation(tmp_path / "a.png", EXTENT)
        boxes = np.array([[0, 0, 100, 100], [50, 0, 150, 100], [99, 0, 103, 8], [200, 0, 300, 99]])
        assert areas.overlap(boxes) == pytest.approx([1, 0.5, 0.25, 0])

    def test_slide_whose_size_the_mask_does_not_divide(self, tmp_path):
        mask = np.zeros((3, 4), dtype=np.uint8)
        mask[:, 2:] = 1
        Image.fromarray(mask).save(tmp_path / "a.png")
        areas = read_annotation(tmp_path / "a.png", Extent((1001, 802), Mpp(0.5)))
        assert areas.overlap(np.array([[500, 0, 501, 802]])) == pytest.approx([0.5])

    @pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
    def test_every_kind_of_picture(self, tmp_path, mode):
        """Also a palette that draws the lesions black, and an opaque background."""
        mask = np.zeros((80, 100), dtype=np.uint8)
        mask[:, 50:] = 255
        if mode == "P":
            picture = Image.fromarray(mask // 255, mode="P")
            picture.putpalette([255, 255, 255, 0, 0, 0])
        elif mode == "I;16":
            picture = Image.fromarray((mask // 255).astype(np.uint16))
        else:
            picture = Image.fromarray(mask).convert(mode)
        picture.save(tmp_path / "a.png")
        areas = read_annotation(tmp_path / "a.png", EXTENT)
        assert areas.overlap(tiles(100, (0, 4), (0, 5))).tolist() == [0, 1]

    @pytest.mark.parametrize("value", [1, 255])
    def test_levels_of_a_pyramid_are_taken_as_they_are(self, tmp_path, value):
        """The level at 1/4 misses a lesion that lies between its pixels, and shows a thin one."""
        mask = np.zeros((800, 1000), dtype=np.uint8)
        mask[:100, :50] = 1
        mask[401:403, 401:403] = 1  # between
        mask[600, 600] = 1
        write_pyramid(tmp_path / "a.tif", mask, values=value)
        areas = read_annotation(tmp_path / "a.tif", EXTENT)
        assert areas.overlap(tiles(100, (0, 0), (4, 4), (6, 6))).tolist() == [0.5, 4e-4, 1e-4]
        assert (areas.mask(4) == (mask[::4, ::4] > 0)).all()
        assert areas.mask(8).shape == (100, 125)  # not stored
        assert areas.mask(8)[:13, :6].all() and areas.mask(8).sum() == 13 * 6  # 12.5, and 6.25

    def test_a_tiff_without_tiles(self, tmp_path):
        mask = np.zeros((80, 100), dtype=np.uint8)
        mask[:, 50:] = 1
        tifffile.imwrite(tmp_path / "a.tiff", mask)
        areas = read_annotation(tmp_path / "a.tiff", EXTENT)
        assert areas.overlap(tiles(100, (0, 4), (0, 5))).tolist() == [0, 1]

    @pytest.mark.parametrize("suffix", [".png", ".tif"])
    def test_a_mask_read_in_blocks_equals_one_read_whole(self, tmp_path, monkeypatch, suffix):
        rng = np.random.default_rng(0)
        blobs = np.kron(rng.integers(0, 2, (13, 16)), np.ones((64, 64)))[:797, :1001]
        mask, path = blobs.astype(np.uint8), tmp_path / f"a{suffix}"
        if suffix == ".png":
            Image.fromarray(mask).save(path)
        else:
            write_pyramid(path, mask, downsamples=[1])
        assert (read_annotation(path, Extent((1001, 797), Mpp(0.5))).finest == (mask > 0)).all()
        monkeypatch.setattr(mask_module, "READ_BLOCK_PX", 128)
        monkeypatch.setattr(mask_module, "STRIP_PX", 10_000)
        assert (read_annotation(path, Extent((1001, 797), Mpp(0.5))).finest == (mask > 0)).all()
        monkeypatch.setattr(areas_module, "MAX_MASK_PX", 797 * 1001 - 1)
        with pytest.raises(InputError, match="1001 x 797 px without a smaller level; at most"):
            read_annotation(path, Extent((1001, 797), Mpp(0.5)))

    def test_the_finest_level_that_memory_holds(self, tmp_path, monkeypatch):
        mask = np.zeros((800, 1000), dtype=np.uint8)
        mask[::2, ::2] = 1  # a quarter at level 0, all of it at level 1
        write_pyramid(tmp_path / "a.tif", mask)
        assert read_annotation(tmp_path / "a.tif", EXTENT).finest.mean() == 0.25
        monkeypatch.setattr(areas_module, "MAX_MASK_PX", 500 * 400)
        areas = read_annotation(tmp_path / "a.tif", EXTENT)
        assert areas.finest.shape == (400, 500) and areas.finest.all()

    @pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16])
    @pytest.mark.parametrize("compression", [None, "zlib"])
    def test_the_two_ways_of_tiff_to_store_an_array_are_read_alike(
        self, tmp_path, dtype, compression
    ):
        mask = np.zeros((80, 100), dtype=dtype)
        mask[:10, 50:70] = 1
        for photometric in ("minisblack", "miniswhite"):
            path = tmp_path / f"{photometric}.tif"
            tifffile.imwrite(path, mask, photometric=photometric, compression=compression)
            assert (read_annotation(path, EXTENT).finest == mask.astype(bool)).all()
        tifffile.imwrite(path, (mask == 0).astype(dtype), photometric="miniswhite")
        with pytest.warns(UserWarning, match="most of it is marked by its stored values"):
            read_annotation(path, EXTENT)

    @pytest.mark.parametrize("mode", ["LA", "PA", "P", "RGBA", "1"])
    @pytest.mark.parametrize("colour", [0, 255], ids=["black", "white"])
    def test_a_mask_may_lie_in_alpha_alone(self, tmp_path, mode, colour):
        mask = np.zeros((80, 100), dtype=bool)
        mask[:10, 50:70] = True
        alpha = Image.fromarray(mask.astype(np.uint8) * 255)
        path, options = tmp_path / "a.png", {}
        if mode == "P":  # the first colour of its palette is the one that is seen
            picture = Image.fromarray((~mask).astype(np.uint8), mode="P")
            picture.putpalette([colour] * 6)
            options = {"transparency": b"\xff\x00"}
        elif mode == "1":
            picture, options = (
                Image.fromarray(mask if colour else ~mask),
                {"transparency": 255 - colour},
            )
        elif mode == "PA":
            picture, path = Image.new("LA", (100, 80), (colour, 0)), tmp_path / "a.tif"
            picture.putalpha(alpha)
        else:
            picture = Image.new(mode, (100, 80), (colour,) * len(mode))
            picture.putalpha(alpha)
        picture.save(path, **options)
        assert (read_annotation(path, EXTENT).finest == mask).all()

    @pytest.mark.parametrize("suffix", [".tif", ".tiff"])
    def test_a_mask_of_fractions_is_refused_by_name(self, tmp_path, suffix):
        path = tmp_path / f"a{suffix}"
        tifffile.imwrite(path, np.full((80, 100), 0.5, np.float32))
        with pytest.raises(InputError, match="its pixels are float32; save it as 8-bit grey"):
            read_annotation(path, EXTENT)

    def test_a_pyramid_with_alpha_is_refused_by_name(self, tmp_path):
        path = tmp_path / "a.tif"
        pixels = np.zeros((800, 1000, 4), np.uint8)
        tifffile.imwrite(
            path, pixels, tile=(256, 256), photometric="rgb", extrasamples=["unassalpha"]
        )
        with pytest.raises(InputError, match="with alpha"):
            read_annotation(path, EXTENT)

    def test_a_mask_of_another_shape_is_refused(self, tmp_path):
        Image.new("L", (100, 81)).save(tmp_path / "a.png")  # within a pixel
        read_annotation(tmp_path / "a.png", EXTENT)
        Image.new("L", (80, 100)).save(tmp_path / "a.png")
        with pytest.raises(InputError, match="80 x 100 px does not have the shape of the slide"):
            read_annotation(tmp_path / "a.png", EXTENT)

    def test_a_mask_with_several_classes_is_refused(self, tmp_path):
        """Camelyon17's masks hold tissue too; which value is the lesions' nobody says."""
        mask = np.zeros((800, 1000), dtype=np.uint8)
        mask[:100], mask[300:400] = 1, 2
        write_pyramid(tmp_path / "a.tif", mask)
        with pytest.raises(InputError, match="holds the values 1, 2; save it with 0 and one value"):
            _ = read_annotation(tmp_path / "a.tif", EXTENT).finest

    def test_pixels_whose_values_would_change_are_refused(self, tmp_path):
        """Of 16 bits OpenSlide shows the upper 8: a lesion of value 1 would vanish."""
        mask = np.ones((800, 1000), dtype=np.uint16)
        write_pyramid(tmp_path / "a.tif", mask)
        with pytest.raises(InputError, match=r"pixels are 16 bits \(MINISBLACK\)"):
            read_annotation(tmp_path / "a.tif", EXTENT)
        write_pyramid(tmp_path / "a.tif", mask.astype(np.uint8), photometric="miniswhite")
        with pytest.raises(InputError, match=r"pixels are 8 bits \(MINISWHITE\)"):
            read_annotation(tmp_path / "a.tif", EXTENT)
        Image.fromarray(np.full((80, 100), 256, dtype=np.uint16)).save(tmp_path / "a.png")
        with pytest.raises(InputError, match="holds the value 256; save it as 8-bit grey"):
            read_annotation(tmp_path / "a.png", EXTENT)

    @pytest.mark.parametrize("name", ["a.png", "a.tif"])
    def test_no_picture_at_all(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"no picture")
        with pytest.raises(InputError, match=f"{name}: cannot be read as PNG or TIFF"):
            read_annotation(tmp_path / name, EXTENT)


class TestPoints:
    def test_a_tile_holds_its_left_and_top_edge(self):
        points = Points(np.array([(0, 0), (99.5, 99.5), (100, 0), (0, 100), (250, 50.0), (1, 1)]))
        boxes = tiles(100, (0, 0), (0, 1), (1, 0), (0, 2), (5, 5))
        assert points.overlap(boxes).tolist() == [3, 1, 1, 1, 0]
        assert points.positive(points.overlap(boxes)).tolist() == [True, True, True, True, False]

    def test_columns_other_than_x_and_y_are_not_read(self, tmp_path):
        (tmp_path / "a.csv").write_text("type,y,x\nepithelial,20,10\n,800,1000\n")
        points = read_annotation(tmp_path / "a.csv", EXTENT)
        assert points.xy_px0.tolist() == [[10, 20], [1000, 800]] and not points.is_empty

    def test_an_empty_table_says_that_there_is_nothing(self, tmp_path):
        (tmp_path / "a.csv").write_text("x,y\n")
        points = read_annotation(tmp_path / "a.csv", EXTENT)
        assert points.is_empty
        assert points.positive(points.overlap(tiles(100, (0, 0)))).tolist() == [False]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a,b\n1,2\n", "points need the columns x and y"),
            ("x,y\n1,two\n", "could not convert string to float: 'two'"),
            ("x,y\n1,2\n800,1000\n", "the point 800,1000 is outside the slide of 1000 x 800"),
            ("x,y\nnan,2\n", "the point nan,2 is outside"),
            ("x,y\n-1,2\n", "the point -1,2 is outside"),
        ],
    )
    def test_tables_that_are_not_points_of_the_slide(self, tmp_path, text, message):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            read_annotation(tmp_path / "a.csv", EXTENT)


@pytest.mark.parametrize(
    "name", ["a.xml", "a.csv", "a.geojson", "a.tif", "a.tiff", "a.png", "a_mask.tif"]
)
def test_the_annotation_of_a_slide_is_found_by_its_name(tmp_path, name):
    for other in ("b.xml", "ab.xml", "a.txt", "a.svs", ".a.xml"):
        (tmp_path / other).touch()
    assert find_truths(tmp_path, ["a"]) == {}
    (tmp_path / name).touch()
    assert find_truths(tmp_path, ["a", "a.b"]) == {"a": tmp_path / name}
    assert find_truths(tmp_path / "none", ["a"]) == {}


@pytest.mark.parametrize("name", [" b.xml", "b .csv", "b\u00a0_mask.TIF", " b.geojson.gz"])
def test_blanks_around_the_name_of_a_slide_are_no_part_of_it(tmp_path, name):
    """As of the slides: `` b.svs`` is the slide b."""
    (tmp_path / name).touch()
    assert find_truths(tmp_path, ["a", "b"]) == {"b": tmp_path / name}


def test_two_annotations_of_a_slide_are_refused(tmp_path):
    (tmp_path / "a.xml").touch()
    (tmp_path / "a_mask.tif").touch()
    with pytest.raises(InputError, match=r"a\.xml: a_mask\.tif is of the same slide; keep one"):
        find_truths(tmp_path, ["a"])


@pytest.mark.parametrize("name", ["a.XML", "a.CSV", "a.GEOJSON", "a_mask.TIF", "a.PNG"])
def test_suffixes_in_capitals_are_found_and_read(tmp_path, name):
    path = tmp_path / name
    if name.endswith(("TIF", "PNG")):
        mask = Image.new("L", (100, 80))
        mask.save(path, format="TIFF" if name.endswith("TIF") else "PNG")
    else:
        empty = '{"type": "FeatureCollection", "features": []}'
        text = {".XML": asap(), ".CSV": "x;y\n1,5;2\n", ".GEOJSON": empty}
        path.write_text(text[path.suffix])
    assert find_truths(tmp_path, ["a"]) == {"a": path}
    assert read_annotation(path, EXTENT).is_empty == (not name.endswith("CSV"))
    assert marks_points(path) == name.endswith("CSV")
    assert class_names(path) == set()
