"""What tests of the callbacks share."""

from pathlib import Path

import pytest
from callbacks.judged_bags import write_judged_bags


@pytest.fixture
def bags(tmp_path: Path) -> Path:
    """Two tumour slides whose upper left quarter is the lesion, and a normal slide."""
    return write_judged_bags(tmp_path)
