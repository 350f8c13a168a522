"""Annotations of strangers: a sentence or the right marks, in bounded memory."""

import gzip
import json
import os
import tracemalloc
import warnings
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from PIL import Image
from slides.hostile_annotations import mutate, seeds

from dasmil.errors import InputError
from dasmil.geometry import Extent
from dasmil.slides.annotation import (
    areas,
    class_names,
    find_truths,
    limits,
    marks_points,
    read_annotation,
)
from dasmil.slides.annotation import (
    mask as mask_module,
)
from dasmil.units import Mpp

SIZE = (1000, 800)  # width and height of the slide
EXTENT = Extent(SIZE, Mpp(0.5))


def feature(coordinates, kind="Polygon"):
    geometry = {"type": kind, "coordinates": coordinates}
    return {"type": "Feature", "geometry": geometry, "properties": {"classification": "Tumor"}}


def read(tmp_path, content, name="a.geojson", extent=EXTENT):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_annotation(path, extent)


def fill_at_once(mask, rings, value):
    """As polygons were filled before the memory was bounded."""
    start = np.concatenate(rings) - 0.5
    end = np.concatenate([np.roll(xy, -1, axis=0) for xy in rings]) - 0.5
    first, last = (
        np.clip(np.ceil(bound(start[:, 1], end[:, 1])).astype(int), 0, len(mask))
        for bound in (np.minimum, np.maximum)
    )
    edge = np.repeat(np.arange(len(start)), last - first)
    row = np.concatenate([np.arange(a, b) for a, b in zip(first, last)])
    (x0, y0), (x1, y1) = start[edge].T, end[edge].T
    crossing = np.ceil(x0 + (row - y0) * (x1 - x0) / (y1 - y0)).astype(int)
    order = np.lexsort((crossing, row))
    bounds = np.clip(crossing[order], 0, mask.shape[1]).reshape(-1, 2)
    for at, (left, right) in zip(row[order][::2].tolist(), bounds.tolist()):
        mask[at, left:right] = value


class TestFilling:
    @pytest.mark.parametrize("crossings", [5, 100, 2**20])
    def test_masks_are_those_that_are_filled_at_once(self, monkeypatch, crossings):
        """Random polygons with holes, overlaps and corners on the centres of pixels."""
        monkeypatch.setattr(areas, "BAND_CROSSINGS", crossings)
        rng = np.random.default_rng(0)

        def ring():
            corners = int(rng.integers(3, 12))
            if rng.random() < 0.5:
                return rng.uniform(-100, 300, (corners, 2))
            return rng.integers(-40, 440, (corners, 2)) / 2

        for _ in range(100):
            size = tuple(rng.integers(1, 200, 2).tolist())
            lesions, excluded = (
                [[ring() for _ in range(rng.integers(1, 4))] for _ in range(rng.integers(0, most))]
                for most in (6, 3)
            )
            found = areas.Polygons(size, lesions, excluded)
            for downsample in (1, 3.7):
                mask = found.mask(downsample)
                wanted = np.zeros_like(mask)
                for polygons, value in ((lesions, True), (excluded, False)):
                    for rings in polygons:
                        fill_at_once(wanted, [xy * (1 / downsample) for xy in rings], value)
                assert (mask == wanted).all()

    def test_memory_does_not_grow_with_the_rows_that_edges_cross(self):
        """4 million crossings took 600 MB."""
        x = np.arange(2000)
        found = areas.Polygons((2000, 2000), [[np.stack([x, x % 2 * 2000], axis=1)]])
        tracemalloc.start()
        try:
            marked = found.finest.mean()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert marked == 0.24975 and peak < 150e6

    @pytest.mark.parametrize("far", [1e7, 2.0**40])
    def test_far_corners_are_cut_off(self, tmp_path, far):
        """Also an edge at 45°, whose ends are cut, not moved; and on a slide of unknown size."""
        corners = [[-far, -far], [far, -far], [far, far], [-far, far]]
        assert read(tmp_path, feature([corners])).finest.all()
        mask = read(tmp_path, feature([[corners[0], corners[1], corners[2]]])).finest
        assert (mask == np.triu(np.ones(mask.shape, bool))).all()
        with pytest.raises(InputError, match=r"'annotation 1' reaches to .* further than any"):
            read(tmp_path, feature([corners]), extent=replace(EXTENT, size_is_known=False))

    def test_corners_beyond_any_slide_are_refused(self, tmp_path):
        with pytest.raises(InputError, match="annotation 1' are not all numbers on a slide"):
            read(tmp_path, feature([[[0, 0], [1e13, 0], [0, 1e13]]]))

    def test_a_zigzag_that_takes_minutes_is_refused(self, tmp_path):
        corners = [[number, number % 2 * 100_000] for number in range(10_000)]
        with pytest.raises(InputError, match=r"cross 1\d\d,\d{3},\d{3} rows of pixels, and 20,0"):
            read(tmp_path, feature([corners]), extent=Extent((100_000, 100_000), Mpp(0.5)))


class TestGeoJson:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"type": "GeometryCollection", "geometries": 5}, "is no geometry of GeoJSON, but"),
            ({"type": []}, "not GeoJSON of QuPath: holds"),
            (feature([[[0, 0], ["1", "2"], [3, 4]]]), r"pairs of numbers \(some are str\)"),
            (feature([[[[0, 0], [9, 0]], [[1, 1], [2, 2]], [[1, 1], [2, 2]]]]), "some are list"),
            (feature([[[0, 0], [10**400, 0], [3, 4]]]), "are not all pairs of numbers"),
            (b"[" * 900 + b"1" + b"]" * 900, "not GeoJSON"),
            (b"[" * 100_000, "not GeoJSON"),
            (b"\xff\xfe" + b"[]".decode().encode("utf-16-le") + b"\0", "not GeoJSON"),
        ],
    )
    def test_a_file_that_is_no_geojson_is_refused_in_one_sentence(self, tmp_path, content, message):
        if isinstance(content, dict) and "properties" not in content:
            content = {**feature([]), "geometry": content} if "geometries" in content else content
        with pytest.raises(InputError, match=message):
            read(tmp_path, content)

    def test_a_deep_collection_is_read(self, tmp_path):
        geometry = feature([[[0, 0], [1000, 0], [1000, 800], [0, 800]]])["geometry"]
        for _ in range(300):
            geometry = {"type": "GeometryCollection", "geometries": [geometry]}
        assert read(tmp_path, {**feature([]), "geometry": geometry}).finest.all()

    def test_a_value_of_the_file_is_shown_short_and_escaped(self, tmp_path):
        content = feature([[[0, 0], [9, 0], [9, 9]]])
        content["properties"] = {"classification": "\x1b[31m\0" + "x" * 300}
        with pytest.raises(
            InputError, match=r"unknown class '\\x1b\[31m\\x00x{30,60}…; les"
        ) as told:
            read(tmp_path, content)
        assert len(str(told.value)) < 500

    def test_a_bomb_is_not_unpacked(self, tmp_path, monkeypatch):
        monkeypatch.setattr(limits, "MAX_FILE_BYTES", 2_000_000)
        tracemalloc.start()
        try:
            with pytest.raises(InputError, match=r"a\.geojson\.gz: larger than 2 MB unpacked"):
                read(tmp_path, gzip.compress(b" " * 100_000_000), "a.geojson.gz")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 120e6  # the test's own 100 MB, and no second time

    def test_files_that_would_take_gigabytes_are_not_parsed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(json, "loads", lambda _: pytest.fail("it was parsed"))
        with pytest.raises(
            InputError, match=r"would take 1\.[12] GB of memory, more than the limit of 0\.7 GB"
        ):
            read(tmp_path, b"[" + b"[]," * 8_000_000 + b"[]]")

    def test_outlines_and_corners_are_counted(self, tmp_path, monkeypatch):
        monkeypatch.setattr(limits, "MAX_RINGS", 10)
        ring = [[0, 0], [9, 0], [9, 9]]
        read(tmp_path, feature([[ring]] * 10, "MultiPolygon"))
        for coordinates, kind in (([[ring]] * 11, "MultiPolygon"), ([ring] * 11, "Polygon")):
            with pytest.raises(InputError, match=r"a\.geojson: has more than 10 outlines"):
                read(tmp_path, feature(coordinates, kind))
        monkeypatch.setattr(limits, "MAX_CORNERS", 10)
        with pytest.raises(InputError, match=r"a\.geojson: has more than 10 corners"):
            read(tmp_path, feature([ring * 4]))


def xml(annotations, root="ASAP_Annotations", head=""):
    return f"{head}<{root}><Annotations>{annotations}</Annotations></{root}>".encode()


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))


class TestXml:
    @pytest.mark.parametrize(
        "head",
        [
            f'<!DOCTYPE a [<!ENTITY l0 "lol">{LAUGHS}]>',
            '<!DOCTYPE a [<!ENTITY l9 SYSTEM "file:///etc/hostname">]>',
            '<!DOCTYPE a SYSTEM "http://127.0.0.1:9/a.dtd">',
            '<!DOCTYPE a [<!ENTITY % p SYSTEM "http://127.0.0.1:9/a.dtd"> %p;]>',
        ],
    )
    def test_no_entity_is_declared(self, tmp_path, head, monkeypatch):
        monkeypatch.setattr("socket.socket", lambda *_: pytest.fail("a connection was opened"))
        content = xml('<Annotation Name="&l9;" Type="Polygon" PartOfGroup="_0"/>', head=head)
        with pytest.raises(InputError, match=r"a\.xml: declares a document type \(DOCTYPE\)"):
            read(tmp_path, content, "a.xml")

    @pytest.mark.parametrize(
        "encoding",
        ["utf-7", "idna", "rot13", "zlib", "big5", "utf-32", "none", "a\n", "x" * 300, "mbcs"],
    )
    def test_encodings_that_cannot_be_read(self, tmp_path, encoding):
        content = xml("", head=f'<?xml version="1.0" encoding="{encoding}"?>')
        with pytest.raises(InputError, match=r"a\.xml: not XML \(.*; export it from ASAP"):
            read(tmp_path, content, "a.xml")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (xml("<a>" * 200_000), "more than 100 nested elements"),
            (xml("".join(f"<a{n}/>" for n in range(11_000))), "more than 10,000 names of element"),
            (xml(f'<a b="{"x" * 3_000_000}"/>'), "a tag has no end"),
            (xml("<!--" + "x" * 3_000_000), "a tag has no end"),
            (xml("&undefined;"), "not XML"),
            (xml("", root="x" * 300), "its root is 'x{60}'…, not ASAP_Annotations"),
        ],
    )
    def test_files_that_asap_does_not_write(self, tmp_path, content, message):
        with pytest.raises(InputError, match=message):
            read(tmp_path, content, "a.xml")

    def test_elements_annotations_and_corners_are_counted(self, tmp_path, monkeypatch):
        monkeypatch.setattr("dasmil.slides.annotation.asap.MAX_OTHERS", 10)
        with pytest.raises(InputError, match="more than 10 elements other than corners"):
            read(tmp_path, xml("<a/>" * 9), "a.xml")
        monkeypatch.setattr(limits, "MAX_CORNERS", 5)
        corner = '<Coordinate Order="0" X="1" Y="2"/>'
        annotation = (
            f'<Annotation PartOfGroup="_0"><Coordinates>{corner * 6}</Coordinates></Annotation>'
        )
        with pytest.raises(InputError, match="more than 5 corners"):
            read(tmp_path, xml(annotation), "a.xml")


class TestMasks:
    def test_a_picture_that_unpacks_to_too_much_is_not_decoded(self, tmp_path, monkeypatch):
        monkeypatch.setattr(mask_module, "MAX_PICTURE_PX", 79_999)
        monkeypatch.setattr(Image.Image, "crop", lambda *_: pytest.fail("it was decoded"))
        for name in ("a.png", "a.tif"):
            Image.new("1", (1000, 80)).save(tmp_path / name)
            with pytest.raises(InputError, match=rf"{name}: a picture of 1000 x 80 px without til"):
                read_annotation(tmp_path / name, Extent((1000, 80), Mpp(0.5)))

    @pytest.mark.parametrize("kind", ["EPS", "BMP", "GIF", "JPEG", "PPM", "WEBP"])
    def test_other_formats_are_refused_whatever_the_name_says(self, tmp_path, kind):
        for name in ("a.png", "a.tif"):
            with open(tmp_path / name, "wb") as file:
                Image.new("L", (100, 80)).convert("RGB").save(file, format=kind)
            with pytest.raises(InputError, match=f"{name}: cannot be read as PNG or TIFF"):
                read_annotation(tmp_path / name, EXTENT)

    def test_giant_tiles_are_not_decoded(self, tmp_path, monkeypatch):
        monkeypatch.setattr(mask_module, "MAX_TILE_PX", 256 * 256 - 1)
        mask = np.zeros((800, 1000), dtype=np.uint8)
        tifffile.imwrite(tmp_path / "a.tif", mask, tile=(256, 256), compression="zlib")
        with pytest.raises(InputError, match=r"a\.tif: stored in tiles of 256 × 256 px"):
            read_annotation(tmp_path / "a.tif", EXTENT)


class TestPoints:
    def test_a_table_that_would_take_gigabytes_is_not_parsed(self, tmp_path):
        with pytest.raises(InputError, match=r"a\.csv: would take 1\.\d GB of memory"):
            read(tmp_path, b"x,y\n" + b"1,2\n" * 1_500_000, "a.csv")

    def test_a_table_with_very_many_columns(self, tmp_path):
        """Comparing each name with all others took minutes."""
        names = ",".join(map(str, range(200_000))).encode()
        with pytest.raises(InputError, match="points need the columns x and y"):
            read(tmp_path, names, "a.csv")


@pytest.mark.parametrize("name", ["a.xml", "a.csv", "a.geojson", "a.geojson.gz", "a.tif", "a.png"])
def test_a_file_that_is_not_regular_is_refused_by_name(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert find_truths(tmp_path, ["a"]) == {"a": tmp_path / name}
    for open_file in (lambda path: read_annotation(path, EXTENT), marks_points, class_names):
        for path in (tmp_path / name, tmp_path, tmp_path / f"{'n' * 300}{name}"):
            with pytest.raises(InputError, match="give an annotation of a slide"):
                open_file(path)
        with pytest.raises(InputError, match="give an annotation of a slide"):
            open_file(tmp_path / f"a\0{name}")


@pytest.mark.parametrize("kind", ["geojson", "xml", "mask", "csv"])
def test_mutated_files_are_read_or_refused(tmp_path, kind):
    """No traceback; 3,500 of each kind were tried by hand, and none gave any."""
    rng, samples = np.random.default_rng(0), seeds(kind)
    for name, data in samples:
        (tmp_path / name).write_bytes(data)
        assert not read_annotation(tmp_path / name, EXTENT).is_empty
    refused = 0
    for number in range(300):
        name, data = samples[number % len(samples)]
        path = tmp_path / name
        path.write_bytes(mutate(data, rng))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                marks_points(path)
                class_names(path)
                found = read_annotation(path, EXTENT)
                assert found.is_empty or found.overlap(np.array([[0, 0, *SIZE]])).min() >= 0
            except InputError as error:
                refused += 1
                assert len(str(error)) < 800
    assert 50 < refused < 300
