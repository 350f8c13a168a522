"""What the pictures of an evaluation show, read off their lines, bars and words."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.integrate import trapezoid
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dasmil.metrics import Evaluation
from dasmil.metrics.score_intervals import wilson_interval
from dasmil.reports.figure_parts import scale_colours
from dasmil.reports.figures import (
    calibration_figure,
    confusion_figure,
    evaluation_figures,
    scores_figure,
    write_figures,
)
from dasmil.reports.roc_figures import GRID, precision_recall_figure, roc_figure

pytestmark = pytest.mark.draws
SCORES = [0.12, 0.42, 0.36, 0.83]  # three of the four pairs are in order
LABELS = [0, 0, 1, 1]


def evaluation(scores=SCORES, labels=LABELS, thresholds=None, patients=None) -> Evaluation:
    positive = torch.tensor(scores, dtype=torch.float64)
    names = tuple(f"s{number}" for number in range(len(scores)))
    return Evaluation(
        classes=("normal", "tumour"),
        slide_ids=names,
        patients=patients or names,
        labels=torch.tensor(labels),
        probabilities={"x20": torch.stack([1 - positive, positive], dim=1)},
        thresholds=thresholds and {"x20": thresholds},
    )


def three_classes() -> Evaluation:
    probabilities = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0, 1, 1]] * 0.4 + 0.2
    return replace(
        evaluation(),
        classes=("a", "b", "c"),
        slide_ids=tuple("123456"),
        patients=tuple("123456"),
        labels=torch.tensor([0, 1, 2, 0, 1, 2]),
        probabilities={"x20": probabilities},
    )


def line(figure: Figure, name: str):
    """x and y of the one line whose label begins with ``name``, or whose name it is."""
    (found,) = (
        item
        for axes in figure.axes
        for item in axes.lines
        if str(item.get_label()).startswith(name) or item.get_gid() == name
    )
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


def drawstyle(figure: Figure) -> str:
    return str(figure.axes[0].lines[-1].get_drawstyle())


def band(figure: Figure):
    """Lower and upper end of the one band at each x of the grid."""
    (found,) = figure.axes[0].collections
    vertices = found.get_paths()[0].vertices
    heights = [vertices[np.isclose(vertices[:, 0], x, atol=1e-9), 1] for x in GRID]
    return np.array([(each.min(), each.max()) for each in heights]).T


def words(figure: Figure) -> str:
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    texts += titles(figure)
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    texts += [text.get_text() for legend in legends for text in legend.get_texts()]
    return "\n".join(texts)


def titles(figure: Figure) -> list[str]:
    panels = [axes.get_title(loc) for axes in figure.axes for loc in ("center", "left")]
    return [figure.get_suptitle(), *panels]


def test_the_roc_has_the_corners_of_the_four_slides_and_says_its_area():
    x, y = line(roc_figure(evaluation(), "test"), "x20: AUROC 0.750")
    assert list(zip(x, y)) == [(0, 0), (0, 0.5), (0.5, 0.5), (0.5, 1), (1, 1)]


def test_slides_with_one_score_are_a_diagonal_as_the_area_counts_them():
    """One normal and one tumour slide of 0.5: half a pair in order, and no corner between."""
    x, y = line(roc_figure(evaluation([0.5, 0.5], [0, 1]), "test"), "x20: AUROC 0.500")
    assert list(zip(x, y)) == [(0, 0), (1, 1)]


@pytest.mark.parametrize("made", [roc_figure, precision_recall_figure])
def test_the_drawn_area_is_the_figure_that_is_said(made):
    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(50, generator=generator) * 20).round() / 20  # with ties
    labels = (torch.rand(50, generator=generator) < scores).long()
    shown = evaluation(scores.tolist(), labels.tolist())
    figure, metrics = made(shown, "test"), shown.metrics("x20")
    x, y = line(figure, "x20")
    if made is roc_figure:
        assert drawstyle(figure) == "default"
        assert trapezoid(y, x) == pytest.approx(metrics["auroc"], abs=1e-6)
    else:
        assert drawstyle(figure) == "steps-pre"  # each y from the x before it
        assert (np.diff(x) * y[1:]).sum() == pytest.approx(metrics["average_precision"], abs=1e-6)


MANY = [0.12, 0.42, 0.2, 0.3, 0.25, 0.36, 0.83, 0.7, 0.9, 0.6]  # 24 of 25 pairs are in order
OF_MANY = [0] * 5 + [1] * 5


def test_the_interval_is_that_of_the_table():
    shown = evaluation(MANY, OF_MANY)
    low, high = shown.intervals("x20")["auroc"]
    assert f"AUROC 0.960 [{low:.3f}, {high:.3f}]" in words(roc_figure(shown, "test"))
    low, high = shown.intervals("x20")["average_precision"]
    assert f"[{low:.3f}, {high:.3f}]" in words(precision_recall_figure(shown, "test"))
    few = roc_figure(evaluation(), "test")
    assert "[" not in words(few) and not few.axes[0].collections
    assert "too few patients for any interval or p: 2 with" in " ".join(words(few).split())


def test_operating_points_match_their_thresholds():
    """Above 0.38 one of two normal and one of two tumour slides; above 0.5 none and one."""
    shown = evaluation(thresholds={"youden": 0.38, "specificity_0.9": 0.5})
    roc, precision_recall = (
        roc_figure(shown, "test"),
        precision_recall_figure(shown, "test"),
    )
    assert line(roc, "x20 youden") == ([0.5], [0.5])
    assert line(roc, "x20 specificity_0.9") == ([0.0], [0.5])
    assert line(precision_recall, "x20 youden") == ([0.5], [0.5])
    assert line(precision_recall, "x20 specificity_0.9") == ([0.5], [1.0])
    assert {
        "threshold of validation: Youden's",
        "threshold of validation: specificity 0.9",
    } <= set(words(roc).split("\n"))


def test_a_threshold_that_calls_no_slide_has_no_precision():
    shown = evaluation(thresholds={"youden": 0.95})
    marks = [item for item in precision_recall_figure(shown, "test").axes[0].lines]
    assert not [item for item in marks if item.get_gid()]
    assert line(roc_figure(shown, "test"), "x20 youden") == ([0.0], [0.0])


def test_a_band_holds_its_curve_and_has_a_width_if_the_slides_are_in_perfect_order():
    perfect = [number / 10 for number in range(10)]
    for made in (roc_figure, precision_recall_figure):
        low, high = band(made(evaluation(MANY, OF_MANY), "test"))
        assert (low <= high).all() and (low >= 0).all() and (high <= 1).all()
        if made is roc_figure:
            assert (np.diff(low) >= 0).all() and (np.diff(high) >= 0).all()
        low, high = band(made(evaluation(perfect, OF_MANY), "test"))
        assert (low[100:] < 0.9).all() and high == pytest.approx(1)


def test_a_band_is_of_patients_and_not_of_their_slides():
    slides = evaluation(MANY * 3, OF_MANY * 3)
    patients = evaluation(MANY * 3, OF_MANY * 3, patients=tuple("abcdefghij" * 3))
    (low, high), (wide_low, wide_high) = (
        band(roc_figure(shown, "test")) for shown in (slides, patients)
    )
    assert (wide_high - wide_low)[50] > 1.4 * (high - low)[50]
    text = words(roc_figure(patients, "test"))
    assert "30 slides of 10 patients (15 normal, 15 tumour)" in text
    assert "95 % at each point; few patients: 5 with" in text


def test_precision_and_recall_by_hand():
    """Called in turn: 0.8 (hit), 0.4 (miss), 0.35 (hit), 0.1 (miss)."""
    figure = precision_recall_figure(evaluation(), "test")
    recall, precision = line(figure, "x20: AP 0.833")  # (1 + 2 / 3) / 2
    assert recall == pytest.approx([0, 0.5, 1])
    assert precision == pytest.approx([1, 1, 2 / 3])


def test_more_than_two_classes_are_one_against_the_rest():
    """Of b: both slides of b have 0.6, and of the rest one has 0.6 and three 0.2."""
    text = words(roc_figure(three_classes(), "test")).split("\n")
    (of_b,) = (item for item in text if item.startswith("b: AUROC"))
    assert of_b == "b: AUROC 0.875"  # 8 pairs: 6 in order, 2 ties
    assert "test: ROC at x20" in text


def test_calibration_is_the_share_of_the_class_in_each_bin():
    """Bins of 1/15: two slides between 0.333 and 0.4, one of them tumour, and one elsewhere."""
    scores, labels = [0.05, 0.34, 0.38, 0.95], [0, 0, 1, 1]
    figure = calibration_figure(evaluation(scores, labels), "val")
    above, below = figure.axes
    (points,) = above.containers
    x, y = points.lines[0].get_data()
    assert x == pytest.approx([0.05, 0.36, 0.95])
    assert y == pytest.approx([0, 0.5, 1])
    heights = [bar.get_height() for bar in below.patches]
    assert heights == [1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    # sum of share of slides · |share − mean|: (0.05 + 2 · 0.14 + 0.05) / 4
    assert "x20: Brier 0.126, ECE 0.095" in words(figure)


def test_the_interval_of_a_bin_is_wilson_s():
    """None of one slide: 0 to z² / (1 + z²); 5 of 10: Newcombe (1998) gives 0.2366 to 0.7634."""
    low, high = wilson_interval(np.array([0, 0.5]), np.array([1, 10]))
    assert low == pytest.approx([0, 0.2366], abs=1e-4)
    assert high == pytest.approx([0.7935, 0.7634], abs=1e-4)


def test_calibration_of_three_classes_is_that_of_the_most_probable_one():
    """All six have 0.6 of their most probable class, and five are of it."""
    (points,) = calibration_figure(three_classes(), "test").axes[0].containers
    assert points.lines[0].get_data() == (pytest.approx([0.6]), pytest.approx([5 / 6]))


def test_confusion_counts_at_one_half_and_at_the_thresholds_of_validation():
    figure = confusion_figure(
        evaluation(thresholds={"youden": 0.38, "specificity_0.9": 0.9}), "test"
    )
    half, youden, specific = ([text.get_text() for text in axes.texts] for axes in figure.axes)
    assert half == ["2\n100%", "0\n0%", "1\n50%", "1\n50%"]
    assert youden == ["1\n50%", "1\n50%", "1\n50%", "1\n50%"]
    assert specific == ["2\n100%", "0\n0%", "2\n100%", "0\n0%"]
    assert "x20, above 0.38\n(validation, Youden's)" in words(figure)


def test_confusion_of_three_classes_is_that_of_the_most_probable_one():
    (axes,) = confusion_figure(three_classes(), "test").axes
    counts = [int(text.get_text().split()[0]) for text in axes.texts]
    assert counts == [2, 0, 0, 0, 2, 0, 0, 1, 1]


def test_scores_are_counted_by_label():
    """Tumour slides upwards, normal ones downwards; bins of 0.05."""
    figure = scores_figure(evaluation(thresholds={"youden": 0.42}), "test")
    axes = figure.axes[0]
    up, down = ([bar.get_height() for bar in bars] for bars in axes.containers)
    assert {number: height for number, height in enumerate(up) if height} == {7: 1, 16: 1}
    assert {number: height for number, height in enumerate(down) if height} == {2: -1, 8: -1}
    assert up[7] and axes.containers[0][7].get_x() == pytest.approx(0.352)  # 0.35 to 0.4
    assert line(figure, "youden")[0].tolist() == [0.42, 0.42]
    assert "x20   dashed: Youden's, 0.42" in words(figure)
    assert {"↑ 2", "↓ 2", "tumour", "normal"} <= set(words(figure).split("\n"))


@pytest.mark.parametrize(
    ("labels", "reason"), [([1] * 4, "every slide is tumour"), ([0] * 4, "no slide is tumour")]
)
def test_undefined_metrics_are_named_in_the_picture(labels, reason):
    shown = evaluation(labels=labels, thresholds={"youden": 0.4})
    figures = evaluation_figures(shown, "test")
    for name in ("roc", "precision_recall"):
        assert f"x20: not defined, {reason}" in words(figures[name])
    assert words(figures["confusion"]).count("no slide") == 4  # 2 cells at 2 thresholds
    for figure in figures.values():
        figure.draw_without_rendering()


def test_a_class_without_slides_is_said_and_the_others_are_drawn():
    shown = three_classes()
    shown = replace(shown, labels=shown.labels.clamp(max=1))
    text = words(roc_figure(shown, "test"))
    assert "c: not defined, no slide is c" in text
    assert "a: AUROC 1.000" in text and "b: AUROC" in text


def test_a_probability_that_is_no_number_is_named_and_the_other_scale_is_drawn():
    shown = evaluation(thresholds={"youden": 0.38})
    fine = shown.probabilities["x20"]
    broken = fine.clone()
    broken[2] = float("nan")
    shown = replace(shown, probabilities={"x10": broken, "x20": fine})
    figures = evaluation_figures(shown, "test")
    assert "x20: AUROC 0.750" in words(figures["roc"])
    for figure in figures.values():
        assert "a probability is not a number" in " ".join(words(figure).split())
        figure.draw_without_rendering()


def test_a_scale_keeps_its_colour_in_any_company():
    three = scale_colours(["x5", "x10", "x20"])
    assert scale_colours(["x10"])["x10"] == three["x10"]
    assert len(set(scale_colours(["x1.25", "x2.5", "x5", "x10", "x20", "x40"]).values())) == 6


def many_classes(num_classes: int, num_scales: int = 1, name: str = "c{}") -> Evaluation:
    """Two slides of each class, three of the last 20."""
    classes = torch.arange(num_classes)
    labels = torch.cat([classes, classes, classes[-20:]])
    ids = tuple(map(str, range(len(labels))))
    noise = torch.rand(len(labels), num_classes, generator=torch.Generator().manual_seed(0))
    probabilities = (noise.double() + 9 * torch.eye(num_classes).double()[labels]).softmax(dim=1)
    return Evaluation(
        classes=tuple(map(name.format, range(num_classes))),
        slide_ids=ids,
        patients=ids,
        labels=labels,
        probabilities={f"x{number}": probabilities for number in range(1, num_scales + 1)},
    )


@pytest.mark.parametrize("num_classes", [20, 200])
def test_the_size_of_a_picture_is_limited_and_omissions_are_counted(num_classes):
    """With 200 classes the matrix alone had 140 megapixels per scale."""
    figures = evaluation_figures(many_classes(num_classes), "val")
    for figure in figures.values():
        assert max(figure.get_size_inches()) <= 16
    for name in ("roc", "precision_recall", "scores"):
        assert f"{num_classes - 8} more classes are left out" in words(figures[name])
        shown = [f"c{number}" for number in range(num_classes - 20, num_classes - 12)]
        assert all(f"{each}" in words(figures[name]) for each in shown)
    ticks = [text.get_text() for text in figures["confusion"].axes[0].get_xticklabels()]
    others = [f"{num_classes - 20} others"] if num_classes > 20 else []
    assert ticks == [*(f"c{number}" for number in range(num_classes - 20, num_classes)), *others]


def test_the_others_of_a_confusion_matrix_are_counted_together():
    """All slides are called what they are: 3 of each class that is drawn, 80 of the others."""
    texts = [text.get_text() for text in confusion_figure(many_classes(60), "val").axes[0].texts]
    assert texts == [*["3\n100%"] * 20, "80\n100%"]


def test_the_finest_scales_are_drawn_and_the_others_are_counted():
    three, two = many_classes(3, num_scales=30), evaluation()
    two = replace(two, probabilities={f"x{n}": two.probabilities["x20"] for n in range(1, 31)})
    for shown, drawers in (
        (three, (confusion_figure, calibration_figure)),
        (two, (roc_figure, precision_recall_figure, scores_figure)),
    ):
        for draw in drawers:
            figure = draw(shown, "val")
            assert max(figure.get_size_inches()) <= 20
            assert "24 more scales are left out" in words(figure)


def test_names_of_classes_are_shown_as_they_are(tmp_path):
    """Matplotlib takes dollars for formulas, and leaves lines with a first _ out of legends."""
    figure = roc_figure(many_classes(3, name="_${}_{{ \x1b\n" + "x" * 300), "val")
    write_figures(tmp_path, "val", {"roc": figure})
    assert " _\\$0_{ \ufffd xxx" in words(figure)
    assert max(map(len, words(figure).splitlines())) < 100
    assert all(line.isprintable() for line in words(figure).splitlines())


@pytest.mark.parametrize("made", [evaluation, three_classes])
def test_all_figures_are_files_with_a_title(tmp_path, made):
    shown = made()
    figures = evaluation_figures(shown, "test")
    write_figures(tmp_path, "test", figures)
    assert sorted(path.stem for path in (tmp_path / "figures").iterdir()) == sorted(figures)
    n = len(shown.slide_ids)
    for name, figure in figures.items():
        first, second = next(
            text.split("\n") for text in titles(figure) if text.startswith("test: ")
        )
        assert first.removeprefix("test: ").split()[0].lower() == name.replace("_", "-")
        assert second.startswith(f"{n} slides of {n} patients (2 ")
        with Image.open(tmp_path / "figures" / f"{name}.png") as picture:
            assert picture.width > 500


def test_tensorboard_shows_each_picture_once_however_often_it_is_asked(tmp_path):
    figures = {"roc": roc_figure(evaluation(), "test")}
    for _ in range(2):
        write_figures(tmp_path, "test", figures)
    assert len(list(tmp_path.glob("events*"))) == 1
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["test/roc"]
