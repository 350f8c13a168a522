"""Instance metrics for annotations of every kind, and the slides that a refused one costs."""

import json
from itertools import product

import numpy as np
import pytest
from callbacks.judged_bags import box_xml, geojson, refusal, run, set_header, tile_rows
from PIL import Image

from dasmil.callbacks import instance_truth
from dasmil.callbacks.instance_truth import InstanceTruth
from dasmil.demo.slides import TRUTH_DOWNSAMPLE, write_cohort
from dasmil.errors import InputError
from dasmil.geometry import Extent
from dasmil.slides.cohort import read_cohort
from dasmil.units import Mpp


@pytest.mark.slow
def test_classes_that_are_asked_for(bags, tmp_path):
    """t1's lesion is of the group Gland, t2's of _0; a class that one file has is enough."""
    path = tmp_path / "truth" / "t1.xml"
    path.write_text(path.read_text().replace('PartOfGroup="_0"', 'PartOfGroup="Gland"'))
    assert "t1.xml: 'a' has the unknown group 'Gland'" in refusal(bags, "t1")
    logged = run(bags, InstanceTruth(tmp_path / "truth", classes=["gland"]))
    # of the 176 negative tiles, t2's among them, one scores higher than t1's 16 of the lesion
    assert logged["test/x20/instance_auroc"] == pytest.approx(1 - 1 / 176)
    assert np.isfinite(logged["test/x20/froc"])


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
        f"the instance metrics: t2; the first: {callback.refused['t2']}"
    )
    for folder in ("instance_truth", "detections/x20"):
        written = sorted(path.stem for path in (tmp_path / "out" / folder).iterdir())
        assert written == ["n1", "t1"]


def test_an_unforeseen_error_costs_its_slide_only(bags, monkeypatch):
    read = instance_truth.read_annotation

    def fail_at_t2(path, *rest):
        if path.stem == "t2":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *rest)

    monkeypatch.setattr(instance_truth, "read_annotation", fail_at_t2)
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
    assert "2 annotation(s) are refused, so there are no instance metrics" in said
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


def test_tiles_over_the_border_are_judged_by_their_part_on_the_slide(bags, tmp_path):
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


def test_a_positive_slide_without_annotation_is_left_out_and_named(bags, tmp_path):
    (tmp_path / "truth" / "t2.xml").unlink()
    callback = InstanceTruth(tmp_path / "truth")
    with pytest.warns(
        UserWarning, match=r"1 test slide.* of class tumour .* instance metrics: t2$"
    ):
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


def test_the_truth_of_the_demo(tmp_path):
    """Its masks are drawn at a quarter: as many tiles are at least half lesion as counted there."""
    table = write_cohort(tmp_path, num_slides={"test": 2}, size_px0=(1024, 1024), seed=1)
    counted = 0
    for row in read_cohort(table):
        path = tmp_path / "truth" / f"{row.slide_id}.png"
        annotation = instance_truth.read_annotation(path, Extent((1024, 1024), Mpp(0.5)))
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
    assert counted > 10
