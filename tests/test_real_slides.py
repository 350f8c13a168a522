"""The whole road on the 17 real slides of ../shared/data/slides/atlas_x5, by command."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from road import CONF, CONFIGS, embed_command, log_to

from dasmil.bags import bag_path, read_bag
from dasmil.cli import main
from dasmil.slides.cohort import read_cohort, split_cohort

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
    random = dict.fromkeys(("x2.5", "x5"), "random:test_vit")
    assert main(embed_command(root / "tiles", root / "bags", random)) == 0
    configs = ["--config", str(CONFIGS / "dasmil.yaml"), "--config", str(CONF / "dasmil.yaml")]
    data = ["--data.bags", str(root / "bags"), "--data.classes", "[benign,malignant]"]
    split = ["--data.val_fraction", "0.2"]
    assert main(["fit", *configs, *data, *split, *log_to(root / "runs", "dasmil")]) == 0
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
        assert (boxes_px0[:, 2] <= bag.header.size_px0[0]).all()
        assert (boxes_px0[:, 3] <= bag.header.size_px0[1]).all()
        expected_px0 = 256 * 2.0 / bag.header.slide_mpp
        assert ((boxes_px0[:, 2] - boxes_px0[:, 0]) - expected_px0).abs().max() <= 1


def test_cases_stay_together_and_the_test_figures_are_theirs(atlas):
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


def test_the_overlay_lies_on_tissue(atlas):
    """The pixels of the slide's picture under kept tiles are more coloured than those beside."""
    for row in read_cohort(atlas / "bags" / "cohort.csv"):
        picture = Image.open(atlas / "tiles" / "qc" / f"{row.slide_id}.png")
        assert picture.width > picture.height / 2
        bag = read_bag(bag_path(atlas / "bags", row.slide_id))
        slide = Image.open(row.path)
        slide.draft("RGB", (slide.width // 8, slide.height // 8))
        saturation = np.asarray(slide.convert("HSV").resize((512, 512)))[..., 1]
        under = np.zeros((512, 512), dtype=bool)
        to_picture = 512 / np.array(bag.header.size_px0 * 2)
        for left, top, right, bottom in (bag.boxes_px0("x5").numpy() * to_picture).astype(int):
            under[top:bottom, left:right] = True
        assert saturation[under].mean() > 2 * saturation[~under].mean(), row.slide_id
        assert (atlas / "out" / "overlays" / f"{row.slide_id}_x2.5.png").stat().st_size > 10_000
