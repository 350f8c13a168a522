"""Killed anywhere, continued by the same command: the bytes are those of an undisturbed run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from road import RANDOM, embed_command, tile_command

from dasmil.cli import main
from dasmil.demo.slides import write_cohort

pytestmark = pytest.mark.slow
FAULTS = Path(__file__).parent / "faults.py"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kill")
    parts = {"train": 2, "val": 1, "test": 1}
    write_cohort(root / "cohort", num_slides=parts, seed=3, size_px0=(384, 384))
    return root


def tiled(cohort: Path) -> Path:
    tiles = cohort / "tiles"
    if not tiles.exists():
        assert main(tile_command(cohort / "cohort" / "cohort.csv", tiles)) == 0
    return tiles


def kill_again_and_again(seed: int, reference: Path, command: list[str]) -> int:
    """Kill a command repeatedly; return how often. It fails if a promise is broken."""
    kills, last = "8", "50"  # of about 100 points of a run that is not killed
    done = subprocess.run(
        [sys.executable, FAULTS, str(seed), kills, last, reference, *command],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("seed", range(3))
def test_tile(cohort: Path, tmp_path: Path, seed: int) -> None:
    command = tile_command(cohort / "cohort" / "cohort.csv", tmp_path / "tiles")
    assert kill_again_and_again(seed, tiled(cohort), command) >= 5


@pytest.mark.parametrize("seed", range(3))
def test_embed(cohort: Path, tmp_path: Path, seed: int) -> None:
    tiles, reference = tiled(cohort), cohort / "bags"
    if not reference.exists():
        assert main(embed_command(tiles, reference, RANDOM)) == 0
    command = embed_command(tiles, tmp_path / "bags", RANDOM)
    assert kill_again_and_again(seed, reference, command) >= 5
