"""The kind ``mil4wsi-bags`` of the verb ``import``: mil4wsi's graph files → bag files."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dasmil.bags import Bag, ExtractorCard, bag_graph
from dasmil.errors import InputError
from dasmil.files import must_exist
from dasmil.interop.features.common_grid import IntArray
from dasmil.interop.features.digest import features_digest
from dasmil.interop.features.importer import (
    Record,
    SlideFiles,
    Source,
    import_slides,
    shorten,
    stand_in_card,
)
from dasmil.interop.features.slide_bag import assemble_bag, order_by_parents
from dasmil.interop.mil4wsi.graph import PreparedGraph, read_name, read_prepared
from dasmil.interop.mil4wsi.grid import find_side_px0, require_nested
from dasmil.slides.cohort import SlideRow, refuse_twice

IMPORTED = {"imported": "mil4wsi"}  # in a bag's header


def extractor_card(scale: str, feature_dim: int) -> ExtractorCard:
    """The card of mil4wsi's extractor of a scale: unknown weights, no normalisation (D19).

    It is the same for all imports, so that imported bags and models fit together. D numbers:
    .github/docs/paper.md.
    """
    return stand_in_card("mil4wsi", f"mil4wsi {scale}", 256, feature_dim)


def mil4wsi_bags(
    src: Path, dest: Path, classes: tuple[str, ...] = ("0", "1"), tile_px: int = 256
) -> int:
    """Import graphs that mil4wsi prepared into a bag folder.

    The tiles of mil4wsi lie on one grid per piece of tissue, those of a bag on one grid per slide:
    some have to be moved. Level 3 of mil4wsi is taken for x20 at 0.5 µm/px, as mil4wsi calls it;
    the files lack the slides' own mpp. Per slide, DEST/import.csv counts the tiles that were moved,
    the largest shift in level-0 pixels, and the entries of edge_index that the bag's graph lacks
    and adds. A slide that cannot be imported costs one row. DEST/cohort.csv names the graph files
    as paths; replace them by the slides to draw overlays.

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
    The exit code: 1 if a slide failed, else 0.

    Raises
    ------
    InputError
        if there is no such file, a label has no class, or two files hold the same slide.
    """

    def read(row: SlideRow) -> SlideFiles:
        graph = read_prepared(row.path)
        if graph.slide_id != row.slide_id:
            raise InputError(f"{row.path}: it has changed during the import; run it again")
        names = [scale.name for scale in graph.scales]
        return SlideFiles(
            paths=dict.fromkeys(names, row.path),
            cards={name: extractor_card(name, graph.features.shape[1]) for name in names},
            is_empty=False,
            make_bag=lambda _, tiling: make_bag(graph, tile_px, tiling),
        )

    return import_slides(
        dest,
        Source(
            tool=IMPORTED["imported"],
            rows=_list_slides(src, classes),
            files=lambda row: [row.path],
            read=read,
            tile_px=tile_px,
            columns=("edges_missing", "edges_added"),
            describe=_describe_graphs,
        ),
    )


def _list_slides(src: Path, classes: Sequence[str]) -> list[SlideRow]:
    """The slides of a folder; a file without a readable name is named after the file itself."""
    must_exist(src, "give the folder of graphs that mil4wsi prepared")
    for folder in (src / "processed", src):
        paths = [p for part in ("train", "test") for p in (folder / part).glob("data_*.pt")]
        if paths:
            break
    else:
        raise InputError(
            f"{src}: no train/data_*.pt or test/data_*.pt in it or its folder processed; give the "
            "folder of graphs that mil4wsi prepared"
        )
    rows = []
    for path in sorted(paths, key=lambda path: (path.parent, len(path.name), path.name)):
        split = path.parent.name
        try:
            slide_id, label = read_name(path)
        except InputError:  # raised again when the slide is imported
            rows.append(SlideRow(f"{split}_{path.stem}", path, split=split))
            continue
        if not 0 <= label < len(classes):
            raise InputError(
                f"{path}: the label of {slide_id} is {label}, but --classes names {len(classes)} "
                f"({', '.join(classes)}); name one class for each label from 0 on"
            )
        rows.append(SlideRow(slide_id, path, classes[label], split=split))
    refuse_twice(src, rows, advice="remove one of the files")
    return rows


def _describe_graphs(done: Sequence[Record]) -> Iterable[str]:
    """Lines on how the graphs of the bags differ from those of the files."""
    changed = [row for row in done if row.get("edges_missing") or row.get("edges_added")]
    yield from shorten(
        [
            f"{row['slide_id']}: the graph lacks {row['edges_missing']} entries of edge_index and "
            f"adds {row['edges_added']}; {row['moved']} tiles moved by up to "
            f"{row['max_moved_px0']:g} px"
            for row in changed
        ]
    )
    if orphaned := sum((row.get("orphans") or 0) > 0 for row in done):
        yield (
            f"{orphaned} slide(s) have tiles without a parent: for these mil4wsi itself also reads "
            "the last tile of the file in its coarse head, so its coarse logits differ from ours"
        )
    yield f"{len(done) - len(changed)} of {len(done)} graphs have exactly the edges of their file"


def make_bag(
    graph: PreparedGraph, tile_px: int = 256, tiling: str = json.dumps(IMPORTED)
) -> tuple[Bag, dict[str, Any]]:
    """The bag of a slide, and its columns of import.csv.

    A tile loses its parent if that is not of the next coarser scale in the file (mil4wsi left out
    the tile between them as empty).

    Parameters
    ----------
    tile_px: side of a tile as the extractors saw it.
    tiling: for the header: JSON that identifies the import.

    Raises
    ------
    InputError
        if the places of tiles, parents and neighbours contradict each other.
    """
    scales = graph.scales
    scale = np.searchsorted(np.unique(graph.level), graph.level)
    in_next_scale = (graph.childof >= 0) & (scale[graph.childof] == scale - 1)
    parent = np.where(in_next_scale, graph.childof, -1)
    ratios = np.array([round(s.mpp / scales[-1].mpp) for s in scales])
    of_scale = [scale == number for number in range(len(scales))]
    finest = graph.features.numpy()[of_scale[-1]], graph.place[of_scale[-1]]
    try:
        side_px0 = find_side_px0(graph.place, scale, parent, graph.edges, ratios, default=tile_px)
        require_nested(graph.place, scale, parent, ratios * side_px0)
        bag, columns = assemble_bag(
            {s.name: extractor_card(s.name, graph.features.shape[1]) for s in scales},
            tiling=tiling,
            slide_id=graph.slide_id,
            scales=scales,
            tile_px=tile_px,
            features=[graph.features[chosen] for chosen in of_scale],
            place=graph.place,
            scale=scale,
            parent=parent,
            sides=ratios * side_px0,
            slide_digest=features_digest(*finest),
        )
    except InputError as error:
        raise InputError(f"{graph.path}: {error}; prepare the graph again") from error
    rows = np.concatenate(order_by_parents(scale, parent, len(scales))[0])
    missing, added = _compare_edges(bag, rows, graph.edges)
    return bag, {**columns, "rule": "keep", "edges_missing": missing, "edges_added": added}


def _compare_edges(bag: Bag, rows: IntArray, edges: IntArray) -> tuple[int, int]:
    """The number of the file's edges that the bag's graph lacks, and of those that it adds.

    Parameters
    ----------
    rows: of the file's tiles, in the order of the bag's.
    edges: (2, E) of the file.
    """
    graph = bag_graph(bag)
    assert graph.union is not None
    union = rows[graph.union.edge_index().numpy()]
    of_bag, of_file = (np.unique(e[0] * len(rows) + e[1]) for e in (union, edges))
    common = len(np.intersect1d(of_bag, of_file, assume_unique=True))
    return len(of_file) - common, len(of_bag) - common
