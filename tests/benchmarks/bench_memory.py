"""Memory of ``tile`` and ``embed`` on slides of 200,000 × 200,000 px, decoded 120 GB each.

The largest sum of the resident sets of all processes of the command, looked at every 20 ms; pages
that processes share count in each of them. The peer holds the slide decoded, the limit is 4 GB.
"""

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from gigapixel import peak_bytes, write_gigapixel
from table import Row

NETWORK = "random:test_vit"
SCALES = ("x10", "x20")
LIMIT = 4e9
QUIET = ("--trainer.enable_progress_bar", "false")

#: name, what write_gigapixel is told, whether it is embedded, too
CASES = (
    ("0.25 µm/px, 3 % tissue", {"mpp": 0.25}, True),
    ("0.5 µm/px, 3 % tissue", {"mpp": 0.5}, True),
    ("0.25 µm/px, all tissue", {"mpp": 0.25, "tissue": 1.0, "tile_px": 256}, False),
    ("51,200 px, no pyramid", {"side_px0": 51_200, "downsamples": (1,)}, True),
)
QUICK = (("4,096 px", {"side_px0": 4096, "tissue": 1.0, "downsamples": (1, 4)}, False),)


def peak(verb: str, *options: object) -> int:
    return peak_bytes([sys.executable, "-m", "dasmil", verb, *map(str, options)])["tree"]


def measure(quick: bool) -> Iterable[Row]:
    imports = "import dasmil.embedding.embed"
    baseline = peak_bytes([sys.executable, "-c", imports])["tree"]
    yield Row("memory", "importing torch and Lightning, no slide", "GB", baseline / 1e9)
    for name, drawn, embeds in QUICK if quick else CASES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            path = write_gigapixel(folder / "a.tiff", **drawn)
            decoded = 3 * drawn.get("side_px0", 200_000) ** 2
            table = folder / "cohort.csv"
            table.write_text(f"slide_id,path\na,{path}\n")
            tiles, scales = folder / "tiles", "[" + ",".join(SCALES) + "]"
            taken = peak("tile", "--cohort", table, "--output", tiles, "--scales", scales)
            yield _row(f"tile, {name}", taken, decoded)
            if embeds:
                sources = [text for s in SCALES for text in (f"--extractors.{s}", NETWORK)]
                bags = folder / "bags"
                taken = peak("embed", "--tiles", tiles, "--output", bags, *sources, *QUIET)
                yield _row(f"embed, {name}, 2 reading processes", taken, decoded)


def _row(case: str, taken: int, decoded: int) -> Row:
    return Row(
        "memory",
        case,
        "GB",
        taken / 1e9,
        peer=decoded / 1e9,
        peer_is="the slide decoded",
        limit=LIMIT / 1e9,
        limit_is="asked for",
        target="bounded whatever the slide's size",
    )
