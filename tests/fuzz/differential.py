"""Compare pixels of mutated slides with those of OpenSlide, at the same level and place.

``python tests/fuzz/differential.py [SLIDE...]`` mutates each slide 400 times (by default three that
it draws: 1,200 files) and prints a Markdown table, in about five minutes. Nothing may be returned
that OpenSlide refuses, and where both return pixels, they are equal.
"""

import argparse
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

import numpy as np  # noqa: E402
import openslide  # noqa: E402
from jpegs import write_jpeg_pyramid  # noqa: E402

from dasmil.errors import InputError  # noqa: E402
from dasmil.slides.cohort import SlideRow  # noqa: E402
from dasmil.slides.reader import RgbArray, Slide, over_white  # noqa: E402
from fuzz.mutations import mutate_bytes  # noqa: E402

SIDE_PX = 900
RESULTS = ("equal", "both refuse", "only ours refuses", "other pixels", "only OpenSlide refuses")


def compare(path: Path) -> Counter[str]:
    """How often the two agree, over a part of each of the two finest levels."""
    found = Counter[str]()
    try:
        slide = Slide(SlideRow("slide", path, mpp=0.5))
    except InputError:
        return Counter({"not opened": 1})
    with slide:
        for level in range(min(2, len(slide.downsamples))):
            if not slide.is_whole(level):
                continue
            size_px = tuple(
                int(min(SIDE_PX, side / slide.downsamples[level])) for side in slide.size_px0
            )
            expected = _read(path, level, size_px)
            try:
                pixels = slide.region((0, 0), level, size_px)
            except InputError:
                found["both refuse" if expected is None else "only ours refuses"] += 1
                continue
            if expected is None:
                found["only OpenSlide refuses"] += 1
            else:
                found["equal" if np.array_equal(pixels, expected) else "other pixels"] += 1
    return found


def _read(path: Path, level: int, size_px: tuple[int, int]) -> RgbArray | None:
    """By a handle of its own: one that has refused something refuses all that follows."""
    try:
        with openslide.open_slide(path) as slide:
            return over_white(np.asarray(slide.read_region((0, 0), level, size_px)))
    except (openslide.OpenSlideError, OSError, SyntaxError, ValueError):
        return None


def mutated(data: bytes, name: str, count: int, seed: int) -> list[bytes]:
    return [mutate_bytes(data, random.Random(f"{name} {seed} {number}")) for number in range(count)]


def draw(folder: Path) -> list[Path]:
    """Three slides: JPEG tiles, the same as Aperio writes them, and with two levels."""
    paths = [folder / name for name in ("one.tiff", "aperio.svs", "two.tiff")]
    description = "Aperio Image|AppMag = 20|MPP = 0.5"
    write_jpeg_pyramid(paths[0], 1000, 700, (1,))
    write_jpeg_pyramid(paths[1], 1000, 700, (1,), description=description)
    write_jpeg_pyramid(paths[2], 512, 384, (1, 2))
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slides", nargs="*", type=Path)
    parser.add_argument("--count", type=int, default=400, help="mutations of each slide")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    columns = ("slide", "files", "not opened", *RESULTS)
    print(f"| {' | '.join(columns)} |\n| {' | '.join('---' for _ in columns)} |", flush=True)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for source in arguments.slides or draw(Path(folder)):
            found, path = Counter[str](), Path(folder) / f"mutated{source.suffix}"
            data = source.read_bytes()
            for content in mutated(data, source.name, arguments.count, arguments.seed):
                path.write_bytes(content)
                found += compare(path)
            cells = [source.name, arguments.count, *(found[name] for name in columns[2:])]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            wrong += found["other pixels"] + found["only OpenSlide refuses"]
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
