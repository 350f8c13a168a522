"""Methods side by side: values, intervals and p known by arithmetic, and what is refused."""

import csv
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isnan
from pathlib import Path

import pytest
import torch
from PIL import Image

from dasmil.cli import main
from dasmil.errors import InputError
from dasmil.experiments.compare.compare import compare, compare_methods
from dasmil.experiments.compare.figure import draw
from dasmil.experiments.compare.runs import read_methods
from dasmil.experiments.compare.table import Comparison, Result, csv_rows, markdown
from dasmil.metrics import Evaluation
from dasmil.reports.evaluation_files import write_evaluation

NAMES = ("s0", "s1", "s2", "s3")
LABELS = (0, 0, 1, 1)


def write_run(
    folder: Path,
    positive: Sequence[float],
    *,
    labels: Sequence[int] = LABELS,
    names: Sequence[str] | None = None,
    patients: Sequence[str] | None = None,
    scales: Sequence[str] = ("x20",),
    classes: tuple[str, ...] = ("normal", "tumor"),
    about: Mapping[str, str | None] | None = None,
) -> Path:
    """The test files of a run, with the same probabilities at each scale."""
    scores = torch.tensor(positive, dtype=torch.float64)
    names = [f"s{number}" for number in range(len(labels))] if names is None else list(names)
    evaluation = Evaluation(
        classes=classes,
        slide_ids=tuple(names),
        patients=tuple(patients or names),
        labels=torch.tensor(labels),
        probabilities={scale: torch.stack([1 - scores, scores], 1) for scale in scales},
    )
    write_evaluation(folder / "test", "test", evaluation, about=about)
    return folder


def results(folders: Sequence[Path], metric: str, draws: int = 99) -> list[Result]:
    asked = ["auroc"] if metric.startswith("auroc") else [metric]
    return list(compare_methods(read_methods(folders), asked, draws, 0).results[metric])


TEN = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
MIXED = [0.1, 0.6, 0.3, 0.2, 0.45, 0.5, 0.55, 0.9, 0.4, 0.8]  # of slides labelled TEN


def test_test_sets_are_pooled_and_pairs_of_the_same_fold_are_reported_too(tmp_path: Path) -> None:
    """Two seeds in one fold, one in the other, by counting pairs.

    Pooled 10.5 and 7 of 16 pairs are in order, in the same fold 4 + 1 and 2 + 1 of 8.
    """
    fold_0, fold_1 = tmp_path / "row" / "fold_0", tmp_path / "row" / "fold_1"
    write_run(fold_0 / "seed_0", [0.1, 0.2, 0.3, 0.4])
    write_run(fold_0 / "seed_1", [0.3, 0.2, 0.4, 0.1])
    write_run(fold_1 / "seed_0", [0.3, 0.4, 0.2, 0.35], names=["t0", "t1", "t2", "t3"])
    (pooled,) = results([tmp_path / "row"], "auroc_pooled")
    assert pooled.values == pytest.approx((1, 0.5, 0.25))
    assert pooled.value == pytest.approx((10.5 + 7) / 2 / 16)
    assert pooled.sd == pytest.approx(
        ((5 / 12) ** 2 + (1 / 12) ** 2 + (4 / 12) ** 2) ** 0.5 / 2**0.5
    )
    assert (pooled.difference, pooled.p) == (None, None)
    (same_fold,) = results([tmp_path / "row"], "auroc_same_fold")
    assert same_fold.value == pytest.approx((5 + 3) / 2 / 8)


def test_a_fold_of_one_class_counts_in_the_pooled_auroc(tmp_path: Path) -> None:
    write_run(tmp_path / "fold_0", [0.1, 0.2, 0.8, 0.9])
    write_run(tmp_path / "fold_1", [0.2, 0.85], labels=[0, 0], names=["t0", "t1"])
    comparison = compare_methods(read_methods([tmp_path]), ["auroc", "accuracy"], 9, 0)
    (pooled,) = comparison.results["auroc_pooled"]
    assert pooled.value == pytest.approx(7 / 8)
    assert pooled.values[0] == 1 and isnan(pooled.values[1])
    (same_fold,) = comparison.results["auroc_same_fold"]
    assert same_fold.value == 1
    assert comparison.results["accuracy"][0].value == pytest.approx(5 / 6)
    text = markdown(comparison)
    assert "it counts in the pooled one" in text
    assert "pairs of slides of the same fold" in text and "of the models of different" in text


def test_models_of_one_fold_that_score_higher_cost_the_pooled_auroc_alone(tmp_path: Path) -> None:
    """The order is right in each fold, but the one model's scores all lie above the other's."""
    write_run(tmp_path / "fold_0", [0.1, 0.2, 0.3, 0.4])
    write_run(tmp_path / "fold_1", [0.6, 0.7, 0.8, 0.9], names=["t0", "t1", "t2", "t3"])
    assert results([tmp_path], "auroc_same_fold")[0].value == 1
    assert results([tmp_path], "auroc_pooled")[0].value == 12 / 16


def test_a_method_that_is_better_on_every_slide_has_the_smallest_p(tmp_path: Path) -> None:
    """Of the 512 ways to swap ten patients, but for the sign, the data and three more."""
    right = write_run(tmp_path / "right", [0.1 * n for n in range(10)], labels=TEN)
    wrong = write_run(tmp_path / "wrong", [1 - 0.1 * n for n in range(10)], labels=TEN)
    _, found = results([right, wrong], "auroc", draws=512)
    assert (found.value, found.difference, found.p) == (0, -1, 4 / 512)
    low, high = found.difference_interval
    assert low == -1 and -1 < high < -0.3
    assert found.interval[0] == 0 and 0.1 < found.interval[1] < 0.5


def test_equal_methods_do_not_differ(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, MIXED, labels=TEN) for name in ("one", "other")]
    one, other = results(folders, "auroc")
    assert one.interval == other.interval
    assert 0 < one.interval[0] < one.value < one.interval[1] < 1
    assert (other.difference, other.difference_interval, other.p) == (0, (0, 0), 1)


def test_methods_that_are_both_perfect_may_still_differ(tmp_path: Path) -> None:
    """Not a slide tells them apart, but ten slides are not many."""
    scores = [0.05 * n for n in range(10)]
    one = write_run(tmp_path / "one", scores, labels=TEN)
    other = write_run(tmp_path / "other", [s**2 + s for s in scores], labels=TEN)
    first, second = results([one, other], "auroc")
    assert first.interval[0] < 0.8 and second.interval[1] == pytest.approx(1)
    assert (second.difference, second.p) == (0, 1)
    low, high = second.difference_interval
    assert low < -0.1 and high > 0.1


def test_too_few_patients_give_neither_interval_nor_p_and_the_table_says_why(
    tmp_path: Path,
) -> None:
    """Four patients with tumour: one of the nine has slides of both classes."""
    labels, patients = [0, 0, 0, 0, 0, 0, 1, 1, 1, 1], list("abcdefaghi")
    folders = [
        write_run(tmp_path / name, scores, labels=labels, patients=patients)
        for name, scores in (("one", MIXED), ("other", MIXED[::-1]))
    ]
    comparison = compare_methods(read_methods(folders), ["auroc", "brier"], 99, 0)
    for first, other in comparison.results.values():
        assert all(map(isnan, (*first.interval, *other.difference_interval, other.p)))
    text = markdown(comparison)
    assert (
        "too few patients for any interval or p: 4 with slides of tumor, and 5 are needed" in text
    )
    assert "few patients: 6 with slides of normal and 4 with slides of tumor" in text
    (row, *_) = csv_rows(comparison)
    assert (row["low"], row["p"]) == (None, None) and "4 with slides of tumor" in row["note"]


def test_the_table_says_why_the_auroc_of_the_same_fold_alone_has_no_interval(
    tmp_path: Path,
) -> None:
    """Of the second fold, with all but two of the tumours, no pair is in one fold."""
    write_run(tmp_path / "fold_0", MIXED[:7], labels=TEN[:7])
    write_run(tmp_path / "fold_1", MIXED[5:], labels=[1] * 5, names=[f"t{n}" for n in range(5)])
    comparison = compare_methods(read_methods([tmp_path]), ["auroc"], 9, 0)
    (pooled,), (same_fold,) = comparison.results.values()
    assert not isnan(pooled.interval[0]) and isnan(same_fold.interval[0])
    reason = "auroc_same_fold: too few patients for an interval or a p: a class has fewer than 5"
    assert reason in markdown(comparison) and reason in next(csv_rows(comparison))["note"]


def test_a_metric_given_twice_is_listed_once(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / n, MIXED[k:] + MIXED[:k], labels=TEN) for k, n in enumerate("abc")]
    compare(tuple(runs), ("brier", "brier"), output=tmp_path / "table", draws=9)
    with open(tmp_path / "table/compare.csv", newline="", encoding="utf-8") as file:
        found = [float(row["value"]) for row in csv.DictReader(file)]
    assert found == [results([run], "brier")[0].value for run in runs]


def test_the_patient_is_the_unit_over_all_test_sets(tmp_path: Path) -> None:
    """The same slides again under other names, in a second test set, make nothing more certain."""
    patients = [f"p{number}" for number in range(10)]
    once = write_run(tmp_path / "once", MIXED, labels=TEN, patients=patients)
    for fold in "ab":
        names = [f"{fold}{number}" for number in range(10)]
        write_run(tmp_path / "twice" / fold, MIXED, labels=TEN, names=names, patients=patients)
    same_set = write_run(
        tmp_path / "same_set",
        MIXED * 2,
        labels=TEN * 2,
        names=[f"s{number:02}" for number in range(20)],
        patients=patients * 2,
    )
    (alone,), (pooled,) = results([once], "auroc"), results([tmp_path / "twice"], "auroc_pooled")
    assert pooled.interval == pytest.approx(results([same_set], "auroc")[0].interval)
    assert pooled.interval == pytest.approx(alone.interval, abs=0.03)


def test_each_is_judged_at_its_finest_scale_and_the_table_says_so(tmp_path: Path) -> None:
    both = write_run(tmp_path / "both", [0.1, 0.2, 0.8, 0.9], scales=["x10", "x20"])
    coarse = write_run(tmp_path / "coarse", [0.1, 0.2, 0.8, 0.9], scales=["x10"])
    methods = read_methods([both, coarse])
    assert [method.scale for method in methods] == ["x20", "x10"]
    assert "they are not the same" in markdown(compare_methods(methods, ["auroc"], 9, 0))
    methods = read_methods([both, coarse], scale="x10")
    assert [method.scale for method in methods] == ["x10", "x10"]
    assert "they are not the same" not in markdown(compare_methods(methods, ["auroc"], 9, 0))
    with pytest.raises(InputError, match=r"coarse: it has no scale x20, only x10"):
        read_methods([both, coarse], scale="x20")


def test_slides_in_another_order_are_the_same_slides(tmp_path: Path) -> None:
    scores = [0.1, 0.6, 0.5, 0.9]
    one = write_run(tmp_path / "one", scores)
    other = write_run(tmp_path / "other", scores[::-1], labels=LABELS[::-1], names=NAMES[::-1])
    assert results([one, other], "auroc")[1].difference == 0


@pytest.mark.draws
def test_the_verb_prints_the_table_and_writes_three_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    perfect = [0.1 * number for number in range(10)]
    for seed, scores in enumerate((perfect, perfect, MIXED)):
        write_run(tmp_path / "right" / f"seed_{seed}", scores, labels=TEN)
        write_run(tmp_path / "wrong" / f"seed_{seed}", scores[::-1], labels=TEN)
    folders = [str(tmp_path / name) for name in ("right", "wrong")]
    options = ["--metrics", "[auroc,brier]", "--draws", "512", "--labels", "[ours,theirs]"]
    assert main(["compare", *folders, *options, "--output", str(tmp_path / "table")]) == 0
    text = (tmp_path / "table/compare.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "# Comparison on 10 test slides of 10 patients\n" in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    (row,) = [line for line in cells if line[:2] == ["auroc ↑", "ours"]]
    assert (row[2:5], row[9]) == (["x20", "3", "0.947"], "0.947 ± 0.092")
    row = next(line for line in cells if line[1:2] == ["theirs"])
    assert (row[4], row[6], row[8]) == ("0.053", "-0.893", "0.008")
    assert "in at most 512 ways" in text and "brier ↓" in text
    assert "few patients: 5 with slides of normal and 5 with slides of tumor" in text
    with open(tmp_path / "table/compare.csv", newline="", encoding="utf-8") as file:
        rows = {(row["metric"], row["method"]): row for row in csv.DictReader(file)}
    assert float(rows["auroc", "theirs"]["value"]) == pytest.approx(0.16 / 3)
    assert rows["auroc", "theirs"]["values"] == "0.0;0.0;0.16"
    assert rows["auroc", "ours"]["p"] == ""
    assert float(rows["auroc", "theirs"]["p"]) == 4 / 512
    assert (tmp_path / "table/compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_names_the_checkpoint_of_each_run(tmp_path: Path) -> None:
    about = {"checkpoint": "best.ckpt", "checkpoint_sha256": "0123456789abcdef"}
    one = write_run(tmp_path / "one", [0.1, 0.2, 0.8, 0.9], about=about)
    other = write_run(tmp_path / "other", [0.1, 0.2, 0.8, 0.9])
    compare((one, other), output=tmp_path / "table", draws=9)
    text = (tmp_path / "table/compare.md").read_text(encoding="utf-8")
    assert f"- checkpoints of one: {one / 'test'} (best.ckpt 0123456789ab)\n" in text
    assert f"- checkpoints of other: {other / 'test'} (not known)\n" in text
    with open(tmp_path / "table/compare.csv", newline="", encoding="utf-8") as file:
        assert [row["checkpoints"] for row in csv.DictReader(file)][:2] == [
            "best.ckpt 0123456789ab",
            "",
        ]


def test_the_output_is_a_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [0.1, 0.2, 0.8, 0.9])
    compare((run,), output=tmp_path / "out", draws=9)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "compare.csv",
        "compare.md",
        "compare.png",
    ]


def test_folders_of_one_name_are_labelled_by_their_paths(tmp_path: Path) -> None:
    scores = [0.1, 0.2, 0.8, 0.9]
    folders = [write_run(tmp_path / name / "version_0", scores) for name in ("ours", "theirs")]
    assert [method.label for method in read_methods(folders)] == [str(path) for path in folders]
    write_run(tmp_path / "third", scores)
    labels = [method.label for method in read_methods([folders[0], tmp_path / "third"])]
    assert labels == ["version_0", "third"]


def test_the_output_folder_of_test_is_a_run_too(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [0.1, 0.2, 0.8, 0.9])
    shutil.move(tmp_path / "run" / "test", tmp_path / "elsewhere")
    (method,) = read_methods([tmp_path / "elsewhere"])
    assert [run.folder for run in method.runs] == [tmp_path / "elsewhere"]


def refusal(tmp_path: Path, *folders: Path, **options: object) -> str:
    """The one sentence; nothing is written."""
    with pytest.raises(InputError) as caught:
        compare(folders, output=tmp_path / "refused", draws=9, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("refused*"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dict(names=["s0", "s1", "s2", "s9"]), "it lacks s3; it has in addition s9"),
        (dict(patients=["s0", "s1", "s2", "p3"]), "slide s3 has the patient p3, and s3 in another"),
        (dict(labels=[0, 1, 1, 1]), "slide s1 has the label tumor, and normal in another run"),
        (dict(classes=("tumor", "normal")), "its classes are tumor, normal, and those of"),
    ],
)
def test_other_test_slides_are_refused_by_name(
    tmp_path: Path, other: dict[str, object], message: str
) -> None:
    ours = write_run(tmp_path / "ours", [0.1, 0.2, 0.8, 0.9])
    theirs = write_run(tmp_path / "theirs", [0.1, 0.2, 0.8, 0.9], **other)  # type: ignore[arg-type]
    found = refusal(tmp_path, ours, theirs)
    assert message in found
    assert str(theirs) in found


def test_the_same_slides_in_other_folds_are_refused(tmp_path: Path) -> None:
    for name, folds in (("ours", ("02", "13")), ("theirs", ("03", "12"))):
        for number, fold in enumerate(folds):
            names = [f"s{slide}" for slide in fold]
            write_run(tmp_path / name / f"fold_{number}", [0.1, 0.9], labels=[0, 1], names=names)
    found = refusal(tmp_path, tmp_path / "ours", tmp_path / "theirs")
    assert "the same slides, divided otherwise" in found


def test_a_missing_fold_is_refused(tmp_path: Path) -> None:
    for name, folds in (("ours", "ab"), ("theirs", "a")):
        for fold in folds:
            names = [f"{fold}{number}" for number in range(4)]
            write_run(tmp_path / name / fold, [0.1, 0.2, 0.8, 0.9], names=names)
    found = refusal(tmp_path, tmp_path / "ours", tmp_path / "theirs")
    assert "it lacks b0, b1, b2, b3" in found


def test_a_run_without_test_metrics_is_refused_with_the_command(tmp_path: Path) -> None:
    write_run(tmp_path / "row" / "seed_0", [0.1, 0.2, 0.8, 0.9])
    unfinished = tmp_path / "row" / "seed_1"
    (unfinished / "checkpoints").mkdir(parents=True)
    found = refusal(tmp_path, tmp_path / "row")
    assert f"dasmil test --ckpt_path {unfinished}/checkpoints/best.ckpt" in found
    (tmp_path / "empty").mkdir()
    assert "contains no run" in refusal(tmp_path, tmp_path / "empty")
    assert "no such folder" in refusal(tmp_path, tmp_path / "nowhere")


def test_a_run_is_named_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "row" / "seed_0", [0.1, 0.2, 0.8, 0.9])
    for other in (run, tmp_path / "row", run / "test", run / ".." / "seed_0"):
        assert "both hold the run" in refusal(tmp_path, run, other)


def test_several_methods_are_not_taken_for_one(tmp_path: Path) -> None:
    """A folder of rows: the same seed on the same slides twice, or other scales."""
    for row in ("ours", "theirs"):
        run = write_run(tmp_path / "sweep" / row / "seed_0", [0.1, 0.2, 0.8, 0.9])
        (run / "config.yaml").write_text("seed_everything: 0\n", encoding="utf-8")
    assert "the same seed and the same test slides" in refusal(tmp_path, tmp_path / "sweep")
    write_run(tmp_path / "mixed" / "a", [0.1, 0.2, 0.8, 0.9])
    write_run(tmp_path / "mixed" / "b", [0.1, 0.2, 0.8, 0.9], scales=["x10"])
    assert "different scales" in refusal(tmp_path, tmp_path / "mixed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(metrics=("auroc", "auc")), "has no auc; it has auroc, average_precision"),
        (dict(labels=("one", "two")), "--labels names 2 methods, but 1 folders are given"),
        (dict(metrics=()), "at least one folder, one metric and one draw"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, object], message: str) -> None:
    run = write_run(tmp_path / "run", [0.1, 0.2, 0.8, 0.9])
    assert message in refusal(tmp_path, run, **options)


def test_the_command_line_says_a_refusal_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.draws
def test_a_picture_of_very_many_methods_and_metrics_has_a_limit(tmp_path: Path) -> None:
    method = read_methods([write_run(tmp_path / "a", [0.1, 0.6, 0.4, 0.9])])[0]
    result = Result((0.5,), 0.5, (0.4, 0.6), None, None, None)
    many = Comparison(
        methods=tuple(
            replace(method, label=f"$x_{{ {number}" + "x" * 300) for number in range(300)
        ),
        results={f"metric {number}": [result] * 300 for number in range(30)},
        num_slides=4,
        num_patients=4,
        draws=9,
        seed=0,
    )
    draw(tmp_path / "c.png", many)
    with Image.open(tmp_path / "c.png") as picture:
        assert max(picture.size) <= 3600
