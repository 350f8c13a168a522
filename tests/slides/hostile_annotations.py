"""Sound annotations of a slide of 1000 x 800 px, and how a stranger's hand changes them."""

import gzip
import io
import json
import re

import numpy as np
import tifffile
from PIL import Image

INSERTS = (
    *(b"", b"0", b"-1", b"5", b"1e300", b"-1e300", b"NaN", b"Infinity", b"9" * 400, b'""', b"'"),
    *(b"[]", b"{}", b"[" * 50, b"]", b"null", b"true", b'"x"', b"\0", b"\x1b[31m", b"\xff\xfe"),
    *(b"<a>", b"</a>", b"&a;", b'<!DOCTYPE a [<!ENTITY a "b">]>', b"\xed\xa0\x80", b"a" * 300),
    *(b'{"type":"GeometryCollection","geometries":5}', b'{"type":[]}', b"[[[[1,2],[3,4]]]]"),
)
VALUES = (
    *(None, True, 0, -1, 5, 0.5, 1e300, -1e300, 10**400, float("nan"), float("inf"), "", "5"),
    *("x" * 300, "a\0b", "\x1b[31m", [], {}, [[]], [[[1, 2], [3, 4]]], [1], {"type": []}),
    *({"type": "GeometryCollection", "geometries": 5}, {"name": {}}, {"names": [[]]}, "Tumor"),
)
TOKEN = re.compile(rb'-?\d+(?:\.\d+)?|"[^"]*"|null|[\[{][^\[\]{}]*[\]}]')


def seeds(kind: str) -> list[tuple[str, bytes]]:
    """Names and contents of sound files: ``geojson``, ``xml``, ``mask`` or ``csv``."""
    return {"geojson": _geojson, "xml": _xml, "mask": _masks, "csv": _csv}[kind]()


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One or two changes; in half of the texts only values change, so that they can be parsed."""
    if rng.random() < 0.5:
        if data.startswith(b"{"):
            return _mutate_json(data, rng)
        if data.startswith(b"<?xml"):
            return _mutate_attributes(data, rng)
    for _ in range(rng.integers(1, 3)):
        at = int(rng.integers(len(data) + 1))
        length = int(rng.integers(1, 40))
        insert = INSERTS[int(rng.integers(len(INSERTS)))]
        token = TOKEN.search(data, at)
        if token and rng.random() < 0.7:
            other = TOKEN.search(data, int(rng.integers(len(data))))
            put = other[0] if other and rng.random() < 0.6 else insert
            data = data[: token.start()] + put + data[token.end() :]
            continue
        match rng.integers(6):
            case 0:
                data = data[:at] + data[at + length :]
            case 1:
                data = data[:at] + data[at : at + length] * int(rng.integers(2, 30)) + data[at:]
            case 2:
                data = data[:at] + insert + data[at:]
            case 3 if rng.random() < 0.3:
                data = data[:at]
            case 4:
                data = data[:at] + rng.bytes(length) + data[at + length :]
            case _ if at < len(data):
                flipped = bytes([data[at] ^ (1 << int(rng.integers(8)))])
                data = data[:at] + flipped + data[at + 1 :]
    return data


def _mutate_json(data: bytes, rng: np.random.Generator) -> bytes:
    """Put another value, or one from elsewhere in the file, into a few places."""
    tree = json.loads(data)
    for _ in range(rng.integers(1, 3)):
        places = []
        waiting = [tree]
        while waiting:
            each = waiting.pop()
            keys = list(each) if isinstance(each, dict) else range(len(each))
            places += [(each, key) for key in keys]
            waiting += [each[key] for key in keys if isinstance(each[key], dict | list)]
        inside, key = places[rng.integers(len(places))]
        other, its_key = places[rng.integers(len(places))]
        values = [VALUES[rng.integers(len(VALUES))], json.loads(json.dumps(other[its_key]))]
        inside[key] = values[int(rng.random() < 0.3)]
    return json.dumps(tree).encode()


def _mutate_attributes(data: bytes, rng: np.random.Generator) -> bytes:
    """Put other values, or those of another attribute, into a few attributes."""
    for _ in range(rng.integers(1, 4)):
        found = list(re.finditer(rb'"[^"<]*"', data[50:]))  # what is before is the declaration
        at, other = found[rng.integers(len(found))], found[rng.integers(len(found))]
        insert = INSERTS[rng.integers(len(INSERTS))]
        put = other[0] if rng.random() < 0.4 else b'"' + insert.translate(None, b'"<&\0') + b'"'
        data = data[: 50 + at.start()] + put + data[50 + at.end() :]
    return data


def _geojson() -> list[tuple[str, bytes]]:
    ring = [[10, 10], [500.5, 20], [480, 700], [30, 650], [10, 10]]
    hole = [[100, 100], [200, 100], [200, 200], [100, 200]]

    def feature(kind, coordinates, name="Tumor", **properties):
        geometry = {"type": kind, "coordinates": coordinates}
        properties = {"objectType": "annotation", "classification": {"name": name}, **properties}
        return {"type": "Feature", "id": "a", "geometry": geometry, "properties": properties}

    areas = {
        "type": "FeatureCollection",
        "features": [
            feature("Polygon", [ring, hole], name="Tumor"),
            feature("MultiPolygon", [[hole], [ring]], childObjects=[feature("Polygon", [hole])]),
            feature("Polygon", [hole], "Ignore*"),
            {"type": "Feature", "geometry": None, "properties": {"objectType": "cell"}},
            {
                "type": "Feature",
                "geometry": {
                    "type": "GeometryCollection",
                    "geometries": [{"type": "Polygon", "coordinates": [hole]}],
                },
                "properties": {"classification": {"names": ["Tumor", "Positive"]}},
            },
        ],
    }
    points = [feature("Point", [5, 7.5]), feature("MultiPoint", ring)]
    parent = feature("Polygon", [ring])
    parent["properties"]["classification"] = {"name": "Negative", "parentClass": {"name": "Tumor"}}
    texts = [json.dumps(each).encode() for each in (areas, points, parent)]
    return [
        *(("a.geojson", text) for text in texts),
        ("a.json", texts[0].decode().encode("utf-16")),
        ("a.geojson.gz", gzip.compress(texts[0])),
    ]


def _xml() -> list[tuple[str, bytes]]:
    corners = [(10, 10), (500.5, 20), (480, 700), (30, 650)]

    def annotation(group: str, kind: str, factor: float) -> str:
        lines = [
            f'<Coordinate Order="{order}" X="{x * factor}" Y="{y * factor}" />'
            for order, (x, y) in enumerate(corners)
        ]
        return (
            f'<Annotation Name="Annotation {group}" Type="{kind}" PartOfGroup="{group}" '
            f'Color="#F4FA58">\n<Coordinates>{"".join(lines)}</Coordinates></Annotation>'
        )

    marked = ("Tumor", "Polygon", 1), ("_2", "Spline", 0.5), ("_0", "Rectangle", 0.1)
    annotations = "".join(annotation(*each) for each in marked)
    text = (
        f"<ASAP_Annotations><Annotations>{annotations}</Annotations><AnnotationGroups>"
        '<Group Name="Tumor" PartOfGroup="None" Color="#00ff00"><Attributes /></Group>'
        "</AnnotationGroups></ASAP_Annotations>"
    )
    head = '<?xml version="1.0" encoding="{}"?>\n'
    return [
        ("a.xml", (head.format(name) + text).encode(name))
        for name in ("utf-8", "iso-8859-1", "utf-16")
    ]


def _masks() -> list[tuple[str, bytes]]:
    mask = np.zeros((80, 100), dtype=np.uint8)
    mask[10:40, 50:70] = 1
    found = []
    for mode in ("1", "L", "P", "LA", "RGB", "RGBA", "I;16"):
        picture = Image.fromarray(mask * 255)
        picture = picture.convert(mode) if mode != "I;16" else Image.fromarray(mask.astype("u2"))
        for name, kind in (("a.png", "PNG"), ("a.tif", "TIFF")):
            file = io.BytesIO()
            picture.save(file, kind)
            found.append((name, file.getvalue()))
    for options in (
        {"compression": "zlib"},
        {"compression": "zlib", "photometric": "miniswhite"},
        {"tile": (16, 16), "compression": "zlib"},
        {"tile": (16, 16), "compression": "zlib", "bigtiff": True},
        {"tile": (32, 32), "compression": "zlib", "byteorder": ">"},
    ):
        file = io.BytesIO()
        big = {key: options.pop(key) for key in ("bigtiff", "byteorder") if key in options}
        with tifffile.TiffWriter(file, **big) as tiff:
            for step in (1, 2):
                tiff.write(
                    mask[::step, ::step],
                    metadata=None,
                    subfiletype=int(step > 1),
                    **{"photometric": "minisblack", **options},
                )
        found.append(("a.tif", file.getvalue()))
    return found


def _csv() -> list[tuple[str, bytes]]:
    text = "type,x,y\na,10,20.5\nb,999,0\n"
    return [
        ("a.csv", text.encode()),
        ("a.csv", text.encode("utf-16")),
        ("a.csv", b"sep=;\r\nx;y\r\n1,5;2\r\n"),
    ]
