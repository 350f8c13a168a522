"""The figures of instances, by a model whose tile scores are known: each tile's first feature."""

import csv
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from bag_factory import CLASSES, with_changes, write_bags
from lightning.pytorch import LightningModule, Trainer
from models import make_module
from PIL import Image
from road import CONFIGS, fit_dasmil
from torch.utils.data import DataLoader

from dasmil.bags import bag_path, join_graphs, read_bag, write_bag
from dasmil.bags.output import ScaleOutput
from dasmil.callbacks import instances
from dasmil.callbacks.instances import InstanceTruth
from dasmil.callbacks.predictions import PredictionWriter
from dasmil.cli import main
from dasmil.data import BagDataModule
from dasmil.demo.slides import TRUTH_DOWNSAMPLE, write_cohort
from dasmil.errors import InputError
from dasmil.files import write_text
from dasmil.geometry import Extent
from dasmil.metrics.froc import FALSE_POSITIVES
from dasmil.slides.cohort import read_cohort
from dasmil.units import Mpp

SIZE_PX0 = (4096, 4096)  # 8 x 8 tiles of x20, 512 px wide


class FirstFeature(LightningModule):
    """The instance logit of a tile is its first feature."""

    def _outputs(self, graph):
        outputs = {}
        for scale, features in graph.features.items():
            logits, rows = features[:, :1], torch.zeros(len(features), dtype=torch.int64)
            bag = torch.zeros(graph.num_bags, 1)
            outputs[scale] = ScaleOutput(bag, logits, logits, rows, rows == 0)
        return outputs

    def test_step(self, graph, batch_idx):
        return self._outputs(graph)

    def validation_step(self, graph, batch_idx):
        return self._outputs(graph)


def set_logits(folder: Path, slide_id: str, logit) -> None:
    """A bag of all tiles of the slide, with ``logit(scale, row, column)`` as features."""
    old = read_bag(bag_path(folder, slide_id))
    grid, features, parent = {}, {}, {}
    for number, scale in enumerate(old.scales):
        side = 4 * 2**number
        cells = list(product(range(side), repeat=2))
        if number:  # in the order of the parents
            cells.sort(key=lambda cell: (cell[0] // 2, cell[1] // 2))
            parent[scale] = torch.tensor([r // 2 * 4 + c // 2 for r, c in cells]).int()
        grid[scale] = torch.tensor(cells).int()
        values = torch.tensor([float(logit(scale, r, c)) for r, c in cells])
        features[scale] = values[:, None].expand(-1, 6).half().contiguous()
    bag = with_changes(old, size_px0=SIZE_PX0, features=features, grid=grid, parent=parent)
    write_bag(bag_path(folder, slide_id), bag)


def box_xml(left, top, right, bottom) -> str:
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    text = "".join(f'<Coordinate Order="{n}" X="{x}" Y="{y}"/>' for n, (x, y) in enumerate(corners))
    return (
        '<ASAP_Annotations><Annotations><Annotation Name="a" Type="Polygon" PartOfGroup="_0">'
        f"<Coordinates>{text}</Coordinates></Annotation></Annotations></ASAP_Annotations>"
    )


@pytest.fixture
def bags(tmp_path):
    """Two tumour slides whose upper left quarter is the lesion, one normal slide.

    In slide t1 the lesion's tiles score highest; in t2 one tile outside scores higher still. The
    normal slide scores as t1 does outside, but for one tile.
    """
    labels = {"t1": "tumour", "t2": "tumour", "n1": "normal"}
    folder = write_bags(tmp_path / "bags", labels, dict.fromkeys(labels, "test"))

    def lesion(row, column, side):
        return row < side // 2 and column < side // 2

    def side(scale):
        return {"x10": 4, "x20": 8}[scale]

    set_logits(folder, "t1", lambda s, r, c: 2 if lesion(r, c, side(s)) else -1)
    corner = {"x10": (3, 3), "x20": (7, 7)}
    set_logits(
        folder, "t2", lambda s, r, c: 3 if (r, c) == corner[s] else 2 * lesion(r, c, side(s)) - 1
    )
    set_logits(folder, "n1", lambda s, r, c: 1.5 if (r, c) == corner[s] else -1)
    truth = tmp_path / "truth"
    truth.mkdir()
    for name in ("t1", "t2"):
        (truth / f"{name}.xml").write_text(box_xml(0, 0, 2048, 2048))
    return folder


def run(folder, callback, stage="test", classes=CLASSES, batch_size=2):
    data = BagDataModule(folder, classes, num_workers=0)
    loader = data.test_dataloader
    data.test_dataloader = lambda: DataLoader(  # its own has one slide a batch
        loader().dataset, batch_size, collate_fn=join_graphs
    )
    if stage == "validate":
        data.val_part = "test"
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder.parent,
    )
    getattr(trainer, stage)(FirstFeature(), datamodule=data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_figures_of_areas(bags, tmp_path):
    """x20: 16 tiles of the lesion against 48 in t1 and t2, and 64 negative ones in n1.

    Of the 32 x 160 pairs are not in order: t2's corner beats all 32; the normal slide's 1.5 beats
    t2's 16 of logit 1.
    """
    callback = InstanceTruth(tmp_path / "truth", output=tmp_path / "out")
    logged = run(bags, callback)
    wrong = 32 + 16
    assert logged["test/x20/instance_auroc"] == pytest.approx(1 - wrong / (32 * 160))
    assert logged["test/x20/instance_auroc_per_slide"] == pytest.approx((1 + 47 / 48) / 2)
    # 4 tiles of the lesion against 12
    assert logged["test/x10/instance_auroc"] == pytest.approx(1 - (8 + 4) / (8 * 40))
    assert logged["test/x10/instance_auroc_per_slide"] == pytest.approx((1 + 11 / 12) / 2)
    assert logged == pytest.approx({f"test/{name}": v for name, v in callback.metrics.items()})


@pytest.mark.draws
def test_froc_of_areas(bags, tmp_path):
    """Scores in order: 3 false (t2), 2 hit (t1), 1.5 false (n1), 1 hit (t2), and many of -1 false.

    False positives of three slides: both lesions are found at 2/3 a slide, one at 1/3.
    """
    callback = InstanceTruth(tmp_path / "truth", output=tmp_path / "out")
    logged = run(bags, callback)
    at = callback.curves["x20"].at
    assert at[0.25] == 0 and at[0.5] == 0.5 and at[1] == 1 and at[8] == 1
    assert logged["test/x20/froc"] == pytest.approx((0 + 0.5 + 4) / 6)
    with open(tmp_path / "out" / "froc.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    written = {
        float(row["false_positives_per_slide"]): float(row["sensitivity"])
        for row in rows
        if row["scale"] == "x20"
    }
    assert written == at and len(rows) == 2 * len(FALSE_POSITIVES)
    assert Image.open(tmp_path / "out" / "froc.png").size == (825, 750)


def test_detections_are_written_as_the_challenge_reads_them(bags, tmp_path):
    """No header; confidence, x and y of the tile's centre, best first."""
    run(bags, InstanceTruth(tmp_path / "truth", output=tmp_path / "out"))
    folder = tmp_path / "out" / "detections"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.csv")) == [
        f"{scale}/{slide_id}.csv" for scale in ("x10", "x20") for slide_id in ("n1", "t1", "t2")
    ]
    lines = (folder / "x20" / "t2.csv").read_text().splitlines()
    confidence, x, y = lines[0].split(",")
    assert float(confidence) == pytest.approx(1 / (1 + np.exp(-3)), abs=1e-12)
    assert (int(x), int(y)) == (7 * 512 + 256, 7 * 512 + 256)
    confidences = [float(line.split(",")[0]) for line in lines]
    assert confidences == sorted(confidences, reverse=True)
    # 187 µm are 748 px0: side and corner neighbours (724 px0) of a detection are none
    places = np.array([[int(value) for value in line.split(",")[1:]] for line in lines])
    apart = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1))
    assert apart[apart > 0].min() >= 1024


def tile_rows(tmp_path, slide_id):
    with open(tmp_path / "out" / "instance_truth" / f"{slide_id}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_tile_is_written_with_its_overlap(bags, tmp_path):
    """The lesion of t1 ends in the middle of the tiles of row 3: half of each, a quarter at x10.

    t2's is a triangle over a square of 4 x 4 tiles: half of the tiles on its diagonal.
    """
    (tmp_path / "truth" / "t1.xml").write_text(box_xml(0, 0, 2048, 1024 + 256))
    (tmp_path / "truth" / "t2.xml").unlink()
    corners = [[0, 0], [2048, 0], [0, 2048], [0, 0]]
    geometry = {"type": "Polygon", "coordinates": [corners]}
    properties = {"objectType": "annotation", "classification": {"name": "Tumor"}}
    lesion = {"type": "Feature", "geometry": geometry, "properties": properties}
    (tmp_path / "truth" / "t2.geojson").write_text(json.dumps(lesion))
    run(bags, InstanceTruth(tmp_path / "truth", output=tmp_path / "out"))

    rows = tile_rows(tmp_path, "t1")
    places = ["scale", "row", "col", "x0_px0", "y0_px0", "size_px0"]
    assert list(rows[0]) == ["slide_id", *places, "overlap", "positive", "prob/tumour"]
    found = {(r["scale"], int(r["row"]), int(r["col"])): r for r in rows}
    assert len(rows) == len(found) == 16 + 64
    for (scale, row, col), tile in found.items():
        side = {"x10": 1024, "x20": 512}[scale]
        assert [int(tile[name]) for name in places[3:]] == [col * side, row * side, side]
        height = min(max(1280 - row * side, 0), side)
        overlap = height / side * (col * side < 2048)
        assert float(tile["overlap"]) == pytest.approx(overlap, abs=1e-12)
        assert tile["positive"] == str(int(overlap >= 0.5))
        score = 2 if row * side < 2048 and col * side < 2048 else -1
        assert float(tile["prob/tumour"]) == pytest.approx(1 / (1 + np.exp(-score)))
        assert tile["slide_id"] == "t1"
    diagonal = [r for r in tile_rows(tmp_path, "t2") if r["scale"] == "x20"]
    for tile in diagonal:
        far = int(tile["row"]) + int(tile["col"])
        overlap = 1 if far < 3 else 0.5 if far == 3 else 0
        assert float(tile["overlap"]) == pytest.approx(overlap, abs=1 / 512)
    assert {r["overlap"] for r in tile_rows(tmp_path, "n1")} == {"0.0"}


def test_the_columns_of_a_tile_are_those_of_predict(bags, tmp_path):
    data = BagDataModule(bags, CLASSES, num_workers=0)
    data.setup("predict")
    module = make_module(hidden_dim=8, out_dim=8, classes=CLASSES, bag_format=data.bag_format)
    run(bags, InstanceTruth(tmp_path / "truth", output=tmp_path / "out"))
    writer = PredictionWriter(tmp_path / "out")
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[writer],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.predict(module, datamodule=data, return_predictions=False)
    with open(tmp_path / "out" / "instances" / "t1.csv", newline="") as file:
        predicted = list(csv.DictReader(file))
    judged = tile_rows(tmp_path, "t1")
    places = list(predicted[0])[:6]
    assert places == list(judged[0])[1:7]
    assert [[r[name] for name in places] for r in predicted] == [
        [r[name] for name in places] for r in judged
    ]


def test_classes_that_are_asked_for(bags, tmp_path):
    """t1's lesion is of the group Gland, t2's of _0; a class that one file has is enough."""
    path = tmp_path / "truth" / "t1.xml"
    path.write_text(path.read_text().replace('PartOfGroup="_0"', 'PartOfGroup="Gland"'))
    assert "t1.xml: 'a' has the unknown group 'Gland'" in refusal(bags, "t1")
    logged = run(bags, InstanceTruth(tmp_path / "truth", classes=["gland"]))
    # of the 176 negative tiles, t2's among them, one scores higher than t1's 16 of the lesion
    assert logged["test/x20/instance_auroc"] == pytest.approx(1 - 1 / 176)
    assert np.isfinite(logged["test/x20/froc"])


def refusal(bags: Path, slide_id: str) -> str:
    """Why the annotation of a slide, and of no other, is refused."""
    callback = InstanceTruth(bags.parent / "truth")
    run(bags, callback)
    assert list(callback.refused) == [slide_id] and callback.metrics
    return callback.refused[slide_id]


@pytest.mark.parametrize("when", ["at the start", "when its slide comes"])
def test_a_refused_annotation_leaves_its_slide_out_and_no_other(bags, tmp_path, capsys, when):
    """Without t2 both figures are 1; what is wrong with a mask's pixels is seen only late."""
    run(bags, InstanceTruth(tmp_path / "truth", output=tmp_path / "out"))  # its files go
    path = tmp_path / "truth" / "t2.xml"
    path.unlink()
    if when == "at the start":
        path = path.with_suffix(".geojson")
        path.write_text('{"type": ')
    else:
        path = path.with_suffix(".png")
        Image.fromarray(np.ones((64, 64), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:-30])
    callback = InstanceTruth(tmp_path / "truth", output=tmp_path / "out")
    logged = run(bags, callback)
    assert logged["test/x20/instance_auroc"] == 1 and logged["test/x20/froc"] == 1
    assert list(callback.refused) == ["t2"] and str(path) in callback.refused["t2"]
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        f"error: {tmp_path / 'truth'}: 1 annotation(s) are refused, their slides are left out of "
        f"the figures of instances: t2; the first: {callback.refused['t2']}"
    )
    for folder in ("instance_truth", "detections/x20"):
        written = sorted(path.stem for path in (tmp_path / "out" / folder).iterdir())
        assert written == ["n1", "t1"]


def test_what_a_reader_did_not_foresee_costs_its_slide_too(bags, monkeypatch):
    read = instances.read_annotation

    def fail_at_t2(path, *rest):
        if path.stem == "t2":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *rest)

    monkeypatch.setattr(instances, "read_annotation", fail_at_t2)
    said = refusal(bags, "t2")
    assert said.startswith(f"{bags.parent / 'truth' / 't2.xml'}: PermissionError: ")
    assert said.endswith("; correct or remove it")


@pytest.mark.parametrize("classes", [None, ["Tumor"]])
def test_if_all_annotations_are_refused_there_are_no_figures(bags, tmp_path, capsys, classes):
    run(bags, InstanceTruth(tmp_path / "truth", output=tmp_path / "out"))
    for path in (tmp_path / "truth").iterdir():
        path.write_text("<no xml")
    callback = InstanceTruth(tmp_path / "truth", output=tmp_path / "out", classes=classes)
    assert run(bags, callback) == {} == callback.metrics == callback.curves
    assert list(callback.refused) == ["t1", "t2"]
    said = capsys.readouterr().err
    assert "2 annotation(s) are refused, all that there are, so there are no figures" in said
    assert not (tmp_path / "out" / "froc.csv").exists()


def test_a_class_that_no_annotation_has(bags, tmp_path):
    with pytest.raises(InputError, match=r"no annotation is of the classes Tumr; there are _0$"):
        run(bags, InstanceTruth(tmp_path / "truth", classes=["Tumr"]))
    with pytest.warns(UserWarning, match=r"no annotation is of the classes Tumr; there are _0$"):
        run(bags, InstanceTruth(tmp_path / "truth", classes=["Tumr", "_0"]))
    for path in (tmp_path / "truth").iterdir():
        path.unlink()
    (tmp_path / "truth" / "t1.csv").write_text("x,y\n5,5\n")
    with pytest.raises(InputError, match="there are none, as in masks and tables of points"):
        run(bags, InstanceTruth(tmp_path / "truth", classes=["Tumor"]))


def test_points_of_geojson_have_no_froc(bags, tmp_path):
    """Beside areas too: a slide whose lesions are points has none that could be found."""
    (tmp_path / "truth" / "t1.xml").unlink()
    feature = {
        "type": "Feature",
        "geometry": {"type": "MultiPoint", "coordinates": [[5, 5], [600, 5]]},
        "properties": {"classification": {"name": "Tumor"}},
    }
    (tmp_path / "truth" / "t1.geojson").write_text(json.dumps(feature))
    logged = run(bags, InstanceTruth(tmp_path / "truth", output=tmp_path / "out"))
    assert "test/x20/froc" not in logged and not (tmp_path / "out" / "detections").exists()
    marked = [r for r in tile_rows(tmp_path, "t1") if r["overlap"] != "0"]
    assert [(r["scale"], r["overlap"]) for r in marked] == [
        ("x10", "2"),
        ("x20", "1"),
        ("x20", "1"),
    ]


def set_header(folder: Path, slide_id: str, **changes) -> None:
    bag = read_bag(bag_path(folder, slide_id))
    write_bag(bag_path(folder, slide_id), with_changes(bag, **changes))


def geojson(left, top, right, bottom) -> str:
    corners = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    geometry = {"type": "Polygon", "coordinates": [corners]}
    properties = {"classification": {"name": "Tumor"}}
    return json.dumps({"type": "Feature", "geometry": geometry, "properties": properties})


def test_geojson_is_counted_from_the_bounds_of_the_slide(bags, tmp_path):
    """One tile of x20, two tiles to the right and four down, as QuPath and as ASAP count it."""
    set_header(bags, "t1", bounds_px0=(1024, 2048))
    set_header(bags, "t2", bounds_px0=(1024, 2048))
    (tmp_path / "truth" / "t1.xml").unlink()
    (tmp_path / "truth" / "t1.geojson").write_text(geojson(0, 0, 512, 512))
    (tmp_path / "truth" / "t2.xml").write_text(box_xml(1024, 2048, 1536, 2560))
    run(bags, InstanceTruth(tmp_path / "truth", output=tmp_path / "out"))
    for slide_id in ("t1", "t2"):
        found = [r for r in tile_rows(tmp_path, slide_id) if r["positive"] == "1"]
        assert [(r["scale"], r["row"], r["col"]) for r in found] == [("x20", "4", "2")]


def test_tiles_that_reach_over_the_border_are_judged_by_what_lies_on_the_slide(bags, tmp_path):
    """100 px of the last row and column of x20 tiles lie on the slide, all of it lesion."""
    size = 7 * 512 + 100
    for slide_id in ("t1", "t2"):
        set_header(bags, slide_id, size_px0=(size, size))
        (tmp_path / "truth" / f"{slide_id}.xml").unlink()
        (tmp_path / "truth" / f"{slide_id}.geojson").write_text(geojson(3584, 0, size, size))
    run(bags, InstanceTruth(tmp_path / "truth", output=tmp_path / "out"))
    found = [r for r in tile_rows(tmp_path, "t2") if r["positive"] == "1" and r["scale"] == "x20"]
    assert {(r["col"], r["overlap"]) for r in found} == {("7", "1.0")} and len(found) == 8
    line = (tmp_path / "out" / "detections" / "x20" / "t2.csv").read_text().splitlines()[0]
    assert line.split(",")[1:] == ["3634", "3634"]  # the best tile's centre, as far as it is there


def test_truth_of_a_slide_without_its_mpp_is_refused(bags, tmp_path):
    """Its tiles have no place in level-0 pixels; a normal slide needs none."""
    set_header(bags, "n1", mpp_is_known=False)
    run(bags, InstanceTruth(tmp_path / "truth"))
    set_header(bags, "t2", mpp_is_known=False)
    said = refusal(bags, "t2")
    assert "t2.xml: the tiles of t2 have no place" in said
    assert "--cohort of `import stamp` a table with the" in said


def test_lesions_beyond_the_tiles_of_a_slide_whose_size_is_not_known(bags, tmp_path):
    """Points, polygons and QuPath's count there as elsewhere; a lesion without a tile is missed."""
    truth = tmp_path / "truth"
    (truth / "t1.xml").write_text(box_xml(6000, 6000, 8000, 8000))
    assert "is outside the slide of 4096 x 4096 px" in refusal(bags, "t1")
    for slide_id in ("t1", "t2"):
        set_header(bags, slide_id, size_is_known=False)
    callback = InstanceTruth(truth)
    run(bags, callback)
    assert callback.curves["x20"].sensitivity.max() == 0.5  # of two lesions t1's is never found
    (truth / "t1.xml").unlink()
    (truth / "t1.geojson").write_text(geojson(6000, 6000, 8000, 8000))
    again = InstanceTruth(truth)
    run(bags, again)
    assert again.metrics == callback.metrics
    (truth / "t1.geojson").unlink()
    (truth / "t1.csv").write_text("x,y\n5,5\n6000,6000\n")
    run(bags, InstanceTruth(truth, output=tmp_path / "out"))
    assert sum(r["positive"] == "1" for r in tile_rows(tmp_path, "t1")) == 2  # one a scale
    (truth / "t1.csv").write_text("x,y\n-5,5\n")
    assert "the point -5,5 is outside" in refusal(bags, "t1")


def test_a_mask_of_a_slide_whose_size_is_not_known_is_refused_with_the_reason(bags, tmp_path):
    (tmp_path / "truth" / "t1.xml").unlink()
    Image.fromarray(np.ones((100, 150), np.uint8)).save(tmp_path / "truth" / "t1.png")
    set_header(bags, "t1", size_is_known=False)
    said = refusal(bags, "t1")
    assert "t1.png: " in said and "imported without its size; give polygons" in said


def test_nothing_that_trains_can_read_annotations():
    """Bags, models, losses and the modules that train load without the package."""
    code = "import sys, dasmil.modules, dasmil.embedding.embed; "
    code += "sys.exit(any(name.startswith('dasmil.slides.annotation') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize("option", ["truth", "truth_classes"])
def test_fit_has_no_option_for_annotations(option, tmp_path, capsys):
    config = ["--config", str(CONFIGS / "mil.yaml"), "--data.bags", "B"]
    assert main(["fit", *config, "--data.classes", "[a,b]", f"--{option}", "[T]"]) == 2
    assert f"--{option}" in capsys.readouterr().err


def test_by_command(road, tmp_path, capsys):
    """The upper part of every tumour slide, of a class that only the command knows."""
    assert main(fit_dasmil(road.bags, tmp_path / "runs")) == 0
    checkpoint = tmp_path / "runs" / "dasmil" / "checkpoints" / "best.ckpt"
    tested = [row for row in read_cohort(road.bags / "cohort.csv") if row.split == "test"]
    upper_part = [[0, 0], [448, 0], [448, 192], [0, 192], [0, 0]]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [upper_part]},
        "properties": {"classification": {"name": "Gland"}},
    }
    for row in tested:
        if row.label == "tumour":
            write_text(tmp_path / "truth" / f"{row.slide_id}.geojson", json.dumps(feature))
    places = ["--bags", str(road.bags), "--output", str(tmp_path / "out")]
    quiet = ["--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]
    command = ["test", "--ckpt_path", str(checkpoint), *places, *quiet]
    classes = ["--truth_classes", "[Gland]"]
    assert main([*command, *classes]) == 2
    assert "--truth_classes needs --truth" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--truth", str(tmp_path / "truth")]) == 1
    said = capsys.readouterr().err
    assert "so there are no figures of instances; the first: " in said
    assert "has the unknown class 'Gland'" in said
    assert main([*command, *classes, "--truth", str(tmp_path / "truth")]) == 0
    for row in tested:
        for tile in tile_rows(tmp_path, row.slide_id):
            upper = int(tile["y0_px0"]) + int(tile["size_px0"]) <= 192
            assert float(tile["overlap"]) == (upper and row.label == "tumour")
    metrics = (tmp_path / "out" / "test_metrics.csv").read_text()
    assert "x20,instance,instance_auroc," in metrics

    slides = (tmp_path / "out" / "test_slides.csv").read_text()
    normal = next(row.slide_id for row in tested if row.label == "normal")
    write_text(tmp_path / "truth" / f"{normal}.xml", "<no xml")
    assert main([*command, *classes, "--truth", str(tmp_path / "truth")]) == 1
    with open(tmp_path / "out" / "test_slides.csv", newline="") as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    reasons = {slide_id: row.pop("annotation_refused") for slide_id, row in rows.items()}
    assert [slide_id for slide_id, reason in reasons.items() if reason] == [normal]
    assert f"{normal}.xml: " in reasons[normal]
    before = list(csv.DictReader(slides.splitlines()))
    assert list(rows.values()) == before
    with open(tmp_path / "out" / "test_metrics.csv", newline="") as file:
        notes = {row["note"] for row in csv.DictReader(file) if row["level"] == "instance"}
    assert notes == {f"without 1 slide(s) whose annotation is refused: {normal}"}


def test_validation_and_nothing_written_without_an_output(bags, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    logged = run(bags, InstanceTruth(tmp_path / "truth"), "validate")
    assert logged["val/x20/instance_auroc"] == pytest.approx(1 - 48 / (32 * 160))
    assert logged["val/x20/froc"] == pytest.approx(0.75)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_slide_that_comes_twice_counts_once(bags, tmp_path, monkeypatch, batch_size):
    """As a sampler repeats slides for several processes, whatever rank has them."""
    once = InstanceTruth(tmp_path / "truth")
    run(bags, once)
    monkeypatch.setattr(instances, "gather_lists", lambda items: [*items[::-1], *items[:1]])
    twice = InstanceTruth(tmp_path / "truth")
    run(bags, twice, batch_size=batch_size)
    assert twice.metrics == once.metrics and len(once.metrics) == 6


def test_points_have_no_froc(bags, tmp_path):
    """t1 has one point in a tile of the lesion: 1 of 64 tiles; t2's lies in its highest tile."""
    for path in (tmp_path / "truth").iterdir():
        path.unlink()
    (tmp_path / "truth" / "t1.csv").write_text("x,y,type\n5,5,epithelial\n6,6,epithelial\n")
    (tmp_path / "truth" / "t2.csv").write_text("x,y\n4000,4000\n")
    (tmp_path / "truth" / "n1.csv").write_text("x,y\n")
    callback = InstanceTruth(tmp_path / "truth", output=tmp_path / "out")
    logged = run(bags, callback)
    per_slide = (1 + (48 + 15 / 2) / 63) / 2
    assert logged["test/x20/instance_auroc_per_slide"] == pytest.approx(per_slide)
    assert not [name for name in logged if "froc" in name]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["instance_truth"]
    marked = {s: [t for t in tile_rows(tmp_path, s) if t["overlap"] != "0"] for s in ("t1", "t2")}
    assert [(t["scale"], t["overlap"], t["positive"]) for t in marked["t1"]] == [
        ("x10", "2", "1"),
        ("x20", "2", "1"),
    ]
    assert [(t["row"], t["col"]) for t in marked["t2"]] == [("3", "3"), ("7", "7")]


def test_froc_can_be_left_out(bags, tmp_path):
    logged = run(bags, InstanceTruth(tmp_path / "truth", output=tmp_path / "out", froc=False))
    assert "test/x20/instance_auroc" in logged and "test/x20/froc" not in logged
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["instance_truth"]


def test_min_share_decides_which_tiles_are_positive(bags, tmp_path):
    """The lesion of t1 now covers half of a column of tiles more; of t2 nothing changes."""
    (tmp_path / "truth" / "t1.xml").write_text(box_xml(0, 0, 2048 + 256, 2048))
    half, more = InstanceTruth(tmp_path / "truth"), InstanceTruth(tmp_path / "truth", min_share=0.6)
    run(bags, half)
    run(bags, more)
    name = "x20/instance_auroc_per_slide"
    # half: 4 of 20 positive tiles score as the 44 negative ones
    assert half.metrics[name] == pytest.approx((16 / 20 + 4 / 20 / 2 + 47 / 48) / 2)
    assert more.metrics[name] == pytest.approx((1 + 47 / 48) / 2)


def test_a_positive_slide_without_annotation_is_left_out_and_named(bags, tmp_path):
    (tmp_path / "truth" / "t2.xml").unlink()
    callback = InstanceTruth(tmp_path / "truth")
    with pytest.warns(UserWarning, match=r"1 test slide\(s\) of class tumour .* figures .*: t2$"):
        logged = run(bags, callback)
    assert logged["test/x20/instance_auroc"] == 1
    assert logged["test/x20/froc"] == 1  # t2's corner is no false positive either


def test_a_part_without_any_annotation_is_refused(bags, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError, match=r"no annotation of any of the 3 test slides; for t1 it wo"
    ):
        run(bags, InstanceTruth(tmp_path / "empty"))


def test_a_lesion_on_a_negative_slide_is_refused(bags, tmp_path):
    """As with Camelyon17's masks, which mark the tissue of normal slides.

    Without n1 it is t2's corner alone that scores too high, of 96 negative tiles.
    """
    (tmp_path / "truth" / "n1.xml").write_text(box_xml(0, 0, 512, 512))
    assert "n1.xml: it marks something on a slide of the negative" in refusal(bags, "n1")
    logged = run(bags, InstanceTruth(tmp_path / "truth"))
    assert logged["test/x20/instance_auroc"] == pytest.approx(1 - 1 / 96)


def test_more_than_two_classes_are_refused(bags, tmp_path):
    with pytest.raises(InputError, match="of two classes, the model has 3"):
        run(bags, InstanceTruth(tmp_path / "truth"), classes=[*CLASSES, "other"])


def test_min_share_is_a_share(tmp_path):
    with pytest.raises(InputError, match="min_share: 0 is outside"):
        InstanceTruth(tmp_path, min_share=0)


def test_froc_is_not_defined_where_all_lesions_are_isolated_tumour_cells(bags, tmp_path):
    """512 px of 0.25 µm: 128 µm. There is no curve then, and no file of one."""
    for name in ("t1", "t2"):
        (tmp_path / "truth" / f"{name}.xml").write_text(box_xml(0, 0, 512, 512))
    callback = InstanceTruth(tmp_path / "truth", output=tmp_path / "out")
    with pytest.warns(UserWarning, match=r"FROC is not defined: .* \(200 µm\)"):
        logged = run(bags, callback)
    assert np.isnan(logged["test/x20/froc"]) and not np.isnan(logged["test/x20/instance_auroc"])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["detections", "instance_truth"]


def test_the_truth_of_the_demo(tmp_path):
    """Its masks are drawn at a quarter: as many tiles are at least half lesion as counted there."""
    table = write_cohort(tmp_path, num_slides={"test": 4}, size_px0=(1024, 1024), seed=1)
    counted = 0
    for row in read_cohort(table):
        path = tmp_path / "truth" / f"{row.slide_id}.png"
        annotation = instances.read_annotation(path, Extent((1024, 1024), Mpp(0.5)))
        corners = np.array(list(product(range(0, 1024, 64), repeat=2)))
        positive = annotation.positive(
            annotation.overlap(np.concatenate([corners, corners + 64], axis=1))
        )
        mask, side = np.asarray(Image.open(path)) > 0, 64 // TRUTH_DOWNSAMPLE
        wanted = [
            mask[y // 4 : y // 4 + side, x // 4 : x // 4 + side].mean() >= 0.5 for x, y in corners
        ]
        assert positive.tolist() == wanted
        assert annotation.is_empty == (row.label == "normal")
        counted += positive.sum()
    assert counted > 20
