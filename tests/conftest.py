"""What all tests share."""

from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from road import Road, make_road

torch.set_num_threads(1)  # on tiny tensors threads only wait for each other
DRAW = Figure.draw


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Save figures blank unless the test is marked ``draws``: drawing takes half of a short fit."""
    draws = item.get_closest_marker("draws") is not None
    Figure.draw = DRAW if draws else lambda self, renderer: None  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real slides and features, kept beside the checkout and not in it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data are absent: no folder ../shared/data beside the checkout")
    return folder


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Road:
    """A tiny cohort, tiled, pretrained on and embedded by command."""
    return make_road(tmp_path_factory.mktemp("road"))
