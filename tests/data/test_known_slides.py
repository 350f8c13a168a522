"""Which slides of a folder may be evaluated with a checkpoint that has met some of them."""

from pathlib import Path
from typing import Any

import pytest
from bag_factory import CLASSES, trainer_of, write_bags

from dasmil.data import BagDataModule, SplitOptions
from dasmil.errors import InputError
from dasmil.slides.study import SlideRecord, plain_records, read_records
from dasmil.tables import write_csv

PARTS = ("train", "train", "train", "train", "val", "val", "test", "test")
NAMES = ("n0", "t0", "n1", "t1", "n2", "t2", "n3", "t3")
SPLIT = dict(zip(NAMES, PARTS, strict=True))
LABELS: dict[str, str | None] = {name: CLASSES[name[0] == "t"] for name in NAMES}
PATIENTS = {name: f"p{number}" for number, name in enumerate(NAMES)}
DIGESTS = {name: f"pixels of {name}" for name in NAMES}


def study(digests: bool = True, patients: bool = True) -> list[dict[str, str | None]]:
    """What a checkpoint of the eight slides holds."""
    return plain_records(
        SlideRecord(
            name,
            PATIENTS[name] if patients else None,
            SPLIT[name],
            DIGESTS[name] if digests else "",
            LABELS[name],
        )
        for name in NAMES
    )


def evaluated(
    folder: Path, stage: str = "test", met: Any = None, other_cohort: bool = False, **options: Any
) -> list[str]:
    """Names of the evaluated slides.

    Parameters
    ----------
    met: slides that the model has met; those of :func:`study` if None.
    options: of the split.
    """
    split = SplitOptions(**options)
    data = BagDataModule(folder, CLASSES, num_workers=0, split=split, other_cohort=other_cohort)
    data.trainer = trainer_of(study() if met is None else met)
    data.setup(stage)
    return [row.slide_id for row in data.rows_of("test" if stage == "test" else data.val_part)]


def write_table(path: Path, split: dict[str, str]) -> str:
    write_csv(path, ("slide_id", "split"), ({"slide_id": s, "split": p} for s, p in split.items()))
    return str(path)


def test_a_fit_remembers_each_slide_with_patient_part_and_digest(tmp_path: Path) -> None:
    labels = {**LABELS, "u": None}
    folder = write_bags(tmp_path, labels, SPLIT, PATIENTS, digests=DIGESTS)
    data = BagDataModule(folder, CLASSES, num_workers=0)
    data.setup("fit")
    assert data.study() == [*study(), *plain_records([SlideRecord("u", split="unlabelled")])]


def test_known_slides_keep_their_part_and_new_ones_are_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = {**LABELS, "new": "normal", "u": None, "bare": "normal"}
    folder = write_bags(tmp_path, labels, digests={**DIGESTS, "new": "x"}, missing=["bare"])
    with pytest.warns(UserWarning, match="no bag file"):
        assert evaluated(folder) == ["n3", "t3", "new"]
    assert capsys.readouterr().out == (
        "test: 3 slides are tested, 8 are left out: 4 trained on (n0, t0, n1, t1), 2 validated on "
        "(n2, t2), 1 without a label (u), 1 without a bag file (bare)\n"
        "test: 1 bag(s) hold no digest of their slide, only its name: u\n"
    )
    with pytest.warns(UserWarning, match="no bag file"):
        assert evaluated(folder, "validate") == ["n2", "t2"]


def test_the_same_name_with_other_content_is_another_slide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An external cohort whose slides are counted from the same number on is tested as a whole."""
    digests = {name: f"other {name}" for name in NAMES}
    folder = write_bags(tmp_path, LABELS, dict.fromkeys(NAMES, "test"), digests=digests)
    assert evaluated(folder) == list(NAMES)
    said = capsys.readouterr().out
    assert "8 slides are tested, 0 are left out" in said
    assert "8 slide(s) have the name of a slide of the checkpoint but other content" in said


def test_the_same_content_under_another_name_is_the_same_slide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels: dict[str, str | None] = {"a": "normal", "b": "normal", "c": "tumour"}
    digests = {"a": DIGESTS["n0"], "b": DIGESTS["n3"], "c": "new"}
    folder = write_bags(tmp_path, labels, digests=digests)
    assert evaluated(folder) == ["b", "c"]
    assert "1 trained on (a (there n0))" in capsys.readouterr().out
    write_bags(tmp_path, labels, dict.fromkeys("abc", "test"), digests=digests)
    with pytest.raises(InputError, match=r"cohort\.csv: 1 slide.*: a \(there n0\) \(trained on\)"):
        evaluated(folder)


def test_without_digests_the_names_decide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_bags(tmp_path, {**LABELS, "new": "normal"})
    assert evaluated(folder) == ["n3", "t3", "new"]
    assert "9 bag(s) hold no digest" in capsys.readouterr().out
    assert evaluated(folder, met=SPLIT) == ["n3", "t3", "new"]  # of an older checkpoint
    assert "holds no digests of its slides, only their names and no patients" in (
        capsys.readouterr().out
    )
    assert evaluated(folder, other_cohort=True) == [*NAMES, "new"]


def test_a_fit_says_nothing_of_digests_when_it_validates_its_own_slides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = BagDataModule(write_bags(tmp_path, LABELS, SPLIT), CLASSES, num_workers=0)
    data.setup("fit")
    data.trainer = trainer_of(data.study())
    data.setup("validate")
    assert capsys.readouterr().out == (
        "validate: 2 slides are validated, 6 are left out: 4 trained on (n0, t0, n1, t1), 2 in the "
        "part 'test' (n3, t3)\n"
    )


def test_new_slides_of_a_patient_that_was_trained_on_are_left_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels: dict[str, str | None] = dict.fromkeys(("of_p0", "of_p4", "of_p6", "of_p9"), "normal")
    patients = {name: name[3:] for name in labels}
    folder = write_bags(tmp_path / "a", labels, patients=patients)
    assert evaluated(folder) == ["of_p6", "of_p9"]
    said = capsys.readouterr().out
    assert "1 of a patient trained on (of_p0)" in said
    assert "1 of a patient validated on (of_p4)" in said
    marked = write_bags(tmp_path / "b", labels, dict.fromkeys(labels, "test"), patients)
    with pytest.raises(InputError, match=r"of_p0 \(of a patient trained on: p0\).*other_cohort"):
        evaluated(marked)
    assert evaluated(marked, other_cohort=True) == list(labels)


def test_the_table_knows_patients_that_an_older_checkpoint_does_not(tmp_path: Path) -> None:
    labels: dict[str, str | None] = {"n0": "normal", "again": "normal", "n3": "normal"}
    folder = write_bags(tmp_path, labels, patients={"n0": "Mustermann", "again": "Mustermann"})
    assert evaluated(folder, met=SPLIT) == ["n3"]
    data = BagDataModule(folder, CLASSES)
    data.trainer = trainer_of(SPLIT)
    data.setup("predict")  # nothing is measured there
    assert data.describe_met_slides() == {"n0": "train", "again": "patient in train", "n3": "test"}


def test_a_split_table_that_is_given_is_obeyed_or_refused(tmp_path: Path) -> None:
    folder = write_bags(tmp_path / "bags", {**LABELS, "new": "normal"}, SPLIT | {"new": "test"})
    table = write_table(tmp_path / "fair.csv", {"new": "test", "n3": "train", "n2": "val"})
    with pytest.warns(UserWarning, match="does not name"):
        assert evaluated(folder, table=table) == ["new"]
    with pytest.warns(UserWarning, match="does not name"):
        assert evaluated(folder, "validate", table=table) == ["n2"]
    table = write_table(
        tmp_path / "unfair.csv", {**SPLIT, "n0": "test", "n2": "test", "new": "val"}
    )
    with pytest.raises(
        InputError, match=r"data\.split\.table: 2 slide.*n0 \(trained on\), n2 \(val"
    ):
        evaluated(folder, table=table)
    table = write_table(tmp_path / "no_val.csv", SPLIT | dict.fromkeys(("n2", "t2"), "train"))
    with pytest.warns(UserWarning, match="does not name"):  # validation was drawn from train
        assert evaluated(folder, "validate", table=table) == ["n2", "t2"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_folds": 2, "fold": 0}, "data.split.num_folds, data.split.fold"),
        ({"test_fraction": 0.9}, "data.split.test_fraction"),
        ({"seed": 0, "test_fraction": 0.9}, "data.split.test_fraction, data.split.seed"),
    ],
)
def test_options_that_draw_are_refused_if_they_contradict_the_checkpoint(
    tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    folder = write_bags(tmp_path, LABELS)
    with pytest.raises(InputError, match=rf"{name}: \d slide\(s\) of the part 'test' may not"):
        evaluated(folder, **options)


def test_the_options_of_the_fit_may_be_given_again(tmp_path: Path) -> None:
    labels = {f"{c}{n}": CLASSES[c == "t"] for n in range(10) for c in "nt"}
    folder = write_bags(tmp_path, labels)
    options: dict[str, Any] = {"num_folds": 5, "fold": 3, "seed": 0}
    fitted = BagDataModule(folder, CLASSES, num_workers=0, split=SplitOptions(0.3, **options))
    fitted.setup("fit")
    tested = [row.slide_id for row in fitted.rows_of("test")]
    assert evaluated(folder, met=fitted.study(), **options) == tested


@pytest.mark.parametrize("unknown", [{}, []])
def test_a_checkpoint_that_does_not_know_its_slides_asks_for_a_split(
    tmp_path: Path, unknown: Any
) -> None:
    """As imported ones: not every slide is a test slide."""
    folder = write_bags(tmp_path / "a", LABELS)
    for stage, part in (("test", "test"), ("validate", "val")):
        with pytest.raises(
            InputError, match=rf"does not know which slides .* name the {part} slid"
        ):
            evaluated(folder, stage, met=unknown)
    with pytest.raises(InputError, match="does not know which slides"):
        evaluated(folder, met=unknown, num_folds=2, fold=0)
    table = write_table(tmp_path / "split.csv", SPLIT)
    with pytest.warns(UserWarning, match=rf"does not know .* only {table} says that the test sl"):
        assert evaluated(folder, met=unknown, table=table) == ["n3", "t3"]
    column = write_bags(tmp_path / "b", LABELS, {"n3": "test", "n2": "val"})
    with pytest.warns(UserWarning, match=r"only the column split of .* says that the test slides"):
        assert evaluated(column, met=unknown) == ["n3"]
    with pytest.warns(UserWarning, match=r"says that the val slides are not among them"):
        assert evaluated(column, "validate", met=unknown) == ["n2"]
    data = BagDataModule(folder, CLASSES)
    data.trainer = trainer_of(unknown)
    data.setup("predict")
    assert data.describe_met_slides() == {}


def test_one_slide_under_two_names_in_two_parts_is_refused_by_fit(tmp_path: Path) -> None:
    folder = write_bags(tmp_path, LABELS, SPLIT, digests={**DIGESTS, "n3": DIGESTS["n0"]})
    with pytest.raises(InputError, match="n0 in train and n3 in test are the same slide under two"):
        BagDataModule(folder, CLASSES).setup("fit")


def test_records_of_older_checkpoints_are_read() -> None:
    assert read_records({"a": "train"}) == [SlideRecord("a", None, "train", "", None)]
    assert read_records(["a"]) == [SlideRecord("a")]
    assert read_records(study()) == read_records(plain_records(read_records(study())))
