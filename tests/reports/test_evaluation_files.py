"""The files of an evaluation: read back to the last digit, and what they say of each figure."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dasmil.errors import InputError
from dasmil.metrics import Evaluation
from dasmil.reports.evaluation_files import read_checkpoint, read_evaluation, write_evaluation

THRESHOLDS = {
    "x10": {"youden": 0.5, "specificity_0.9": 0.75},
    "x20": {"youden": 0.1 + 0.2, "specificity_0.9": 0.7},
}


def evaluation(patients: str = "abcd", thresholds=THRESHOLDS) -> Evaluation:
    """Four slides; three of four pairs are in order at x10, all at x20."""
    coarse = torch.tensor([0.1, 0.6, 0.3, 0.8], dtype=torch.float64)
    fine = torch.tensor([1e-17, 0.1, 1 / 3, 1 - 2**-53], dtype=torch.float64)
    return Evaluation(
        classes=("normal", "tumor"),
        slide_ids=("slide_0", "slide_1", "slide_2", "slide_3, 3"),
        patients=tuple(patients),
        labels=torch.tensor([0, 0, 1, 1]),
        probabilities={
            "x10": torch.stack([1 - coarse, coarse], 1),
            "x20": torch.stack([1 - fine, fine], 1),
        },
        thresholds=thresholds,
        specificity=0.9,
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def metrics_of(folder: Path, stage: str = "test") -> dict[tuple[str, str, str], dict[str, str]]:
    rows = rows_of(folder / f"{stage}_metrics.csv")
    return {(row["scale"], row["level"], row["metric"]): row for row in rows}


@pytest.mark.parametrize("thresholds", [THRESHOLDS, None])
def test_read_back_to_the_last_digit(tmp_path: Path, thresholds) -> None:
    written = evaluation(thresholds=thresholds)
    write_evaluation(tmp_path, "val", written, about={"checkpoint": "best.ckpt"})
    found = read_evaluation(tmp_path, "val")
    for name in ("classes", "slide_ids", "patients", "thresholds", "specificity", "scales"):
        assert getattr(found, name) == getattr(written, name), name
    assert torch.equal(found.labels, written.labels)
    for scale, probabilities in written.probabilities.items():
        assert found.probabilities[scale].dtype == torch.float64
        assert torch.equal(found.probabilities[scale], probabilities)
    assert json.loads((tmp_path / "val_evaluation.json").read_text())["checkpoint"] == "best.ckpt"


def test_both_tables_name_the_checkpoint(tmp_path: Path) -> None:
    about = {"checkpoint": "best.ckpt", "checkpoint_sha256": "0123"}
    write_evaluation(tmp_path, "test", evaluation(), about=about)
    for table in ("test_slides.csv", "test_metrics.csv"):
        assert {row["checkpoint_sha256"] for row in rows_of(tmp_path / table)} == {"0123"}
    assert read_checkpoint(tmp_path, "test") == ("best.ckpt", "0123")


def test_the_json_is_flat_and_omits_the_name_of_the_finest_scale(tmp_path: Path) -> None:
    write_evaluation(tmp_path, "test", evaluation(), {"loss": 0.5, "x20/froc": 0.25})
    metrics = json.loads((tmp_path / "test_metrics.json").read_text())
    assert (metrics["test/x10/auroc"], metrics["test/x20/auroc"]) == (0.75, 1.0)
    assert metrics["test/auroc"] == 1.0
    assert metrics["test/x20/sensitivity_at_val_specificity_0.9"] == 0.5
    assert (metrics["test/loss"], metrics["test/x20/froc"]) == (0.5, 0.25)
    assert not [name for name in metrics if "patient" in name]


def test_the_table_says_interval_number_and_threshold(tmp_path: Path) -> None:
    four, names = evaluation(), tuple(f"slide_{number}" for number in range(20))
    slides = replace(
        four,
        slide_ids=names,
        patients=names,
        labels=four.labels.repeat(5),
        probabilities={scale: p.repeat(5, 1) for scale, p in four.probabilities.items()},
    )
    write_evaluation(tmp_path, "test", slides, {"x20/instance_auroc": 0.75})
    table = metrics_of(tmp_path)
    low, high = slides.intervals("x10")["auroc"]
    row = table["x10", "slide", "auroc"]
    assert (float(row["value"]), float(row["low"]), float(row["high"])) == (0.75, low, high)
    assert (row["n"], row["patients"]) == ("20", "20")
    few = "few patients: 10 with slides of normal and 10 with slides of tumor"
    assert row["note"] == few
    note = table["x20", "slide", "accuracy_at_val_threshold"]["note"]
    assert note == f"above 0.3000, chosen on the validation slides (youden); {few}"
    note = table["x20", "slide", "sensitivity_at_val_specificity_0.9"]["note"]
    assert note.startswith("above 0.7000, chosen on the validation slides (specificity_0.9)")
    row = table["x20", "slide", "calibration_error"]
    assert row["low"] == "" and row["note"].startswith("no interval: with few slides")
    assert table["x20", "instance", "instance_auroc"]["value"] == "0.75"


def test_too_few_patients_have_no_interval_and_the_table_says_why(tmp_path: Path) -> None:
    write_evaluation(tmp_path, "test", evaluation())
    row = metrics_of(tmp_path)["x20", "slide", "auroc"]
    assert (row["value"], row["low"], row["high"]) == ("1.0", "", "")
    assert row["note"].startswith(
        "too few patients for any interval or p: 2 with slides of normal and 2 with"
    )


def test_the_test_threshold_is_reported_by_test_only_and_called_biased(
    tmp_path: Path,
) -> None:
    for split in ("val", "test"):
        write_evaluation(tmp_path, split, evaluation())
    name = "accuracy_at_test_threshold"
    row = metrics_of(tmp_path)["x20", "slide", name]
    assert (row["value"], row["low"]) == ("1.0", "")
    assert "optimistically biased" in row["note"]
    assert json.loads((tmp_path / "test_metrics.json").read_text())[f"test/x20/{name}"] == 1.0
    assert name not in (tmp_path / "val_metrics.json").read_text()
    assert name not in (tmp_path / "val_metrics.csv").read_text()


def test_patients_with_several_slides_have_figures_of_their_own(tmp_path: Path) -> None:
    """Patient a: slides of 0.1 and 0.6 at x10; b and c are positive with 0.3 and 0.8."""
    write_evaluation(tmp_path, "test", evaluation("aabc"))
    metrics = json.loads((tmp_path / "test_metrics.json").read_text())
    assert (metrics["test/x10/auroc"], metrics["test/x10/patient_auroc"]) == (0.75, 0.5)
    assert metrics["test/patient_auroc"] == 1.0
    assert metrics_of(tmp_path)["x10", "patient", "auroc"]["n"] == "3"
    write_evaluation(tmp_path, "test", evaluation("abab"), pooling="max")
    metrics = json.loads((tmp_path / "test_metrics.json").read_text())
    assert metrics["test/x10/patient_auroc"] is None  # both patients are positive


def test_a_patient_without_one_label_costs_the_metrics_of_patients_alone(tmp_path: Path) -> None:
    slides = Evaluation(
        classes=("luad", "lusc", "normal"),
        slide_ids=("s0", "s1", "s2"),
        patients=("a", "a", "b"),
        labels=torch.tensor([0, 1, 2]),
        probabilities={"x20": torch.eye(3).double()},
    )
    with pytest.warns(UserWarning, match="no metrics of patients: patient a: its slides have"):
        write_evaluation(tmp_path, "test", slides)
    metrics = json.loads((tmp_path / "test_metrics.json").read_text())
    assert metrics["test/auroc"] == 1.0
    assert read_evaluation(tmp_path, "test").thresholds is None


def test_a_figure_that_is_not_defined_is_null_and_an_empty_cell(tmp_path: Path) -> None:
    one_class = replace(evaluation(), labels=torch.zeros(4, dtype=torch.int64))
    write_evaluation(tmp_path, "test", one_class, {"x20/froc": float("nan")})
    metrics = json.loads((tmp_path / "test_metrics.json").read_text())
    assert (metrics["test/x20/auroc"], metrics["test/x20/froc"]) == (None, None)
    row = metrics_of(tmp_path)["x20", "slide", "auroc"]
    assert (row["value"], row["low"], row["high"]) == ("", "", "")


def test_an_evaluation_that_is_broken_off_does_not_pass_for_a_finished_one(tmp_path: Path) -> None:
    write_evaluation(tmp_path, "test", evaluation())
    (tmp_path / "test_metrics.csv").unlink()
    (tmp_path / "test_metrics.csv").mkdir()  # the table cannot be written
    with pytest.raises(OSError):
        write_evaluation(tmp_path, "test", evaluation("aabc"))
    with pytest.raises(InputError, match="does not exist"):
        read_evaluation(tmp_path, "test")


def break_json(folder: Path) -> None:
    (folder / "test_evaluation.json").write_text("{", encoding="utf-8")


def forget_classes(folder: Path) -> None:
    (folder / "test_evaluation.json").write_text('{"scales": ["x20"]}', encoding="utf-8")


def drop_table(folder: Path) -> None:
    (folder / "test_slides.csv").unlink()


def rewrite(old: str, new: str):
    def edit(folder: Path) -> None:
        path = folder / "test_slides.csv"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "test_evaluation.json").unlink(), "dasmil test --ckpt_path"),
        (break_json, "cannot be read"),
        (forget_classes, "KeyError: 'classes'"),
        (drop_table, "no such table"),
        (rewrite("prob/x10/tumor", "prob/x10/cancer"), "lacks column prob/x10/tumor"),
        (rewrite("slide_1", "slide_0"), "slide slide_0 occurs twice"),
        (rewrite("normal,0.9", "healthy,0.9"), "line 2: label 'healthy' is none of normal, tumor"),
        (rewrite("normal,0.9", "normal,high"), "could not convert string to float: 'high'"),
        (rewrite("normal,0.9", "normal,1.9"), "numbers outside 0 to 1"),
    ],
)
def test_files_that_are_not_ours_are_refused(tmp_path: Path, damage, message: str) -> None:
    write_evaluation(tmp_path, "test", evaluation())
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        read_evaluation(tmp_path, "test")
