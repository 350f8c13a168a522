"""The kind ``mil4wsi-bags`` of the verb ``import``: mil4wsi's graph files → bag files."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dasmil.bags import (
    Bag,
    BagHeader,
    ExtractorCard,
    bag_graph,
    bag_path,
    read_headers,
    write_bag,
)
from dasmil.errors import InputError
from dasmil.files import must_exist, write_text
from dasmil.interop.features.digest import features_digest
from dasmil.interop.mil4wsi.graph import SCALES, PreparedGraph, read_prepared
from dasmil.interop.mil4wsi.grid import IntArray, finest_side, place_on_grid, require_nested
from dasmil.progress import progress
from dasmil.slides.cohort import SlideRow, write_cohort
from dasmil.tables import write_csv
from dasmil.units import Mpp, TilePx

IMPORTED = {"imported": "mil4wsi"}  # in a bag's header, where others hold parameters
MAX_LINES = 20  # slides that are named when the import ends


def extractor_card(scale: str, feature_dim: int) -> ExtractorCard:
    """Stands for mil4wsi's extractor of a scale: of unknown weights, without normalisation (D19).

    It is the same for all that is imported, so that imported bags and models fit together.
    """
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return ExtractorCard("mil4wsi", f"mil4wsi {scale}", mean, std, 256, feature_dim)


def mil4wsi_bags(
    src: Path, dest: Path, classes: tuple[str, ...] = ("0", "1"), tile_px: int = 256
) -> int:
    """Graph features that mil4wsi prepared → a folder of bags.

    The tiles of mil4wsi lie on one grid for every piece of tissue, those of a bag on one for the
    slide: some have to be moved. Their level 3 is taken for x20, 0.5 µm/px, as mil4wsi calls it;
    the slides' own mpp is not in the files (D20). DEST/import.csv says of every slide how many
    were moved, by how many level-0 pixels at most, and how many entries of its edge_index the bag's
    graph lacks and adds. A slide that
    cannot be imported costs one row there. DEST/cohort.csv names the files where it should name
    the slides: put those in to have overlays drawn on them.

    Parameters
    ----------
    src:
        folder with train/data_*.pt and test/data_*.pt, or with these in a folder processed.
    dest:
        folder for the bags.
    classes:
        names of the labels 0, 1, ...
    tile_px:
        side of a tile as the extractors saw it.

    Returns
    -------
    The exit code: 1 when a slide failed, else 0.

    Raises
    ------
    InputError
        when there is no such file, a label has no class, or two files hold the same slide.
    """
    for slide_id, found in read_headers(dest).items():
        if isinstance(found, BagHeader) and json.loads(found.tiling) != IMPORTED:
            raise InputError(
                f"{bag_path(dest, slide_id)}: not imported from mil4wsi, and a folder holds bags "
                "of one making; choose another DEST"
            )
    records: list[dict[str, Any]] = []
    slides: dict[str, SlideRow] = {}
    for path in progress(_graph_files(src), "import", unit="slide"):
        records.append(record := {"file": path, "state": "failed"})
        try:
            graph = read_prepared(path)
        except InputError as error:
            record["message"] = str(error)
            continue
        row = _cohort_row(path, graph, classes)
        if row.slide_id in slides:
            raise InputError(
                f"{path}: its slide {row.slide_id} is that of {slides[row.slide_id].path} too; "
                "give each slide a name of its own"
            )
        slides[row.slide_id] = row
        record["slide_id"] = row.slide_id
        try:
            bag, figures = make_bag(graph, tile_px)
            write_bag(bag_path(dest, row.slide_id), bag)
            record |= {"state": "done", "extractors": bag.header.extractors, **figures}
        except InputError as error:
            record["message"] = f"{path}: {error}"
    _fail_unlike_the_rest(records)
    for record in records:
        if record["state"] == "failed" and "slide_id" in record:
            bag_path(dest, record["slide_id"]).unlink(missing_ok=True)  # of an import before
    write_cohort(dest / "cohort.csv", slides.values())
    for record in records:
        if record["state"] == "done":
            _write_extractors(dest / "extractors.json", record["extractors"], src)
            break
    return _report(dest / "import.csv", records)


def _graph_files(src: Path) -> list[Path]:
    must_exist(src, "give the folder of graphs that mil4wsi prepared")
    for folder in (src / "processed", src):
        files = [p for part in ("train", "test") for p in (folder / part).glob("data_*.pt")]
        if files:
            return sorted(files, key=lambda path: (path.parent, len(path.name), path.name))
    raise InputError(f"{src}: no train/data_*.pt or test/data_*.pt in it or its folder processed")


def _cohort_row(path: Path, graph: PreparedGraph, classes: Sequence[str]) -> SlideRow:
    if not 0 <= graph.label < len(classes):
        raise InputError(
            f"{path}: the label of {graph.slide_id} is {graph.label}, but --classes names "
            f"{len(classes)} ({', '.join(classes)}); name one class for each label from 0 on"
        )
    return SlideRow(graph.slide_id, path, classes[graph.label], split=path.parent.name)


def _write_extractors(path: Path, cards: Mapping[str, ExtractorCard], src: Path) -> None:
    """Which slides the extractors have seen is not known; `fit` says so."""
    unknown = {"source": str(src), "trained_on": None}
    records = {scale: {**asdict(card), **unknown} for scale, card in cards.items()}
    write_text(path, json.dumps(records, indent=2))


def _fail_unlike_the_rest(records: Sequence[dict[str, Any]]) -> None:
    """Bags of one folder have the same scales and widths; what most have is right."""
    done = [record for record in records if record["state"] == "done"]
    kinds = Counter(record["kind"] for record in done).most_common()
    for record in done:
        if record["kind"] != kinds[0][0]:
            record["state"] = "failed"
            record["message"] = (
                f"{record['file']}: it holds {record['kind']}, most files here {kinds[0][0]}"
            )


def _report(path: Path, records: Sequence[Mapping[str, Any]]) -> int:
    done = [record for record in records if record["state"] == "done"]
    kind = f" ({done[0]['kind']})" if done else ""
    tiles = [name for name in (done[0] if done else ()) if name.startswith("tiles/")]
    figures = ("orphans", "moved", "max_moved_px0", "edges_missing", "edges_added")
    columns = ("slide_id", "file", "state", *tiles, *figures, "message")
    write_csv(path, columns, ({c: record.get(c) for c in columns} for record in records))
    lines = [f"failed: {record['message']}" for record in records if record["state"] == "failed"]
    lines += [
        f"{record['slide_id']}: the graph lacks {record['edges_missing']} entries of edge_index "
        f"and adds {record['edges_added']}; {record['moved']} tiles moved by up to "
        f"{record['max_moved_px0']} px"
        for record in done
        if record["edges_missing"] or record["edges_added"]
    ]
    for line in lines[:MAX_LINES]:
        print(line)
    if len(lines) > MAX_LINES:
        print(f"... and {len(lines) - MAX_LINES} more")
    orphaned = sum(record["orphans"] > 0 for record in done)
    if orphaned:
        print(
            f"{orphaned} slide(s) have tiles without a parent: there mil4wsi itself shows its "
            "coarse head the last tile of the file as well, so its coarse logits differ from ours"
        )
    num_equal = sum(not record["edges_missing"] and not record["edges_added"] for record in done)
    print(
        f"import: {len(done)} done{kind}, {num_equal} of them with the very graph of their file, "
        f"{len(records) - len(done)} failed; see {path}"
    )
    return int(len(done) < len(records))


def make_bag(graph: PreparedGraph, tile_px: int = 256) -> tuple[Bag, dict[str, Any]]:
    """The bag of a slide, and what import.csv says of it.

    A tile whose parent is not of the next coarser scale that the file holds (the tile between them
    was left out as empty) becomes a tile without a parent.

    Raises
    ------
    InputError
        when the places of tiles, parents and neighbours contradict each other.
    """
    levels = np.unique(graph.level)
    scales = tuple(SCALES[level] for level in levels)
    scale = np.searchsorted(levels, graph.level)
    held = (graph.childof >= 0) & (scale[graph.childof] == scale - 1)
    parent = np.where(held, graph.childof, -1)
    ratios = np.array([round(s.mpp / scales[-1].mpp) for s in scales])
    side_px0 = finest_side(graph.place, scale, parent, graph.edges, ratios, default=tile_px)
    sides = ratios * side_px0
    require_nested(graph.place, scale, parent, sides)
    cells, moved = place_on_grid(graph.place, scale, parent, sides)

    rows, parents = in_order_of_parents(scale, parent, len(scales))
    dim = graph.features.shape[1]
    finest = scale == len(scales) - 1
    header = BagHeader(
        slide_id=graph.slide_id,
        scales=scales,
        tile_px=TilePx(tile_px),
        slide_mpp=Mpp(tile_px * scales[-1].mpp / side_px0),
        size_px0=_extent_px0(cells, sides[scale]),
        size_is_extent=True,
        tiling=json.dumps(IMPORTED),
        extractors={s.name: extractor_card(s.name, dim) for s in scales},
        num_tiles=len(rows[-1]),
        slide_digest=features_digest(graph.features.numpy()[finest], graph.place[finest]),
    )
    bag = Bag(
        header,
        features={s.name: graph.features[r] for s, r in zip(scales, rows, strict=True)},
        grid={
            s.name: torch.from_numpy(cells[r].astype(np.int32))
            for s, r in zip(scales, rows, strict=True)
        },
        parent={s.name: torch.from_numpy(p) for s, p in zip(scales[1:], parents, strict=True)},
    )
    distance = np.abs(moved).max(1)
    lacks, adds = _edge_differences(bag, np.concatenate(rows), graph.edges)
    return bag, {
        "kind": f"{'+'.join(bag.scales)}, {dim} features",
        **{f"tiles/{name}": number for name, number in bag.num_tiles().items()},
        "orphans": int(((scale > 0) & (parent < 0)).sum()),
        "moved": int((distance > 0).sum()),
        "max_moved_px0": int(distance.max()),
        "edges_missing": lacks,
        "edges_added": adds,
    }


def in_order_of_parents(
    scale: IntArray, parent: IntArray, num_scales: int
) -> tuple[list[IntArray], list[npt.NDArray[np.int32]]]:
    """Per scale the file's rows of its tiles; per scale but the coarsest their parents' rows."""
    rows = [np.flatnonzero(scale == 0)]
    parents = []
    for number in range(1, num_scales):
        own = np.full(len(scale) + 1, -1, dtype=np.int32)  # the last one is read by -1
        own[rows[-1]] = np.arange(len(rows[-1]))
        tiles = np.flatnonzero(scale == number)
        order = np.argsort(own[parent[tiles]], kind="stable")
        rows.append(tiles[order])
        parents.append(own[parent[tiles[order]]])
    return rows, parents


def _extent_px0(cells: IntArray, sides: IntArray) -> tuple[int, int]:
    height, width = ((cells + 1) * sides[:, None]).max(0).tolist()
    return width, height


def _edge_differences(bag: Bag, rows: IntArray, edges: IntArray) -> tuple[int, int]:
    """How many of the file's edges the bag's graph lacks, and how many it has beside them."""
    graph = bag_graph(bag)
    assert graph.union is not None
    union = rows[graph.union.edge_index().numpy()]
    ours, theirs = (np.unique(e[0] * len(rows) + e[1]) for e in (union, edges))
    common = len(np.intersect1d(ours, theirs, assume_unique=True))
    return len(theirs) - common, len(ours) - common
