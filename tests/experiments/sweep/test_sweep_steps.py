"""Which steps there are, and how a folder's step is known again."""

import json
import shutil
from dataclasses import replace

import pytest
import yaml
from road import COLON, CONFIGS
from stand_in import plan_one

from dasmil.config_files import find_config
from dasmil.errors import InputError
from dasmil.experiments.sweep.bag_steps import plan_bags
from dasmil.experiments.sweep.runs import SweepRow, plan
from dasmil.experiments.sweep.steps import Fold, in_order, refuse_other_steps
from dasmil.files import write_text
from dasmil.methods import DASMIL

YAMLS = [*CONFIGS.rglob("*.yaml"), *COLON.glob("*.yaml")]
SWEEPS = [path for path in YAMLS if "rows" in yaml.safe_load(path.read_text())]
TWO_FOLDS = [Fold(0, 2), Fold(1, 2)]


def write_record(step):
    write_text(step.folder / "run.json", json.dumps(step.record()))


# the configs that we ship


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_our_tables_can_be_planned(path, tmp_path, bags):
    table = yaml.safe_load(path.read_text())
    rows = [SweepRow(**row) for row in table["rows"]]
    runs = plan(rows, table["base"], [0], tmp_path / "out", {None: bags})
    assert all(list(row.paper) in ([], table["columns"]) for row in rows)
    default = [run for [run] in runs if run.row.name == "scales_x10_x20"]
    assert len(set(default)) == (path.stem != "table5")
    assert table["name"] == path.stem
    write_text(tmp_path / "cohort.csv", "")
    road = {name: table.get(name, ()) for name in ("tile", "extractor")}
    plan_bags(tmp_path, tmp_path / "cohort.csv", ["x20"], [None], embed=(), **road)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_a_row_sets_options_that_exist_and_differ_from_the_defaults(path):
    options = DASMIL().flat_options
    for row in yaml.safe_load(path.read_text())["rows"]:
        for name, value in row["set"].items():
            if name != "data.scales":
                assert options[name.removeprefix("model.")] != value, (row["label"], name)


@pytest.mark.parametrize("label", ["τ = 2", "λ = 0.5", "β = 1.2"])
def test_the_label_of_a_row_is_what_it_sets(label):
    rows = [row for path in SWEEPS for row in yaml.safe_load(path.read_text())["rows"]]
    [row] = [row for row in rows if row["label"] == label]
    symbol, value = label.split(" = ")
    name = {"τ": "temperature", "λ": "distillation", "β": "criticality"}[symbol]
    assert row["set"][f"model.objective.{name}"] == float(value)


# which steps


def test_a_config_is_taken_from_here_else_from_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = CONFIGS / "preset" / "paper.yaml"
    assert find_config("configs/preset/paper.yaml") == ours
    assert find_config("preset/paper.yaml") == ours
    here = tmp_path / "preset" / "paper.yaml"
    write_text(here, "")
    assert find_config("preset/paper.yaml") == here
    with pytest.raises(InputError, match=r"preset/none\.yaml: no such config"):
        find_config("preset/none.yaml")


def test_rows_with_the_same_configs_share_their_runs(tmp_path, bags):
    tau, paper = {"model.objective.temperature": 2.0}, "configs/preset/paper.yaml"
    rows = [SweepRow("a"), SweepRow("b", (paper,), set=tau), SweepRow("c", (paper[8:],), set=tau)]
    table = plan(rows, ["configs/mil.yaml"], [0, 3], tmp_path, {None: bags})
    folders = [[str(run.folder.relative_to(tmp_path)) for run in of_row] for of_row in table]
    assert folders[0] == ["base/seed_0", "base/seed_3"]
    assert folders[1] == ["paper+temperature_2.0/seed_0", "paper+temperature_2.0/seed_3"]
    assert table[1] == table[2]
    assert len({run for of_row in table for run in of_row}) == 4


def test_each_row_has_a_run_a_fold_and_seed(tmp_path, bags):
    [runs] = plan([SweepRow("a")], [], [0, 3], tmp_path, dict.fromkeys(TWO_FOLDS, bags))
    assert [str(run.folder.relative_to(tmp_path)) for run in runs] == [
        *("base/fold_0/seed_0", "base/fold_0/seed_3"),
        *("base/fold_1/seed_0", "base/fold_1/seed_3"),
    ]
    assert [run.name for run in runs][2:] == ["base fold 1 seed 0", "base fold 1 seed 3"]


def test_other_configs_in_one_folder_are_refused(tmp_path, bags):
    write_text(tmp_path / "paper.yaml", "")
    rows = [SweepRow("ours", ("preset/paper.yaml",))]
    rows += [SweepRow("other", (str(tmp_path / "paper.yaml"),))]
    with pytest.raises(InputError, match=r"the row 'other' and another one"):
        plan(rows, [], [0], tmp_path / "out", {None: bags})


def test_a_row_cannot_take_the_folder_of_the_bags(tmp_path, bags):
    write_text(tmp_path / "bags.yaml", "")
    with pytest.raises(InputError, match=r"the row 'a' would write into .*out/bags"):
        plan([SweepRow("a", (str(tmp_path / "bags.yaml"),))], [], [0], tmp_path / "out", {})


# what is known again


def test_a_run_with_other_settings_is_refused_with_the_difference(tmp_path, bags, own, monkeypatch):
    run = plan_one(tmp_path, own)
    write_record(run)
    refuse_other_steps([run])

    own.write_text("trainer: {max_epochs: 4}\n")
    (bags / "extractors.json").write_text('{"x20": {}}')
    with pytest.raises(InputError) as error:
        refuse_other_steps([run])
    assert str(error.value) == (
        f"{run.folder}: made with other configs (own.yaml) and other bags ({bags} as it was then); "
        "choose another --output, or delete that folder to start over"
    )

    write_record(run)
    monkeypatch.setattr("dasmil.experiments.sweep.steps.__version__", "99")
    with pytest.raises(InputError, match=r"made with dasmil 0\.2"):
        refuse_other_steps([run])


def test_a_record_from_before_folds_existed_is_refused(tmp_path, bags):
    run = plan_one(tmp_path)
    old = {"dasmil": "0.1", "fit": [], "seed": 0, "configs": [], "bags": "B", "bags_sha256": {}}
    write_text(run.folder / "run.json", json.dumps(old))
    with pytest.raises(InputError, match="made with a version of dasmil with other records"):
        refuse_other_steps([run])


def test_other_options_of_a_row_are_refused(tmp_path, bags):
    run = plan_one(tmp_path, options={"model.objective.temperature": 2.0})
    fit = run.fit()
    assert fit[fit.index("--model.objective.temperature") + 1] == "2.0"
    write_record(run)
    other = replace(run, overrides=(("model.objective.temperature", "2.5"),))
    with pytest.raises(InputError, match=r"another model.objective.temperature \(2.0\)"):
        refuse_other_steps([other])


def test_the_order_of_configs_matters(tmp_path, bags, own):
    run = plan_one(tmp_path, own)
    write_record(run)
    with pytest.raises(InputError, match=r"other configs \(another order\)"):
        refuse_other_steps([replace(run, configs=run.configs[::-1])])


def test_a_fold_of_another_division_is_refused(tmp_path, bags):
    write_record(plan([SweepRow("a")], [], [0], tmp_path, {Fold(1, 5): bags})[0][0])
    with pytest.raises(InputError, match=r"fold_1/seed_0: made with another number of folds \(5\)"):
        refuse_other_steps(plan([SweepRow("a")], [], [0], tmp_path, {Fold(1, 4): bags})[0])


def test_metrics_of_other_annotations_are_refused(tmp_path, bags):
    truth = tmp_path / "truth"
    write_text(truth / "a.csv", "x,y\n1,2\n")
    run = plan_one(tmp_path, truth=truth)
    write_record(run)
    with pytest.raises(InputError, match=r"made with other annotations \(.*/truth as it was then"):
        refuse_other_steps([plan_one(tmp_path)])
    write_text(truth / "a.csv", "x,y\n1,3\n")
    with pytest.raises(InputError, match="made with other annotations"):
        refuse_other_steps([run])
    write_record(plan_one(tmp_path))
    with pytest.raises(InputError, match=r"made with other annotations \(none\)"):
        refuse_other_steps([run])
    write_record(run)
    chosen = plan_one(tmp_path, truth=truth, truth_classes=("Tumor", "a b"))
    assert chosen.test()[5:9] == ["--truth", str(truth), "--truth_classes", '["Tumor", "a b"]']
    with pytest.raises(InputError, match=r"another choice of annotated classes \(none\)"):
        refuse_other_steps([chosen])


def test_a_folder_of_something_else_is_left_alone(tmp_path, bags):
    run = plan_one(tmp_path)
    write_text(run.folder / "run.lock", "")  # what a sweep leaves that was killed at once
    refuse_other_steps([run])
    write_text(run.checkpoints / "best.ckpt", "")
    with pytest.raises(InputError, match="made with something else"):
        refuse_other_steps([run])


def test_a_run_of_other_extractors_is_refused_even_when_their_folders_are_gone(tmp_path, own):
    def planned():
        cohort, configs = tmp_path / "cohort.csv", {"tile": (), "embed": ()}
        write_text(cohort, "slide_id,path\n")
        road = plan_bags(tmp_path, cohort, ["x20"], TWO_FOLDS, extractor=[str(own)], **configs)
        return in_order(plan([SweepRow("a")], [], [0], tmp_path, road)[0])

    for step in planned():
        write_record(step)
    refuse_other_steps(planned())
    own.write_text("trainer: {max_epochs: 4}\n")
    with pytest.raises(InputError, match=r"extractors/fold_0/x20: made with other configs \(own"):
        refuse_other_steps(planned())
    shutil.rmtree(tmp_path / "extractors")
    shutil.rmtree(tmp_path / "bags")
    with pytest.raises(InputError) as error:
        refuse_other_steps(planned())
    assert str(error.value).startswith(
        f"{tmp_path}/base/fold_0/seed_0: made with 'bags fold 0' made with "
        "'extractor x20 fold 0' made with other configs (own.yaml); "
    )


# a run


@pytest.mark.parametrize("allowed", [True, False])
def test_a_run_is_tested_as_it_was_fitted(tmp_path, bags, allowed):
    run = plan_one(tmp_path)
    fitted = {
        "data": {"init_args": {"allow_seen_slides": allowed, "split": {"table": "list.csv"}}},
        "trainer": {"accelerator": "cpu"},
    }
    write_text(run.folder / "config.yaml", yaml.safe_dump(fitted))
    arguments = run.test()
    seen = arguments.index("--data.allow_seen_slides")
    assert arguments[seen + 1] == ("true" if allowed else "false")
    assert arguments[arguments.index("--data.split.table") + 1] == "list.csv"
    assert arguments[-2:] == ["--trainer.accelerator", "cpu"]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("auroc", 0.7),
        ("x10/auroc", 0.6),
        ("x40/auroc", None),  # a row without this scale
        ("instance_auroc", 0.8),  # of x20, not of x5
        ("specificity", None),
        ("nothing", None),
    ],
)
def test_a_column_without_scale_is_the_finest_scales(tmp_path, bags, column, value):
    run = plan_one(tmp_path)
    figures = {"auroc": 0.7, "x10/auroc": 0.6, "x20/auroc": 0.7, "specificity": None}
    figures |= {"x20/instance_auroc": 0.8, "x5/instance_auroc": 0.5, "x20/specificity": 0.1}
    figures |= {"bag/x20": 0.3}
    write_text(run.metrics, json.dumps({f"test/{key}": value for key, value in figures.items()}))
    assert run.metric(column) is None  # not done
    write_text(run.mark, "")
    assert run.metric(column) == value
