"""Files of large bags that take no disk space."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from bag_factory import make_bag

from dasmil.json_text import pack_metadata


def write_hollow(path: Path, num_tiles: int = 3000, width: int = 384) -> None:
    """A hole in place of the tensors of ``num_tiles`` x10 tiles and four times as many of x20."""
    head = make_bag(path.stem, num_tiles=1, dims=width).header
    head = replace(head, num_tiles=4 * num_tiles)
    sizes = {"x10": num_tiles, "x20": 4 * num_tiles}
    entries: dict[str, Any] = {}
    end = 0
    for kind, dtype, columns, item in (("features", "F16", width, 2), ("grid", "I32", 2, 4)):
        for scale, rows in sizes.items():
            start, end = end, end + rows * columns * item
            shape, place = [rows, columns], [start, end]
            entries[f"{kind}/{scale}"] = {"dtype": dtype, "shape": shape, "data_offsets": place}
    rows = sizes["x20"]
    start, end = end, end + rows * 4
    entries["parent/x20"] = {"dtype": "I32", "shape": [rows], "data_offsets": [start, end]}
    entries["__metadata__"] = pack_metadata(head.pack())
    text = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
