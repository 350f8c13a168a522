"""Methods side by side: means, intervals and p known by arithmetic, and what is refused."""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dasmil.cli import main
from dasmil.compare.compare import compare, compare_methods
from dasmil.compare.runs import read_methods
from dasmil.compare.table import Result, markdown
from dasmil.errors import InputError
from dasmil.metrics import Evaluation
from dasmil.reports.evaluation import write_evaluation

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
    write_evaluation(folder / "test", "test", evaluation, draws=0)
    return folder


def results(folders: Sequence[Path], metric: str, draws: int = 99) -> list[Result]:
    return list(compare_methods(read_methods(folders), [metric], draws, 0).results[metric])


def test_the_mean_is_over_test_sets_of_the_mean_over_seeds(tmp_path: Path) -> None:
    """AUROC 1 and 1/2 of two seeds in one fold, 1/4 in the other: (3/4 + 1/4) / 2."""
    fold_0, fold_1 = tmp_path / "row" / "fold_0", tmp_path / "row" / "fold_1"
    write_run(fold_0 / "seed_0", [0.1, 0.2, 0.3, 0.4])
    write_run(fold_0 / "seed_1", [0.1, 0.4, 0.2, 0.3][::-1])
    write_run(fold_1 / "seed_0", [0.3, 0.4, 0.2, 0.35], names=["t0", "t1", "t2", "t3"])
    (found,) = results([tmp_path / "row"], "auroc")
    assert found.values == pytest.approx((1, 0.5, 0.25))
    assert found.mean == pytest.approx(0.5)
    assert found.sd == pytest.approx(
        ((5 / 12) ** 2 + (1 / 12) ** 2 + (4 / 12) ** 2) ** 0.5 / 2**0.5
    )
    assert (found.difference, found.p) == (None, None)


def test_a_method_that_is_better_on_every_slide_has_the_smallest_p(tmp_path: Path) -> None:
    right = write_run(tmp_path / "right", [0.1, 0.2, 0.8, 0.9])
    wrong = write_run(tmp_path / "wrong", [0.9, 0.8, 0.2, 0.1])
    _, found = results([right, wrong], "auroc")
    assert (found.mean, found.interval) == (0, (0, 0))
    assert (found.difference, found.difference_interval) == (-1, (-1, -1))
    assert found.p == pytest.approx(1 / 100)


def test_equal_methods_do_not_differ(tmp_path: Path) -> None:
    scores = [0.1, 0.6, 0.5, 0.9]
    folders = [write_run(tmp_path / name, scores) for name in ("one", "other")]
    one, other = results(folders, "auroc")
    assert one.interval == other.interval != (0.75, 0.75)
    assert (other.difference, other.difference_interval, other.p) == (0, (0, 0), 1)


def test_methods_share_their_draws(tmp_path: Path) -> None:
    """Every slide's squared error is larger by 0.05: so is each draw's mean, whatever was drawn."""
    errors = [0.04 * number for number in range(10)]
    labels = [number % 2 for number in range(10)]

    def with_errors(name: str, added: float) -> Path:
        distances = [(error + added) ** 0.5 for error in errors]
        scores = [1 - d if label else d for d, label in zip(distances, labels)]
        return write_run(tmp_path / name, scores, labels=labels)

    one, other = results([with_errors("one", 0), with_errors("other", 0.05)], "brier")
    assert one.interval[1] - one.interval[0] > 0.1
    assert other.difference_interval == pytest.approx((0.05, 0.05))


def test_draws_are_of_patients_with_all_slides_in_all_test_sets(tmp_path: Path) -> None:
    """The same slides again under other names, in a second test set, make nothing more certain."""
    scores, labels = [0.1, 0.6, 0.3, 0.5, 0.55, 0.9], [0, 0, 0, 1, 1, 1]
    patients = [f"p{number}" for number in range(6)]
    once = write_run(tmp_path / "once", scores, labels=labels, patients=patients)
    for fold in "ab":
        names = [f"{fold}{number}" for number in range(6)]
        write_run(tmp_path / "twice" / fold, scores, labels=labels, names=names, patients=patients)
    double = [name for name in scores for _ in range(2)]
    same_set = write_run(
        tmp_path / "same_set",
        double,
        labels=[label for label in labels for _ in range(2)],
        names=[f"s{number:02}" for number in range(12)],
        patients=[name for name in patients for _ in range(2)],
    )
    intervals = [
        results([folder], "auroc", 300)[0].interval
        for folder in (once, tmp_path / "twice", same_set)
    ]
    assert intervals[0][0] < intervals[0][1]
    assert intervals[1] == pytest.approx(intervals[0])
    assert intervals[2] == pytest.approx(intervals[0])


def test_every_fold_keeps_both_classes_in_every_draw(tmp_path: Path) -> None:
    for fold in range(3):
        names = [f"{fold}_{number}" for number in range(3)]
        write_run(tmp_path / f"fold_{fold}", [0.1, 0.2, 0.9], labels=[0, 0, 1], names=names)
    (found,) = results([tmp_path], "auroc", 200)
    assert found.interval == (1, 1)


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
    assert results([one, other], "auroc")[1].difference_interval == (0, 0)


def test_a_figure_that_a_fold_lacks_is_not_defined(tmp_path: Path) -> None:
    write_run(tmp_path / "fold_0", [0.1, 0.2, 0.8, 0.9])
    write_run(tmp_path / "fold_1", [0.2, 0.9], labels=[0, 0], names=["t0", "t1"])
    comparison = compare_methods(read_methods([tmp_path]), ["auroc", "accuracy"], 9, 0)
    text = markdown(comparison)
    line = next(line for line in text.splitlines() if "auroc" in line)
    assert [cell.strip() for cell in line.split("|")][-3:-1] == ["–", "–"]
    assert "a test set lacks a class" in text
    assert comparison.results["accuracy"][0].mean == pytest.approx((1 + 1 / 2) / 2)


def test_the_verb_prints_the_table_and_writes_three_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the worst draw ours has (1 + 1 + 0) / 3, theirs (0 + 0 + 1) / 3: none is beyond zero."""
    perfect = [0.1, 0.2, 0.8, 0.9]
    for seed, scores in enumerate((perfect, perfect, [0.1, 0.7, 0.6, 0.9])):
        write_run(tmp_path / "right" / f"seed_{seed}", scores)
        write_run(tmp_path / "wrong" / f"seed_{seed}", scores[::-1])
    folders = [str(tmp_path / name) for name in ("right", "wrong")]
    options = ["--metrics", "[auroc,brier]", "--draws", "19", "--labels", "[ours,theirs]"]
    assert main(["compare", *folders, *options, "--output", str(tmp_path / "table")]) == 0
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "# Comparison on 4 test slides of 4 patients\n" in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    (row,) = [line for line in cells if line[:2] == ["auroc ↑", "ours"]]
    assert row[2:5] == ["x20", "3", "0.917 ± 0.144"]
    row = next(line for line in cells if line[1:2] == ["theirs"])
    assert (row[4], row[6], row[8]) == ("0.083 ± 0.144", "-0.833", "0.050")
    assert "19 bootstrap draws" in text and "brier ↓" in text and "(1 + 2 · min(" in text
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        rows = {(row["metric"], row["method"]): row for row in csv.DictReader(file)}
    assert float(rows["auroc", "theirs"]["mean"]) == pytest.approx(1 / 12)
    assert rows["auroc", "theirs"]["values"] == "0.0;0.0;0.25"
    assert rows["auroc", "ours"]["p"] == ""
    assert float(rows["auroc", "theirs"]["p"]) == pytest.approx(1 / 20)
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_as_output_takes_the_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [0.1, 0.2, 0.8, 0.9])
    (tmp_path / "out").mkdir()
    compare((run,), output=tmp_path / "out", draws=9)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "compare.csv",
        "compare.md",
        "compare.png",
    ]


def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
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


def test_a_run_without_test_figures_is_refused_with_the_command(tmp_path: Path) -> None:
    write_run(tmp_path / "row" / "seed_0", [0.1, 0.2, 0.8, 0.9])
    unfinished = tmp_path / "row" / "seed_1"
    (unfinished / "checkpoints").mkdir(parents=True)
    found = refusal(tmp_path, tmp_path / "row")
    assert f"dasmil test --ckpt_path {unfinished}/checkpoints/best.ckpt" in found
    (tmp_path / "empty").mkdir()
    assert "no run in it" in refusal(tmp_path, tmp_path / "empty")
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
