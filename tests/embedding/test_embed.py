import csv
import json
import os
import re
import shutil
import signal
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise

import cv2
import numpy as np
import pytest
import tifffile
import torch
from road import NUM_SLIDES, RANDOM, SMALL, copy_first_tiles, embed_command

from dasmil.bag_folder import describe_bag
from dasmil.bags import bag_path, read_bag
from dasmil.cli import main
from dasmil.embedding.dataset import WAIT, ChunkDataset
from dasmil.embedding.extractor import Extractor, load_extractor
from dasmil.embedding.sampler import ClaimingSampler
from dasmil.slides.cohort import SlideRow, read_cohort, write_cohort
from dasmil.slides.cutting import TileCutter
from dasmil.slides.digest import file_state, sample_digest
from dasmil.slides.pyramid import TilingParameters, lay_tiles
from dasmil.slides.reader import Slide
from dasmil.slides.tile_table import read_tiles, tiles_path, write_tiles
from dasmil.units import Scale
from dasmil.work.worker import Worker

FEW = 3


def slide_ids(road):
    return [row.slide_id for row in read_cohort(road.cohort)]


@pytest.fixture(scope="module")
def few(road, tmp_path_factory):
    """Tiles of the first slides."""
    return copy_first_tiles(road, tmp_path_factory.mktemp("few") / "tiles", FEW)


def states(folder):
    with open(folder / "status.csv", newline="") as file:
        return {row["slide_id"]: (row["state"], row["message"]) for row in csv.DictReader(file)}


def test_every_slide_gets_a_bag_and_the_folder_is_complete(road):
    assert len(slide_ids(road)) == sum(NUM_SLIDES.values())
    assert set(states(road.bags)) == set(slide_ids(road))
    assert {state for state, _ in states(road.bags).values()} == {"done"}
    assert [r.split for r in read_cohort(road.bags / "cohort.csv")] == [
        r.split for r in read_cohort(road.cohort)
    ]
    paths = {row.slide_id: row.path for row in read_cohort(road.cohort)}
    for slide_id in slide_ids(road):
        bag = read_bag(bag_path(road.bags, slide_id))
        assert bag.header.slide_digest == sample_digest(paths[slide_id])
        assert bag.num_tiles() == read_tiles(tiles_path(road.tiles, slide_id)).num_tiles()


def test_features_are_those_of_each_tile_read_by_hand(road):
    """Each row of a bag belongs to the tile of that row, at every scale."""
    row = read_cohort(road.bags / "cohort.csv")[0]
    bag = read_bag(bag_path(road.bags, row.slide_id))
    for scale in bag.header.scales:
        extractor = load_extractor(str(road.dino[scale.name]), Scale.parse(scale.name), 32)
        with Slide(row) as slide:
            pixels = [slide.read(box, (32, 32)) for box in bag.boxes_px0(scale.name).numpy()]
        expected = extractor(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))
        assert torch.allclose(bag.features[scale.name].float(), expected, atol=2e-3, rtol=2e-3)
        assert expected.std(0).mean() > 1e-4  # rows differ, so an exchanged row would show


def test_extractors_remember_the_slides_they_saw(road):
    record = json.loads((road.bags / "extractors.json").read_text())["x20"]
    train = {
        (row.slide_id, row.patient_id, sample_digest(row.path))
        for row in read_cohort(road.cohort)
        if row.split == "train"
    }
    seen = {(r["slide_id"], r["patient_id"], r["digest"]) for r in record["trained_on"]}
    assert seen == train


def test_finished_slides_are_skipped_and_lost_ones_made_again(road, tmp_path, capsys):
    bags = tmp_path / "bags"
    shutil.copytree(road.bags, bags)
    first, *others = slide_ids(road)
    lost = bag_path(bags, first)
    before = lost.read_bytes()
    lost.unlink()
    times = {s: bag_path(bags, s).stat().st_mtime_ns for s in others}
    assert main(embed_command(road.tiles, bags, road.dino)) == 0
    assert {s: bag_path(bags, s).stat().st_mtime_ns for s in others} == times
    assert np.frombuffer(lost.read_bytes(), np.uint8).tolist() == list(before)
    assert states(bags)[others[0]] == ("done", "")
    assert "0 failed" in capsys.readouterr().out


def test_other_extractors_never_mix_in(road, capsys):
    before = {s: bag_path(road.bags, s).read_bytes() for s in slide_ids(road)}
    assert main(embed_command(road.tiles, road.bags, RANDOM)) == 2
    assert "made with other tiles or extractors" in capsys.readouterr().err
    assert {s: bag_path(road.bags, s).read_bytes() for s in slide_ids(road)} == before


def test_a_folder_holds_one_configuration_also_of_slides_not_asked_for_now(road, tmp_path, capsys):
    """Other tiles or extractors are refused by what differs, though no slide coincides."""
    tiles, bags = tmp_path / "tiles", tmp_path / "bags"
    bags.mkdir()
    shutil.copy(bag_path(road.bags, slide_ids(road)[0]), bag_path(bags, "another"))
    assert main(embed_command(road.tiles, bags, RANDOM)) == 2
    assert "x10 features of the extractor" in capsys.readouterr().err
    shutil.copytree(road.tiles, tiles)
    for slide_id in slide_ids(road):
        table = read_tiles(tiles_path(tiles, slide_id))
        tiling = json.dumps({**json.loads(table.tiling), "min_tissue": 0.5})
        write_tiles(tiles_path(tiles, slide_id), replace(table, tiling=tiling))
    assert main(embed_command(tiles, bags, road.dino)) == 2
    assert "min_tissue 0.25 → 0.5" in capsys.readouterr().err
    assert [path.name for path in bags.glob("*.safetensors")] == ["another.safetensors"]


def test_a_slide_that_was_replaced_is_never_embedded_with_the_tiles_of_before(
    road, tmp_path, capsys
):
    """Of three slides one is replaced after it was tiled and one copied; then both are tiled."""
    tiles, bags, slides = (tmp_path / name for name in ("tiles", "bags", "slides"))
    slides.mkdir()
    rows = read_cohort(road.cohort)[:3]
    copies = [replace(row, path=slides / row.path.name, split=None) for row in rows]
    for row, copy in zip(rows, copies):
        shutil.copy(row.path, copy.path)
    write_cohort(tmp_path / "cohort.csv", copies)
    parameters = TilingParameters(**json.loads((road.tiles / "tiling.json").read_text()))
    options = [f"--tissue.mpp={parameters.tissue['mpp']}"]
    command = ["tile", "--cohort", str(tmp_path / "cohort.csv"), "--output", str(tiles)]
    command += ["--scales", "[x10,x20]", "--tile_px", str(parameters.tile_px), *options]
    assert main([*command, "--workers", "1"]) == 0
    assert main(embed_command(tiles, bags, RANDOM)) == 0
    first, second, third = (bag_path(bags, row.slide_id) for row in rows)
    before = [path.read_bytes() for path in (first, second, third)]

    os.utime(copies[1].path, (0, 0))  # the same file with another time
    copies[0].path.write_bytes(copies[2].path.read_bytes())
    capsys.readouterr()
    assert main(embed_command(tiles, bags, RANDOM)) == 1
    state, message = states(bags)[rows[0].slide_id]
    assert state == "failed" and message.startswith(f"{copies[0].path}: the slide file has changed")
    assert "run tile again" in message
    assert {state for state, _ in list(states(bags).values())[1:]} == {"done"}
    assert [path.read_bytes() for path in (first, second, third)] == before  # nothing is lost

    times = tiles_path(tiles, rows[1].slide_id).stat().st_mtime_ns
    assert main([*command, "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert f"warning: {rows[0].slide_id}: its file was replaced" in said
    assert f"{rows[0].slide_id}, {rows[2].slide_id} are the same slide file" in said
    assert tiles_path(tiles, rows[1].slide_id).stat().st_mtime_ns == times
    assert main(embed_command(tiles, bags, RANDOM)) == 0
    assert "the slide file was replaced: 1 bag(s) re-created" in capsys.readouterr().out
    assert torch.equal(read_bag(first).features["x20"], read_bag(third).features["x20"])
    assert [path.read_bytes() for path in (second, third)] == before[1:]


def test_an_extractor_for_each_scale_is_asked_for(road, tmp_path, capsys):
    assert main(embed_command(road.tiles, tmp_path, {"x20": SMALL})) == 2
    assert "give one extractor for each" in capsys.readouterr().err


def test_a_vanished_slide_costs_one_row(road, tmp_path, capsys):
    tiles, slides = tmp_path / "tiles", tmp_path / "slides"
    shutil.copytree(road.tiles, tiles)
    rows = read_cohort(road.cohort)
    shutil.copytree(rows[0].path.parent, slides)
    table = (road.tiles / "cohort.csv").read_text().replace(str(rows[0].path.parent), str(slides))
    (tiles / "cohort.csv").write_text(table)
    (slides / rows[0].path.name).unlink()
    assert main(embed_command(tiles, tmp_path / "bags", RANDOM)) == 1
    found = states(tmp_path / "bags")
    assert found[rows[0].slide_id][0] == "failed"
    assert "no such file" in found[rows[0].slide_id][1]
    assert {state for s, (state, _) in found.items() if s != rows[0].slide_id} == {"done"}
    assert "1 failed" in capsys.readouterr().out.splitlines()[-1]


def chunk_dataset(road, max_roots):
    rows = read_cohort(road.tiles / "cohort.csv")
    tables = [read_tiles(tiles_path(road.tiles, row.slide_id)) for row in rows]
    return ChunkDataset(rows, tables, max_roots)


@pytest.mark.parametrize("world", [1, 3, 40])
def test_processes_share_slides_whole_and_by_tiles(road, tmp_path, world):
    """Whoever has read least so far is the next to ask, as processes of one speed would."""
    dataset = chunk_dataset(road, max_roots=7)
    tiles_of = [
        len(dataset.tables[slide].grid["x10"][start:stop]) for slide, start, stop in dataset.chunks
    ]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(tmp_path)) for _ in range(world)]
        shares = [iter(ClaimingSampler(dataset, w, lambda slide: False)) for w in workers]
        read = [[] for _ in workers]
        loads = dict.fromkeys(range(world), 0)
        while loads:
            rank = min(loads, key=loads.get)
            chunk = next(shares[rank], None)
            if chunk is None or chunk == WAIT:
                del loads[rank]
            else:
                read[rank].append(chunk)
                loads[rank] += tiles_of[chunk]
                if chunk == dataset.chunks_of[dataset.chunks[chunk][0]][-1]:
                    workers[rank].settle(dataset.rows[dataset.chunks[chunk][0]].slide_id, {})
    assert sorted(chunk for share in read for chunk in share) == list(range(len(dataset)))
    slides = [{dataset.chunks[chunk][0] for chunk in share} for share in read]
    assert sum(map(len, slides)) == len(dataset.rows)
    totals = [sum(tiles_of[chunk] for chunk in share) for share in read]
    largest = max(sum(tiles_of[c] for c in chunks) for chunks in dataset.chunks_of)
    assert max(totals) - min(totals) <= largest


@pytest.mark.parametrize("added", [float("nan"), 1e6])
def test_features_that_float16_cannot_hold_are_float32_and_those_not_finite_cost_one_slide(
    few, tmp_path, monkeypatch, added
):
    """Those of the first slide that is read; the others arrive in float16."""
    real, seen = Extractor.forward, []

    def overflowing(self, tiles):
        seen.append(len(tiles))
        return real(self, tiles) + (added if len(seen) == 1 else 0.0)

    monkeypatch.setattr(Extractor, "forward", overflowing)
    code = main(embed_command(few, tmp_path, RANDOM))
    found = states(tmp_path)
    failed = [slide_id for slide_id, (state, _) in found.items() if state == "failed"]
    kinds = [
        features.dtype
        for slide_id in found.keys() - set(failed)
        for features in read_bag(bag_path(tmp_path, slide_id)).features.values()
    ]
    if added == 1e6:
        assert (code, failed, kinds.count(torch.float32)) == (0, [], 1)
    else:
        assert code == 1 and len(failed) == 1 and torch.float32 not in kinds
        assert "features are not finite; embed with --trainer" in found[failed[0]][1]


def test_a_limit_of_one_batch_leaves_the_other_slides_unfinished(road, tmp_path):
    """``limit_predict_batches 1`` is not 1.0, which would be all of them."""
    command = embed_command(road.tiles, tmp_path, RANDOM)
    limit = ["--batch_size", "8", "--trainer.limit_predict_batches", "1"]
    assert main([*command, *limit]) == 1
    assert {state for state, _ in states(tmp_path).values()} == {"waiting"}


def test_the_networks_see_full_batches_of_one_slide(road, few, tmp_path, monkeypatch):
    """Of one scale of one slide all batches but the last are full."""
    real, sizes = Extractor.forward, []
    monkeypatch.setattr(
        Extractor, "forward", lambda self, tiles: sizes.append(len(tiles)) or real(self, tiles)
    )
    assert main([*embed_command(few, tmp_path, RANDOM), "--batch_size", "8"]) == 0
    counts = [
        count
        for slide_id in slide_ids(road)[:FEW]
        for count in read_tiles(tiles_path(road.tiles, slide_id)).num_tiles().values()
    ]
    expected = [size for count in counts for size in [8] * (count // 8) + [count % 8] if size]
    assert max(counts) > 64 and sorted(sizes) == sorted(expected)


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "3"])
def test_workers_change_not_a_byte(road, few, tmp_path, workers):
    command = embed_command(few, tmp_path, road.dino)
    assert main([*command, "--num_workers", workers, "--batch_size", "16"]) == 0
    plain = [*embed_command(few, tmp_path / "plain", road.dino), "--batch_size", "16"]
    assert main(plain) == 0
    for slide_id in slide_ids(road)[:FEW]:
        ours, theirs = (bag_path(bags, slide_id) for bags in (tmp_path, tmp_path / "plain"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_workers_read_neighbours_one_after_the_other(road, tmp_path):
    dataset = chunk_dataset(road, max_roots=3)
    with Worker(tmp_path) as worker:
        turns = list(ClaimingSampler(dataset, worker, lambda slide: False, num_workers=3))
    assert sorted(turns) == list(range(len(dataset)))
    for lane in range(3):
        mine = turns[lane::3][: len(dataset) // 4]
        steps = [after - before for before, after in pairwise(mine)]
        assert steps.count(1) >= len(steps) - len(dataset.rows)


@pytest.mark.slow
def test_lower_precision_gives_nearly_the_same_features_which_never_mix(
    road, few, tmp_path, capsys
):
    command = embed_command(few, tmp_path, road.dino)
    assert main([*command, "--trainer.precision", "bf16-mixed"]) == 0
    for slide_id in slide_ids(road)[:FEW]:
        ours, exact = (read_bag(bag_path(bags, slide_id)) for bags in (tmp_path, road.bags))
        for name, features in exact.features.items():
            found, wanted = ours.features[name].float(), features.float()
            assert not torch.equal(found, wanted)
            assert (found - wanted).norm() < 0.02 * wanted.norm()
    assert main([*command, "--trainer.precision", "32"]) == 2
    assert "x10 features in precision bf16-mixed instead of 32-true" in capsys.readouterr().err
    record = json.loads((tmp_path / "extractors.json").read_text())["x10"]
    assert record["precision"] == "bf16-mixed"


def test_the_speed_is_printed(road, few, tmp_path, capsys):
    assert main(embed_command(few, tmp_path, RANDOM)) == 0
    total = sum(
        sum(read_tiles(tiles_path(road.tiles, slide_id)).num_tiles().values())
        for slide_id in slide_ids(road)[:FEW]
    )
    line = capsys.readouterr().out.splitlines()[-2]
    assert re.fullmatch(
        rf"embed: {total} tiles in [\d.]+ s, \d+ tiles/s; \d+% of it waiting for pixels, "
        "the rest for the network",
        line,
    )


def usual_way(slide, box_px0, side):
    """A tile as most people read it: the best level, then averaged down."""
    left, top, right, bottom = box_px0.tolist()
    handle = slide._handle
    level = handle.get_best_level_for_downsample((right - left) / side * 1.001)
    stored = handle.level_downsamples[level]
    size = round((right - left) / stored), round((bottom - top) / stored)
    rgba = np.array(handle.read_region((left, top), level, size))
    pixels = np.where(rgba[..., 3:] == 0, 255, rgba[..., :3]).astype(np.uint8)  # outside
    shrinks = min(size) >= side
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(pixels, (side, side), interpolation=interpolation)


@pytest.mark.parametrize(
    ("file", "mpp", "interpolated"),
    [
        ("atlas_x20/PDAC-tru-cut_HE3.svs", None, ()),
        ("native/cmu-1-small-region.svs", None, ()),
        # its level for x10 is passed over, because OpenSlide would have to interpolate it
        ("atlas_x20/erosion_HE.tif", 0.5, ("x10",)),
    ],
)
def test_features_are_those_of_the_usual_way(shared_data, file, mpp, interpolated):
    """Grey levels and features against one read_region and one resize of each tile."""
    extractor = load_extractor("random:test_vit", Scale.parse("x20"), 256)
    with Slide(SlideRow("a", shared_data / "slides" / file, mpp=mpp)) as slide:
        mask = slide.thumbnail(32.0).std(axis=2) > 12
        tiles = lay_tiles("a", mask, slide.extent, TilingParameters(("x5", "x10", "x20")))
        pixels = TileCutter(slide, tiles).cut(0, min(6, len(tiles.grid["x5"]))).pixels
        for name, ours in pixels.items():
            ours = ours[:20]
            usual = np.stack(
                [usual_way(slide, box, 256) for box in tiles.boxes_px0(name)[: len(ours)]]
            )
            found, wanted = (
                extractor(torch.from_numpy(np.ascontiguousarray(p)).permute(0, 3, 1, 2))
                for p in (ours, usual)
            )
            grey = np.abs(ours.astype(int) - usual).mean()
            features = ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max()
            assert grey < (10 if name in interpolated else 0.2)
            assert features < (0.02 if name in interpolated else 5e-3)
            neighbours = (wanted[1:] - wanted[:-1]).norm(dim=1) / wanted[1:].norm(dim=1)
            assert neighbours.median() > 3 * features  # an exchanged tile would show


def damaged_copy(road, folder):
    """Tiles of a cohort whose first slide is damaged inside, where its thumbnail is not read."""
    tiles, slides = folder / "tiles", folder / "slides"
    shutil.copytree(road.tiles, tiles)
    rows = read_cohort(road.cohort)
    shutil.copytree(rows[0].path.parent, slides)
    table = (road.tiles / "cohort.csv").read_text().replace(str(rows[0].path.parent), str(slides))
    (tiles / "cohort.csv").write_text(table)
    path = slides / rows[0].path.name
    with tifffile.TiffFile(path) as tiff:
        offsets = tiff.pages[0].dataoffsets
    with open(path, "r+b") as file:
        for offset in offsets[len(offsets) // 2 :]:  # deflate; a change further inside may decode
            file.seek(offset)
            file.write(bytes(2))
    table = tiles_path(tiles, rows[0].slide_id)
    as_tiled = {"slide_digest": sample_digest(path), "slide_state": file_state(path)}
    write_tiles(table, replace(read_tiles(table), **as_tiled))
    return tiles, path, rows[0].slide_id


def test_pixels_that_cannot_be_read_cost_one_row(road, tmp_path):
    """The rest can be read."""
    tiles, path, slide_id = damaged_copy(road, tmp_path)
    assert main([*embed_command(tiles, tmp_path / "bags", RANDOM), "--batch_size", "8"]) == 1
    found = states(tmp_path / "bags")
    state, message = found[slide_id]
    assert state == "failed" and message.startswith(f"{path}: its x")
    assert " (level-0 pixels) cannot be read: " in message
    assert "--max_damaged_tiles 0 allows 0" in message
    assert {state for s, (state, _) in found.items() if s != slide_id} == {"done"}
    assert not bag_path(tmp_path / "bags", slide_id).exists()


@pytest.mark.slow
def test_damaged_tiles_may_be_left_out_and_are_counted(road, tmp_path, capsys):
    """All others have the features that they have without damage, to the last bit."""
    tiles, path, slide_id = damaged_copy(road, tmp_path)
    command = [*embed_command(tiles, tmp_path / "bags", RANDOM), "--batch_size", "8"]
    sound = [*embed_command(road.tiles, tmp_path / "sound", RANDOM), "--batch_size", "8"]
    assert main(sound) == main([*command, "--max_damaged_tiles", "0.9"]) == 0
    whole, bag = (read_bag(bag_path(tmp_path / f, slide_id)) for f in ("sound", "bags"))
    lost = whole.num_tiles()["x20"] - bag.num_tiles()["x20"]
    assert 0 < lost == bag.header.num_damaged < whole.num_tiles()["x20"]
    for scale in bag.scales:
        cells = {tuple(cell): row for row, cell in enumerate(whole.grid[scale].tolist())}
        rows = [cells[tuple(cell)] for cell in bag.grid[scale].tolist()]
        assert torch.equal(bag.features[scale], whole.features[scale][rows])
    assert states(tmp_path / "bags")[slide_id][0] == "done"
    assert (
        f"{lost} damaged tiles left out; the first: {path}: its x"
        in (states(tmp_path / "bags")[slide_id][1])
    )
    with open(tmp_path / "bags" / "status.csv", newline="") as file:
        counts = {row["slide_id"]: row["damaged"] for row in csv.DictReader(file)}
    assert counts.pop(slide_id) == str(lost) and set(counts.values()) == {"0"}

    assert describe_bag(bag_path(tmp_path / "bags", slide_id))["damaged"] == lost
    with Worker(tmp_path / "bags") as worker:  # as if it had been killed before it said so
        worker.note(slide_id, {"state": "failed", "message": "no such file", "damaged": 0})
    before = bag_path(tmp_path / "bags", slide_id).stat().st_mtime_ns
    assert main([*command, "--max_damaged_tiles", "0.9"]) == 0  # it is done
    assert bag_path(tmp_path / "bags", slide_id).stat().st_mtime_ns == before
    assert states(tmp_path / "bags")[slide_id] == ("done", f"{lost} damaged tiles left out")
    capsys.readouterr()
    assert main(command) == 1
    assert (
        "more damaged tiles are left out than max_damaged_tiles allows" in capsys.readouterr().out
    )
    assert states(tmp_path / "bags")[slide_id][0] == "failed"


def test_a_slide_without_tiles_gets_an_empty_bag(road, tmp_path):
    tiles = tmp_path / "tiles"
    shutil.copytree(road.tiles, tiles)
    path = tiles_path(tiles, slide_ids(road)[0])
    table = read_tiles(path)
    grid = {name: places[:0] for name, places in table.grid.items()}
    parent = {name: rows[:0] for name, rows in table.parent.items()}
    write_tiles(path, replace(table, grid=grid, parent=parent))
    assert main(embed_command(tiles, tmp_path / "bags", RANDOM)) == 0
    bag = read_bag(bag_path(tmp_path / "bags", table.slide_id))
    assert set(bag.num_tiles().values()) == {0}


def test_a_slide_that_is_tiled_later_is_embedded_by_the_next_run(road, tmp_path, capsys):
    tiles, bags = tmp_path / "tiles", tmp_path / "bags"
    shutil.copytree(road.tiles, tiles)
    slide_id = slide_ids(road)[0]
    away = tiles_path(tiles, slide_id).rename(tmp_path / "away")
    args = embed_command(tiles, bags, RANDOM)
    assert main(args) == 0
    assert states(bags)[slide_id][0] == "not tiled"
    shutil.copy(away, tiles_path(tiles, slide_id))
    assert main(args) == 0
    assert states(bags)[slide_id] == ("done", "")
    assert bag_path(bags, slide_id).exists()

    tiles_path(tiles, slide_id).write_bytes(b"cut off")
    assert main(args) == 0
    assert states(bags)[slide_id][0] == "not tiled"
    shutil.copy(away, tiles_path(tiles, slide_id))
    time = bag_path(bags, slide_id).stat().st_mtime_ns
    assert main(args) == 0
    assert bag_path(bags, slide_id).stat().st_mtime_ns == time
    assert states(bags)[slide_id] == ("done", "")


def test_a_bag_counts_if_its_worker_was_killed_before_it_reported(road, tmp_path):
    bags = tmp_path / "bags"
    shutil.copytree(road.bags, bags)
    slide_id = slide_ids(road)[0]
    with Worker(bags) as worker:
        worker.note(slide_id, {"state": "failed", "message": "no such file"})
    assert main(embed_command(road.tiles, bags, road.dino)) == 0
    assert states(bags)[slide_id] == ("done", "")


class SleepingSlide(Slide):
    """Takes for ever to open."""

    def __init__(self, row, cache_bytes):
        if row.slide_id == DEADLY:
            time.sleep(1000)
        super().__init__(row, cache_bytes)


@pytest.mark.slow
def test_endless_reading_ends_and_the_awaited_slide_is_named(road, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dasmil.embedding.dataset.Slide", SleepingSlide)
    monkeypatch.setattr("dasmil.progress.SILENCE_S", 0.3)
    args = embed_command(road.tiles, tmp_path, RANDOM)
    args[args.index("--num_workers") + 1] = "1"
    assert main([*args, "--read_timeout", "2"]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"nothing for 1 s; waiting for pixels of .*{DEADLY}", error)
    assert "a reading process was killed while it read one of " in error
    assert "or more than read_timeout (2 s); run the same command again" in error
    assert states(tmp_path)[DEADLY][0] == "failed"


class DeadlyDataset(ChunkDataset):
    def __getitem__(self, index):
        if index >= 0 and self.rows[self.chunks[index][0]].slide_id == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


DEADLY = "demo_000"


@pytest.mark.slow
def test_a_slide_that_kills_its_reading_process_is_the_last_of_the_next_run(
    road, tmp_path, monkeypatch, capsys
):
    assert DEADLY in slide_ids(road)
    monkeypatch.setattr("dasmil.embedding.embed.ChunkDataset", DeadlyDataset)
    monkeypatch.setattr("dasmil.embedding.dataset.WAIT_S", 0.02)
    args = embed_command(road.tiles, tmp_path, RANDOM)
    args[args.index("--num_workers") + 1] = "2"
    assert main(args) == 2
    assert "a reading process was killed while it read one of " in capsys.readouterr().err
    found = states(tmp_path)
    assert found[DEADLY][0] == "failed" and DEADLY in found[DEADLY][1]
    for _ in range(2):
        assert main(args) == 2
        error = capsys.readouterr().err
        assert f"was killed while it read one of {DEADLY}: too little memory" in error
    # the second run knows which one it was, so that the third one reads all others before it
    done = {slide_id for slide_id, (state, _) in states(tmp_path).items() if state == "done"}
    assert done == set(slide_ids(road)) - {DEADLY}
    monkeypatch.undo()
    assert main(args) == 0
    assert states(tmp_path)[DEADLY] == ("done", "")
