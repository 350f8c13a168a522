"""QuPath's GeoJSON: what is marked, and shares of tiles whose areas are known by arithmetic."""

import gzip
import json

import numpy as np
import pytest

from dasmil.errors import InputError
from dasmil.geometry import Extent
from dasmil.slides.annotation import (
    Points,
    Polygons,
    areas,
    class_names,
    find_truths,
    marks_points,
    read_annotation,
)
from dasmil.units import Mpp

EXTENT = Extent((1000, 800), Mpp(0.5))


def ring(left, top, right, bottom):
    """Closed, as GeoJSON wants it."""
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def polygon(*rings):
    return {"type": "Polygon", "coordinates": [list(each) for each in rings]}


def feature(geometry, classification="Tumor", **properties):
    if isinstance(classification, str):
        classification = {"name": classification, "color": [200, 0, 0]}
    if classification is not None:
        properties["classification"] = classification
    return {
        "type": "Feature",
        "id": "6f9a5c3e-0e0b-4a6e-8b8e-6d7f6f0e9c11",
        "geometry": geometry,
        "properties": {"objectType": "annotation", **properties},
    }


def collection(*features):
    return {"type": "FeatureCollection", "features": list(features)}


def read(tmp_path, content, name="a.geojson", **options):
    path = tmp_path / name
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return read_annotation(path, EXTENT, **options)


def share(found, *boxes):
    return found.overlap(np.array(boxes)).tolist()


LEFT = polygon(ring(0, 0, 50, 100))  # half of the first tile of 100 px
FIRST = (0, 0, 100, 100)


class TestAreas:
    def test_a_hole_is_not_marked(self, tmp_path):
        """100 x 100 px less 50 x 50; the second box cuts the hole in halves."""
        found = read(tmp_path, collection(feature(polygon(ring(*FIRST), ring(25, 25, 75, 75)))))
        assert share(found, FIRST, (0, 0, 50, 100), (30, 30, 60, 60)) == [0.75, 0.75, 0]

    def test_rings_that_are_not_closed_are_closed_each_for_itself(self, tmp_path):
        rings = [corners[:-1] for corners in (ring(*FIRST), ring(25, 25, 75, 75))]
        found = read(tmp_path, collection(feature(polygon(*rings))))
        assert share(found, FIRST, (0, 0, 25, 25)) == [0.75, 1]

    def test_every_part_of_a_multipolygon_counts_with_its_own_holes(self, tmp_path):
        """Of 200 x 100 px: 60 x 100 less 20 x 50, and 40 x 100; an island inside the hole."""
        parts = [
            [ring(0, 0, 60, 100), ring(20, 25, 40, 75)],
            [ring(160, 0, 200, 100)],
            [ring(25, 40, 35, 50)],
        ]
        geometry = {"type": "MultiPolygon", "coordinates": parts}
        found = read(tmp_path, collection(feature(geometry)))
        marked = 60 * 100 - 20 * 50 + 40 * 100 + 10 * 10
        assert share(found, (0, 0, 200, 100)) == [pytest.approx(marked / 20_000)]

    def test_a_collection_of_geometries_is_all_of_them(self, tmp_path):
        geometries = [LEFT, {"type": "MultiPolygon", "coordinates": [[ring(90, 0, 100, 100)]]}]
        geometry = {"type": "GeometryCollection", "geometries": geometries}
        assert share(read(tmp_path, collection(feature(geometry))), FIRST) == [0.6]

    def test_annotations_that_overlap_count_once(self, tmp_path):
        """Also where the hole of one lies in the other."""
        holed = feature(polygon(ring(*FIRST), ring(25, 25, 75, 75)))
        found = read(tmp_path, collection(holed, feature(LEFT)))
        assert share(found, FIRST) == [1 - 25 * 50 / 10_000]

    def test_holes_at_a_sixteenth_of_a_large_slide(self):
        """16 px a pixel of the mask: shares are still those of the areas."""
        outline, hole = np.array(ring(0, 0, 512, 512)), np.array(ring(256, 0, 512, 256))
        found = Polygons((200_000, 200_000), [[outline, hole]])
        assert found.finest.size <= areas.MAX_MASK_PX
        assert share(found, (0, 0, 512, 512), (256, 0, 512, 256)) == [0.75, 0]

    def test_a_slide_whose_size_the_mask_does_not_divide(self, monkeypatch):
        """A mask of 126 x 100 for 1012 x 804 px: its last column reaches to the slide's edge."""
        monkeypatch.setattr(areas, "MAX_MASK_PX", 13_000)
        found = Polygons((1012, 804), [[np.array(ring(1006, 0, 1012, 804))]])
        assert found.finest.shape == (100, 126)
        assert share(found, (1006, 0, 1012, 804), (800, 0, 1000, 804)) == [pytest.approx(1), 0]

    def test_extra_numbers_and_shapes_without_area_are_ignored(self, tmp_path):
        tall = polygon([[x, y, 7] for x, y in ring(0, 0, 50, 100)])
        flat = polygon([[0, 0], [100, 100]])
        found = read(tmp_path, collection(feature(tall), feature(flat), feature(polygon())))
        assert share(found, FIRST) == [0.5]


class TestForms:
    """The ways in which a file may hold annotations."""

    @pytest.mark.parametrize(
        "content",
        [
            collection(feature(LEFT)),
            [feature(LEFT)],
            feature(LEFT),
            collection(feature(polygon(ring(*FIRST)), "Region*", childObjects=[feature(LEFT)])),
            {"type": "Feature", "geometry": LEFT, "properties": {"classification": "Tumor"}},
            {**feature(LEFT), "id": "PathAnnotationObject"},
        ],
        ids=["collection", "list", "feature", "nested", "plain", "0.2"],
    )
    @pytest.mark.parametrize("name", ["a.geojson", "a.json", "a.geojson.gz"])
    def test_a_file_of_one_lesion(self, tmp_path, content, name):
        assert share(read(tmp_path, content, name), FIRST) == [0.5]
        assert find_truths(tmp_path, ["a"]) == {"a": tmp_path / name}

    def test_an_export_of_qupath_as_it_is(self, tmp_path):
        """Version 0.5: a locked annotation, its cells, and the outline of the tissue."""
        text = """{"type":"FeatureCollection","features":[
        {"type":"Feature","id":"1d0cf5a9-7ff4-4d4b-8e57-4c1f5e1c9d11","geometry":{"type":"Polygon",
         "coordinates":[[[0.0, 0.0],[1000.0, 0.0],[1000.0, 800.0],[0.0, 800.0],[0.0, 0.0]]]},
         "properties":{"objectType":"annotation","classification":{"name":"Region*",
         "color":[0, 0, 180]},"isLocked":true}},
        {"type":"Feature","id":"9b0c2c0e-8a64-4d5e-9c0c-1f8a0c3a4b22","geometry":{"type":"Polygon",
         "coordinates":[[[50, 0],[100, 0],[100, 100],[50, 100],[50, 0]]],"isEllipse":true,
         "plane":{"c":-1,"z":0,"t":0}},"properties":{"objectType":"annotation","name":"met 1",
         "color":[1, 2, 3],"classification":{"name":"Tumor","color":[200, 0, 0]},
         "measurements":{"Num Detections":1.0},"metadata":{"ANNOTATION_DESCRIPTION":"x"}}},
        {"type":"Feature","id":"5e2f1c7a-1f4e-4a0e-b3b7-0a1b2c3d4e33","geometry":{"type":"Polygon",
         "coordinates":[[[0, 0],[20, 0],[20, 20],[0, 20],[0, 0]]]},"nucleusGeometry":
         {"type":"Polygon","coordinates":[[[5, 5],[9, 5],[9, 9],[5, 9],[5, 5]]]},
         "properties":{"objectType":"cell","classification":{"names":["Tumor","Positive"],
         "color":[200, 0, 0]}}}]}"""
        assert share(read(tmp_path, b"\xef\xbb\xbf" + text.encode()), FIRST) == [0.5]
        assert class_names(tmp_path / "a.geojson") == {"Region*", "Tumor"}

    def test_nothing_is_marked_in_an_empty_collection(self, tmp_path):
        found = read(tmp_path, collection())
        assert isinstance(found, Polygons) and found.is_empty

    @pytest.mark.parametrize("kind", ["detection", "cell", "tile", "tmaCore"])
    def test_objects_of_qupath_are_no_annotations(self, tmp_path, kind):
        """Beside annotations they are left out; alone they would say that nothing is marked."""
        found = feature(polygon(ring(*FIRST)), objectType=kind)
        assert share(read(tmp_path, collection(feature(LEFT), found)), FIRST) == [0.5]
        with pytest.raises(InputError, match=r"a\.geojson: no annotation, only .* \(1 of the kin"):
            read(tmp_path, collection(found))

    def test_objects_of_version_0_2_are_known_by_their_id(self, tmp_path):
        old = feature(polygon(ring(*FIRST)))
        del old["properties"]["objectType"]
        found = collection(feature(LEFT), {**old, "id": "PathCellObject"})
        assert share(read(tmp_path, found), FIRST) == [0.5]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{", "a.geojson: not GeoJSON"),
            (b"\xff\xfe\xff", "a.geojson: not GeoJSON"),
            (b"[" * 100_000, "a.geojson: not GeoJSON"),
            ({"type": "Topology"}, "not GeoJSON of QuPath: holds {'type': 'Topology'} instead"),
            ([1], "not GeoJSON of QuPath: holds 1 instead"),
            (feature(None, name="met"), "'met' has no geometry"),
            (feature({"type": "Circle", "coordinates": [1, 2]}), "'annotation 1' is no geometry"),
            (feature({"type": "Polygon", "coordinates": None}), "'annotation 1' is no geometry"),
            (feature(polygon([[0, "x"], [1, 2], [3, 4]])), "'annotation 1' are not all pairs"),
            (feature({"type": "MultiPolygon", "coordinates": [1]}), "are not all pairs of numbers"),
            (feature(polygon([[0], [1, 2], [3, 4]])), "are not all pairs of numbers"),
            (feature(polygon([[0, float("nan")], [1, 2], [3, 4]])), "'annotation 1' are not all n"),
            (feature(polygon(ring(1001, 0, 1200, 9))), "'annotation 1' is outside the slide of"),
            (feature(LEFT, ["Tumor"]), r"classification of 'annotation 1' is \['Tumor'\]"),
        ],
    )
    def test_files_that_are_not_annotations_of_the_slide(self, tmp_path, content, message):
        with pytest.raises(InputError, match=message):
            read(tmp_path, content)

    def test_a_file_that_is_not_compressed(self, tmp_path):
        (tmp_path / "a.geojson.gz").write_text(json.dumps(collection()))
        with pytest.raises(InputError, match=r"a\.geojson\.gz: cannot be read \(Not a gzipped"):
            read_annotation(tmp_path / "a.geojson.gz", EXTENT)


class TestClasses:
    @pytest.mark.parametrize(
        "classification",
        [
            *("Tumor", "tumour", "LESION", "Metastasis", "Metastases", "Positive", "Carcinoma"),
            {"name": "Tumor", "colorRGB": -3670016},
            {"names": ["Tumor", "Positive"], "color": [200, 0, 0]},
            {"name": "Negative", "colorRGB": 1, "parentClass": {"name": "Tumor", "colorRGB": 2}},
            {"name": "Tumor: Negative", "color": [0, 0, 0]},
        ],
        ids=str,
    )
    def test_classes_of_lesions(self, tmp_path, classification):
        assert share(read(tmp_path, feature(LEFT, classification)), FIRST) == [0.5]

    def test_a_class_may_be_a_text(self, tmp_path):
        content = feature(LEFT)
        content["properties"]["classification"] = "Tumor: Positive"
        assert share(read(tmp_path, content), FIRST) == [0.5]

    @pytest.mark.parametrize(
        "name", ["Region*", "Stroma", "Immune cells: Positive", "Necrosis", "Other", "Artefact*"]
    )
    def test_other_classes_change_nothing(self, tmp_path, name):
        """Neither on their own nor over a lesion."""
        other = feature(polygon(ring(0, 0, 75, 100)), name)
        assert share(read(tmp_path, collection(feature(LEFT), other)), FIRST) == [0.5]

    @pytest.mark.parametrize("name", ["Ignore*", "Exclusion", "normal"])
    def test_some_are_cut_out_wherever_they_stand_in_the_file(self, tmp_path, name):
        cut = feature(polygon(ring(0, 0, 100, 25)), name)
        assert share(read(tmp_path, collection(cut, feature(LEFT))), FIRST) == [0.375]

    def test_a_class_that_is_not_known_is_refused_by_name(self, tmp_path):
        content = collection(feature(LEFT, "Epithelium", name="gland"))
        with pytest.raises(InputError, match=r"'gland' has .* 'Epithelium'; .* '\[\"Tumor: "):
            read(tmp_path, content)
        assert share(read(tmp_path, content, lesions=["epithelium"]), FIRST) == [0.5]

    @pytest.mark.parametrize("classification", [None, {}, {"names": []}])
    def test_an_annotation_without_a_class_is_refused(self, tmp_path, classification):
        """QuPath's own outline of the tissue has none."""
        content = feature(LEFT, classification)
        with pytest.raises(InputError, match=r"has no class; .* --truth_classes '\[None\]'"):
            read(tmp_path, content)
        assert share(read(tmp_path, content, lesions=["None"]), FIRST) == [0.5]

    def test_the_classes_that_are_asked_for_are_the_only_lesions(self, tmp_path):
        """What is cut out stays cut out, unless it is asked for."""
        content = collection(
            feature(LEFT),
            feature(polygon(ring(50, 0, 100, 100)), "Gland"),
            feature(polygon(ring(0, 50, 100, 100)), "Ignore*"),
            feature(polygon(ring(0, 0, 100, 10)), "Ducts"),
            feature(polygon(ring(0, 0, 100, 10)), None),
        )
        boxes = (0, 0, 50, 100), (50, 0, 100, 100)
        assert share(read(tmp_path, content, lesions=["gland"]), *boxes) == [0, 0.5]
        assert share(read(tmp_path, content, lesions=["Gland", " TUMOR"]), *boxes) == [0.5, 0.5]
        assert share(read(tmp_path, content, lesions=["Ignore*"]), *boxes) == [0.5, 0.5]

    def test_a_derived_class_can_be_asked_for_as_a_whole(self, tmp_path):
        content = collection(
            feature(LEFT, {"names": ["Tumor", "Positive"]}),
            feature(polygon(ring(50, 0, 100, 100)), {"names": ["Tumor", "Negative"]}),
        )
        found = read(tmp_path, content, lesions=["Tumor: Positive"])
        assert share(found, (0, 0, 50, 100), (50, 0, 100, 100)) == [1, 0]


class TestPoints:
    def test_points_are_counted_as_those_of_a_table(self, tmp_path):
        content = collection(
            feature({"type": "Point", "coordinates": [10.5, 20]}),
            feature({"type": "MultiPoint", "coordinates": [[99, 99], [100, 0], [500, 500]]}),
            feature({"type": "Point", "coordinates": [11, 21]}, "Stroma"),
            feature({"type": "MultiPoint", "coordinates": []}),
        )
        found = read(tmp_path, content)
        assert isinstance(found, Points) and marks_points(tmp_path / "a.geojson")
        assert share(found, FIRST, (100, 0, 200, 100), (200, 0, 300, 100)) == [2, 1, 0]

    def test_points_of_other_classes_leave_areas_as_they_are(self, tmp_path):
        content = collection(
            feature({"type": "Point", "coordinates": [10, 20]}, "Stroma"), feature(LEFT)
        )
        assert share(read(tmp_path, content), FIRST) == [0.5]
        assert not marks_points(tmp_path / "a.geojson")
        assert marks_points(tmp_path / "a.geojson", ["Stroma"])

    @pytest.mark.parametrize(
        ("features", "message"),
        [
            ([{"type": "Point", "coordinates": [1, 2]}, LEFT], "by points and by areas; keep one"),
            ([{"type": "Point", "coordinates": [1001, 2]}], "the point 1001,2 is outside"),
            ([{"type": "Point", "coordinates": []}], "are not all pairs of numbers"),
            ([{"type": "LineString", "coordinates": [[1, 2], [3, 4]]}], "is a line, without an ar"),
            ([{"type": "MultiLineString", "coordinates": [[[1, 2]]]}], "is a line, without an are"),
        ],
    )
    def test_files_with_neither_areas_nor_points(self, tmp_path, features, message):
        with pytest.raises(InputError, match=message):
            read(tmp_path, collection(*map(feature, features)))

    def test_lines_of_other_classes_change_nothing(self, tmp_path):
        line = feature({"type": "LineString", "coordinates": [[1, 2], [3, 4]]}, "Other")
        assert share(read(tmp_path, collection(line, feature(LEFT))), FIRST) == [0.5]
