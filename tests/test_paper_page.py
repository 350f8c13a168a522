"""The page on the paper quotes code that is there."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / ".github" / "paper.md"
ROW = re.compile(r"\| \[`[^`]+`\]\(\.\./([^#)]+)\) `([^`]+)` \|")
LINK = re.compile(r"\]\(\.\./([^#)]+)")

ROWS = ROW.findall(PAGE.read_text(encoding="utf-8"))


def test_every_symbol_of_the_paper_has_its_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    symbols = ("X_1, X_2", "A_1, A_2", "| A |", "θ_3", "y_1^BAG", "z_1, z_2", "τ²", "KL(· ‖ ·)")
    symbols += ("GraphPooling", "L_CE", "λ L_KD + β L_CRIT", "critical instance")
    assert all(symbol in page for symbol in symbols)
    assert len(ROWS) > 30


@pytest.mark.parametrize(("path", "code"), ROWS, ids=[row[1][:40] for row in ROWS])
def test_quoted_code_occurs_once_in_its_file(path: str, code: str) -> None:
    assert (REPOSITORY / path).read_text(encoding="utf-8").count(code) == 1, (path, code)


def test_every_file_that_the_page_names_is_there() -> None:
    paths = LINK.findall(PAGE.read_text(encoding="utf-8"))
    assert all((REPOSITORY / path).exists() for path in paths)


def test_every_difference_has_a_row_and_a_test() -> None:
    page = PAGE.read_text(encoding="utf-8")
    tests = (REPOSITORY / "tests" / "test_differences.py").read_text(encoding="utf-8")
    for number in range(1, 22):
        assert f"| D{number} |" in page
        assert f"def test_d{number}_" in tests
