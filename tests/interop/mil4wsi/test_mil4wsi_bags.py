import csv
import json

import numpy as np
import pytest
import torch
from bag_factory import union_by_search, write_bags
from golden import RELEASED, released_folder
from mil4wsi_cases import (
    RunsCode,
    blocks,
    import_bags,
    make_data,
    make_prepared,
    write_data,
)

from dasmil.bags import bag_path, read_bag
from dasmil.interop.mil4wsi.bags import make_bag
from dasmil.interop.mil4wsi.graph import SCALES, read_prepared
from dasmil.slides.cohort import read_cohort

SQUARE = ((0, 0), (512, 0), (0, 512), (512, 512))


def report(folder):
    with open(folder / "import.csv", newline="") as file:
        return list(csv.DictReader(file))


def places(bag, scale):
    return [(x, y) for x, y, _, _ in bag.boxes_px0(scale).tolist()]


@pytest.mark.parametrize("case", RELEASED)
def test_a_released_slide_becomes_a_bag_with_the_very_same_graph(case, tmp_path, capsys):
    source = released_folder(case)
    assert import_bags(source, tmp_path) == 0
    graph = read_prepared(source / "processed" / "test" / "data_0.pt")
    bag = read_bag(bag_path(tmp_path, graph.slide_id))
    assert bag.header.extent.mpp == 0.5
    assert bag.header.tile_px == 256
    assert json.loads(bag.header.tiling)["imported"] == "mil4wsi"
    for level in np.unique(graph.level):
        scale, rows = SCALES[level].name, graph.level == level
        at = {place: row for row, place in enumerate(places(bag, scale))}
        order = [at[tuple(place)] for place in graph.place[rows].tolist()]
        assert torch.equal(bag.features[scale][order], graph.features[torch.from_numpy(rows)])
    [row] = report(tmp_path)
    assert row["state"] == "done"
    assert [row[name] for name in ("edges_missing", "edges_added", "moved")] == ["0"] * 3
    [slide] = read_cohort(tmp_path / "cohort.csv")
    assert (slide.slide_id, slide.label, slide.split) == (graph.slide_id, "1", "test")
    assert "1 of 1 graphs have exactly the edges of their file" in capsys.readouterr().out


def test_children_come_in_the_order_of_their_parents(tmp_path):
    tiles = [(3, 768, 0, 2), (3, 256, 0, 3), (2, 512, 0, -1), (2, 0, 0, -1), (3, 512, 256, 2)]
    graph = make_prepared(tiles, tmp_path)
    bag, _ = make_bag(graph)
    assert places(bag, "x10") == [(512, 0), (0, 0)]
    assert places(bag, "x20") == [(768, 0), (512, 256), (256, 0)]
    assert bag.parent["x20"].tolist() == [0, 0, 1]
    assert torch.equal(bag.features["x20"], graph.features[[0, 4, 1]])
    assert bag.header.extent.size_px0 == (1024, 512) and not bag.header.extent.size_is_known


@pytest.mark.parametrize(("base", "slide_mpp"), [(2048, 0.5), (4096, 0.25)])
def test_the_step_of_the_tiles_tells_the_resolution_of_the_slide(base, slide_mpp, tmp_path):
    tiles = blocks((0, 0), (base // 4, 0), base=base)
    bag, columns = make_bag(make_prepared(tiles, tmp_path, base=base))
    assert bag.header.extent.mpp == slide_mpp
    assert columns["edges_missing"] == columns["edges_added"] == 0


def test_tiles_of_another_width_in_pixels_are_another_resolution(tmp_path):
    graph = make_prepared(blocks(*SQUARE), tmp_path)
    bag, _ = make_bag(graph, tile_px=224)
    assert bag.header.extent.mpp == 0.5 * 224 / 256
    assert places(bag, "x10") == list(SQUARE)


def test_three_levels_become_three_scales(tmp_path):
    tiles = [(1, 0, 0, -1), (2, 512, 512, 0), (3, 768, 512, 1), (3, 512, 768, 1), (1, 1024, 0, -1)]
    bag, columns = make_bag(make_prepared(tiles, tmp_path))
    assert bag.scales == ("x5", "x10", "x20")
    assert bag.parent["x10"].tolist() == [0]
    assert bag.parent["x20"].tolist() == [0, 0]
    assert columns["orphans"] == columns["edges_missing"] == columns["edges_added"] == 0


def test_one_level_becomes_one_scale(tmp_path):
    tiles = [(3, 256, 0, -1), (3, 512, 256, -1), (3, 1024, 1024, -1)]
    bag, columns = make_bag(make_prepared(tiles, tmp_path))
    assert bag.scales == ("x20",)
    assert places(bag, "x20") == [(256, 0), (512, 256), (1024, 1024)]
    assert (columns["tiles/x20"], columns["orphans"]) == (3, 0)


def test_a_fine_tile_without_parent_is_kept_and_comes_first(tmp_path):
    tiles = [*blocks((0, 0)), (3, 512, 0, -1), (3, 768, 0, -1)]
    bag, columns = make_bag(make_prepared(tiles, tmp_path))
    assert bag.parent["x20"].tolist() == [-1, -1, 0, 0, 0, 0]
    assert places(bag, "x20")[:2] == [(512, 0), (768, 0)]
    assert columns["orphans"] == 2
    assert columns["edges_missing"] == columns["edges_added"] == 0


def test_an_edge_that_skips_a_scale_is_lost_and_counted(tmp_path):
    """x20 inside x5 where the x10 tile between them is empty."""
    tiles = [(1, 0, 0, -1), (2, 0, 0, 0), (3, 0, 0, 1), (3, 512, 0, 0)]
    bag, columns = make_bag(make_prepared(tiles, tmp_path))
    assert bag.parent["x20"].tolist() == [-1, 0]
    assert columns["orphans"] == 1
    assert (columns["edges_missing"], columns["edges_added"]) == (2, 0)


def test_pieces_of_tissue_with_grids_of_their_own_keep_their_graphs(tmp_path):
    tiles = blocks((0, 0), (512, 0), (512, 512), (1100, 70), (1612, 70))
    bag, columns = make_bag(make_prepared(tiles, tmp_path))
    assert (columns["edges_missing"], columns["edges_added"]) == (0, 0)
    assert columns["moved"] == 10  # the two tiles of the smaller piece, and what is in them
    assert columns["max_moved_px0"] == max(
        max(abs(x - x0), abs(y - y0)) for (x, y), x0, y0 in moved_places(bag, tiles)
    )


def moved_places(bag, tiles):
    """Places of the bag's tiles, and x, y in the file; both hold whole blocks in order."""
    for level, scale in ((2, "x10"), (3, "x20")):
        in_file = [(x, y) for number, x, y, _ in tiles if number == level]
        for place, (x, y) in zip(places(bag, scale), in_file, strict=True):
            yield place, x, y


def test_edges_lost_between_moved_pieces_are_counted(tmp_path):
    """The pieces are half a coarse tile askew: fine tiles are neighbours, coarse ones are not."""
    tiles = [(2, 0, 0, -1), (3, 256, 256, 0), (2, 256, 512, -1), (3, 256, 512, 2)]
    bag, columns = make_bag(make_prepared(tiles, tmp_path))
    assert bag.num_tiles() == {"x10": 2, "x20": 2}
    assert (columns["edges_missing"], columns["edges_added"]) == (2, 0)


def test_edges_that_the_file_does_not_have_are_counted(tmp_path):
    tiles = blocks((0, 0), (512, 0))
    edges = torch.tensor([[0, 1], [1, 0]])
    _, columns = make_bag(make_prepared(tiles, tmp_path, edge_index=edges))
    bag, complete = make_bag(make_prepared(tiles, tmp_path))
    assert complete["edges_added"] == 0
    assert columns["edges_added"] == len(union_by_search(bag)) - 2
    assert columns["edges_missing"] == 0


def test_features_keep_their_precision(tmp_path):
    for dtype in (torch.float16, torch.float32):
        x = torch.randn(5, 7).to(dtype)
        bag, _ = make_bag(make_prepared(blocks((0, 0)), tmp_path, x=x))
        assert bag.features["x10"].dtype == dtype
        assert torch.equal(torch.cat([bag.features["x10"], bag.features["x20"]]), x)


@pytest.mark.parametrize("inside", ["processed", "."])
def test_slides_get_their_label_and_part(inside, tmp_path):
    folder = tmp_path / "source"
    for part, number, name, label in (
        ("train", 10, "c", 0),
        ("train", 2, "b", 1),
        ("test", 0, "a", 0),
    ):
        write_data(folder, part, number, make_data(blocks((0, 0)), name, label))
    bags = tmp_path / "bags"
    source = folder / "processed" if inside == "." else folder
    assert import_bags(source, bags, "--classes", "[normal,tumor]") == 0
    found = {row.slide_id: (row.label, row.split) for row in read_cohort(bags / "cohort.csv")}
    assert found == {"a": ("normal", "test"), "b": ("tumor", "train"), "c": ("normal", "train")}
    records = json.loads((bags / "extractors.json").read_text())
    assert all(record["trained_on"] is None for record in records.values()) and records
    assert [row["slide_id"] for row in report(bags)] == ["a", "b", "c"]
    fingerprints = {
        card.fingerprint
        for name in found
        for card in read_bag(bag_path(bags, name)).header.extractors.values()
    }
    assert fingerprints == {"mil4wsi x10", "mil4wsi x20"}


def test_a_label_without_a_class_is_refused(tmp_path, capsys):
    path = write_data(tmp_path, "train", 0, make_data(blocks((0, 0)), "a", label=2))
    assert import_bags(tmp_path, tmp_path / "bags") == 2
    assert f"{path}: the label of a is 2, but --classes names 2 (0, 1)" in capsys.readouterr().err
    assert import_bags(tmp_path, tmp_path / "bags", "--classes", "[a,b,c]") == 0


def test_two_files_of_one_slide_are_refused(tmp_path, capsys):
    paths = [write_data(tmp_path, p, 0, make_data(blocks((0, 0)), "a")) for p in ("train", "test")]
    assert import_bags(tmp_path, tmp_path / "bags") == 2
    said = capsys.readouterr().err
    assert all(str(path) in said for path in paths)


def test_bags_of_another_making_do_not_share_the_folder(tmp_path, capsys):
    write_bags(tmp_path / "BAGS", {"s9": "normal"})
    write_data(tmp_path, "train", 0, make_data(blocks((0, 0)), "a"))
    assert import_bags(tmp_path, tmp_path / "BAGS") == 2
    assert (
        "the folder holds other bags than this import makes (`embed` wrote it)"
        in capsys.readouterr().err
    )


def test_a_folder_without_graphs_is_refused(tmp_path, capsys):
    assert import_bags(tmp_path, tmp_path / "bags") == 2
    assert "no train/data_*.pt or test/data_*.pt in it" in capsys.readouterr().err


CONTRADICTIONS = {
    "neighbours": ({"x_coord": torch.tensor([0, 0, 0, 300, 256])}, "its neighbours lie"),
    "children": ({"x_coord": torch.tensor([512, 0, 0, 256, 256])}, "inside their parent"),
    "one place": ({"y_coord": torch.tensor([0, 0, 0, 0, 256])}, "in the same place"),
}
MISFITS = {
    "no places": ({"x_coord": None}, "x_coord is not (5,) whole numbers"),
    "floating places": ({"x_coord": torch.rand(5)}, "x_coord is not (5,) whole numbers"),
    "places beyond any slide": ({"x_coord": torch.full((5,), 2**40)}, "impossible values"),
    "unknown level": ({"level": torch.tensor([2, 3, 3, 3, 4])}, "level has impossible values"),
    "unknown parent": ({"childof": torch.tensor([-1, 0, 0, 0, 5])}, "childof has impossible"),
    "unknown tile": ({"edge_index": torch.tensor([[0], [5]])}, "edge_index has impossible"),
    "no edges": ({"edge_index": None}, "edge_index is not (2, 0) whole numbers"),
    "no label": ({"y": None}, "y is not (1,) whole numbers"),
    "no tile": ({"x": torch.rand(0, 5)}, "x is not (N, D)"),
    "double features": ({"x": torch.rand(5, 4).double()}, "neither float16 nor float32"),
    "broken features": ({"x": torch.full((5, 4), float("nan"))}, "not finite"),
    "sparse features": (
        {"x": torch.rand(5, 4).to_sparse()},
        "_rebuild_sparse_tensor', which no graph",
    ),
    "no name": ({"name": None}, "its name None names no slide"),
    "a path for a name": ({"name": "../../slide"}, "names no slide"),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [*CONTRADICTIONS.values(), *MISFITS.values()],
    ids=[*CONTRADICTIONS, *MISFITS],
)
def test_a_slide_that_does_not_fit_costs_one_row(changed, message, tmp_path, capsys):
    write_data(tmp_path, "train", 0, make_data(blocks((0, 0)), "good", 0))
    bad = make_data(blocks((0, 0)), **({"name": "bad"} | changed))
    path = write_data(tmp_path, "train", 1, bad)
    write_data(tmp_path, "train", 2, make_data(blocks((0, 0)), "late", 0))
    bags = tmp_path / "bags"
    assert import_bags(tmp_path, bags) == 1
    assert [row["state"] for row in report(bags)] == ["done", "failed", "done"]
    assert message in report(bags)[1]["message"]
    assert f": {path}: " in capsys.readouterr().out
    assert sorted(p.stem for p in bags.glob("*.safetensors")) == ["good", "late"]


def test_files_that_are_no_graphs_cost_one_row_each(tmp_path):
    write_data(tmp_path, "train", 0, make_data(blocks((0, 0)), "good"))
    write_data(tmp_path, "train", 1, {"x": torch.rand(3, 3)})
    path = write_data(tmp_path, "train", 2, make_data(blocks((0, 0)), "cut"))
    path.write_bytes(path.read_bytes()[:500])
    (path.parent / "data_3.pt").write_bytes(b"")
    assert import_bags(tmp_path, tmp_path / "bags") == 1
    rows = report(tmp_path / "bags")
    assert [row["state"] for row in rows] == ["done", "failed", "failed", "failed"]
    assert "it holds no graph of torch_geometric" in rows[1]["message"]
    assert all("no graph of torch_geometric" in row["message"] for row in rows[2:])


def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path):
    marker = tmp_path / "marker"
    write_data(tmp_path, "test", 0, RunsCode(marker))
    write_data(tmp_path, "test", 1, make_data(blocks((0, 0)), "a", patch_label=RunsCode(marker)))
    write_data(tmp_path, "test", 2, make_data(blocks((0, 0)), "good"))
    assert import_bags(tmp_path, tmp_path / "bags") == 1
    rows = report(tmp_path / "bags")
    assert [row["state"] for row in rows] == ["failed", "failed", "done"]
    assert all("could run foreign code" in row["message"] for row in rows[:2])
    assert not marker.exists()
    torch.load(rows[1]["file"], weights_only=False)
    assert marker.exists()  # had it been unpickled


def test_a_slide_unlike_the_rest_fails(tmp_path):
    write_data(tmp_path, "test", 0, make_data([(3, 0, 0, -1)], "odd"))
    for number in (1, 2):
        write_data(tmp_path, "test", number, make_data(blocks((0, 0)), f"slide{number}"))
    assert import_bags(tmp_path, tmp_path / "bags") == 1
    row = report(tmp_path / "bags")[0]
    assert row["state"] == "failed"
    assert "it has the scales x20, the other slides have x10, x20" in row["message"]
    assert not bag_path(tmp_path / "bags", "odd").exists()


def test_a_slide_that_fails_now_leaves_no_bag_of_an_earlier_import(tmp_path):
    bags = tmp_path / "bags"
    for number, slide_id in enumerate(("other", "slide")):
        write_data(tmp_path, "test", number, make_data(blocks((0, 0)), slide_id))
    assert import_bags(tmp_path, bags) == 0
    bad = {"x_coord": torch.tensor([512, 0, 0, 256, 256])}
    write_data(tmp_path, "test", 1, make_data(blocks((0, 0)), "slide", **bad))
    assert import_bags(tmp_path, bags) == 1
    assert not bag_path(bags, "slide").exists() and bag_path(bags, "other").exists()


def test_the_next_run_imports_missing_and_changed_slides(tmp_path):
    """A file that is repaired takes the name that it holds."""
    bags = tmp_path / "bags"
    for number, slide_id in enumerate(("same", "changed")):
        write_data(tmp_path, "test", number, make_data(blocks((0, 0)), slide_id))
    broken = write_data(tmp_path, "test", 2, {"x": torch.rand(3, 3)})
    assert import_bags(tmp_path, bags) == 1
    assert [row["slide_id"] for row in report(bags)] == ["same", "changed", "test_data_2"]
    before = bag_path(bags, "same").stat().st_mtime_ns
    write_data(tmp_path, "test", 1, make_data(blocks((0, 0), (512, 0)), "changed"))
    torch.save(make_data(blocks((0, 0)), "repaired"), broken)
    assert import_bags(tmp_path, bags) == 0
    assert bag_path(bags, "same").stat().st_mtime_ns == before
    assert read_bag(bag_path(bags, "changed")).num_tiles() == {"x10": 2, "x20": 8}
    assert [row["slide_id"] for row in report(bags)] == ["same", "changed", "repaired"]
    assert import_bags(tmp_path, bags, "--tile_px", "224") == 0
    assert read_bag(bag_path(bags, "same")).header.tile_px == 224


def test_many_differences_end_in_a_count(tmp_path, capsys):
    edges = torch.tensor([[0, 1], [1, 0]])
    for number in range(13):
        data = make_data(blocks((0, 0)), f"slide{number}", edge_index=edges)
        write_data(tmp_path, "test", number, data)
    assert import_bags(tmp_path, tmp_path / "bags") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13
    assert "lacks 0 entries of edge_index and adds 18" in lines[0]
    assert lines[10] == "... and 3 more"
    assert lines[11] == "0 of 13 graphs have exactly the edges of their file"
    assert lines[12].startswith("import mil4wsi: 13 done, 0 failed")
