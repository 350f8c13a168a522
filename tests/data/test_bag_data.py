"""Which slides BagDataModule puts into which part, and what it refuses."""

import csv
import json
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bag_factory import CLASSES, make_bag, make_card, trainer_of, write_bags
from bags.hollow import write_hollow
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from models import make_module
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from dasmil.bags import BagGraph, bag_graph, bag_path, join_graphs, read_bag, write_bag
from dasmil.bags.store import graph_bytes, step_bytes
from dasmil.data import BagDataModule, SplitOptions
from dasmil.data.bag_dataset import UnreadBag, join_features_there
from dasmil.errors import InputError
from dasmil.modules import MILModule
from dasmil.slides.splits import SPLIT_COLUMNS
from dasmil.slides.study import SlideRecord, plain_records
from dasmil.tables import write_csv

SPLIT = {
    "n0": "train",
    "t0": "train",
    "n1": "train",
    "n2": "val",
    "t2": "val",
    "n3": "test",
    "t3": "test",
    "t1": "train",
}
LABELS: dict[str, str | None] = {s: CLASSES[s.startswith("t")] for s in SPLIT}


def make_data(folder: Path, stage: str = "fit", **arguments: Any) -> BagDataModule:
    data = BagDataModule(folder, **{"classes": CLASSES, "num_workers": 0, **arguments})
    data.setup(stage)
    return data


def ids(data: BagDataModule, part: str) -> list[str]:
    return [row.slide_id for row in data.rows_of(part)]


def seen(loader: DataLoader[BagGraph]) -> list[str]:
    return [slide_id for graph in loader for slide_id in graph.slide_ids]


def many(count: int) -> dict[str, str | None]:
    """As many normal as tumour slides, n00, t00, n01, ..."""
    return {f"{c}{n:02}": CLASSES[c == "t"] for n in range(count // 2) for c in "nt"}


# Parts


def test_the_split_column_is_obeyed(tmp_path: Path) -> None:
    data = make_data(write_bags(tmp_path, LABELS, SPLIT))
    assert data.splits == SPLIT
    for part in ("train", "val", "test"):
        assert ids(data, part) == [s for s, given in SPLIT.items() if given == part]


def test_loaders_give_the_slides_of_their_part_with_their_labels(tmp_path: Path) -> None:
    data = make_data(write_bags(tmp_path, LABELS, SPLIT), batch_size=3)
    assert sorted(seen(data.train_dataloader())) == ["n0", "n1", "t0", "t1"]
    assert seen(data.val_dataloader()) == ["n2", "t2"]
    assert seen(data.test_dataloader()) == ["n3", "t3"]
    assert seen(data.predict_dataloader()) == list(SPLIT)
    for loader in (data.train_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        for graph in loader:
            expected = [int(s.startswith("t")) for s in graph.slide_ids]
            assert graph.labels.tolist() == expected


def test_a_batch_holds_the_bags_as_they_lie_on_disk(tmp_path: Path) -> None:
    data = make_data(write_bags(tmp_path, LABELS, SPLIT), batch_size=4)
    (batch,) = data.train_dataloader()
    graphs = [bag_graph(read_bag(bag_path(tmp_path, slide_id))) for slide_id in batch.slide_ids]
    assert sorted(batch.slide_ids) == ["n0", "n1", "t0", "t1"]
    for scale in ("x10", "x20"):
        expected = torch.cat([graph.features[scale] for graph in graphs])
        assert torch.equal(batch.features[scale], expected)


def test_the_order_of_the_classes_is_the_callers(tmp_path: Path) -> None:
    data = make_data(write_bags(tmp_path, LABELS, SPLIT), classes=CLASSES[::-1])
    (n3, t3) = data.test_dataloader()
    assert (n3.labels.item(), t3.labels.item()) == (1, 0)


def test_training_is_shuffled_in_each_epoch(tmp_path: Path) -> None:
    loader = make_data(
        write_bags(tmp_path, many(20)), split=SplitOptions(0.2, 0.2)
    ).train_dataloader()
    orders = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        orders.append(seen(loader))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_a_drawn_split_is_stratified(tmp_path: Path) -> None:
    """Of 10 slides a class 2 are for testing (20 %), and of the other 8 one for validation."""
    data = make_data(write_bags(tmp_path, many(20)))
    for part, count in (("train", 7), ("val", 1), ("test", 2)):
        letters = Counter(slide_id[0] for slide_id in ids(data, part))
        assert letters == {"n": count, "t": count}


def test_a_drawn_split_depends_on_the_seed_and_not_on_the_order_of_the_rows(tmp_path: Path) -> None:
    labels = many(20)
    forth = write_bags(tmp_path / "forth", labels)
    back = write_bags(tmp_path / "back", dict(reversed(labels.items())))
    drawn = make_data(forth).splits
    assert make_data(forth).splits == drawn
    assert make_data(back).splits == drawn
    assert make_data(forth, split=SplitOptions(seed=1)).splits != drawn


def test_a_drawn_split_keeps_a_patients_slides_together(tmp_path: Path) -> None:
    labels = many(24)
    patients = {s: f"{s[0]}-{int(s[1:]) // 2}" for s in labels}
    data = make_data(write_bags(tmp_path, labels, patients=patients), split=SplitOptions(0.25))
    assert set(data.splits.values()) == {"train", "val", "test"}
    for patient in set(patients.values()):
        assert len({data.splits[s] for s in labels if patients[s] == patient}) == 1


def test_a_table_with_test_slides_only_gives_up_some_training_slides(tmp_path: Path) -> None:
    labels = many(20)
    split = {s: "test" if int(s[1:]) < 3 else "train" for s in labels}
    data = make_data(write_bags(tmp_path, labels, split))
    assert ids(data, "test") == [s for s, part in split.items() if part == "test"]
    assert Counter(s[0] for s in ids(data, "val")) == {"n": 1, "t": 1}


def test_slides_without_label_are_predicted_and_nothing_else(tmp_path: Path) -> None:
    folder = write_bags(tmp_path, {**LABELS, "u": None}, SPLIT)
    data = make_data(folder)
    assert "u" not in data.splits
    last = list(data.predict_dataloader())[-1]
    assert (last.slide_ids, last.labels.tolist()) == (("u",), [-1])
    assert "u" not in [s for part in ("train", "val", "test") for s in ids(data, part)]


def test_predicting_needs_no_label_at_all(tmp_path: Path) -> None:
    data = make_data(write_bags(tmp_path, {"a": None, "b": None}), "predict")
    assert seen(data.predict_dataloader()) == ["a", "b"]


def trainer(world: int = 1, rank: int = 0, accumulated: int = 1, device: str = "cpu") -> Any:
    """As much of a trainer as decides which slides come when."""
    none = SimpleNamespace(processed=0, started=0)
    progress = SimpleNamespace(is_last_batch=False, current=none, total=none)
    epoch_loop = SimpleNamespace(batch_progress=progress)
    fit_loop = SimpleNamespace(epoch_loop=epoch_loop, epoch_progress=progress)
    return SimpleNamespace(
        world_size=world,
        global_rank=rank,
        accumulate_grad_batches=accumulated,
        strategy=SimpleNamespace(root_device=torch.device(device)),
        num_devices=world,
        fit_loop=fit_loop,
    )


def test_processes_share_a_part(tmp_path: Path) -> None:
    """Two processes: each slide once in training, and as many batches for each."""
    data = make_data(write_bags(tmp_path, LABELS, SPLIT))
    shares = []
    for rank in range(2):
        data.trainer = trainer(2, rank)
        shares.append(seen(data.train_dataloader()))
    assert [len(share) for share in shares] == [2, 2]
    assert sorted(shares[0] + shares[1]) == ["n0", "n1", "t0", "t1"]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_processes_see_in_a_step_what_one_process_accumulates(
    tmp_path: Path, batch_size: int
) -> None:
    """Also where the slides do not divide: 5 slides, two processes or two batches a step."""
    labels = {name: LABELS[name] for name in ("n0", "n1", "t0", "t1", "n2", "n3")} | {
        "n9": "normal"
    }
    split = {**dict.fromkeys(labels, "train"), "n2": "val", "n3": "test"}
    folder = write_bags(tmp_path, labels, split)
    data = BagDataModule(folder, CLASSES, batch_size=batch_size, num_workers=0)
    data.setup("predict")

    def batches(world: int, rank: int, accumulated: int) -> list[list[str]]:
        data.trainer = trainer(world, rank, accumulated)
        return [sorted(graph.slide_ids) for graph in data.train_dataloader()]

    alone = batches(1, 0, 2)
    steps = [sorted(alone[i] + alone[i + 1]) for i in range(0, len(alone), 2)]
    shares = [batches(2, rank, 1) for rank in range(2)]
    assert [sorted(one + two) for one, two in zip(*shares, strict=True)] == steps
    assert {len(batch) for batch in alone} == {batch_size}  # every step is full
    assert set().union(*alone) == {"n0", "n1", "t0", "t1", "n9"}
    seen_alone = [slide_id for graph in batches(1, 0, 1) for slide_id in graph]
    assert sorted(seen_alone) == ["n0", "n1", "n9", "t0", "t1"]  # nothing comes twice


def test_evaluation_takes_one_slide_at_a_time_whatever_the_batch_size(tmp_path: Path) -> None:
    data = make_data(write_bags(tmp_path, LABELS, SPLIT), batch_size=3)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert {graph.num_bags for graph in loader} == {1}


def test_fewer_slides_than_processes_are_all_evaluated(tmp_path: Path) -> None:
    data = make_data(write_bags(tmp_path, LABELS, SPLIT))
    shares = []
    for rank in range(5):
        data.trainer = trainer(5, rank)
        shares.append(seen(data.test_dataloader()))
    assert {len(share) for share in shares} == {1}
    assert {slide_id for share in shares for slide_id in share} == {"n3", "t3"}


def test_weighted_sampling_draws_each_class_equally_often(tmp_path: Path) -> None:
    labels = {f"s{n}": CLASSES[n < 3] for n in range(18)}  # 3 tumour, 15 normal
    labels["held out"] = "normal"
    split = {**dict.fromkeys(labels, "train"), "held out": "val"}
    folder = write_bags(tmp_path, labels, split)
    data = BagDataModule(folder, CLASSES, num_workers=0, weighted_sampling=True)
    data.setup("predict")
    assert list(data.class_counts().values()) == [15, 3]
    loader = data.train_dataloader()
    drawn = []
    for epoch in range(100):
        loader.sampler.set_epoch(epoch)
        drawn += list(loader.sampler)
    assert len(drawn) == 100 * 18
    share = sum(index < 3 for index in drawn) / len(drawn)
    assert abs(share - 0.5) < 4 * (0.25 / len(drawn)) ** 0.5
    plain = BagDataModule(folder, CLASSES, num_workers=0)
    plain.setup("predict")
    assert sorted(plain.train_dataloader().sampler) == list(range(18))


def test_a_permuted_table_gives_each_slide_the_same_label(tmp_path: Path) -> None:
    """The classes' order is the caller's, not that of their first appearance."""
    folder = write_bags(tmp_path, LABELS, SPLIT)
    table = (folder / "cohort.csv").read_text().splitlines()

    def labels_of() -> dict[str, int]:
        loader = make_data(folder).predict_dataloader()
        return {graph.slide_ids[0]: graph.labels.item() for graph in loader}

    before = labels_of()
    (folder / "cohort.csv").write_text("\n".join([table[0], *table[:0:-1]]))
    assert labels_of() == before
    assert before["t3"] == 1 and before["n3"] == 0


def test_slides_left_out_by_a_split_table_stay_out_in_test(
    tmp_path: Path,
) -> None:
    """A duplicate that the official list does not name is no test slide afterwards either."""
    folder = write_bags(tmp_path, LABELS)
    table = tmp_path / "list.csv"
    table.write_text(
        "\n".join(["slide_id,split", *(f"{s},{p}" for s, p in SPLIT.items() if s != "t3")])
    )
    with pytest.warns(UserWarning, match=r"does not name 1 slide\(s\) .*: t3"):
        fitted = make_data(folder, split=SplitOptions(table=str(table)))
    tested = BagDataModule(folder, CLASSES, num_workers=0)
    tested.trainer = trainer_of(fitted.study())
    tested.setup("test")
    for data in (fitted, tested):
        assert {s: data.splits[s] for s in SPLIT if s != "t3"} == {
            s: part for s, part in SPLIT.items() if s != "t3"
        }
        assert seen(data.test_dataloader()) == ["n3"]
        assert "t3" not in [row["slide_id"] for row in data.split_rows()]
    assert "t3" in seen(tested.predict_dataloader())


def test_a_run_s_split_table_gives_its_parts_again(tmp_path: Path) -> None:
    folder = write_bags(tmp_path / "bags", many(20))
    first = make_data(folder, split=SplitOptions(seed=5))
    write_csv(tmp_path / "split.csv", SPLIT_COLUMNS, first.split_rows())
    again = make_data(folder, split=SplitOptions(table=str(tmp_path / "split.csv")))
    assert again.splits == first.splits != make_data(folder).splits


@pytest.mark.parametrize("fold", [0, 3])
def test_a_fold_is_the_test_part_and_gives_up_none_to_validation(tmp_path: Path, fold: int) -> None:
    folder = write_bags(tmp_path, many(40))
    data = make_data(folder, split=SplitOptions(0.2, num_folds=4, fold=fold))
    assert Counter(data.splits.values()) == {"train": 24, "val": 6, "test": 10}
    rows = list(data.split_rows())
    assert {row["slide_id"]: row["split"] for row in rows} == data.splits
    assert rows[1] == {
        "slide_id": "t00",
        "patient_id": None,
        "label": "tumour",
        "split": data.splits["t00"],
    }


# What is refused or said


@pytest.mark.parametrize("classes", [["tumour"], ["tumour", "tumour"], []])
def test_fewer_than_two_different_classes_are_refused(tmp_path: Path, classes: list[str]) -> None:
    with pytest.raises(InputError, match=r"data\.classes: .* at least two different labels"):
        BagDataModule(tmp_path, classes)


def test_an_unknown_label_is_refused_by_slide(tmp_path: Path) -> None:
    folder = write_bags(tmp_path, {**LABELS, "t1": "Tumour"}, SPLIT)
    with pytest.raises(InputError, match=r"cohort\.csv: slide t1 has the label 'Tumour'"):
        make_data(folder)


def test_a_label_that_is_no_class_is_no_obstacle_to_predict(tmp_path: Path) -> None:
    folder = write_bags(tmp_path, {**LABELS, "t1": "Tumour"}, SPLIT)
    data = BagDataModule(folder, CLASSES, num_workers=0)
    data.setup("predict")
    labels = {graph.slide_ids[0]: int(graph.labels[0]) for graph in data.predict_dataloader()}
    assert labels["t1"] == -1 and labels["t2"] == 1 and labels["n1"] == 0


def test_slides_without_bag_are_left_out_and_named(tmp_path: Path) -> None:
    folder = write_bags(tmp_path, LABELS, SPLIT, missing=["n1", "t3"])
    with pytest.warns(
        UserWarning, match=r"2 slide\(s\) .* no bag file .*: n1, t3; see status\.csv"
    ):
        data = make_data(folder)
    assert ids(data, "train") == ["n0", "t0", "t1"]
    assert ids(data, "test") == ["n3"]
    assert "n1" not in seen(data.predict_dataloader())


def test_a_whole_folder_is_not_warned_about(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = make_data(write_bags(tmp_path, LABELS, SPLIT))
    assert len(data.rows) == len(LABELS)


def test_a_folder_without_any_bag_is_refused(tmp_path: Path) -> None:
    folder = write_bags(tmp_path, LABELS, SPLIT, missing=LABELS)
    with (
        pytest.warns(UserWarning, match="no bag file"),
        pytest.raises(InputError, match="no bag file for any slide"),
    ):
        make_data(folder)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"fingerprint": "0" * 64}, r"features of the extractor .*000000000000"),
        ({"tile_px": 128}, "tiles of 128 px instead of 256"),
        ({"scales": ("x5", "x20")}, "scales x5, x20 instead of x10, x20"),
    ],
)
def test_bags_of_two_formats_are_refused(tmp_path: Path, other: dict[str, Any], words: str) -> None:
    """Prediction goes on with the others."""
    folder = write_bags(tmp_path, LABELS, SPLIT)
    write_bag(bag_path(folder, "t2"), make_bag("t2", **other))
    sentence = rf"the bag t2 holds .*{words}.*\(as in n0\)"
    with pytest.raises(InputError, match=sentence):
        make_data(folder)
    data = make_data(folder, "predict")
    unread = [batch for batch in data.predict_dataloader() if isinstance(batch, UnreadBag)]
    assert [batch.slide_ids for batch in unread] == [("t2",)]
    assert re.search(sentence, unread[0].reason)


def test_the_format_of_the_bags_is_remembered(tmp_path: Path) -> None:
    data = make_data(write_bags(tmp_path, LABELS, SPLIT, scales=("x2.5", "x10"), tile_px=64))
    assert data.bag_format == make_bag(scales=("x2.5", "x10"), tile_px=64).header.bag_format()


@pytest.mark.parametrize(("part", "slides"), [("train", ["t0", "t1"]), ("val", ["t2"])])
def test_fitting_needs_every_class_in_training_and_validation(
    tmp_path: Path, part: str, slides: list[str]
) -> None:
    split = {s: "test" if s in slides else given for s, given in SPLIT.items()}
    folder = write_bags(tmp_path, LABELS, split)
    with pytest.raises(InputError, match=f"the split '{part}' has no slide of class tumour"):
        make_data(folder)
    assert set(slides) <= set(ids(make_data(folder, "test"), "test"))


def test_an_evaluation_without_slides_is_refused(tmp_path: Path) -> None:
    split = {s: "train" if given == "test" else given for s, given in SPLIT.items()}
    data = make_data(write_bags(tmp_path, LABELS, split))
    with pytest.raises(InputError, match="no labelled slide is in the split 'test'"):
        data.test_dataloader()


def test_bags_without_tiles_are_evaluated_but_not_trained_on(tmp_path: Path) -> None:
    data = make_data(write_bags(tmp_path, LABELS, SPLIT, empty=["n1", "n2", "t3"]), batch_size=4)
    assert ids(data, "train") == ["n0", "t0", "t1"]
    assert sorted(seen(data.train_dataloader())) == ["n0", "t0", "t1"]
    assert seen(data.val_dataloader()) == ["n2", "t2"]
    assert seen(data.test_dataloader()) == ["n3", "t3"]
    assert data.splits["n1"] == "train"


def test_a_class_with_empty_bags_only_cannot_be_trained_on(tmp_path: Path) -> None:
    folder = write_bags(tmp_path, LABELS, SPLIT, empty=["n0", "n1"])
    with pytest.raises(InputError, match="the split 'train' has no slide of class normal"):
        make_data(folder)


# Extractors that have seen slides


def write_extractors(folder: Path, **trained_on: Sequence[Any]) -> None:
    records = {scale: {"name": "vit", "trained_on": slides} for scale, slides in trained_on.items()}
    (folder / "extractors.json").write_text(json.dumps(records))


@pytest.mark.parametrize(("stage", "slide_id"), [("fit", "t2"), ("validate", "t2"), ("test", "n3")])
def test_a_held_out_slide_that_an_extractor_has_seen_is_refused(
    tmp_path: Path, slide_id: str, stage: str
) -> None:
    folder = write_bags(tmp_path, LABELS, SPLIT)
    write_extractors(folder, x10=["n0", "t0"], x20=["n0", slide_id])
    words = rf"the x20 extractor was trained on 1 slide\(s\) .*\({slide_id}\).*allow_seen_slides"
    with pytest.raises(InputError, match=words):
        make_data(folder, stage)
    assert make_data(folder, stage, allow_seen_slides=True).splits == SPLIT


def test_the_extractors_slides_are_known_by_digest_and_by_patient(tmp_path: Path) -> None:
    """Also a slide without label: it gives no metrics, but its patient's other slides do."""
    labels = {**LABELS, "unlabelled": None}
    patients = {"n3": "p3", "unlabelled": "p3"}
    digests = {"t2": "pixels of t2"}
    folder = write_bags(tmp_path, labels, SPLIT, patients, digests=digests)

    for record, slide_id in (
        (SlideRecord("unlabelled", "p3"), "n3"),
        (SlideRecord("elsewhere", digest="pixels of t2"), "t2"),
    ):
        write_extractors(folder, x20=plain_records([record]))
        with pytest.raises(InputError, match=rf"x20 extractor .* 1 slide\(s\) .*\({slide_id}\)"):
            make_data(folder)
    write_extractors(folder, x20=plain_records([SlideRecord("t2", "p4", digest="other pixels")]))
    make_data(folder)
    write_extractors(folder, x20=plain_records([SlideRecord("n3", "p3")]))
    assert make_data(folder, other_cohort=True).splits["n3"] == "test"


def test_an_extractor_may_have_seen_training_slides(tmp_path: Path) -> None:
    folder = write_bags(tmp_path, LABELS, SPLIT)
    write_extractors(folder, x10=["n0", "t0", "n1", "t1", "elsewhere"], x20=[])
    assert make_data(folder).splits == SPLIT


def test_prediction_asks_no_extractor(tmp_path: Path) -> None:
    folder = write_bags(tmp_path, LABELS, SPLIT)
    write_extractors(folder, x10=list(SPLIT), x20=[])
    assert seen(make_data(folder, "predict").predict_dataloader()) == list(SPLIT)


def test_a_drawn_split_is_held_against_the_extractors_too(tmp_path: Path) -> None:
    folder = write_bags(tmp_path, many(20))
    held_out = sorted(s for s, part in make_data(folder).splits.items() if part != "train")
    write_extractors(folder, x20=held_out)
    with pytest.raises(InputError, match=rf"{len(held_out)} slide\(s\)"):
        make_data(folder)


def test_the_cohort_table_is_read_by_its_column_names(tmp_path: Path) -> None:
    """Columns in another order, and one more."""
    folder = write_bags(tmp_path, LABELS, SPLIT)
    with open(folder / "cohort.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["split", "scanner", "label", "slide_id", "path"])
        table.writerows([SPLIT[s], "S360", LABELS[s], s, f"{s}.svs"] for s in SPLIT)
    assert make_data(folder).splits == SPLIT


# Some of the bags' scales

PYRAMID = ("x5", "x10", "x20")
CHOICES = [["x20"], ["x5", "x20"], None]


@pytest.mark.parametrize("scales", CHOICES, ids=lambda scales: "+".join(scales or ["null"]))
def test_a_model_reads_the_scales_that_are_chosen(tmp_path: Path, scales: list[str] | None) -> None:
    """Format, bags, batches and statistics hold these and no other; ancestors are parents."""
    folder = write_bags(tmp_path, LABELS, SPLIT, scales=PYRAMID)
    data = make_data(folder, scales=scales, batch_size=4)
    chosen = tuple(scales or PYRAMID)
    assert tuple(data.bag_format["scales"]) == chosen
    assert data.bag_format == make_bag(scales=PYRAMID).header.bag_format(chosen)
    assert set(data.train_statistics()) == set(chosen)

    whole = read_bag(bag_path(folder, "n2"))
    bag = data.read_bag("n2")
    assert bag.scales == chosen
    expected = whole.select(chosen)
    assert all(torch.equal(bag.parent[s], expected.parent[s]) for s in chosen[1:])
    (batch,) = data.train_dataloader()
    alone = [bag_graph(read_bag(bag_path(folder, s)).select(chosen)) for s in batch.slide_ids]
    joined = join_graphs(alone)
    assert batch.scales == chosen
    for scale in chosen:
        assert torch.equal(batch.features[scale], joined.features[scale])
        assert torch.equal(batch.neighbours[scale].index, joined.neighbours[scale].index)
    for scale in chosen[1:]:
        assert torch.equal(batch.parent[scale], joined.parent[scale])
    for loader in (data.train_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert all(graph.scales == chosen for graph in loader)


def test_the_statistics_are_those_of_the_bags_whatever_scales_are_chosen(tmp_path: Path) -> None:
    folder = write_bags(tmp_path, LABELS, SPLIT, scales=PYRAMID)
    everything = make_data(folder).train_statistics()
    some = make_data(folder, scales=["x5", "x20"]).train_statistics()
    for scale in ("x5", "x20"):
        for ours, theirs in zip(some[scale], everything[scale], strict=True):
            assert torch.equal(ours, theirs)


def test_scales_may_be_named_in_any_order(tmp_path: Path) -> None:
    data = make_data(write_bags(tmp_path, LABELS, SPLIT, scales=PYRAMID), scales=["x20", "x5"])
    assert list(data.bag_format["scales"]) == ["x5", "x20"]
    assert data.read_bag("n0").scales == ("x5", "x20")


@pytest.mark.parametrize("stage", ["fit", "predict"])
@pytest.mark.parametrize(
    ("scales", "words"),
    [
        (["x40", "x20"], "data.scales asks for x40, its bags hold x5, x10, x20"),
        (["x2", "x40"], "data.scales asks for x2, x40, its bags hold x5, x10, x20"),
        ([], "data.scales asks for none, its bags hold x5, x10, x20"),
    ],
)
def test_a_scale_that_the_bags_lack_is_refused_in_one_sentence(
    tmp_path: Path, stage: str, scales: list[str], words: str
) -> None:
    folder = write_bags(tmp_path, LABELS, SPLIT, scales=PYRAMID)
    with pytest.raises(InputError) as caught:
        make_data(folder, stage, scales=scales)
    assert str(caught.value) == f"{folder}: {words}"


def test_bags_need_be_alike_at_the_chosen_scales_only(tmp_path: Path) -> None:
    """One bag has another extractor at x5, and none at x5 would do too."""
    folder = write_bags(tmp_path, LABELS, SPLIT, scales=PYRAMID)
    bag = make_bag("t2", PYRAMID, num_tiles=8)
    cards = {**bag.header.extractors, "x5": make_card(fingerprint="0" * 64)}
    write_bag(bag_path(folder, "t2"), replace(bag, extractors=cards))
    write_bag(bag_path(folder, "n3"), make_bag("n3", ("x10", "x20"), num_tiles=8))
    assert make_data(folder, scales=["x10", "x20"]).splits == SPLIT
    with pytest.raises(InputError, match=r"t2 holds x5 features of the extractor .*000000000000"):
        make_data(folder, scales=["x5", "x20"])
    write_bag(bag_path(folder, "t2"), make_bag("t2", PYRAMID, num_tiles=8))
    with pytest.raises(InputError, match="n3 holds scales x20 instead of x5, x20"):
        make_data(folder, scales=["x5", "x20"])


def test_only_the_extractors_of_chosen_scales_matter(tmp_path: Path) -> None:
    folder = write_bags(tmp_path, LABELS, SPLIT, scales=PYRAMID)
    write_extractors(folder, x5=["n3"], x10=["n0"], x20=["t0"])
    assert make_data(folder, scales=["x10", "x20"]).splits == SPLIT
    for scales in (["x5", "x20"], ["x5"], None):
        with pytest.raises(InputError, match="the x5 extractor was trained on 1 slide"):
            make_data(folder, scales=scales)


# Validation on the test part (D17)


def test_validation_on_the_test_part_is_said_and_changes_nothing_else(tmp_path: Path) -> None:
    folder = write_bags(tmp_path, LABELS, SPLIT)
    for stage in ("fit", "validate", "test"):
        with pytest.warns(UserWarning, match=r"validation slides are the test slides .*; 2 slide"):
            data = make_data(folder, stage, split=SplitOptions(val_part="test"))
        assert seen(data.val_dataloader()) == seen(data.test_dataloader()) == ["n3", "t3"]
        assert sorted(seen(data.train_dataloader())) == ["n0", "n1", "t0", "t1"]
        assert data.splits == SPLIT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_data(folder, "predict", split=SplitOptions(val_part="test"))
        for stage in ("fit", "validate", "test", "predict"):
            make_data(folder, stage)


def test_the_part_that_is_validated_on_needs_every_class(tmp_path: Path) -> None:
    """A cohort without validation slides will do when the test slides take their place."""
    split = {s: "train" if given == "val" else given for s, given in SPLIT.items()}
    folder = write_bags(tmp_path / "none", LABELS, split)
    with pytest.raises(InputError, match="the split 'val' has no slide of class normal, tumour"):
        make_data(folder, split=SplitOptions(0.0))
    with pytest.warns(UserWarning, match="validation slides are the test"):
        data = make_data(folder, split=SplitOptions(0.0, val_part="test"))
    assert seen(data.val_dataloader()) == ["n3", "t3"]
    one_sided = write_bags(tmp_path / "one", LABELS, {**SPLIT, "t3": "train"})
    with pytest.raises(InputError, match="the split 'test' has no slide of class tumour"):
        make_data(one_sided, split=SplitOptions(val_part="test"))
    make_data(one_sided)


def test_a_line_says_if_the_slides_of_an_extractor_are_unknown(tmp_path: Path) -> None:
    folder = write_bags(tmp_path, LABELS, SPLIT)
    records = {"x10": {"trained_on": None}, "x20": {"trained_on": ["n0"]}}
    (folder / "extractors.json").write_text(json.dumps(records))
    with pytest.warns(UserWarning, match="which slides the x10 extractors were trained on"):
        make_data(folder)


# What is kept of the slides that were read


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    reads: Counter[str] = Counter()

    def remember(path: Path, scales: Any = None) -> Any:
        reads[path.stem] += 1
        return read_bag(path, scales)

    monkeypatch.setattr("dasmil.data.bag_dataset.read_bag", remember)
    return reads


def quiet_trainer(folder: Path, **options: Any) -> Trainer:
    keeper = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[keeper],
        **options,
    )


def fitted(
    folder: Path, bags: Path, ckpt_path: str | None = None, **arguments: Any
) -> tuple[Trainer, MILModule, BagDataModule]:
    """Three epochs with dropout, validated after each."""
    torch.manual_seed(0)
    data = BagDataModule(bags, CLASSES, **arguments)
    module = make_module(hidden_dim=8, out_dim=8, query_dim=4, learning_rate=1e-2)
    run = quiet_trainer(folder, max_epochs=3)
    run.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return run, module, data


def assert_same(one: Any, two: Any) -> None:
    """State dicts or dicts of figures, to the last bit."""
    assert list(one) == list(two)
    assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(two[k])) for k in one)


@pytest.mark.parametrize(
    ("cache", "batch_size"), [("ram", 1), pytest.param("device", 3, marks=pytest.mark.slow)]
)
def test_cached_slides_give_the_metrics_of_slides_that_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str, batch_size: int
) -> None:
    """Weights, losses, validation, test and prediction; also resumed after the first epoch."""
    bags = write_bags(tmp_path / "bags", LABELS, SPLIT, scales=("x5", "x10", "x20"))
    arguments = {"batch_size": batch_size, "scales": ["x5", "x20"]}
    expected, plain, _ = fitted(tmp_path / "none", bags, **arguments, num_workers=1)
    reads = count_reads(monkeypatch)
    found, module, data = fitted(tmp_path / cache, bags, **arguments, cache=cache, num_workers=2)
    assert reads == {s: 1 for s, part in SPLIT.items() if part != "test"}
    assert_same(module.state_dict(), plain.state_dict())
    assert_same(found.callback_metrics, expected.callback_metrics)
    assert "val/loss" in found.callback_metrics

    first = str(tmp_path / cache / "epoch=0.ckpt")
    _, resumed, _ = fitted(tmp_path / cache, bags, first, **arguments, cache=cache)
    assert_same(resumed.state_dict(), plain.state_dict())

    anew = BagDataModule(bags, CLASSES, **arguments, num_workers=0)
    for stage in ("validate", "test"):
        ours, theirs = (
            getattr(found, stage)(module, datamodule=d, verbose=False)[0] for d in (data, anew)
        )
        assert_same(ours, theirs)
    ours, theirs = (found.predict(module, datamodule=d) for d in (data, anew))
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one["x20"].instance_logits, two["x20"].instance_logits)


def test_without_a_cache_slides_are_read_in_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bags = write_bags(tmp_path, LABELS, SPLIT)
    reads = count_reads(monkeypatch)
    for cache, times in (("none", 3), ("ram", 1)):
        reads.clear()
        data = make_data(bags, cache=cache, num_workers=0)
        for _ in range(3):
            for loader in (data.train_dataloader(), data.val_dataloader()):
                assert len(seen(loader)) == len(loader)
        assert reads == {s: times for s, part in SPLIT.items() if part != "test"}
    for stage in ("validate", "test", "predict"):
        data.setup(stage)
        loader = getattr(data, f"{stage[:3] if stage == 'validate' else stage}_dataloader")()
        assert loader.dataset.cache is None
    assert make_data(bags, cache="ram", num_workers=2).train_dataloader().num_workers == 0
    assert make_data(bags, "test", cache="ram", num_workers=2).test_dataloader().num_workers == 2
    assert make_data(bags, cache="none", num_workers=2).train_dataloader().num_workers == 2


def test_reading_processes_may_be_started_afresh(tmp_path: Path) -> None:
    """As on macOS, where they are no forks and the dataset is sent to them."""
    data = make_data(write_bags(tmp_path, LABELS, SPLIT), num_workers=2)
    sent = pickle.loads(pickle.dumps(data.train_dataloader().dataset))
    assert [graph.slide_ids for graph in (sent[0], sent[3])] == [("n0",), ("t1",)]


def test_kept_slides_need_their_files_no_more(tmp_path: Path) -> None:
    """Not even the pages that a file which was deleted holds."""
    maps = Path("/proc/self/maps")
    bags = write_bags(tmp_path, LABELS, SPLIT)
    data = make_data(bags, cache="ram", batch_size=4)
    loader = data.train_dataloader()
    (first,) = loader
    for slide_id in SPLIT:
        bag_path(bags, slide_id).unlink()
    assert not maps.exists() or str(bags) not in maps.read_text()
    loader.sampler.set_epoch(0)
    (again,) = loader
    assert first.slide_ids == again.slide_ids
    for scale in first.scales:
        assert torch.equal(first.features[scale], again.features[scale])


def test_a_replaced_bag_is_read_by_the_next_fit(tmp_path: Path) -> None:
    data = make_data(write_bags(tmp_path, LABELS, SPLIT), cache="ram")
    seen(data.val_dataloader())
    write_bag(bag_path(tmp_path, "n2"), make_bag("n2", num_tiles=5))
    data.setup("fit")
    graph = next(iter(data.val_dataloader()))
    assert (graph.slide_ids, len(graph.features["x20"])) == (("n2",), 5)


def test_on_the_device_slides_are_kept_there_and_not_pinned(tmp_path: Path) -> None:
    """The device "meta" takes tensors from the CPU like any other, and keeps only their shapes."""
    data = BagDataModule(write_bags(tmp_path, LABELS, SPLIT), CLASSES, cache="device")
    data.trainer = trainer(device="meta")
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert not loader.pin_memory
        for graph in loader:
            assert {x.device.type for x in graph.features.values()} == {"meta"}
            assert data.transfer_batch_to_device(graph, torch.device("meta"), 0).scales == (
                "x10",
                "x20",
            )
    ram = BagDataModule(tmp_path, CLASSES, cache="ram")
    ram.trainer = trainer(device="meta")
    ram.setup("fit")
    assert {g.features["x20"].device.type for g in ram.train_dataloader()} == {"cpu"}


def test_on_the_device_only_features_are_joined(tmp_path: Path) -> None:
    """What decides sizes is joined on the CPU: a GPU would have to be waited for."""
    folder = write_bags(tmp_path, LABELS, SPLIT)
    options: Any = {"cache": "device", "batch_size": 4}
    data = BagDataModule(folder, CLASSES, **options)
    data.trainer = trainer(device="meta")
    data.setup("fit")
    (batch,) = data.train_dataloader()
    graphs = [bag_graph(read_bag(bag_path(folder, slide_id))) for slide_id in batch.slide_ids]
    expected = join_graphs(graphs)
    assert {x.device.type for x in batch.features.values()} == {"meta"}
    assert torch.equal(batch.union.index, expected.union.index)
    assert torch.equal(batch.union.reverse, expected.union.reverse)
    assert torch.equal(batch.parent["x20"], expected.parent["x20"])
    for scale, x in expected.features.items():
        assert batch.features[scale].shape == x.shape
    for graph in data.val_dataloader():
        assert graph.features["x20"].is_meta and not graph.union.index.is_meta


def test_what_is_joined_for_a_gpu_is_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = [bag_graph(make_bag(str(n))) for n in range(2)]
    there = [replace(g, features={s: x.to("meta") for s, x in g.features.items()}) for g in graphs]
    pinned: list[int] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        assert not tensor.is_meta
        pinned.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    batch = join_features_there(there)
    assert batch.scales == graphs[0].scales and batch.slide_ids == ("0", "1")
    for tensor in (batch.union.index, batch.union.ptr, batch.union.reverse, batch.parent["x20"]):
        assert tensor.data_ptr() in pinned


@pytest.mark.parametrize(("cache", "pinned"), [("none", True), ("ram", True), ("device", False)])
def test_batches_for_a_gpu_are_pinned_unless_cached_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str, pinned: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**9, 10**9))
    data = BagDataModule(write_bags(tmp_path, LABELS, SPLIT), CLASSES, cache=cache)  # type: ignore[arg-type]
    data.trainer = trainer(device="cuda:0")
    data.setup("fit")
    assert data.train_dataloader().pin_memory is data.val_dataloader().pin_memory is pinned
    data.trainer = trainer()
    assert not data.train_dataloader().pin_memory


@pytest.mark.parametrize(("world", "batch_size"), [(1, 1), (2, 3)])
def test_slides_that_do_not_fit_into_memory_are_refused_before_any_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, batch_size: int
) -> None:
    """Each process keeps them all; a GPU is counted once a process, memory is shared.

    Beside a GPU's cache there is room for a step on the largest training slides.
    """
    folder = write_bags(tmp_path, LABELS, SPLIT)
    for number, slide_id in enumerate(SPLIT):
        write_bag(bag_path(folder, slide_id), make_bag(slide_id, num_tiles=20 - number))
    largest = [bag_path(folder, slide_id) for slide_id in list(SPLIT)[:batch_size]]
    step = sum(map(step_bytes, largest))
    need = sum(graph_bytes(bag_path(folder, s)) for s, part in SPLIT.items() if part != "test")
    reads = count_reads(monkeypatch)

    def with_free(ram: int, gpu: int, cache: str, device: str) -> None:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=ram))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (gpu, gpu))
        options: Any = {"cache": cache, "batch_size": batch_size}
        data = BagDataModule(folder, CLASSES, **options)
        data.trainer = trainer(world, device=device)
        data.setup("fit")

    many = world * need
    with_free(many, 0, "ram", "cpu")
    with_free(many, 0, "device", "cpu")
    with_free(2 * many, 0, "ram", "cuda:0")
    with_free(0, need + step, "device", "cuda:0")
    with_free(0, 0, "none", "cuda:0")
    each = f" in each of {world} processes" if world > 1 else ""
    words = r"data\.cache: {} takes 0\.0 GB for its 6 training and validation slides{}, but 0\.0 GB"
    for case, said in (
        ((many - 1, need + step, "ram", "cpu"), ("ram", each)),
        ((many, need + step, "ram", "cuda:0"), ("ram", each)),  # pinned memory is rounded up
        (
            (many, need + step - 1, "device", "cuda:0"),
            ("device", r" and 0\.0 GB for a training step"),
        ),
    ):
        with pytest.raises(InputError, match=words.format(*said)):
            with_free(*case)
    assert not reads


def test_processes_that_keep_slides_share_them_as_others_do(tmp_path: Path) -> None:
    write_bags(tmp_path, many(20))
    shares = []
    for cache in ("none", "ram"):
        data = BagDataModule(tmp_path, CLASSES, num_workers=0, cache=cache)  # type: ignore[arg-type]
        for rank in range(2):
            data.trainer = trainer(2, rank)
            data.setup("fit")
            loader = data.train_dataloader()
            loader.sampler.set_epoch(3)
            shares.append(seen(loader))
    assert shares[:2] == shares[2:]
    assert shares[0] != shares[1]


# Large cohorts, and bags that are not whole


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_a_large_cohort_is_opened_by_its_headers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    """200 bags of 12k and 3k tiles: 2.3 GB if they were read, of which no byte is."""
    labels = many(200)
    write_bags(tmp_path, labels, missing=labels)
    for slide_id in labels:
        write_hollow(bag_path(tmp_path, slide_id))

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("a bag is read")

    monkeypatch.setattr("dasmil.bags.store.safe_open", read)
    data = make_data(tmp_path, cache=cache)
    assert len(data.rows) == 200 and len(data.splits) == 200


def test_the_first_of_many_bags_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_bags(tmp_path, many(40))
    for slide_id in ("n07", "t11"):
        path = bag_path(tmp_path, slide_id)
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"n07\.safetensors: cannot be read as a bag"):
        make_data(tmp_path)


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_a_foreign_bag_with_a_nan_ends_the_training_with_one_sentence(
    tmp_path: Path, cache: str
) -> None:
    write_bags(tmp_path, LABELS, SPLIT)
    path = bag_path(tmp_path, "n2")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["features/x20"][3, 2] = float("nan")
    save_file(tensors, path, metadata)
    data = make_data(tmp_path, cache=cache)
    with pytest.raises(InputError) as caught:
        seen(data.val_dataloader())
    sentence = "bag n2: x20: some features are not finite; embed the slide again"
    assert str(caught.value) == sentence
