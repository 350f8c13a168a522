"""Even draws of tiles over slides, and the slides and pixels that self-supervision sees."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bag_factory import CLASSES, write_bags, write_cohort_csv
from jpegs import damage, write_jpeg_pyramid
from lightning.pytorch import Trainer
from PIL import Image

from dasmil.data import BagDataModule, SplitOptions, TileDataModule, ViewOptions
from dasmil.data.tiles import EvenSlideSampler, TileDataset
from dasmil.data.views import PilViews, TensorViews
from dasmil.errors import InputError
from dasmil.geometry import Extent, Tiles
from dasmil.slides.cohort import SlideRow
from dasmil.slides.digest import file_state, sample_digest
from dasmil.slides.tile_table import read_tiles, tiles_path, write_tiles
from dasmil.units import Mpp, TilePx, parse_scales

Draw = tuple[int, int]  # number of the slide, row of the tile


def draw(
    sizes: list[int], num_samples: int, world: int = 1, rank: int = 0, seed: int = 0, epoch: int = 0
) -> list[Draw]:
    sampler = EvenSlideSampler(sizes, num_samples, world, rank, seed)
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    assert len(drawn) == len(sampler)
    return [(number, row) for number, row, _ in drawn]


@pytest.mark.parametrize("num_samples", [1, 3, 12, 50, 101])
def test_every_slide_gives_as_many_tiles_however_many_it_has(num_samples: int) -> None:
    drawn = draw([1, 7, 1000, 20], num_samples)
    assert len(drawn) == num_samples
    counts = Counter(number for number, _ in drawn)
    assert max(counts.values()) - min(counts[n] for n in range(4)) <= 1


def test_tiles_exist() -> None:
    sizes = [1, 7, 30]
    assert all(0 <= row < sizes[number] for number, row in draw(sizes, 200))


def test_no_tile_comes_again_before_its_slide_is_exhausted() -> None:
    sizes = [1, 4, 9, 60]
    drawn = draw(sizes, 4 * 40)
    for number, size in enumerate(sizes):
        rows = [row for slide, row in drawn if slide == number]
        for start in range(0, len(rows), size):
            turn = rows[start : start + size]
            assert len(set(turn)) == len(turn)
        assert set(rows[:size]) == set(range(size)) or size > len(rows)


def test_slides_take_turns() -> None:
    drawn = draw([5, 50, 500], 30)
    turns = [drawn[start : start + 3] for start in range(0, 30, 3)]
    assert all({number for number, _ in turn} == {0, 1, 2} for turn in turns)


def test_the_epoch_and_the_seed_decide() -> None:
    sizes = [30, 40]
    first = draw(sizes, 40)
    assert draw(sizes, 40) == first
    assert draw(sizes, 40, epoch=1) != first
    assert draw(sizes, 40, seed=1) != first
    assert draw(sizes, 40, seed=1) != draw(sizes, 40, epoch=1)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_what_one_process_would_draw(world: int) -> None:
    sizes, num_samples = [40, 50, 60], 48
    whole = draw(sizes, num_samples, epoch=2)
    shares = [draw(sizes, num_samples, world, rank, epoch=2) for rank in range(world)]
    assert len(set(whole)) == len(whole)
    assert {len(share) for share in shares} == {num_samples // world}
    assert Counter(tile for share in shares for tile in share) == Counter(whole)


def test_processes_get_as_many_when_the_draws_do_not_divide() -> None:
    whole = draw([40, 50], 11)
    shares = [draw([40, 50], 11, world=3, rank=rank) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 3, 3]
    assert Counter(tile for share in shares for tile in share) == Counter(whole[:9])


@pytest.mark.parametrize("world", [1, 2])
def test_the_seed_of_a_tile_s_views_depends_on_its_place_in_the_epoch_alone(world: int) -> None:
    whole = EvenSlideSampler([40, 50], 20, 1, 0, seed=3)
    whole.set_epoch(5)
    items = list(whole)
    for rank in range(world):
        share = EvenSlideSampler([40, 50], 20, world, rank, seed=3)
        share.set_epoch(5)
        assert list(share) == items[rank::world]
    whole.set_epoch(6)
    assert not {seed for *_, seed in whole} & {seed for *_, seed in items}


# TileDataModule


def write_tile_table(
    folder: Path, slide_id: str, num_tiles: int, scales: tuple[str, ...] = ("x10", "x20")
) -> None:
    """A row of coarse tiles, each with the child in its upper left corner."""
    parsed = parse_scales(scales)
    columns = np.arange(num_tiles, dtype=np.int32)
    rows = np.zeros(num_tiles, dtype=np.int32)
    factors = [round(scale.mpp / parsed[-1].mpp) for scale in parsed]
    grid = {
        scale.name: np.stack([rows, columns * (factors[0] // factor)], axis=1).astype(np.int32)
        for scale, factor in zip(parsed, factors, strict=True)
    }
    write_tiles(
        tiles_path(folder, slide_id),
        Tiles(
            slide_id=slide_id,
            extent=Extent((1000, 1000), Mpp(0.5)),
            scales=parsed,
            tile_px=TilePx(8),
            grid=grid,
            parent={fine.name: columns for _, fine in pairwise(parsed)},
        ),
    )


def write_tables(
    folder: Path,
    labels: dict[str, str | None],
    split: dict[str, str] | None = None,
    num_tiles: int = 5,
) -> Path:
    for number, slide_id in enumerate(labels):
        (folder / "tiles").mkdir(parents=True, exist_ok=True)
        write_tile_table(folder, slide_id, num_tiles + number)
    write_cohort_csv(folder / "cohort.csv", labels, split)
    return folder


def make_data(folder: Path, scale: str = "x20", **arguments: object) -> TileDataModule:
    data = TileDataModule(folder, scale, **{"num_workers": 0, **arguments})  # type: ignore[arg-type]
    data.setup("fit")
    return data


def ids(data: TileDataModule) -> list[str]:
    return [row.slide_id for row in data.rows]


LABELS: dict[str, str | None] = {"a": "normal", "b": "tumour", "c": "normal", "d": "tumour"}
SPLIT = {"a": "train", "b": "val", "c": "test", "d": "train"}


def test_training_slides_alone_are_seen(tmp_path: Path) -> None:
    data = make_data(write_tables(tmp_path, LABELS, SPLIT))
    assert ids(data) == ["a", "d"]
    assert [len(boxes) for boxes in data.boxes_px0] == [5, 8]
    with pytest.raises(InputError, match=r"13 tiles per epoch .* do not fill one batch of 64"):
        data.train_dataloader()


def test_slides_without_label_are_seen_unless_the_table_holds_them_out(tmp_path: Path) -> None:
    labels = {**LABELS, "e": None, "f": None, "g": None}
    split = {**SPLIT, "f": "test", "g": "train"}
    assert ids(make_data(write_tables(tmp_path, labels, split))) == ["a", "d", "e", "g"]


def test_a_drawn_split_is_the_one_that_the_bags_are_trained_on(tmp_path: Path) -> None:
    """Stratified over 10 slides a class: 2 for testing, 1 for validation, 7 seen."""
    labels: dict[str, str | None] = {f"{c}{n}": CLASSES[c == "t"] for n in range(10) for c in "nt"}
    folder, bags = write_tables(tmp_path / "tiles", labels), write_bags(tmp_path / "bags", labels)
    for seed in range(2):
        seen = ids(make_data(folder, split=SplitOptions(seed=seed)))
        assert Counter(slide_id[0] for slide_id in seen) == {"n": 7, "t": 7}
        trained = BagDataModule(bags, CLASSES, split=SplitOptions(seed=seed))
        trained.setup("fit")
        assert seen == [row.slide_id for row in trained.rows_of("train")]


@pytest.mark.parametrize("fold", [0, 2])
def test_a_fold_holds_out_the_same_slides_from_extractor_and_model(
    tmp_path: Path, fold: int
) -> None:
    labels: dict[str, str | None] = {f"{c}{n}": CLASSES[c == "t"] for n in range(9) for c in "nt"}
    folder, bags = write_tables(tmp_path / "tiles", labels), write_bags(tmp_path / "bags", labels)
    seen = ids(make_data(folder, split=SplitOptions(num_folds=3, fold=fold)))
    trained = BagDataModule(bags, CLASSES, split=SplitOptions(num_folds=3, fold=fold))
    trained.setup("fit")
    assert seen == [row.slide_id for row in trained.rows_of("train")]
    assert len(trained.rows_of("test")) == 6


def test_a_split_table_decides_also_for_slides_without_label(tmp_path: Path) -> None:
    """What is not in it is not seen: an official list leaves out duplicates of test slides."""
    folder = write_tables(tmp_path, {**LABELS, "e": None, "f": None, "g": None})
    parts = {**SPLIT, "e": "train", "f": "test"}
    table = tmp_path / "list.csv"
    table.write_text("\n".join(["slide_id,split", *(f"{s},{p}" for s, p in parts.items())]))
    with pytest.warns(UserWarning, match=r"does not name 1 slide\(s\) .*: g"):
        data = make_data(folder, split=SplitOptions(table=str(table)))
    assert ids(data) == ["a", "d", "e"]


def test_the_boxes_are_those_of_the_scale(tmp_path: Path) -> None:
    """8 px at x20 on a slide of 0.5 µm/px are 8 level-0 pixels, at x10 they are 16."""
    folder = write_tables(tmp_path, {"a": None})
    fine, coarse = make_data(folder, "x20"), make_data(folder, "x10")
    assert fine.boxes_px0[0][3].tolist() == [48, 0, 56, 8]
    assert coarse.boxes_px0[0][3].tolist() == [48, 0, 64, 16]
    assert (fine.tile_px, fine.mpp, coarse.mpp) == (8, 0.5, 1.0)


def test_a_scale_that_was_not_tiled_is_refused(tmp_path: Path) -> None:
    folder = write_tables(tmp_path, LABELS, SPLIT)
    with pytest.raises(InputError, match=r"data\.scale 'x5': .* holds x10, x20"):
        make_data(folder, "x5")


def test_slides_without_tiles_are_left_out(tmp_path: Path) -> None:
    folder = write_tables(tmp_path, LABELS, SPLIT)
    write_tile_table(folder, "a", 0)
    assert ids(make_data(folder)) == ["d"]


def test_a_slide_file_that_has_changed_since_it_was_tiled_is_refused(tmp_path: Path) -> None:
    folder, slide = write_tables(tmp_path, LABELS, SPLIT), tmp_path / "a.svs"
    slide.write_bytes(b"as tiled")
    tiled = read_tiles(tiles_path(folder, "a"))
    known = {"slide_digest": sample_digest(slide), "slide_state": file_state(slide)}
    write_tiles(tiles_path(folder, "a"), replace(tiled, **known))
    assert ids(make_data(folder)) == ["a", "d"]
    slide.write_bytes(b"replaced")
    with pytest.raises(InputError, match=r"a\.svs: the slide file has changed .* run tile again"):
        make_data(folder)


def test_no_training_slide_with_tiles_is_refused(tmp_path: Path) -> None:
    folder = write_tables(tmp_path, LABELS, SPLIT)
    write_tile_table(folder, "a", 0)
    tiles_path(folder, "d").unlink()
    with pytest.raises(InputError, match=r"no training slide has tiles; see its status\.csv"):
        make_data(folder)


@pytest.fixture
def picture(tmp_path: Path) -> SlideRow:
    """A slide of 8 x 4 squares of 8 pixels, each with a colour of its own."""
    row, column = np.mgrid[0:32, 0:64] // 8
    pixels = np.stack([row * 60, column * 30, np.full_like(row, 77)], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return SlideRow("a", tmp_path / "a.png", mpp=0.5)


def test_a_tile_is_read_at_its_place(picture: SlideRow) -> None:
    boxes = np.array([[0, 0, 8, 8], [40, 16, 48, 24]])
    dataset = TileDataset([picture, picture], [boxes[:1], boxes], 8, lambda *item: item)
    assert len(dataset) == 3
    for index, colour in (((0, 0), (0, 0, 77)), ((1, 0), (0, 0, 77)), ((1, 1), (120, 150, 77))):
        pixels, seed = dataset[*index, 5]
        assert (pixels.shape, seed) == ((8, 8, 3), 5)
        assert np.array_equal(np.unique(pixels.reshape(-1, 3), axis=0), [colour])


def test_in_the_place_of_a_damaged_tile_comes_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    write_jpeg_pyramid(path, 512, 128, (1,))  # four JPEGs
    boxes = np.array([[left, 0, left + 64, 64] for left in (0, 128, 256, 384)])
    rows = [SlideRow("a", path)]
    sound = TileDataset(rows, [boxes], 64, lambda *item: item[0])
    expected = [sound[0, row, 0] for row in range(4)]
    damage(path, 1, 3)
    with pytest.warns(UserWarning, match="cannot be read: .*; other tiles of the slide") as said:
        dataset = TileDataset(rows, [boxes], 64, lambda *item: item[0])
        found = [dataset[0, row, 0] for row in range(4)]
    assert len(said) == 1
    np.testing.assert_array_equal(found, [expected[row] for row in (0, 2, 2, 0)])
    damage(path, 0, 2)
    with pytest.warns(UserWarning), pytest.raises(InputError, match="none of its tiles"):
        TileDataset(rows, [boxes], 64, lambda *item: item[0])[0, 0, 0]


SMALL_VIEWS: dict[str, Any] = {"global_crop_px": 16, "local_crop_px": 8, "num_local_crops": 1}


def one_slide(folder: Path) -> Path:
    write_tables(folder, {"a": None}, num_tiles=4)
    (folder / "cohort.csv").write_text("slide_id,path,mpp\na,a.png,0.5\n")
    return folder


@pytest.mark.parametrize("backend", ["tensor", "pil"])
def test_a_batch_holds_every_view_of_as_many_tiles(
    tmp_path: Path, picture: SlideRow, backend: str
) -> None:
    views = SMALL_VIEWS | {"num_local_crops": 3, "augmentation_backend": backend}
    options = {"batch_size": 2, "tiles_per_epoch": 5, "views": ViewOptions(**views)}
    batches = list(make_data(one_slide(tmp_path), **options).train_dataloader())
    assert len(batches) == 2
    for views in batches:
        assert [tuple(view.shape) for view in views] == [(2, 3, 16, 16)] * 2 + [(2, 3, 8, 8)] * 3


@pytest.mark.parametrize(("num_workers", "backend"), [(2, "tensor"), (1, "pil")])
def test_views_do_not_depend_on_who_reads_them(
    tmp_path: Path, picture: SlideRow, num_workers: int, backend: str
) -> None:
    folder = one_slide(tmp_path)
    options = ViewOptions(**SMALL_VIEWS, augmentation_backend=backend)

    def views(workers: int, seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)  # must not matter
        more = {"batch_size": 2, "tiles_per_epoch": 4, "num_workers": workers}
        data = make_data(folder, views=options, **more)
        return [view for batch in data.train_dataloader() for view in batch]

    for one, other in zip(views(0, 0), views(num_workers, 1), strict=True):
        assert torch.equal(one, other)


def test_for_a_gpu_the_views_are_made_after_the_tiles_have_moved(
    tmp_path: Path, picture: SlideRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are those that the reading processes would have made, but for rounding."""
    options = {"batch_size": 4, "tiles_per_epoch": 4, "views": ViewOptions(global_crop_px=16)}
    data = make_data(one_slide(tmp_path), **options)
    (here,) = data.train_dataloader()
    monkeypatch.setattr(TileDataModule, "_is_on_gpu", True)
    (drawn,) = data.train_dataloader()
    assert (drawn.tiles.shape, drawn.tiles.dtype) == ((4, 3, 8, 8), torch.uint8)
    moved = data.transfer_batch_to_device(drawn, torch.device("meta"), 0)
    assert moved.tiles.is_meta and moved.numbers.is_meta and moved.values.is_meta
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    there = data.on_after_batch_transfer(drawn, 0)
    assert [view.shape for view in there] == [view.shape for view in here]
    for one, other in zip(here, there, strict=True):
        assert (one - other).abs().mean() < 2 / 255 / min(data.std)


@pytest.mark.parametrize("is_on_gpu", [False, True])
def test_tiles_are_pinned_only_for_a_training_on_the_gpu(
    tmp_path: Path, picture: SlideRow, monkeypatch: pytest.MonkeyPatch, is_on_gpu: bool
) -> None:
    """On the CPU of a machine with a GPU, pinning would open a context there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(TileDataModule, "_is_on_gpu", is_on_gpu)
    data = make_data(one_slide(tmp_path), batch_size=2)
    assert data.train_dataloader().pin_memory is is_on_gpu


def test_views_that_are_ready_pass_through(tmp_path: Path) -> None:
    data = make_data(write_tables(tmp_path, {"a": None}))
    views = [torch.ones(2, 3, 8, 8)]
    moved = data.transfer_batch_to_device(views, torch.device("cpu"), 0)
    assert data.on_after_batch_transfer(moved, 0) is moved
    assert torch.equal(moved[0], views[0])


@pytest.mark.parametrize(
    ("augmentation", "words"),
    [
        (
            {"rr_prob": 0.5, "rr_degrees": 30},
            r"only PIL turns .*augmentation_backend to pil",
        ),
        ({"blur": 0.5}, r"DINOTransform refuses it: .*unexpected keyword argument 'blur'"),
        ({"cj_hue": 2.0}, r"DINOTransform refuses it: .*hue"),
        ({"gaussian_blur": [1.0]}, r"DINOTransform refuses it: .*index"),
        ({"normalize": None}, r"DINOTransform refuses it: .*'normalize'"),
    ],
)
def test_augmentation_that_cannot_be_done_is_refused(
    tmp_path: Path, augmentation: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=r"^data\.views\.augmentation\S* (lightly's )?" + words):
        TileDataModule(tmp_path, "x20", views=ViewOptions(augmentation=augmentation))


def test_operations_that_only_pil_has_are_left_to_pil(tmp_path: Path) -> None:
    turned = {"rr_prob": 0.5, "rr_degrees": 30}
    views = ViewOptions(augmentation=turned, augmentation_backend="pil")
    assert isinstance(TileDataModule(tmp_path, "x20", views=views).views, PilViews)
    views = ViewOptions(augmentation={**turned, "rr_prob": 0.0})
    data = TileDataModule(tmp_path, "x20", views=views)
    assert isinstance(data.views, TensorViews)
