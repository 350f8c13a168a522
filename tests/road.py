"""A tiny cohort of synthetic slides taken through the first verbs, once for all tests."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from dasmil.cli import main
from dasmil.demo.slides import write_cohort

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "configs"
COLON = REPOSITORY / "tests" / "benchmarks" / "colon"
CONF = REPOSITORY / "tests" / "conf"
SMALL = "{model: random:test_vit, image_size: 32}"  # six times as fast as at its own 160 px
RANDOM: dict[str, Path | str] = {"x10": SMALL, "x20": SMALL}
NUM_SLIDES = {"train": 6, "val": 2, "test": 3}  # 3: not a multiple of two processes


@dataclass(frozen=True)
class Road:
    """Folders of a cohort that has been tiled, pretrained on and embedded."""

    root: Path
    cohort: Path
    tiles: Path
    bags: Path
    dino: dict[str, Path]


def fit_dino(tiles: Path, scale: str, runs: Path) -> list[str]:
    configs = ["--config", str(CONFIGS / "dino.yaml"), "--config", str(CONF / "dino.yaml")]
    data = ["--data.tiles", str(tiles), "--data.scale", scale]
    return ["fit", *configs, *data, "--output", str(runs / f"dino_{scale}")]


def fit_dasmil(bags: Path, runs: Path, name: str = "dasmil") -> list[str]:
    configs = ["--config", str(CONFIGS / "mil.yaml"), "--config", str(CONF / "dasmil.yaml")]
    return ["fit", *configs, "--data.bags", str(bags), "--output", str(runs / name)]


def make_road(root: Path) -> Road:
    cohort = write_cohort(root / "cohort", num_slides=NUM_SLIDES, seed=1, size_px0=(448, 448))
    tiles, bags, runs = root / "tiles", root / "bags", root / "runs"
    assert main(tile_command(cohort, tiles)) == 0
    dino = {}
    for scale in ("x10", "x20"):
        assert main(fit_dino(tiles, scale, runs)) == 0
        dino[scale] = runs / f"dino_{scale}" / "checkpoints" / "last.ckpt"
    assert main(embed_command(tiles, bags, dino)) == 0
    return Road(root, cohort, tiles, bags, dino)


def copy_first_tiles(road: Road, folder: Path, num_slides: int) -> Path:
    """Copy the tiles and name only the first slides in their cohort table."""
    tiles: Path = shutil.copytree(road.tiles, folder)
    header, *rows = (tiles / "cohort.csv").read_text().splitlines()
    (tiles / "cohort.csv").write_text("\n".join([header, *rows[:num_slides]]) + "\n")
    return tiles


def tile_command(cohort: Path, tiles: Path) -> list[str]:
    options = ["--tile_px", "32", "--scales", "[x10,x20]", "--workers", "1"]
    return ["tile", "--cohort", str(cohort), "--output", str(tiles), *options]


def embed_command(tiles: Path, bags: Path, extractors: dict[str, Path | str]) -> list[str]:
    sources = [text for s, e in extractors.items() for text in (f"--extractors.{s}", str(e))]
    options = ["--num_workers", "0", "--trainer.enable_progress_bar", "false"]
    return ["embed", "--tiles", str(tiles), "--output", str(bags), *sources, *options]
