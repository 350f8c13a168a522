from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dasmil.experiments.sweep.figure import draw
from dasmil.experiments.sweep.runs import SweepRow
from dasmil.experiments.sweep.table import Cell, csv_rows, describe_runs, markdown


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.9, 0.8, 1.0), "0.900 ± 0.100"),
        ((0.9, None, 1.0), "0.950 ± 0.071 (2 of 3)"),
        ((0.9, None, None), "0.900 (1 of 3)"),
        ((0.9,), "0.900"),
        ((None, None), "–"),
    ],
)
def test_a_cell_says_how_many_runs_it_is_of(values, text):
    assert str(Cell(values)) == text


@pytest.mark.parametrize(
    ("seeds", "num_folds", "text"),
    [
        ((3,), None, "seed 3"),
        ((0, 4), None, "mean ± sd over seeds 0, 4"),
        ((0,), 5, "mean ± sd over 5 folds × 1 seed (0)"),
        ((0, 4), 2, "mean ± sd over 2 folds × 2 seeds (0, 4)"),
    ],
)
def test_the_table_names_its_folds_and_seeds(seeds, num_folds, text):
    assert describe_runs(seeds, num_folds) == text


def test_the_papers_metrics_follow_ours_if_there_are_any():
    rows = [SweepRow("a|b", (), {"auroc": 0.973}), SweepRow("own")]
    cells = [
        {"auroc": Cell((0.9, 1.0)), "accuracy": Cell((0.5, 0.5))},
        {"auroc": Cell((None, 0.7)), "accuracy": Cell((None, None))},
    ]
    assert markdown("Title", Path("BAGS"), "mean of two", rows, cells) == (
        "# Title\n\n"
        "test slides of BAGS, mean of two; "
        "paper: the paper's values on its own data, not comparable\n\n"
        "|  | auroc | paper | accuracy |\n"
        "| --- | --- | --- | --- |\n"
        "| a\\|b | 0.950 ± 0.071 | 0.973 | 0.500 ± 0.000 |\n"
        "| own | 0.700 (1 of 2) | – | – |\n"
    )
    records = list(csv_rows(rows, cells))
    assert [record["values"] for record in records] == ["0.9;1.0", "0.5;0.5", ";0.7", ";"]
    assert records[2] == {
        **{"label": "own", "column": "auroc", "paper": None},
        **{"mean": 0.7, "sd": None, "n": 1, "values": ";0.7"},
    }


def test_without_figures_of_the_paper_the_table_is_plain():
    text = markdown("T", Path("B"), "seed 3", [SweepRow("a")], [{"auroc": Cell((0.9,))}])
    assert "test slides of B, seed 3\n\n|  | auroc |\n" in text
    assert "paper" not in text


@pytest.mark.draws
def test_the_picture_marks_runs_and_the_papers_figures(tmp_path):
    def pixels_near(colour, values, paper):
        draw(tmp_path / "t.png", "T", [SweepRow("a", (), paper)], [{"auroc": Cell(values)}])
        picture = np.asarray(Image.open(tmp_path / "t.png").convert("RGB")).astype(int)
        return int((np.abs(picture - colour).max(axis=2) < 30).sum())

    blue, orange = (31, 119, 180), (255, 127, 14)
    assert pixels_near(orange, (0.9, 1.0), {}) == 0 < pixels_near(orange, (0.9, 1.0), {"auroc": 1})
    assert pixels_near(blue, (None, None), {}) == 0 < pixels_near(blue, (0.9, None), {})


@pytest.mark.slow
@pytest.mark.draws
def test_a_picture_of_very_many_rows_and_columns_has_a_limit(tmp_path):
    rows = [SweepRow(f"row $_{{{number} " + "x" * 300) for number in range(500)]
    cells = [{f"column {number}": Cell((0.9,)) for number in range(50)} for _ in rows]
    draw(tmp_path / "t.png", "Title $x_{$", rows, cells)
    with Image.open(tmp_path / "t.png") as picture:
        assert max(picture.size) <= 4200
