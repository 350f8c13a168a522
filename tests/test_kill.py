"""Killed anywhere, continued by the same command: the bytes are those of an undisturbed run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from road import embed_command

from dasmil.cli import main
from dasmil.demo.slides import write_cohort

pytestmark = pytest.mark.slow
FAULTS = Path(__file__).parent / "faults.py"
EXTRACTORS: dict[str, Path | str] = {"x10": "random:test_vit", "x20": "random:test_vit"}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kill")
    parts = {"train": 2, "val": 1, "test": 1}
    write_cohort(root / "cohort", num_slides=parts, seed=3, size_px0=(384, 384))
    return root


def tile_command(cohort: Path, output: Path) -> list[str]:
    options = ["--tile_px", "32", "--scales", "[x10,x20]", "--workers", "1"]
    return [
        "tile",
        "--cohort",
        str(cohort / "cohort" / "cohort.csv"),
        "--output",
        str(output),
        *options,
    ]


def tiled(cohort: Path) -> Path:
    tiles = cohort / "tiles"
    if not tiles.exists():
        assert main(tile_command(cohort, tiles)) == 0
    return tiles


def kill_again_and_again(seed: int, reference: Path, command: list[str]) -> int:
    """How often the command was killed; it fails where a promise is broken."""
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
    reference = tiled(cohort)
    assert kill_again_and_again(seed, reference, tile_command(cohort, tmp_path / "tiles")) >= 5


@pytest.mark.parametrize("seed", range(3))
def test_embed(cohort: Path, tmp_path: Path, seed: int) -> None:
    tiles, reference = tiled(cohort), cohort / "bags"
    if not reference.exists():
        assert main(embed_command(tiles, reference, EXTRACTORS)) == 0
    command = embed_command(tiles, tmp_path / "bags", EXTRACTORS)
    assert kill_again_and_again(seed, reference, command) >= 5
