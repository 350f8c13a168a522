import sys
from types import SimpleNamespace

import pytest
from stand_in import StandIn, make_bags

from dasmil.files import write_text


@pytest.fixture
def bags(tmp_path):
    return make_bags(tmp_path / "bags")


@pytest.fixture
def own(tmp_path):
    """A config of the user's."""
    write_text(tmp_path / "own.yaml", "trainer: {max_epochs: 3}\n")
    return tmp_path / "own.yaml"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    return StandIn(tmp_path, monkeypatch)


@pytest.fixture
def compared(monkeypatch):
    """What a sweep has given to ``compare``: labels by folder, and where the result goes."""
    given = []

    def compare(run_dirs, labels, output):
        given.append((dict(zip(run_dirs, labels, strict=True)), output))

    for name in ("dasmil.experiments.compare", "dasmil.experiments.compare.compare"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(compare=compare))
    return given
