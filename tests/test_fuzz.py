"""Mutated files of every kind cost a sentence each: no traceback, hang, request or other harm."""

from collections import Counter
from pathlib import Path

import pytest
from fuzz.differential import compare, draw, mutated
from fuzz.kinds import KINDS
from fuzz.run import fuzz

COUNTS = {
    "svs": 8,
    "tiff": 8,
    "png": 8,
    "jpeg": 8,
    "dicom": 8,
    "checkpoint": 20,
    "extractor record": 15,
    "h5": 20,
}


@pytest.mark.slow
def test_mutated_files_are_accepted_or_refused_by_a_sentence(tmp_path: Path) -> None:
    """The long form is ``python tests/fuzz/run.py``."""
    tasks = [(kind, number) for kind in KINDS for number in range(COUNTS.get(kind, 20))]
    outcomes = list(fuzz(tasks, 0, tmp_path))
    wrong = [outcome for outcome in outcomes if outcome.is_wrong]
    assert not wrong, "\n".join(f"{o.kind} {o.number}: {o.result}\n{o.detail}" for o in wrong)
    refused = {outcome.kind for outcome in outcomes if outcome.result == "refused"}
    assert refused == set(KINDS) - {"jsonl"}  # of which a damaged line is skipped, with a warning
    assert [(outcome.kind, outcome.number) for outcome in outcomes] == tasks


def test_mutated_slides_give_the_pixels_of_openslide_or_none(tmp_path: Path) -> None:
    """The long form is ``python tests/fuzz/differential.py``."""
    found = Counter[str]()
    for source in draw(tmp_path):
        path = tmp_path / f"mutated{source.suffix}"
        for content in mutated(source.read_bytes(), source.name, 12, 1):
            path.write_bytes(content)
            found += compare(path)
    assert found["equal"] > 10 and found["both refuse"] > 3
    assert found["other pixels"] == found["only OpenSlide refuses"] == 0
