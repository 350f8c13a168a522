"""Folds, split tables and official lists, and what lies in two parts."""

import csv
import random
import re
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dasmil.config_files import configs_folder
from dasmil.errors import InputError
from dasmil.slides.cohort import SlideRow
from dasmil.slides.splits import placed, read_split_table, split_cohort


def make_rows(
    label: str, num_patients: int, slides_each: int = 1, split: str | None = None
) -> list[SlideRow]:
    names = [
        (f"{label}{p}", f"{label}{p}_{s}") for p in range(num_patients) for s in range(slides_each)
    ]
    return [SlideRow(name, Path(f"{name}.svs"), label, patient, split) for patient, name in names]


def folds(rows: list[SlideRow], num_folds: int, **options: Any) -> list[dict[str, str]]:
    return [split_cohort(rows, num_folds=num_folds, fold=k, **options) for k in range(num_folds)]


def slides(parts: dict[str, str], part: str) -> set[str]:
    return {slide_id for slide_id, found in parts.items() if found == part}


# Folds


@pytest.mark.parametrize("num_folds", [2, 3, 5])
def test_every_slide_is_in_the_test_part_of_one_fold(num_folds: int) -> None:
    rows = make_rows("a", 13, slides_each=2) + make_rows("b", 7)
    drawn = folds(rows, num_folds)
    assert Counter(s for parts in drawn for s in slides(parts, "test")) == Counter(
        row.slide_id for row in rows
    )
    for parts in drawn:
        assert set(parts) == {row.slide_id for row in rows}
        assert slides(parts, "val")


def test_folds_keep_patients_together_and_are_even_in_every_label_and_in_all() -> None:
    """11 + 6 patients and 4 with slides of both labels: 3 labels by folds of 21 / 4 patients."""
    mixed = [
        SlideRow(f"m{p}{label}", Path(f"m{p}{label}.svs"), label, f"m{p}")
        for p in range(4)
        for label in "ab"
    ]
    rows = make_rows("a", 11, slides_each=3) + make_rows("b", 6, slides_each=2) + mixed
    counts: dict[str, list[int]] = {"a": [], "b": [], "m": []}
    for parts in folds(rows, 4):
        assert len({(row.patient, parts[row.slide_id]) for row in rows}) == 21
        held_out = {row.patient for row in rows if parts[row.slide_id] == "test"}
        for kind, found in counts.items():
            found.append(sum(patient[0] == kind for patient in held_out))
    assert {kind: sorted(found) for kind, found in counts.items()} == {
        "a": [2, 3, 3, 3],
        "b": [1, 1, 2, 2],
        "m": [1, 1, 1, 1],
    }
    assert sorted(map(sum, zip(*counts.values()))) == [5, 5, 5, 6]


def test_the_rest_of_a_fold_gives_its_fraction_to_validation() -> None:
    for parts in folds(make_rows("a", 25) + make_rows("b", 50), 5, val_fraction=0.25):
        counts = Counter((slide_id[0], part) for slide_id, part in parts.items())
        assert counts == {
            ("a", "test"): 5,
            ("a", "val"): 5,
            ("a", "train"): 15,
            ("b", "test"): 10,
            ("b", "val"): 10,
            ("b", "train"): 30,
        }


def test_folds_depend_on_the_seed_and_not_on_the_order_of_rows() -> None:
    rows = make_rows("a", 20) + make_rows("b", 20)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert folds(shuffled, 4, seed=3) == folds(rows, 4, seed=3) != folds(rows, 4, seed=4)


def test_if_the_table_has_a_test_split_the_fold_is_validation() -> None:
    rows = make_rows("a", 10, split="train") + make_rows("b", 10, split="train")
    tested = make_rows("t", 5, split="test")
    drawn = folds(rows + tested, 5)
    for parts in drawn:
        assert slides(parts, "test") == {row.slide_id for row in tested}
        assert Counter(s[0] for s in slides(parts, "val")) == {"a": 2, "b": 2}
    assert sorted(s for parts in drawn for s in slides(parts, "val")) == sorted(
        row.slide_id for row in rows
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fold": 3}, "data.split.fold and data.split.num_folds: give both"),
        ({"num_folds": 5}, "data.split.fold and data.split.num_folds: give both"),
        ({"num_folds": 5, "fold": 5}, "there is no fold 5 of 5; give a number from 0 to 4"),
        ({"num_folds": 5, "fold": -1}, "there is no fold -1 of 5"),
        ({"num_folds": 1, "fold": 0}, "1 is no number of folds"),
        ({"num_folds": 11, "fold": 0}, "10 patients cannot be divided into 11 folds"),
    ],
)
def test_folds_that_make_no_sense_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        split_cohort(make_rows("a", 5) + make_rows("b", 5), **options)


def test_a_table_with_a_validation_part_has_no_folds() -> None:
    rows = make_rows("a", 5, split="train") + make_rows("b", 5, split="val")
    with pytest.raises(
        InputError, match=r"split\.num_folds: the split column already names val slides"
    ):
        split_cohort(rows, num_folds=2, fold=0)


# Split tables


def write_table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_split_table_goes_before_the_split_column(tmp_path: Path) -> None:
    rows = make_rows("a", 3, split="train")
    table = write_table(tmp_path / "split.csv", "slide_id,split\na0_0,test\na1_0,val\na2_0,train\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = split_cohort(rows, split_table=table)
    assert parts == {"a0_0": "test", "a1_0": "val", "a2_0": "train"}


def test_a_split_table_without_val_is_drawn_from_and_divided_into_folds(tmp_path: Path) -> None:
    rows = make_rows("a", 12)
    lines = [f"a{p}_0,{'test' if p < 2 else 'train'}" for p in range(12)]
    table = write_table(tmp_path / "list.csv", "\n".join(["slide_id,split", *lines]))
    parts = split_cohort(rows, split_table=table, val_fraction=0.3)
    assert Counter(parts.values()) == {"test": 2, "val": 3, "train": 7}
    for parts in folds(rows, 5, split_table=table):
        assert Counter(parts.values()) == {"test": 2, "val": 2, "train": 8}


def test_slides_that_a_table_does_not_name_are_left_out_by_name(tmp_path: Path) -> None:
    """Also those without label: a duplicate of a test slide is in no training of an extractor."""
    table = write_table(
        tmp_path / "list.csv", "slide_id,split\na0_0,test\na1_0,train\nu,test\nx,train\ny,val\n"
    )
    rows = [*make_rows("a", 4), SlideRow("u", Path("u.svs")), SlideRow("v", Path("v.svs"))]
    with (
        pytest.warns(UserWarning, match=r"does not name 3 slide\(s\) .* left out: a2_0, a3_0, v"),
        pytest.warns(UserWarning, match=r"2 of its 5 slides are not in the cohort: x, y"),
    ):
        found = placed(rows, table)
    assert {row.slide_id: row.split for row in found} == {
        "a0_0": "test",
        "a1_0": "train",
        "u": "test",
    }
    with pytest.warns(UserWarning):
        assert set(split_cohort(rows, split_table=table)) == {"a0_0", "a1_0"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slide_id,split\na0_0,test\na0_0,train\n", "line 3: slide a0_0 occurs twice"),
        ("slide_id,split\na0_0,testing\n", "line 2: split 'testing' is none of train, val, test"),
        ("slide_id,part\na0_0,test\n", "lacks the columns slide_id and split"),
        ("slide_id,split\nother,test\n", "names no slide of the cohort"),
        (
            "slide_id,split,label\na0_0,test,a\na1_0,train,b\n",
            "slide a1_0 is b there and a in the cohort",
        ),
    ],
)
def test_a_split_table_with_a_mistake_is_refused(tmp_path: Path, text: str, words: str) -> None:
    table = write_table(tmp_path / "list.csv", text)
    with pytest.raises(InputError, match=rf"list\.csv.*{re.escape(words)}"):
        split_cohort(make_rows("a", 2), split_table=table)


def test_labels_by_other_names_are_not_compared(tmp_path: Path) -> None:
    table = write_table(tmp_path / "list.csv", "slide_id,split,label\na0_0,test,A\na1_0,train,B\n")
    assert split_cohort(make_rows("a", 2), split_table=table)["a0_0"] == "test"


def test_a_split_table_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.split\.table: .*nowhere\.csv: no such file"):
        split_cohort(make_rows("a", 2), split_table=tmp_path / "nowhere.csv")


# Camelyon16


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_shipped_list_of_camelyon16_is_the_official_one(shared_data: Path) -> None:
    official = {
        row["subject_id"]: (part, "tumor" if row["bag_label"] == "1" else "normal")
        for part in ("train", "test")
        for row in read(shared_data / "splits" / f"camelyon16_official_{part}.csv")
    }
    assert read_split_table("splits/camelyon16.csv") == official
    assert Counter(official.values()) == {
        ("train", "normal"): 159,
        ("train", "tumor"): 111,
        ("test", "normal"): 80,
        ("test", "tumor"): 49,
    }
    rows = read(configs_folder() / "splits" / "camelyon16.csv")
    assert [row["slide_id"] for row in rows] == sorted(official)


def test_the_authors_list_is_read_and_is_the_official_one_without_a_slide(
    shared_data: Path,
) -> None:
    """They leave out test_114; all else, labels included, is equal."""
    authors = read_split_table(shared_data / "splits" / "camelyon16_mil4wsi.csv")
    official = read_split_table("splits/camelyon16.csv")
    assert official.pop("test_114") == ("test", "tumor")
    assert authors == official


def test_nine_to_one_of_the_official_training_slides_validate() -> None:
    table = read_split_table("splits/camelyon16.csv")
    rows = [SlideRow(name, Path(f"{name}.tif"), label) for name, (_, label) in table.items()]
    parts = split_cohort(rows, split_table="splits/camelyon16.csv")
    assert {s for s, part in parts.items() if part == "test"} == {
        s for s, (part, _) in table.items() if part == "test"
    }
    val = Counter(table[s][1] for s, part in parts.items() if part == "val")
    assert val == {"normal": 16, "tumor": 11}
    rows[0] = replace(rows[0], label="tumor")
    with pytest.raises(InputError, match=f"slide {rows[0].slide_id} is normal there and tumor in"):
        split_cohort(rows, split_table="splits/camelyon16.csv")


# What lies in two parts


def test_a_patient_in_two_parts_is_named_with_a_slide_of_each() -> None:
    rows = make_rows("a", 2, slides_each=2, split="train")
    rows[1] = replace(rows[1], split="test")
    words = r"patient a0 has slides in more than one split \(a0_0 in train and a0_1 in test\)"
    with pytest.raises(InputError, match=words):
        split_cohort(rows)


@pytest.mark.parametrize("how", ["same path", "another way", "link"])
def test_a_file_in_two_parts_is_refused_by_name(tmp_path: Path, how: str) -> None:
    slide, other = tmp_path / "a.svs", tmp_path / "b.svs"
    slide.touch()
    (tmp_path / "sub").mkdir()
    other.symlink_to(slide)
    path = {"same path": slide, "another way": tmp_path / "sub" / ".." / "a.svs", "link": other}
    rows = [
        SlideRow("one", slide, "x", split="train"),
        SlideRow("two", path[how], "x", split="test"),
    ]
    with pytest.raises(InputError, match=r"one in train and two in test are one file, .*a\.svs"):
        split_cohort(rows, val_fraction=0.0)
    same_part = [replace(row, split="train") for row in rows]
    assert split_cohort(same_part, val_fraction=0.0) == {"one": "train", "two": "train"}
