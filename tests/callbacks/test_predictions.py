import csv

import pytest
import torch
from bag_factory import write_bags
from lightning.pytorch import Trainer
from models import make_module

from dasmil.callbacks.predictions import PredictionWriter
from dasmil.data import BagDataModule

CLASSES = ["benign", "in situ", "invasive"]


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """Three classes; one slide without tiles, one without a label; two bags a batch."""
    root = tmp_path_factory.mktemp("predictions")
    labels = {"a": "benign", "b": "invasive", "c": None, "empty": "in situ"}
    bags = write_bags(root / "bags", labels, empty=["empty"])
    data = BagDataModule(bags, CLASSES, batch_size=2, num_workers=0)
    data.setup("predict")
    torch.manual_seed(0)
    module = make_module(hidden_dim=8, out_dim=8, classes=CLASSES, bag_format=data.bag_format)
    writer = PredictionWriter(root / "out")
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[writer],
        enable_progress_bar=False,
        default_root_dir=root,
    )
    trainer.predict(module, datamodule=data, return_predictions=False)
    return root / "out", module


def test_columns_name_scale_and_class_and_an_unknown_label_is_empty(predicted):
    rows = read_rows(predicted[0] / "predictions.csv")
    logits = [f"logit/{scale}/{name}" for scale in ("x10", "x20") for name in CLASSES]
    assert list(rows[0]) == [
        *("slide_id", "patient_id", "label", "split"),
        *logits,
        *(f"prob/{n}" for n in CLASSES),
        *("called", "checkpoint_sha256", "state", "message"),
    ]
    assert {row["split"] for row in rows} == {""}  # the model has not been trained
    assert [row["label"] for row in rows] == ["benign", "invasive", "", "in situ"]
    for row in rows:
        fine = torch.tensor([float(row[f"logit/x20/{name}"]) for name in CLASSES])
        found = torch.tensor([float(row[f"prob/{name}"]) for name in CLASSES])
        assert torch.allclose(fine.softmax(0), found, atol=1e-6)
        assert row["called"] == CLASSES[int(found.argmax())]


def test_a_slide_without_tiles_gets_the_bias_and_an_empty_table(predicted):
    out, module = predicted
    row = next(r for r in read_rows(out / "predictions.csv") if r["slide_id"] == "empty")
    bias = module.network.heads["x20"].bag_classifier.bias.tolist()
    assert [float(row[f"logit/x20/{name}"]) for name in CLASSES] == pytest.approx(bias)
    assert read_rows(out / "instances" / "empty.csv") == []
    assert (out / "overlays" / "empty_x20.png").exists()


def test_tiles_of_a_batch_go_to_their_own_slides(predicted):
    for slide_id in ("a", "b", "c"):
        rows = read_rows(predicted[0] / "instances" / f"{slide_id}.csv")
        fine = [row for row in rows if row["scale"] == "x20"]
        assert len(fine) == 8
        for name in CLASSES:
            assert sum(float(r[f"attention/{name}"]) for r in fine) == pytest.approx(1, abs=1e-5)


def test_a_slide_is_called_at_the_thresholds_of_the_checkpoint(tmp_path):
    """Of a threshold below every probability all are called positive, of one above none."""
    bags = write_bags(tmp_path / "bags", {"a": "benign", "b": "invasive"})
    data = BagDataModule(bags, ["benign", "invasive"], num_workers=0)
    data.setup("predict")
    thresholds = {"x10": {}, "x20": {"youden": 0.0, "specificity_0.9": 1.0}}
    module = make_module(
        hidden_dim=8,
        out_dim=8,
        classes=data.classes,
        bag_format=data.bag_format,
        thresholds=thresholds,
    )
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[PredictionWriter(tmp_path / "out")],
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.predict(module, datamodule=data, return_predictions=False)
    for row in read_rows(tmp_path / "out" / "predictions.csv"):
        assert row["called_at_val_threshold"] == "invasive"
        assert row["called_at_val_specificity_0.9"] == "benign"
        assert (row["called_at_0.5"] == "invasive") == (float(row["prob/invasive"]) > 0.5)
