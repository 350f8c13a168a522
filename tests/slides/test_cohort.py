"""The cohort table, a folder of slides, and the parts that slides play."""

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dasmil.errors import InputError
from dasmil.slides.cohort import (
    SlideRow,
    match_names,
    read_cohort,
    read_patients,
    slide_name,
    write_cohort,
)
from dasmil.slides.splits import split_cohort
from dasmil.slides.study import read_records


def write_table(folder: Path, text: str) -> Path:
    path = folder / "cohort.csv"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(source: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_cohort(source)
    return str(caught.value)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def make_rows(
    label: str, num_patients: int, *, slides_each: int = 1, split: str | None = None
) -> list[SlideRow]:
    return [
        SlideRow(
            f"{label}{p}_{s}", Path(f"{label}{p}_{s}.svs"), label, f"patient_{label}{p}", split
        )
        for p in range(num_patients)
        for s in range(slides_each)
    ]


def patients_by_part(rows: Sequence[SlideRow], parts: dict[str, str]) -> Counter[tuple[str, str]]:
    """How many patients of a label a part holds."""
    found = {(row.label, parts[row.slide_id], row.patient_id) for row in rows}
    return Counter((label, part) for label, part, _ in found)


# Reading


def test_every_column_of_a_table_is_read(tmp_path: Path) -> None:
    path = write_table(
        tmp_path,
        "slide_id,path,label,patient_id,split,mpp,magnification\n"
        "s1,scans/a.svs,tumour,p1,train,0.25,\n"
        "s2,/elsewhere/b.tif,normal,p2,test,,40\n",
    )
    assert read_cohort(path) == [
        SlideRow("s1", tmp_path / "scans" / "a.svs", "tumour", "p1", "train", 0.25, None),
        SlideRow("s2", Path("/elsewhere/b.tif"), "normal", "p2", "test", None, 40.0),
    ]


def test_two_columns_are_enough_and_empty_cells_are_none(tmp_path: Path) -> None:
    rows = read_cohort(write_table(tmp_path, "path,slide_id,remark\na.svs,s1,nice\n"))
    assert rows == [SlideRow("s1", tmp_path / "a.svs")]
    rows = read_cohort(write_table(tmp_path, "slide_id,path,label,split,mpp\ns1,a.svs,,,\n"))
    assert rows == [SlideRow("s1", tmp_path / "a.svs", None, None, None, None, None)]


def test_byte_order_mark_and_spaces_are_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes(b"\xef\xbb\xbfslide_id, path ,mpp\r\n s1 , a b.svs, 0.5 \r\n")
    assert read_cohort(path) == [SlideRow("s1", tmp_path / "a b.svs", mpp=0.5)]


def test_a_slide_without_patient_is_its_own_patient() -> None:
    assert SlideRow("s1", Path("a.svs")).patient == "s1"
    assert SlideRow("s1", Path("a.svs"), patient_id="p1").patient == "p1"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("slide_id,label\ns1,a\n", "column path is missing"),
        ("label\na\n", "column path and slide_id is missing"),
        ("slide_id|path\ns1|a.svs\n", "column path and slide_id is missing"),
        ("", "column path and slide_id is missing"),
        ("slide_id,path\n", "holds no slides"),
        ("slide_id,path\ns1,a.svs\ns2\n", " line 3: it does not have the 2 cells of the header"),
        ("slide_id,path\ns1,a.svs\n,b.svs\n", " line 3: slide_id is empty; fill it"),
        ("sep=;\nslide_id;path\n\n ;a.svs\n", " line 4: slide_id is empty"),
        (
            "slide_id,path,split\ns1,a.svs,train\ns2,b.svs,valid\n",
            " line 3: split 'valid' is none of train, val, test",
        ),
    ],
)
def test_a_bad_table_is_refused_with_file_and_line(
    tmp_path: Path, text: str, sentence: str
) -> None:
    path = write_table(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"{path}")
    assert sentence in message


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "-inf", "1e999", "fine", "0.25x"])
@pytest.mark.parametrize("column", ["mpp", "magnification"])
def test_a_scale_that_is_no_positive_number_is_a_fault_of_its_row(
    tmp_path: Path, column: str, text: str
) -> None:
    path = write_table(tmp_path, f"slide_id,path,{column}\ns1,a.svs,20\ns2,b.svs,{text}\n")
    for table in (path, tmp_path / "again.csv"):  # as it was written, too
        good, bad = read_cohort(table)
        assert getattr(good, column) == 20 and good.scale_fault is None
        assert getattr(bad, column) is None and bad.fault is None
        assert bad.scale_fault == (
            f"{table} line 3: {column} {text!r} is no positive number; correct or empty it"
        )
        write_cohort(tmp_path / "again.csv", [good, bad])


def test_a_magnification_is_not_needed_if_there_is_an_mpp(tmp_path: Path) -> None:
    text = "slide_id,path,mpp,magnification\ns1,a.svs,0.5,x\ns2,a.svs,x,20\n"
    good, bad = read_cohort(write_table(tmp_path, text))
    assert good.scale_fault is None and "mpp 'x'" in (bad.scale_fault or "")


def test_an_empty_path_is_a_fault_of_its_row(tmp_path: Path) -> None:
    path = write_table(tmp_path, "slide_id,path\ns1,a.svs\ns2, \ns3,\n")
    for table in (path, tmp_path / "again.csv"):
        rows = read_cohort(table)
        assert [row.fault for row in rows] == [
            None,
            *(f"{table} line {line}: path is empty; fill it" for line in (3, 4)),
        ]
        assert len({row.file for row in rows}) == 3  # no two are the same slide
        write_cohort(tmp_path / "again.csv", rows)


def test_a_missing_column_is_refused_with_the_columns_there_are(tmp_path: Path) -> None:
    message = refusal(write_table(tmp_path, "slide,path\ns1,a.svs\n"))
    assert "slide_id, path, label, patient_id, split, mpp, magnification" in message


def test_a_repeated_slide_id_is_refused_with_both_paths(tmp_path: Path) -> None:
    path = write_table(tmp_path, "slide_id,path\ns1,a.svs\ns2,b.svs\ns1,c.svs\n")
    message = refusal(path)
    assert message.startswith(f"{path}: slide_id 's1' occurs twice")
    assert f"{tmp_path / 'a.svs'} and {tmp_path / 'c.svs'}" in message


def test_numbers_of_a_table_may_have_decimal_commas(tmp_path: Path) -> None:
    path = write_table(tmp_path, "slide_id;path;mpp\ns1;a.svs;0,2527\n")
    assert read_cohort(path) == [SlideRow("s1", tmp_path / "a.svs", mpp=0.2527)]


def test_placeholders_for_no_patient_are_no_patients_but_labels(tmp_path: Path) -> None:
    cells = ["NA", "n/a", "NaN", "None", "null", "unknown", "Nana"]
    text = "".join(f"s{i},{i}.svs,{cell},{cell}\n" for i, cell in enumerate(cells))
    with pytest.warns(UserWarning, match="the patient of 6 slide.* not known: NA, NaN, None, n/a"):
        rows = read_cohort(write_table(tmp_path, "slide_id,path,label,patient_id\n" + text))
    assert [row.patient_id for row in rows] == [None] * 6 + ["Nana"]
    assert [row.label for row in rows] == cells


def test_a_column_that_does_not_know_the_patient_hides_no_other(tmp_path: Path) -> None:
    """CLAM's tables may have a case_id and a patient_id."""
    records = [dict(case_id=a, patient_id=b) for a, b in (("NA", "p1"), ("c2", "p2"), ("-", ""))]
    with pytest.warns(UserWarning, match="the patient of 1 slide.* not known: -$"):
        found = read_patients(tmp_path, [*records, {}], "case_id", "patient_id")
    assert found == ["p1", "c2", None, None]


def test_ignored_columns_are_named_with_a_suggestion(tmp_path: Path) -> None:
    path = write_table(tmp_path, "slide_id,path,lable,age\ns1,a.svs,x,60\n")
    with pytest.warns(UserWarning, match=r"columns that are not read: lable \(label\?\), age$"):
        read_cohort(path)


def test_slide_ids_that_some_disks_do_not_tell_apart_are_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path, "slide_id,path\nS1,a.svs\ns1,b.svs\n")
    assert "slide_id 's1' equals 'S1' on some disks" in refusal(path)


@pytest.mark.parametrize(
    ("name", "slide_id"),
    [
        ("16.1.SVS", "16.1"),
        ("a.b.c.svs", "a.b.c"),
        ("16.1", "16.1"),
        ("x.ome.tiff", "x.ome"),
        (" b.svs", "b"),
        (" .svs", "' '"),
        (".case7", "case7"),
        ("a .svs", "a"),
        ("c\u00a0.svs", "c"),
        (os.fsdecode(b"caf\xe9.svs"), "caf\\xe9"),
    ],
)
def test_only_the_suffix_of_a_slide_and_blanks_are_no_part_of_its_name(
    name: str, slide_id: str
) -> None:
    assert slide_name(name) == slide_id


def test_exact_names_win_over_those_without_a_suffix() -> None:
    rows = [SlideRow(slide_id, Path("x")) for slide_id in ("16", "16.1", "17.svs", "18.svs")]
    found = match_names(rows, ["16", "16.1", "17", "18", "18.svs"])
    assert [row.slide_id for row in found] == ["16", "16.1", "17", "18.svs"]


def test_a_path_may_end_with_a_blank_if_its_folder_does(tmp_path: Path) -> None:
    (tmp_path / "case ").mkdir()
    path = write_table(tmp_path, "slide_id,path\na,case \nb, b.svs \n")
    assert [row.path.name for row in read_cohort(path)] == ["case ", "b.svs"]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (SlideRow("x" * 200, Path("a.svs")), None),
        (SlideRow("ä" * 101, Path("a.svs")), "its slide_id has 202 bytes, too many"),
        (SlideRow("a\nb", Path("a.svs")), "its slide_id 'a\\nb' holds control characters"),
        (SlideRow("a\0b", Path("a.svs")), "its slide_id 'a\\x00b' holds control characters"),
        (SlideRow("a", Path(os.fsdecode(b"\xe9.svs"))), "its path '\\udce9.svs' holds"),
        (SlideRow("a", Path("b" * 300, "a.svs")), "its path has 300 bytes, too many"),
        (SlideRow("a", Path("a\0.svs")), "its path 'a\\x00.svs' holds control characters"),
        (SlideRow("a\x1b[2J", Path("a.svs")), "its slide_id 'a\\x1b[2J' holds control characters"),
        (SlideRow("a/b", Path("a.svs")), "its slide_id 'a/b' cannot be a file name"),
        (SlideRow("..", Path("a.svs")), "its slide_id '..' cannot be a file name"),
        (SlideRow(".s1", Path("a.svs")), "its slide_id '.s1' cannot be a file name"),
        (SlideRow("", Path("a.svs")), "its slide_id '' cannot be a file name"),
        (SlideRow("=1+1", Path("a.svs")), "its slide_id '=1+1' begins with '=', which a"),
        (SlideRow("@SUM(A1)", Path("a.svs")), "its slide_id '@SUM(A1)' begins with '@', which a"),
        (SlideRow("-1", Path("a.svs")), None),
        (SlideRow("+1", Path("a.svs")), None),
    ],
)
def test_a_slide_that_no_file_can_be_named_after_says_why(row: SlideRow, fault: str | None) -> None:
    assert (row.fault or "")[: len(fault or "") or None] == (fault or "")


def test_a_source_that_is_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none"
    assert refusal(path) == f"{path}: does not exist; give a cohort table or a folder of slides"


def test_a_folder_gives_a_row_for_every_slide_below_it(tmp_path: Path) -> None:
    touch(tmp_path, "b.svs", "sub/a.TIF", "sub/deep/c.ndpi", "d.png", "notes.txt", "table.csv")
    assert read_cohort(tmp_path) == [
        SlideRow("b", tmp_path / "b.svs"),
        SlideRow("d", tmp_path / "d.png"),
        SlideRow("a", tmp_path / "sub" / "a.TIF"),
        SlideRow("c", tmp_path / "sub" / "deep" / "c.ndpi"),
    ]


def test_a_folder_of_dicom_files_is_one_slide(tmp_path: Path) -> None:
    touch(tmp_path, "case7/level-0.DCM", "case7/level-1.DCM", "case8/level-0.dcm", "x.svs")
    found = {row.slide_id: row.path for row in read_cohort(tmp_path)}
    assert found == {
        "case7": tmp_path / "case7",
        "case8": tmp_path / "case8",
        "x": tmp_path / "x.svs",
    }


def test_hidden_files_and_folders_named_like_slides_are_no_slides(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "._a.svs", ".b.123.tmp.tiff")
    (tmp_path / "c.svs").mkdir()
    assert [row.slide_id for row in read_cohort(tmp_path)] == ["a"]


def test_associated_pictures_are_no_slides_and_are_named(tmp_path: Path) -> None:
    """As scanners, viewers and downloads leave them; a name alone tells nothing."""
    touch(tmp_path, "a.svs", "a_macro.png", "a.svs-label.jpg", "a_overview.tif", "Thumbnail.jpeg")
    touch(tmp_path, "pictures/b.png", "pictures/b_thumb.png", "pictures/x_macro.png")
    touch(tmp_path, "dicom/level.dcm", "dicom/label.dcm", "white_label/c_labelled.svs")
    with pytest.warns(UserWarning, match="picture") as said:
        rows = read_cohort(tmp_path)
    assert [row.slide_id for row in rows] == ["a", "dicom", "b", "x_macro", "c_labelled"]
    assert str(said[0].message) == (
        f"{tmp_path}: 5 picture(s) of slides (macro, label, thumbnail) are skipped: "
        "Thumbnail.jpeg, a.svs-label.jpg, a_macro.png, a_overview.tif, b_thumb.png"
    )


def test_linked_folders_are_read_once_under_their_own_names_first(tmp_path: Path) -> None:
    touch(tmp_path / "far", "b.svs")
    touch(tmp_path / "cohort", "real/a.svs")
    (tmp_path / "cohort" / "a link").symlink_to(tmp_path / "cohort" / "real")
    (tmp_path / "cohort" / "far").symlink_to(tmp_path / "far")
    (tmp_path / "cohort" / "same").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "loop").symlink_to(tmp_path / "cohort")
    folder = tmp_path / "cohort"
    assert [row.path for row in read_cohort(folder)] == [
        folder / "far" / "b.svs",
        folder / "real" / "a.svs",
    ]


def test_links_that_lead_to_no_file_cost_a_warning(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "b.svs")
    (tmp_path / "round.svs").symlink_to("round.svs")
    (tmp_path / "gone.svs").symlink_to("nowhere.svs")
    with pytest.warns(UserWarning, match=r"round\.svs: skipped: Too many levels of symbolic"):
        assert [row.slide_id for row in read_cohort(tmp_path)] == ["a", "b"]


def test_slides_inside_the_output_are_not_said_to_be_missing(tmp_path: Path) -> None:
    touch(tmp_path, "data/slides/a.svs")
    for output in (tmp_path / "data", tmp_path / "data" / "slides"):
        with pytest.raises(InputError, match=f"is inside --output {output}, .* choose another"):
            read_cohort(tmp_path / "data" / "slides", leave_out=output)


def test_a_folder_without_slides_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "readme.txt")
    assert refusal(tmp_path) == (
        f"{tmp_path}: holds no slides; give a cohort table or a folder of slides"
    )


def test_two_files_of_one_name_in_a_folder_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "one/a.svs", "two/a.tif")
    message = refusal(tmp_path)
    assert "slide_id 'a' occurs twice" in message
    assert "in a cohort table" in message


def test_a_written_table_reads_back_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        SlideRow("s1", Path("scans/a, b.svs"), "tumour", "p1", "val", 0.2425, None),
        SlideRow("s2", tmp_path / "c.svs", None, None, None, None, 40.0),
    ]
    write_cohort(tmp_path / "other" / "cohort.csv", rows)
    assert read_cohort(tmp_path / "other" / "cohort.csv") == [
        replace(rows[0], path=tmp_path / "scans" / "a, b.svs"),
        rows[1],
    ]


# Parts


def test_a_given_split_is_obeyed() -> None:
    given = ["train", "val", "test", "test", "train", "val"]
    rows = [SlideRow(f"s{i}", Path(f"s{i}.svs"), "a", split=part) for i, part in enumerate(given)]
    for seed in range(5):
        assert split_cohort(rows, seed=seed, val_fraction=0.5, test_fraction=0.5) == {
            f"s{i}": part for i, part in enumerate(given)
        }


def test_a_cohort_without_parts_is_divided_by_patient_and_label() -> None:
    rows = make_rows("a", 40, slides_each=3) + make_rows("b", 20, slides_each=2)
    parts = split_cohort(rows, test_fraction=0.25, val_fraction=0.2)
    assert set(parts) == {row.slide_id for row in rows}
    # a: 40 patients = 10 test, then a fifth of 30 = 6 val; b: 20 = 5 test, a fifth of 15 = 3 val
    assert patients_by_part(rows, parts) == {
        ("a", "test"): 10,
        ("a", "val"): 6,
        ("a", "train"): 24,
        ("b", "test"): 5,
        ("b", "val"): 3,
        ("b", "train"): 12,
    }


def test_no_patient_is_divided() -> None:
    rows = make_rows("a", 15, slides_each=4) + make_rows("b", 15, slides_each=3)
    for seed in range(10):
        parts = split_cohort(rows, seed=seed)
        found = {(row.patient, parts[row.slide_id]) for row in rows}
        assert len(found) == 30


def test_without_val_a_tenth_of_the_train_patients_of_each_label_goes_there() -> None:
    train = make_rows("a", 40, slides_each=2, split="train") + make_rows("b", 20, split="train")
    test = make_rows("c", 10, split="test")
    parts = split_cohort(train + test)
    assert patients_by_part(train + test, parts) == {
        ("a", "train"): 36,
        ("a", "val"): 4,
        ("b", "train"): 18,
        ("b", "val"): 2,
        ("c", "test"): 10,
    }


def test_test_slides_never_move_to_val() -> None:
    rows = make_rows("a", 12, split="train") + make_rows("b", 12, split="test")
    for seed in range(10):
        parts = split_cohort(rows, seed=seed, val_fraction=0.5)
        assert {parts[row.slide_id] for row in rows if row.label == "b"} == {"test"}


def test_parts_depend_on_the_seed_alone_and_not_on_the_order_of_rows() -> None:
    rows = make_rows("a", 30, slides_each=2) + make_rows("b", 30)
    first = split_cohort(rows, seed=3)
    for attempt in range(5):
        shuffled = rows.copy()
        random.Random(attempt).shuffle(shuffled)
        assert split_cohort(shuffled, seed=3) == first
    assert len({tuple(sorted(split_cohort(rows, seed=seed).items())) for seed in range(5)}) == 5


def test_parts_are_the_same_in_every_process() -> None:
    script = (
        "from pathlib import Path; from dasmil.slides.cohort import SlideRow; "
        "from dasmil.slides.splits import split_cohort;"
        "rows = [SlideRow(f's{i}', Path(f'{i}'), 'ab'[i % 2], f'p{i // 3}') for i in range(60)];"
        "print(sorted(split_cohort(rows, seed=1).items()))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert "'val'" in outputs[0]


def test_another_slide_of_a_patient_changes_no_part() -> None:
    rows = make_rows("a", 30) + make_rows("b", 30)
    more = SlideRow("new", Path("new.svs"), "a", rows[7].patient_id)
    parts = split_cohort(rows)
    assert split_cohort([more, *rows]) == {**parts, "new": parts[rows[7].slide_id]}


def test_the_only_patient_of_a_label_stays_in_train() -> None:
    parts = split_cohort(make_rows("a", 10) + make_rows("rare", 1, slides_each=3))
    assert {parts[f"rare0_{s}"] for s in range(3)} == {"train"}


def test_a_label_of_few_patients_still_reaches_val_and_test() -> None:
    rows = make_rows("a", 3)
    assert sorted(split_cohort(rows).values()) == ["test", "train", "val"]


def test_fraction_zero_takes_nothing() -> None:
    parts = split_cohort(make_rows("a", 20), val_fraction=0.0, test_fraction=0.0)
    assert set(parts.values()) == {"train"}


def test_a_patient_with_slides_of_two_labels_is_kept_together() -> None:
    mixed = [
        SlideRow(f"m{p}_{label}", Path(f"m{p}_{label}.svs"), label, f"mixed{p}")
        for p in range(10)
        for label in ("a", "b")
    ]
    rows = mixed + make_rows("a", 10) + make_rows("b", 10)
    parts = split_cohort(rows, test_fraction=0.3)
    assert all(parts[f"m{p}_a"] == parts[f"m{p}_b"] for p in range(10))
    assert sum(parts[f"m{p}_a"] == "test" for p in range(10)) == 3


@pytest.mark.parametrize("pair", [("train", "val"), ("train", "test"), ("val", "test")])
def test_a_patient_in_two_parts_is_refused_by_name(pair: tuple[str, str]) -> None:
    rows = [
        SlideRow("s1", Path("x.svs"), "a", "Mustermann", pair[0]),
        SlideRow("s2", Path("x.svs"), "a", "Mustermann", pair[1]),
        *make_rows("a", 3, split="train"),
        *make_rows("b", 3, split="val"),
    ]
    with pytest.raises(InputError, match="patient Mustermann has slides in more than one split"):
        split_cohort(rows)


def test_a_patient_in_train_and_test_is_refused_also_when_val_is_drawn() -> None:
    rows = [
        SlideRow("s1", Path("x.svs"), "a", "Mustermann", "train"),
        SlideRow("s2", Path("x.svs"), "a", "Mustermann", "test"),
        *make_rows("a", 1, split="train"),
    ]
    for seed in range(6):  # whether or not Mustermann is drawn for val
        with pytest.raises(InputError, match="patient Mustermann"):
            split_cohort(rows, seed=seed)


def test_a_split_filled_for_some_slides_only_is_refused_by_name() -> None:
    rows = make_rows("a", 3, split="train") + make_rows("b", 2)
    with pytest.raises(InputError, match="fill it for b0_0, b1_0 too"):
        split_cohort(rows)


def test_slides_without_label_have_no_part() -> None:
    labelled = make_rows("a", 20)
    unlabelled = [
        SlideRow("u1", Path("x.svs")),
        SlideRow("u2", Path("x.svs"), split="train"),
        SlideRow("u3", Path("x.svs"), patient_id=labelled[0].patient_id, split="test"),
    ]
    assert split_cohort(labelled + unlabelled) == split_cohort(labelled)
    assert split_cohort(unlabelled) == {}


def test_however_large_the_fraction_a_patient_of_each_label_stays_in_train() -> None:
    rows = [*make_rows("a", 2), *make_rows("b", 3)]
    parts = split_cohort(rows, val_fraction=0.0, test_fraction=0.99)
    trained = {row.label for row in rows if parts[row.slide_id] == "train"}
    assert trained == {"a", "b"}


def test_links_in_a_circle_and_names_that_no_file_has_end_no_split(tmp_path: Path) -> None:
    (tmp_path / "round.svs").symlink_to("round.svs")
    paths = [tmp_path / "round.svs", tmp_path / "a\0.svs", tmp_path / ("x" * 300), tmp_path / "d"]
    rows = [SlideRow(f"s{n}", path, "ab"[n % 2], f"p{n}") for n, path in enumerate(paths)]
    assert set(split_cohort(rows)) == {row.slide_id for row in rows}


@pytest.mark.parametrize(
    "values",
    [
        *("text", 5, [5], [{}], [{"slide_id": 5}], [{"slide_id": "a", "split": "all"}]),
        *(
            [["a", 1]],
            [{"slide_id": "a", "x": 1}],
            {"a": None},
            [{"slide_id": "a", "digest": None}],
        ),
    ],
)
def test_records_of_slides_that_are_damaged_are_one_sentence(values: object) -> None:
    with pytest.raises(InputError, match="the file is damaged"):
        read_records(values)
