"""The table of mutants fits the code; ``python tests/mutants.py`` runs them."""

import re

import pytest
from mutants import REPOSITORY, SURVIVED, Mutant, read_mutants

MUTANTS = read_mutants()


def test_a_row_is_read_as_it_is_written() -> None:
    line = r"| dasmil/a.py | `x \| y` | `x` | bags/test_a.py data/test_b.py | test_c |"
    mutant = Mutant.parse(line)
    assert mutant == Mutant("dasmil/a.py", "x | y", "x", "bags/test_a.py data/test_b.py", "test_c")
    assert str(mutant) == line
    assert mutant.test_files() == ["tests/bags/test_a.py", "tests/data/test_b.py"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.file}: {m.old}")
def test_a_mutant_fits_the_code_and_its_tests(mutant: Mutant) -> None:
    code = (REPOSITORY / mutant.file).read_text()
    assert code.count(mutant.old) == 1, "the code to replace must occur once"
    assert mutant.new != mutant.old
    tests = "".join((REPOSITORY / file).read_text() for file in mutant.test_files())
    assert mutant.killed_by != SURVIVED, "a mutant without a test that sees it"
    assert re.search(rf"^( *)def {mutant.killed_by}\(", tests, re.MULTILINE), mutant.killed_by
