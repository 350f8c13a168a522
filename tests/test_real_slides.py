"""Real slides of ../shared/data by command: atlas_x5 the whole road, all others as far as embed."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from road import CONF, CONFIGS, embed_command

from dasmil.bags import bag_path, read_bag
from dasmil.cli import main
from dasmil.slides.cohort import read_cohort
from dasmil.slides.splits import split_cohort

pytestmark = pytest.mark.slow
RANDOM = "random:test_vit"

X5_MPP = 2.0  # where the file records none; the others lie at 2.02 to 2.1


@pytest.fixture(scope="module")
def atlas(shared_data, tmp_path_factory):
    """Folder of a finished run with x5 and x2.5 and random extractors; cases are patients."""
    root = tmp_path_factory.mktemp("atlas")
    slides = shared_data / "slides"
    with open(slides / "atlas_labels.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["file"].startswith("atlas_x5/")]
    with open(root / "cohort.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["slide_id", "path", "label", "patient_id", "mpp"])
        for row in rows:
            path = slides / row["file"]
            label = ("benign", "malignant")[int(row["label_malignant"])]
            table.writerow([path.stem, path, label, row["case"], row["mpp"] or X5_MPP])
    tile = ["tile", "--config", str(CONFIGS / "tile.yaml"), "--cohort", str(root / "cohort.csv")]
    assert main([*tile, "--output", str(root / "tiles"), "--scales", "[x2.5,x5]"]) == 0
    random = dict.fromkeys(("x2.5", "x5"), RANDOM)
    assert main(embed_command(root / "tiles", root / "bags", random)) == 0
    configs = ["--config", str(CONFIGS / "mil.yaml"), "--config", str(CONF / "dasmil.yaml")]
    data = ["--data.bags", str(root / "bags"), "--data.classes", "[benign,malignant]"]
    split = ["--data.split.val_fraction", "0.2"]
    assert main(["fit", *configs, *data, *split, "--output", str(root / "runs" / "dasmil")]) == 0
    checkpoint = root / "runs" / "dasmil" / "checkpoints" / "best.ckpt"
    model = ["--ckpt_path", str(checkpoint), "--bags", str(root / "bags")]
    quiet = ["--trainer.enable_progress_bar", "false", "--output", str(root / "out")]
    assert main(["test", *model, *quiet]) == 0
    assert main(["predict", *model, *quiet]) == 0
    return root


def test_every_slide_arrives(atlas):
    rows = read_cohort(atlas / "bags" / "cohort.csv")
    assert len(rows) == 17
    for row in rows:
        bag = read_bag(bag_path(atlas / "bags", row.slide_id))
        assert bag.num_tiles()["x5"] > 0
        boxes_px0 = bag.boxes_px0("x5")
        assert (boxes_px0[:, 0] < bag.header.extent.size_px0[0]).all()
        assert (boxes_px0[:, 1] < bag.header.extent.size_px0[1]).all()
        expected_px0 = 256 * 2.0 / bag.header.extent.mpp
        assert ((boxes_px0[:, 2] - boxes_px0[:, 0]) - expected_px0).abs().max() <= 1


def test_slides_of_a_case_stay_together(atlas):
    rows = read_cohort(atlas / "bags" / "cohort.csv")
    with open(atlas / "runs" / "dasmil" / "split.csv", newline="") as file:
        split = {row["slide_id"]: row["split"] for row in csv.DictReader(file)}
    assert split == split_cohort(rows, val_fraction=0.2)
    parts = {row.patient: set() for row in rows}
    for row in rows:
        parts[row.patient].add(split[row.slide_id])
    assert all(len(found) == 1 for found in parts.values())
    with open(atlas / "out" / "predictions.csv", newline="") as file:
        predictions = {row["slide_id"]: row for row in csv.DictReader(file)}
    tested = [predictions[slide_id] for slide_id, part in split.items() if part == "test"]
    right = [(float(r["prob/malignant"]) > 0.5) == (r["label"] == "malignant") for r in tested]
    metrics = json.loads((atlas / "out" / "test_metrics.json").read_text())
    assert metrics["test/accuracy"] == pytest.approx(sum(right) / len(right))


def test_the_overlay_is_on_tissue(atlas):
    """The pixels of the slide's picture under kept tiles are more coloured than those beside."""
    for row in read_cohort(atlas / "bags" / "cohort.csv"):
        picture = Image.open(atlas / "tiles" / "qc" / f"{row.slide_id}.png")
        assert picture.width > picture.height / 2
        bag = read_bag(bag_path(atlas / "bags", row.slide_id))
        slide = Image.open(row.path)
        slide.draft("RGB", (slide.width // 8, slide.height // 8))
        saturation = np.asarray(slide.convert("HSV").resize((512, 512)))[..., 1]
        under = np.zeros((512, 512), dtype=bool)
        to_picture = 512 / np.array(bag.header.extent.size_px0 * 2)
        for left, top, right, bottom in (bag.boxes_px0("x5").numpy() * to_picture).astype(int):
            under[top:bottom, left:right] = True
        assert saturation[under].mean() > 2 * saturation[~under].mean(), row.slide_id
        assert (atlas / "out" / "overlays" / f"{row.slide_id}_x2.5.png").stat().st_size > 10_000


def tile_and_embed(root, rows, *options, scales):
    """Exit codes of both verbs and the state of each slide after both."""
    root.mkdir()
    with open(root / "cohort.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["slide_id", "path", "mpp"])
        table.writerows(rows)
    tiles, bags = root / "tiles", root / "bags"
    command = ["tile", "--cohort", str(root / "cohort.csv"), "--output", str(tiles), *options]
    codes = [main([*command, "--scales", f"[{','.join(scales)}]"])]
    codes.append(main(embed_command(tiles, bags, dict.fromkeys(scales, RANDOM))))
    states = []
    for folder in (tiles, bags):
        with open(folder / "status.csv", newline="") as file:
            states.append({row["slide_id"]: row for row in csv.DictReader(file)})
    return codes, *states


def test_slides_at_20x_of_every_kind_reach_their_bags(shared_data, tmp_path):
    """SVS, JPEG 2000, DICOM, generic TIFF; x10 is not stored in PDAC-tru-cut_HE3.svs."""
    native, atlas = (shared_data / "slides" / name for name in ("native", "atlas_x20"))
    rows = [
        ("cmu", native / "cmu-1-small-region.svs", ""),
        ("dicom", native / "cmu-1-small-region-dicom", ""),
        ("wrong-mpp", native / "cmu-1-wrong-mpp.tiff", 0.499),
        ("tcga", native / "tcga-cr-7395-01a-01-ts1.svs", 0.5),
        ("pdac", atlas / "PDAC-tru-cut_HE3.svs", ""),
        ("erosion", atlas / "erosion_HE.tif", 0.5),
        ("small", native / "small.svs", ""),
        ("boxes", native / "boxes.tiff", 0.5),
    ]
    codes, tiled, embedded = tile_and_embed(tmp_path / "x20", rows, scales=("x5", "x10", "x20"))
    assert codes == [0, 0]
    assert {s for s, row in tiled.items() if row["state"] == "empty"} == {"small", "boxes"}
    assert {s: row["state"] for s, row in embedded.items()} == {
        s: row["state"] for s, row in tiled.items()
    }
    for slide_id, _, _ in rows:
        bag = read_bag(bag_path(tmp_path / "x20" / "bags", slide_id))
        counts = bag.num_tiles()
        assert counts == {s: int(tiled[slide_id][f"tiles/{s}"]) for s in bag.scales}
        if tiled[slide_id]["state"] == "done":
            assert counts["x5"] <= counts["x10"] <= counts["x20"] <= 4 * counts["x10"]
            assert bag.features["x20"].float().std(0).mean() > 0


def test_all_colon_images_reach_their_bags(shared_data, tmp_path):
    images = sorted((shared_data / "crchisto").glob("*.png"))
    rows = [(path.stem, path, 0.55) for path in images]
    small = ["--tissue.mpp", "2", "--tissue.min_tissue_um2", "500", "--tissue.min_hole_um2", "500"]
    codes, tiled, embedded = tile_and_embed(
        tmp_path / "colon", rows, *small, "--tile_px", "128", scales=("x10", "x20")
    )
    assert codes == [0, 0]
    assert len(rows) == 50
    assert [row["state"] for row in embedded.values()] == [row["state"] for row in tiled.values()]
    assert sum(row["state"] == "done" for row in tiled.values()) >= 45


def test_bad_files_fail_one_by_one_and_the_good_one_arrives(shared_data, tmp_path):
    bad = shared_data / "slides" / "bad"
    rows = [(path.stem, path, 0.5) for path in sorted(bad.iterdir())]
    rows.append(("good", shared_data / "slides" / "native" / "cmu-1-small-region.svs", ""))
    codes, tiled, embedded = tile_and_embed(tmp_path / "bad", rows, scales=("x20",))
    assert codes == [1, 0]
    assert {s: row["state"] for s, row in tiled.items()} == {
        "broken": "failed",
        "unopenable": "failed",
        "unreadable": "failed",
        "good": "done",
    }
    assert "OpenSlide does not know this format" in tiled["broken"]["message"]
    assert "cannot be opened as a slide" in tiled["unopenable"]["message"]
    assert "cannot be read" in tiled["unreadable"]["message"]
    assert embedded["good"]["state"] == "done" and embedded["broken"]["state"] == "not tiled"
