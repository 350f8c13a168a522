"""The metrics of a part: which threshold they are at, patients, and intervals."""

from math import isnan

import pytest
import torch

from dasmil.errors import InputError
from dasmil.metrics import Evaluation, pool


def evaluation(
    positive: list[float],
    labels: list[int],
    patients: list[str] | None = None,
    thresholds: dict[str, float] | None = None,
) -> Evaluation:
    """Of two classes; at x10 every slide has 0.5."""
    scores = torch.tensor(positive, dtype=torch.float64)
    even = torch.full_like(scores, 0.5)
    names = [f"slide_{number}" for number in range(len(labels))]
    return Evaluation(
        classes=("normal", "tumor"),
        slide_ids=tuple(names),
        patients=tuple(patients or names),
        labels=torch.tensor(labels),
        probabilities={
            "x10": torch.stack([even, even], 1),
            "x20": torch.stack([1 - scores, scores], 1),
        },
        thresholds=None if thresholds is None else {"x10": thresholds, "x20": thresholds},
    )


def of_three_classes(probabilities: list[list[float]], labels: list[int], patients: str):
    return Evaluation(
        classes=("luad", "lusc", "normal"),
        slide_ids=tuple(f"slide_{number}" for number in range(len(labels))),
        patients=tuple(patients),
        labels=torch.tensor(labels),
        probabilities={"x20": torch.tensor(probabilities, dtype=torch.float64)},
    )


def test_metrics_at_the_thresholds_of_the_validation_slides() -> None:
    """Above 0.2: both positive slides and one of two negative; above 0.7: one positive slide."""
    points = {"youden": 0.2, "specificity_0.9": 0.7}
    figures = evaluation([0.1, 0.4, 0.6, 0.8], [0, 0, 1, 1], thresholds=points).metrics("x20")
    assert figures["accuracy"] == 1.0
    at_thresholds = {name: value for name, value in figures.items() if "_at_val_" in name}
    assert at_thresholds == pytest.approx(
        {
            "accuracy_at_val_threshold": 3 / 4,
            "balanced_accuracy_at_val_threshold": 3 / 4,
            "f1_at_val_threshold": 4 / 5,
            "sensitivity_at_val_threshold": 1,
            "specificity_at_val_threshold": 1 / 2,
            "sensitivity_at_val_specificity_0.9": 1 / 2,
            "specificity_at_val_specificity_0.9": 1,
        }
    )


def test_only_the_figures_that_are_asked_for() -> None:
    points = {"youden": 0.2, "specificity_0.9": 0.7}
    whole = evaluation([0.1, 0.4, 0.6, 0.8], [0, 0, 1, 1], thresholds=points)
    names = ["auroc", "f1_at_val_threshold", "sensitivity_at_val_specificity_0.9"]
    figures, everything = whole.metrics("x20", names), whole.metrics("x20")
    assert list(figures) == names
    assert figures == {name: everything[name] for name in names}


def test_without_thresholds_there_is_no_figure_at_one() -> None:
    figures = evaluation([0.1, 0.8], [0, 1]).metrics("x20")
    assert not [name for name in figures if "_at_val_" in name]


def test_operating_points_are_chosen_scale_by_scale() -> None:
    points = evaluation([0.1, 0.4, 0.6, 0.8], [0, 0, 1, 1]).operating_points()
    assert points["x20"] == pytest.approx({"youden": 0.5, "specificity_0.9": 0.5})
    assert points["x10"] == pytest.approx({"youden": 0.75, "specificity_0.9": 0.75})


def test_the_threshold_of_the_test_slides_is_named_as_such() -> None:
    """At 0.5 one slide of four is right, and between 0.1 and 0.2 all are."""
    found = evaluation([0.05, 0.1, 0.2, 0.3], [0, 0, 1, 1]).test_chosen_metrics("x20")
    assert found == {"accuracy_at_test_threshold": 1.0}


def test_a_patients_probability_is_the_mean_or_the_maximum_of_its_slides() -> None:
    """Patient a has a tumour slide and a normal one: it has a tumour."""
    slides = evaluation([0.9, 0.1, 0.4, 0.6], [1, 0, 0, 0], ["b", "a", "b", "a"])
    by_mean, by_max = slides.by_patient(), slides.by_patient("max")
    assert by_mean.slide_ids == by_mean.patients == ("a", "b")
    assert by_mean.labels.tolist() == [0, 1]
    torch.testing.assert_close(
        by_mean.probabilities["x20"][:, 1], torch.tensor([0.35, 0.65]).double()
    )
    torch.testing.assert_close(by_max.probabilities["x20"][:, 1], torch.tensor([0.6, 0.9]).double())
    torch.testing.assert_close(by_max.probabilities["x20"].sum(1), torch.ones(2).double())


def test_patients_of_three_classes() -> None:
    rows = [[0.8, 0.1, 0.1], [0.2, 0.2, 0.6], [0.0, 1.0, 0.0]]
    slides = of_three_classes(rows, [0, 0, 1], "aab")
    found = slides.by_patient()
    assert found.labels.tolist() == [0, 1]
    expected = torch.tensor([[0.5, 0.15, 0.35], [0, 1, 0]]).double()
    torch.testing.assert_close(found.probabilities["x20"], expected)
    expected = torch.tensor([[0.5, 0.125, 0.375], [0, 1, 0]]).double()  # 0.8, 0.2, 0.6 over 1.6
    torch.testing.assert_close(slides.by_patient("max").probabilities["x20"], expected)


def test_a_patient_of_two_of_three_classes_is_refused_by_name() -> None:
    slides = of_three_classes([[0.8, 0.1, 0.1]] * 2, [0, 2], "aa")
    with pytest.raises(InputError, match=r"patient a: its slides have the labels luad and normal"):
        slides.by_patient()


def test_intervals_hold_their_figure() -> None:
    positive = [((7 * number) % 31) / 31 for number in range(60)]
    labels = [int(score > 0.4) if number % 4 else 1 for number, score in enumerate(positive)]
    slides = evaluation(positive, labels, thresholds={"youden": 0.4, "specificity_0.9": 0.6})
    figures, intervals = slides.metrics("x20"), slides.intervals("x20")
    assert intervals.keys() == figures.keys()
    assert all(isnan(end) for end in intervals.pop("calibration_error"))
    for name, (low, high) in intervals.items():
        assert 0 <= low < figures[name] <= high <= 1, name


def test_a_perfect_model_has_intervals_too() -> None:
    """None of 20 slides of each class is wrong: Wilson's interval, with Student's t."""
    slides = evaluation([0.1] * 20 + [0.9] * 20, [0] * 20 + [1] * 20, thresholds={"youden": 0.5})
    intervals = slides.intervals("x20")
    t = 1.9917  # of 2 · 38 degrees of freedom
    assert intervals["accuracy"] == pytest.approx((40 / (40 + t**2), 1), abs=1e-4)
    assert intervals["sensitivity_at_val_threshold"] == pytest.approx(
        (20 / (20 + t**2), 1), abs=1e-4
    )
    del intervals["calibration_error"], intervals["brier"]
    assert all(0.5 < low < 0.95 and high == pytest.approx(1) for low, high in intervals.values())


def test_patients_are_counted_and_not_their_slides() -> None:
    """Ten equal slides per patient: nothing is known beyond one of them."""
    scores = [0.1, 0.3, 0.7, 0.2, 0.5, 0.6, 0.8, 0.9, 0.4, 0.75]
    labels = [0] * 5 + [1] * 5
    patients = [f"patient_{number // 10}" for number in range(100)]
    positive, tenfold = (
        [each for each in values for _ in range(10)] for values in (scores, labels)
    )
    grouped, one_each = evaluation(positive, tenfold, patients), evaluation(scores, labels)
    of_patients, of_slides = grouped.intervals("x20"), one_each.intervals("x20")
    for name in ("auroc", "accuracy", "balanced_accuracy", "f1", "brier"):
        assert of_patients[name] == pytest.approx(of_slides[name], abs=0.03), name
    low, high = evaluation(positive, tenfold).intervals("x20")["auroc"]
    assert high - low < (of_slides["auroc"][1] - of_slides["auroc"][0]) / 2


def test_a_patient_counts_in_every_class_of_which_it_has_a_slide() -> None:
    labels, patients = [0, 0, 0, 0, 0, 1, 1, 1, 1], list("abcdeafgh")
    slides = evaluation([0.1] * 5 + [0.9] * 4, labels, patients)
    assert slides.num_patients == {"normal": 5, "tumor": 4}
    assert slides.why_no_interval == (
        "too few patients for any interval or p: 4 with slides of tumor, and 5 are needed"
    )
    assert all(isnan(end) for ends in slides.intervals("x20").values() for end in ends)
    enough = evaluation([0.1] * 5 + [0.9] * 5, [*labels, 1], [*patients, "b"])
    assert enough.why_no_interval == ""
    assert enough.warning == ("few patients: 5 with slides of normal and 5 with slides of tumor")
    low, high = enough.intervals("x20")["auroc"]
    assert 0.3 < low < 0.9 and high == pytest.approx(1)


def test_three_classes_have_intervals() -> None:
    rows = torch.eye(3, dtype=torch.float64)[[0, 1, 2] * 8] * 0.5 + 1 / 6
    rows[:5] = rows[:5].roll(1, dims=1)
    slides = of_three_classes(rows.tolist(), [0, 1, 2] * 8, "abcdefghijklmnopqrstuvwx")
    figures, intervals = slides.metrics("x20"), slides.intervals("x20")
    assert intervals.keys() == figures.keys()
    for name in figures.keys() - {"calibration_error"}:
        low, high = intervals[name]
        assert low < figures[name] < high, name


def test_pooled_slides_keep_the_threshold_of_their_own_model() -> None:
    """Above 0.2 and above 0.7: of each model's two slides the second one alone."""
    pooled = pool(
        [
            evaluation([0.1, 0.6], [0, 1], thresholds={"youden": 0.2}),
            evaluation([0.6, 0.8], [0, 1], thresholds={"youden": 0.7}),
        ],
        "x20",
    )
    figures = pooled.metrics("x20")
    assert figures["accuracy_at_val_threshold"] == 1
    assert (figures["auroc"], figures["auroc_same_fold"]) == (3.5 / 4, 1)
