import csv
import json
import shutil

import numpy as np
import pytest
import torch
from road import NUM_SLIDES, embed_command

from dasmil.bags import bag_path, read_bag
from dasmil.cli import main
from dasmil.embedding.dataset import ChunkDataset, WholeSlideSampler, read_tile_pixels
from dasmil.embedding.extractor import Extractor, load_extractor
from dasmil.slides.cohort import read_cohort
from dasmil.slides.reader import Slide
from dasmil.slides.tile import tiles_path
from dasmil.slides.tiling import read_tiles
from dasmil.units import Scale

RANDOM = {"x10": "random:test_vit", "x20": "random:test_vit"}


def slide_ids(road):
    return [row.slide_id for row in read_cohort(road.cohort)]


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
    for slide_id in slide_ids(road):
        bag = read_bag(bag_path(road.bags, slide_id))
        assert bag.num_tiles() == read_tiles(tiles_path(road.tiles, slide_id)).num_tiles()


def test_features_are_those_of_each_tile_read_by_hand(road):
    """Each row of a bag belongs to the tile of that row, at every scale."""
    row = read_cohort(road.bags / "cohort.csv")[0]
    bag = read_bag(bag_path(road.bags, row.slide_id))
    for scale in bag.header.scales:
        extractor = load_extractor(str(road.dino[scale.name]), Scale.parse(scale.name), 32)
        with Slide(row) as slide:
            pixels = read_tile_pixels(slide, bag.boxes_px0(scale.name).numpy(), 32)
        expected = extractor(pixels)
        assert torch.allclose(bag.features[scale.name].float(), expected, atol=2e-3, rtol=2e-3)
        assert expected.std(0).mean() > 1e-4  # rows differ, so an exchanged row would show


def test_extractors_remember_the_slides_they_saw(road):
    record = json.loads((road.bags / "extractors.json").read_text())["x20"]
    train = {row.slide_id for row in read_cohort(road.cohort) if row.split == "train"}
    assert set(record["trained_on"]) == train


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
    assert states(bags)[others[0]] == ("done", "embedded before")
    assert "0 failed" in capsys.readouterr().out


def test_other_extractors_never_mix_in(road, capsys):
    before = {s: bag_path(road.bags, s).read_bytes() for s in slide_ids(road)}
    assert main(embed_command(road.tiles, road.bags, RANDOM)) == 2
    assert "made with other tiles or extractors" in capsys.readouterr().err
    assert {s: bag_path(road.bags, s).read_bytes() for s in slide_ids(road)} == before


def test_an_extractor_for_each_scale_is_asked_for(road, tmp_path, capsys):
    assert main(embed_command(road.tiles, tmp_path, {"x20": "random:test_vit"})) == 2
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


@pytest.mark.parametrize("world", [1, 2, 3, 40])
def test_processes_share_slides_whole_and_evenly(road, world):
    rows = read_cohort(road.tiles / "cohort.csv")
    dataset = ChunkDataset(rows, road.tiles, chunk_size=7)
    shares = [list(WholeSlideSampler(dataset, world, rank)) for rank in range(world)]
    assert sorted(chunk for share in shares for chunk in share) == list(range(len(dataset)))
    slides = [{dataset.chunks[chunk][0] for chunk in share} for share in shares]
    assert sum(map(len, slides)) == len(rows)
    loads = [sum(dataset.num_tiles[slide] for slide in share) for share in slides]
    assert max(loads) - min(loads) <= max(dataset.num_tiles)


def test_features_that_are_not_finite_cost_one_slide(road, tmp_path, monkeypatch):
    """The first slide that is read gives infinity in float16; the others arrive."""
    real, seen = Extractor.forward, []

    def overflowing(self, tiles):
        seen.append(len(tiles))
        return real(self, tiles) + (1e6 if len(seen) == 1 else 0.0)

    monkeypatch.setattr(Extractor, "forward", overflowing)
    assert main(embed_command(road.tiles, tmp_path, RANDOM)) == 1
    found = states(tmp_path)
    failed = [slide_id for slide_id, (state, _) in found.items() if state == "failed"]
    assert len(failed) == 1 and "not finite" in found[failed[0]][1]


def test_one_batch_is_one_and_what_was_not_reached_says_so(road, tmp_path):
    """``limit_predict_batches 1`` is not 1.0, which would be all of them."""
    command = embed_command(road.tiles, tmp_path, RANDOM)
    assert main([*command, "--trainer.limit_predict_batches", "1"]) == 1
    assert {state for state, _ in states(tmp_path).values()} == {"failed"}
    assert {message for _, message in states(tmp_path).values()} == {"not reached; run embed again"}
