"""For every kind of file: sound ones to begin with, how they are mutated, and who reads them."""

import gzip
import io
import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bag_factory import make_bag
from dicoms import write_dicom
from feature_files import CELLS, ancestors, write_trident
from jpegs import picture, write_jpeg_pyramid
from models import make_module
from PIL import Image

from dasmil.bags import bag_graph, read_bag, write_bag
from dasmil.demo.slides import write_pyramid
from dasmil.embedding.extractor import load_extractor
from dasmil.embedding.networks import vit_backbone
from dasmil.errors import InputError
from dasmil.geometry import Extent
from dasmil.interop.features.trident import trident
from dasmil.methods import load
from dasmil.slides.annotation import class_names, marks_points, read_annotation
from dasmil.slides.annotation.points import Points
from dasmil.slides.cohort import SlideRow, read_cohort
from dasmil.slides.cutting import TileCutter
from dasmil.slides.pyramid import TilingParameters, lay_tiles
from dasmil.slides.reader import Slide
from dasmil.slides.splits import read_split_table
from dasmil.slides.tile_slide import tile_slide
from dasmil.slides.tile_table import read_tiles, write_tiles
from dasmil.slides.tissue import TissueParameters
from dasmil.units import Mpp, Scale
from dasmil.work.status import Status
from dasmil.work.worker import Worker
from fuzz.mutations import (
    Mutation,
    mutate_bytes,
    mutate_json,
    mutate_safetensors,
    mutate_text,
    mutate_value,
)

SIZE_PX0 = (512, 384)
EXTENT = Extent(SIZE_PX0, Mpp(0.5))
PARAMETERS = TilingParameters(("x10", "x20"), tile_px=32, tissue=TissueParameters(mpp=4.0))


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Parameters
    ----------
    make: writes the sound files into a folder; returns them.
    mutate: bytes and a source of chance → other bytes.
    read: reads a file as a verb does for one row; writes into the folder that it is given.
    """

    make: Callable[[Path], list[Path]]
    mutate: Mutation
    read: Callable[[Path, Path], None]


# Slides


def _tissue() -> np.ndarray:
    pixels = picture(*SIZE_PX0)
    pixels[..., 1] //= 2  # as eosin and haematoxylin are: little green
    pixels[:64], pixels[:, :64] = 255, 255
    return pixels


def _tiffs(folder: Path) -> list[Path]:
    Image.fromarray(_tissue()).save(folder / "striped.tif", compression="jpeg")
    write_pyramid(folder / "pyramid.tiff", _tissue(), 0.5, (1, 2))
    write_jpeg_pyramid(folder / "jpegs.tiff", *SIZE_PX0, (1, 2))
    return [folder / name for name in ("striped.tif", "pyramid.tiff", "jpegs.tiff")]


def _svs(folder: Path) -> list[Path]:
    path = folder / "aperio.svs"
    write_jpeg_pyramid(path, *SIZE_PX0, (1,), description="Aperio Image|AppMag = 20|MPP = 0.5")
    return [path]


def _pictures(kind: str) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        path = folder / f"picture.{kind}"
        Image.fromarray(_tissue()).save(path)
        return [path]

    return make


def _read_slide(path: Path, output: Path) -> None:
    row = SlideRow("slide", path, mpp=0.5)
    with Slide(row) as slide:
        tile_slide(slide, output, PARAMETERS)
        mask = np.ones((4, 4), bool)
        tiles = lay_tiles("slide", mask, slide.extent, PARAMETERS)
        TileCutter(slide, tiles).cut(0, min(8, len(tiles.grid["x10"])))


def _dicom(folder: Path) -> list[Path]:
    return write_dicom(folder, _tissue(), 0.5, (1, 2))


def _mutate_dicom(data: bytes, rng: random.Random) -> bytes:
    """Half of the time what stands before the pixels."""
    if rng.random() < 0.5:
        return mutate_bytes(data, rng)
    header = data.index(b"\xe0\x7f\x10\x00OB")  # the tag of the pixels
    return mutate_bytes(data[:header], rng) + data[header:]


def _read_dicom(path: Path, output: Path) -> None:
    """The file among the others of its slide."""
    folder = output / "slide"
    if path.parent.name == "sound":
        shutil.copytree(path.parent, folder, dirs_exist_ok=True)
    before = (folder / path.name).read_bytes()
    (folder / path.name).write_bytes(path.read_bytes())
    try:
        _read_slide(folder, output)
    finally:
        (folder / path.name).write_bytes(before)


# Ours


def _tile_table(folder: Path) -> list[Path]:
    mask = np.random.default_rng(0).random((12, 16)) < 0.5
    write_tiles(folder / "a.safetensors", lay_tiles("a", mask, EXTENT, PARAMETERS))
    return [folder / "a.safetensors"]


def _read_table(path: Path, output: Path) -> None:
    tiles = read_tiles(path)
    for scale in tiles.scales:
        tiles.boxes_px0(scale.name)
    write_tiles(output / "again.safetensors", tiles)


def _bag(folder: Path) -> list[Path]:
    write_bag(folder / "slide.safetensors", make_bag())
    return [folder / "slide.safetensors"]


def _read_bag(path: Path, output: Path) -> None:
    bag = read_bag(path)
    bag_graph(bag, 0)
    for scale in bag.scales:
        bag.boxes_px0(scale)
    write_bag(output / f"{bag.slide_id}.safetensors", bag)


def _model() -> dict[str, Any]:
    options = {"hidden_dim": 8, "out_dim": 8, "query_dim": 4, "heads": 1}
    bag_format = make_bag().header.bag_format()
    module = make_module(**options, classes=["normal", "tumour"], bag_format=bag_format)
    return {"state_dict": module.state_dict(), **module.description()}


def _record() -> dict[str, Any]:
    backbone = vit_backbone("test_vit", 32, {})
    state = {f"teacher.backbone.{key}": value for key, value in backbone.state_dict().items()}
    record = {
        "name": "test_vit",
        "options": {},
        "image_size": 32,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.2, 0.2),
        "scale": "x20",
        "mpp": 0.5,
        "tile_px": 32,
        "trained_on": [{"slide_id": "a", "patient_id": None, "digest": ""}],
    }
    return {"state_dict": state, "extractor": record}


def _checkpoint(content: Callable[[], dict[str, Any]]) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        torch.manual_seed(0)
        torch.save(content(), folder / "last.ckpt")
        return [folder / "last.ckpt"]

    return make


def _mutate_checkpoint(data: bytes, rng: random.Random) -> bytes:
    """A value or a tensor of it; now and then the bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    content = torch.load(io.BytesIO(data), weights_only=True)
    if rng.random() < 0.25:
        state = content["state_dict"]
        key = rng.choice(list(state))
        weight = state[key]
        changes = [
            torch.full_like(weight, float("nan")),
            torch.full_like(weight, float("inf")),
            weight.to(torch.complex64),
            weight.flatten(),
            weight[:0],
            weight.double(),
            weight.bool(),
            weight.to_sparse() if weight.ndim else weight,
            weight.expand(3, *weight.shape),
            torch.empty(0).expand(10**6, 0),
            "text",
            None,
        ]
        state[key] = rng.choice(changes)
    else:
        rest = {key: value for key, value in content.items() if key != "state_dict"}
        mutated = mutate_value(rest, rng)
        content = {**content, **mutated} if isinstance(mutated, dict) else mutated
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _read_model(path: Path, output: Path) -> None:
    model = load(path)
    model(bag_graph(make_bag(), 0))


def _read_record(path: Path, output: Path) -> None:
    extractor = load_extractor(str(path), Scale.parse("x20"), 32)
    extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def _lines(folder: Path) -> list[Path]:
    with Worker(folder) as worker:
        for number in range(4):
            worker.note(f"s{number}", {"state": "waiting", "message": ""})
        worker.claim("s0")
        worker.settle("s0", {"state": "done", "seconds": 1.0, "message": ""})
    return [folder / "work" / "log.jsonl"]


def _read_lines(path: Path, output: Path) -> None:
    work = output / "cohort" / "work"
    (work / "claims").mkdir(parents=True, exist_ok=True)
    for name in ("log.jsonl", "another.jsonl"):
        (work / name).write_bytes(path.read_bytes())
    ids = [f"s{number}" for number in range(4)]
    status = Status(work.parent, ids, [], lambda s: work.parent / s, lambda _: {})
    status.write()
    status.summary("tile")
    with Worker(work.parent) as worker:
        worker.held_by_others()
        for slide_id in ids:
            if worker.claim(slide_id):
                worker.settle(slide_id, {"state": "done", "message": ""})
    for file in work.glob("*.jsonl"):
        file.unlink()


# Others'


def _h5(folder: Path) -> list[Path]:
    paths = [
        write_trident(folder, "slide", power, cells) / "slide.h5"
        for power, cells in ((20, CELLS), (10, ancestors(CELLS, 2)))
    ]
    return paths[:1]


def _mutate_h5(data: bytes, rng: random.Random) -> bytes:
    """An attribute, a dataset, or the bytes."""
    import h5py

    if rng.random() < 0.5:
        return mutate_bytes(data, rng)
    file = io.BytesIO(data)
    with h5py.File(file, "r+") as h5:
        coords = h5["coords"]
        name = rng.choice([*coords.attrs, "features", "coords"])
        if name in coords.attrs:
            value = mutate_value(coords.attrs[name], rng)
            try:
                coords.attrs[name] = value
            except (TypeError, ValueError, OverflowError):
                coords.attrs[name] = str(value).encode(errors="replace")[:200].replace(b"\0", b"")
        else:
            attributes = dict(h5[name].attrs)
            values = h5[name][()]
            del h5[name]
            match rng.randrange(8):
                case 0:
                    h5[name] = h5py.SoftLink("/nowhere")
                case 1:
                    h5[name] = h5py.ExternalLink("/etc/hostname", "/x")
                case 2:
                    h5[name] = np.array([b"text"] * 4)
                case 3:
                    h5.create_dataset(name, (10**12, 2), "f4", chunks=(2**16, 2), compression=9)
                case 4:
                    h5[name] = np.where(values == values.max(), np.nan, values.astype(float))
                case 5:
                    h5[name] = values.astype(complex)
                case 6:
                    h5.create_dataset(name, (64, 2), "i4", external=[("/etc/passwd", 0, 512)])
                case _:
                    h5[name] = values[..., None, None]
            for key, value in attributes.items():
                if isinstance(h5.get(name, getlink=True), h5py.HardLink):
                    h5[name].attrs[key] = value
    return file.getvalue()


def _read_h5(path: Path, output: Path) -> None:
    folder = output / "features_uni_v1"
    folder.mkdir(exist_ok=True)
    (folder / "slide.h5").write_bytes(path.read_bytes())
    trident(output / "bags", {"x20": folder})
    _refuse_unclear(output / "bags" / "status.csv")


def _refuse_unclear(status: Path) -> None:
    """What became a row without a sentence of ours is an error that nobody thought of."""
    import csv

    with open(status, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            kind = row["message"].split(":")[0]
            if kind.endswith(("Error", "Exception")) and " " not in kind:
                raise RuntimeError(f"a row without a sentence: {row['message']}")
            if row["state"] == "failed":
                raise InputError(row["message"])


def _squares() -> list[list[list[int]]]:
    return [
        [[x, y], [x + 60, y], [x + 60, y + 50], [x, y + 50], [x, y]]
        for x, y in ((10, 20), (200, 90))
    ]


def _geojson(folder: Path) -> list[Path]:
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"objectType": "annotation", "classification": {"name": "Tumor"}},
        }
        for ring in _squares()
    ]
    more = {"type": "MultiPolygon", "coordinates": [[ring] for ring in _squares()]}
    points = {"type": "MultiPoint", "coordinates": [[5, 5], [60, 70]]}
    areas = {
        "type": "FeatureCollection",
        "features": [*features, {**features[0], "geometry": more}],
    }
    cells = {"type": "FeatureCollection", "features": [{**features[0], "geometry": points}]}
    (folder / "areas.geojson").write_text(json.dumps(areas))
    (folder / "points.json").write_text(json.dumps(cells))
    return [folder / "areas.geojson", folder / "points.json"]


def _packed(folder: Path) -> list[Path]:
    path = folder / "areas.geojson.gz"
    path.write_bytes(gzip.compress(_geojson(folder)[0].read_bytes(), mtime=0))
    return [path]


def _xml(folder: Path) -> list[Path]:
    rings = "".join(
        f'<Annotation Name="a{number}" Type="Polygon" PartOfGroup="Tumor"><Coordinates>'
        + "".join(
            f'<Coordinate Order="{n}" X="{x}" Y="{y}"/>' for n, (x, y) in enumerate(ring[:-1])
        )
        + "</Coordinates></Annotation>"
        for number, ring in enumerate(_squares())
    )
    groups = '<AnnotationGroups><Group Name="Tumor" PartOfGroup="None"/></AnnotationGroups>'
    text = f'<?xml version="1.0"?>\n<ASAP_Annotations><Annotations>{rings}</Annotations>{groups}'
    (folder / "areas.xml").write_text(text + "</ASAP_Annotations>")
    return [folder / "areas.xml"]


def _masks(folder: Path) -> list[Path]:
    mask = np.zeros((96, 128), np.uint8)
    mask[10:40, 20:70] = 1
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask * 255).save(folder / "mask.tif")
    return [folder / "mask.png", folder / "mask.tif"]


def _read_truth(path: Path, output: Path) -> None:
    marks_points(path)
    class_names(path)
    marked = read_annotation(path, EXTENT)
    if not isinstance(marked, Points):
        assert marked.mask(4.0).shape == (96, 128)
        marked.is_empty  # noqa: B018
        marked.overlap(np.array([[0, 0, 64, 64], [448, 320, 600, 400]]))


def _csv(folder: Path) -> list[Path]:
    rows = "".join(f"s{n},slides/s{n}.svs,tumour,p{n},train,0.5\n" for n in range(6))
    (folder / "cohort.csv").write_text("slide_id,path,label,patient_id,split,mpp\n" + rows)
    (folder / "points.csv").write_text("x,y\n" + "".join(f"{n},{2.5 * n}\n" for n in range(6)))
    return [folder / "cohort.csv", folder / "points.csv"]


def _read_csv(path: Path, output: Path) -> None:
    results = []
    for read in (
        read_cohort,
        read_split_table,
        lambda table: read_annotation(table, EXTENT),
    ):
        try:
            read(path)
            results.append("")
        except InputError as error:
            results.append(str(error))
    if all(results):
        raise InputError(results[0])


KINDS: Mapping[str, Kind] = {
    "svs": Kind(_svs, mutate_bytes, _read_slide),
    "tiff": Kind(_tiffs, mutate_bytes, _read_slide),
    "png": Kind(_pictures("png"), mutate_bytes, _read_slide),
    "jpeg": Kind(_pictures("jpg"), mutate_bytes, _read_slide),
    "dicom": Kind(_dicom, _mutate_dicom, _read_dicom),
    "tile table": Kind(_tile_table, mutate_safetensors, _read_table),
    "bag": Kind(_bag, mutate_safetensors, _read_bag),
    "checkpoint": Kind(_checkpoint(_model), _mutate_checkpoint, _read_model),
    "extractor record": Kind(_checkpoint(_record), _mutate_checkpoint, _read_record),
    "h5": Kind(_h5, _mutate_h5, _read_h5),
    "geojson": Kind(_geojson, mutate_json, _read_truth),
    "geojson.gz": Kind(_packed, mutate_bytes, _read_truth),
    "xml": Kind(_xml, mutate_text, _read_truth),
    "mask": Kind(_masks, mutate_bytes, _read_truth),
    "csv": Kind(_csv, mutate_text, _read_csv),
    "jsonl": Kind(_lines, mutate_text, _read_lines),
}
