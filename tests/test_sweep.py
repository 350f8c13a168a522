import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from road import CONF, CONFIGS, REPOSITORY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dasmil.cli import main
from dasmil.errors import InputError
from dasmil.files import write_text
from dasmil.sweep.figure import draw
from dasmil.sweep.processes import gpu_slots, gpus, last_error
from dasmil.sweep.runs import SweepRow, find_config, plan, refuse_other_runs
from dasmil.sweep.sweep import sweep
from dasmil.sweep.table import Cell, csv_rows, markdown

TABLES = sorted((CONFIGS / "sweep").glob("*.yaml"))
DEFAULT = ["ablation/scales_x10_x20.yaml"]  # λ = 1, β = 1, τ = 1.5


@pytest.fixture
def bags(tmp_path):
    """As much of a folder of bags as a sweep itself looks at."""
    write_text(tmp_path / "bags" / "cohort.csv", "slide_id,path\n")
    write_text(tmp_path / "bags" / "extractors.json", "{}")
    return tmp_path / "bags"


@pytest.fixture
def own(tmp_path):
    """A config of the user's."""
    write_text(tmp_path / "own.yaml", "trainer: {max_epochs: 3}\n")
    return tmp_path / "own.yaml"


def plan_one(tmp_path, *configs):
    row = SweepRow("row", tuple(map(str, configs)))
    [[run]] = plan([row], ["configs/dasmil.yaml"], [0], tmp_path / "out", tmp_path / "bags")
    return run


def test_it_starts_without_torch():
    code = "import sys, dasmil.sweep.sweep; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# the table


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.9, 0.8, 1.0), "0.900 ± 0.100"),
        ((0.9, None, 1.0), "0.950 ± 0.071 (2 of 3)"),
        ((0.9, None, None), "0.900 (1 of 3)"),
        ((0.9,), "0.900"),
        ((None, None), "–"),
    ],
)
def test_a_cell_says_how_many_seeds_it_is_of(values, text):
    assert str(Cell(values)) == text


def test_the_papers_figures_stand_beside_ours_where_there_are_any():
    rows = [SweepRow("a|b", (), {"auroc": 0.973}), SweepRow("own")]
    cells = [
        {"auroc": Cell((0.9, 1.0)), "accuracy": Cell((0.5, 0.5))},
        {"auroc": Cell((None, 0.7)), "accuracy": Cell((None, None))},
    ]
    assert markdown("Title", Path("BAGS"), (0, 4), rows, cells) == (
        "# Title\n\n"
        "test slides of BAGS, mean ± sd over seeds 0, 4; "
        "paper: the paper's figures on its own data, not comparable\n\n"
        "|  | auroc | paper | accuracy |\n"
        "| --- | --- | --- | --- |\n"
        "| a\\|b | 0.950 ± 0.071 | 0.973 | 0.500 ± 0.000 |\n"
        "| own | 0.700 (1 of 2) | – | – |\n"
    )
    records = list(csv_rows(rows, cells))
    assert [record["values"] for record in records] == ["0.9;1.0", "0.5;0.5", ";0.7", ";"]
    assert records[2] == {
        **{"label": "own", "column": "auroc", "paper": None},
        **{"mean": 0.7, "sd": None, "n": 1, "values": ";0.7"},
    }


def test_without_paper_and_with_one_seed_the_table_is_plain():
    text = markdown("T", Path("B"), (3,), [SweepRow("a")], [{"auroc": Cell((0.9,))}])
    assert "test slides of B, seed 3\n\n|  | auroc |\n" in text
    assert "paper" not in text


def test_the_picture_marks_seeds_and_the_papers_figures(tmp_path):
    def pixels_near(colour, values, paper):
        draw(tmp_path / "t.png", "T", [SweepRow("a", (), paper)], [{"auroc": Cell(values)}])
        picture = np.asarray(Image.open(tmp_path / "t.png").convert("RGB")).astype(int)
        return int((np.abs(picture - colour).max(axis=2) < 30).sum())

    blue, orange = (31, 119, 180), (255, 127, 14)
    assert pixels_near(orange, (0.9, 1.0), {}) == 0 < pixels_near(orange, (0.9, 1.0), {"auroc": 1})
    assert pixels_near(blue, (None, None), {}) == 0 < pixels_near(blue, (0.9, None), {})


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_our_tables_can_be_planned_and_share_the_default(path, tmp_path, bags):
    table = yaml.safe_load(path.read_text())
    rows = [SweepRow(**{**row, "configs": tuple(row["configs"])}) for row in table["rows"]]
    runs = plan(rows, table["base"], [0], tmp_path / "out", bags)
    assert all(list(row.paper) == table["columns"] for row in rows)
    default = [run for [run] in runs if run.folder.parent.name == "scales_x10_x20"]
    assert len(set(default)) == (path.stem != "table5")
    assert table["name"] == path.stem


def test_every_ablation_changes_one_value():
    for path in (CONFIGS / "ablation").glob("*.yaml"):
        [(_, content)] = yaml.safe_load(path.read_text()).items()
        [(_, value)] = content["init_args"].items()
        digits = path.stem.rpartition("_")[2]
        assert not isinstance(value, float) or value == float(digits), path


# which runs


def test_a_config_is_taken_from_here_else_from_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = CONFIGS / "ablation" / "no_graph.yaml"
    assert find_config("configs/ablation/no_graph.yaml") == ours
    assert find_config("ablation/no_graph.yaml") == ours
    here = tmp_path / "ablation" / "no_graph.yaml"
    write_text(here, "")
    assert find_config("ablation/no_graph.yaml") == here
    with pytest.raises(InputError, match=r"ablation/none\.yaml: no such config"):
        find_config("ablation/none.yaml")


def test_rows_with_the_same_configs_share_their_runs(tmp_path, bags):
    tau = "configs/ablation/tau_2.0.yaml"
    rows = [SweepRow("a"), SweepRow("b", (*DEFAULT, tau)), SweepRow("c", (*DEFAULT, tau[8:]))]
    table = plan(rows, ["configs/dasmil.yaml"], [0, 3], tmp_path, bags)
    folders = [[str(run.folder.relative_to(tmp_path)) for run in of_row] for of_row in table]
    assert folders[0] == ["base/seed_0", "base/seed_3"]
    assert folders[1] == ["scales_x10_x20+tau_2.0/seed_0", "scales_x10_x20+tau_2.0/seed_3"]
    assert table[1] == table[2]
    assert len({run for of_row in table for run in of_row}) == 4


def test_other_configs_in_one_folder_are_refused(tmp_path, bags):
    write_text(tmp_path / "tau_2.0.yaml", "")
    rows = [SweepRow("ours", ("ablation/tau_2.0.yaml",))]
    rows += [SweepRow("other", (str(tmp_path / "tau_2.0.yaml"),))]
    with pytest.raises(InputError, match=r"the row 'other' and another one"):
        plan(rows, [], [0], tmp_path / "out", bags)


def test_a_folder_without_bags_is_refused(tmp_path):
    with pytest.raises(InputError, match="give --bags the folder"):
        plan([SweepRow("a")], [], [0], tmp_path, tmp_path / "none")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "sweep: nothing to run"),
        ({"configs": ("x.yaml",), "jobs": 0}, "sweep: --jobs must be at least one"),
        ({"configs": ("x.yaml",), "seeds": ()}, "sweep: --seeds must be at least one"),
    ],
)
def test_nothing_to_do_is_said(tmp_path, bags, wrong, words):
    with pytest.raises(InputError, match=words):
        sweep(tmp_path, bags, **wrong)


def test_a_run_made_otherwise_is_refused_and_says_in_what(tmp_path, bags, own, monkeypatch):
    run = plan_one(tmp_path, own)
    write_text(run.folder / "run.json", json.dumps(run.record()))
    refuse_other_runs([run])

    own.write_text("trainer: {max_epochs: 4}\n")
    (bags / "extractors.json").write_text('{"x20": {}}')
    with pytest.raises(InputError) as error:
        refuse_other_runs([run])
    sentence = f"{run.folder}: made with other configs (own.yaml) and other bags (those of {bags}"
    assert str(error.value).startswith(sentence)

    write_text(run.folder / "run.json", json.dumps(run.record()))
    monkeypatch.setattr("dasmil.sweep.runs.__version__", "99")
    with pytest.raises(InputError, match=r"made with dasmil 0\.1"):
        refuse_other_runs([run])


@pytest.mark.parametrize("allowed", [True, False])
def test_a_run_is_tested_as_it_was_fitted(tmp_path, bags, allowed):
    [[run]] = plan([SweepRow("a")], [], [0], tmp_path / "out", bags)
    fitted = {
        "data": {"init_args": {"allow_seen_slides": allowed}},
        "trainer": {"accelerator": "cpu"},
    }
    write_text(run.folder / "config.yaml", yaml.safe_dump(fitted))
    arguments = run.test()
    seen = arguments.index("--data.allow_seen_slides")
    assert arguments[seen + 1] == ("true" if allowed else "false")
    assert arguments[-2:] == ["--trainer.accelerator", "cpu"]


def test_the_order_of_configs_matters(tmp_path, bags, own):
    run = plan_one(tmp_path, own)
    write_text(run.folder / "run.json", json.dumps(run.record()))
    with pytest.raises(InputError, match=r"other configs \(another order\)"):
        refuse_other_runs([replace(run, configs=run.configs[::-1])])


def test_a_folder_of_something_else_is_left_alone(tmp_path, bags):
    run = plan_one(tmp_path)
    write_text(run.checkpoints / "best.ckpt", "")
    with pytest.raises(InputError, match="not of a sweep"):
        refuse_other_runs([run])


def test_a_run_goes_on_only_where_it_began(tmp_path, bags):
    """By another path Lightning forgets the best epoch."""
    run = plan_one(tmp_path)
    assert run.resume() == []
    write_text(run.folder / "run.json", json.dumps(run.record()))
    write_text(run.checkpoints / "resume.ckpt", "")
    assert run.resume() == ["--ckpt_path", str(run.checkpoints / "resume.ckpt")]
    shutil.move(run.folder, tmp_path / "moved")
    moved = replace(run, folder=tmp_path / "moved")
    refuse_other_runs([moved])
    assert moved.resume() == []


# processes


@pytest.mark.parametrize(
    ("jobs", "visible", "slots"),
    [
        (1, "0,1", [None]),  # one run may use all GPUs
        (2, "", [None, None]),
        (2, "-1", [None, None]),
        (2, "3", [None, None]),
        (2, "3, 5", ["3", "5"]),
        (3, "GPU-a,GPU-b", ["GPU-a", "GPU-b", "GPU-a"]),
    ],
)
def test_parallel_runs_have_a_gpu_each_where_there_are_several(jobs, visible, slots, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_slots(jobs, gpus()) == slots


def test_without_an_environment_variable_the_machine_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == []
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 'GPU 0: H200 (UUID: a)'\necho 'GPU 1: H200 (UUID: b)'\n")
    script.chmod(0o755)
    assert gpus() == ["0", "1"]


def test_the_last_error_is_told_with_what_belongs_to_it():
    log = 'error: an old one\nepoch 1\nerror: Parser key "model":\n  no such\n    key\nusage\n'
    assert last_error(log, 2) == 'error: Parser key "model": no such key'
    assert last_error("a\nRuntimeError: CUDA\n", 1) == "RuntimeError: CUDA"
    assert last_error("epoch 1\n", -9) == "exit code -9"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """In place of Python: says what it is given; ``test`` writes what it is told to."""
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\n"
        'echo "gpu=$CUDA_VISIBLE_DEVICES"\n'
        'if [ "$3" = fit ]; then eval "$FIT"; exit; fi\n'
        'while [ "$1" != --output ]; do shift; done\n'
        'mkdir -p "$2" && echo "$METRICS" > "$2/test_metrics.json"\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr("dasmil.sweep.processes.sys.executable", str(script))
    monkeypatch.setenv("METRICS", '{"test/auroc": null, "test/accuracy": 0.5}')
    monkeypatch.setenv("FIT", "true")


def test_runs_in_parallel_see_one_gpu_each(tmp_path, bags, own, stand_in, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("FIT", "sleep 0.2")
    output = tmp_path / "out"
    assert sweep(output, bags, configs=(str(own),), seeds=(0, 1, 1, 2, 3), jobs=2) == 0
    said = capsys.readouterr().out
    assert "[4/4] own seed " in said and "auroc not defined" in said
    assert "| own | – | 0.500 ± 0.000 |" in said
    seen = [(run / "log.txt").read_text() for run in (output / "own").iterdir()]
    assert {line for log in seen for line in log.splitlines() if "gpu=" in line} == {
        "gpu=3",
        "gpu=5",
    }
    assert (output / "sweep.md").read_text() in said


def test_a_run_that_fails_costs_a_line(tmp_path, bags, own, stand_in, monkeypatch, capsys):
    monkeypatch.setenv("FIT", "case $PWD$* in *seed_1*) echo error: no luck; exit 3;; esac")
    assert sweep(tmp_path / "out", bags, configs=(str(own),), seeds=(0, 1), name="t") == 1
    said = capsys.readouterr().out
    log = tmp_path / "out" / "own" / "seed_1" / "log.txt"
    assert f"[2/2] own seed 1: failed: error: no luck; see {log}" in said
    assert "| own | – | 0.500 (1 of 2) |" in said
    with open(tmp_path / "out" / "t.csv", newline="") as file:
        assert [row["n"] for row in csv.DictReader(file)] == ["0", "1"]


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_children(tmp_path, bags, own, stand_in, monkeypatch, capsys, by):
    monkeypatch.setenv("FIT", f"echo $$ > {tmp_path}/pid; exec sleep 1000")
    pid = tmp_path / "pid"

    def stop():
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), by)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    try:
        threading.Thread(target=stop, daemon=True).start()
        assert sweep(tmp_path / "out", bags, configs=(str(own),), jobs=1) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert "goes on from here" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "own").iterdir())) == 1  # nothing else was begun


# the whole


def test_a_sweep_by_command(road, tmp_path, capsys, monkeypatch):
    """One row was broken off after an epoch, one is new, one cannot be fitted."""
    monkeypatch.chdir(REPOSITORY)
    keeper = yaml.safe_load((CONFIGS / "dasmil.yaml").read_text())["trainer"]["callbacks"][0]
    keeper["init_args"].update(monitor="val/loss", mode="min")
    by_loss = tmp_path / "by_loss.yaml"  # no two epochs are equally good
    by_loss.write_text(yaml.safe_dump({"trainer": {"max_epochs": 3, "callbacks": [keeper]}}))
    base = ["configs/dasmil.yaml", str(CONF / "dasmil.yaml"), str(by_loss)]
    half, broken = tmp_path / "half.yaml", tmp_path / "broken.yaml"
    half.write_text("model: {init_args: {distillation: 0.5}}\n")
    broken.write_text("data: {init_args: {classes: [normal, other]}}\n")
    rows = [{"label": "default", "paper": {"x20/auroc": 0.973}}]
    rows += [{"label": "half", "configs": [str(half)]}]
    more = [*rows, {"label": "broken", "configs": [str(broken)]}]
    output = tmp_path / "out"

    def run_sweep(rows):
        table = tmp_path / "table.yaml"
        columns = ["x20/auroc", "accuracy"]
        table.write_text(yaml.safe_dump({"rows": rows, "base": base, "columns": columns}))
        given = ["--bags", str(road.bags), "--output", str(output), "--seeds", "[0]"]
        code = main(["sweep", "--config", str(table), *given])
        return code, capsys.readouterr()

    [[begun]] = plan([SweepRow("default")], base, [0], output.resolve(), road.bags.resolve())
    write_text(begun.folder / "run.json", json.dumps(begun.record()))
    assert main([*begun.fit(), "--trainer.max_epochs", "1"]) == 0
    capsys.readouterr()

    code, said = run_sweep(more)
    assert code == 1
    assert "base seed 0: x20/auroc " in said.out and "half seed 0: x20/auroc " in said.out
    assert "broken seed 0: failed: error: " in said.out
    assert "has the label 'tumour'" in said.out

    curves = EventAccumulator(str(begun.folder))
    curves.Reload()
    losses = [event.value for event in curves.Scalars("val/loss")]
    assert len(losses) == 3
    log = (begun.folder / "log.txt").read_text()
    assert f"--ckpt_path {begun.checkpoints / 'resume.ckpt'}" in log
    best, last = (
        torch.load(begun.checkpoints / f"{name}.ckpt", weights_only=True)
        for name in ("best", "resume")
    )
    assert best["epoch"] == losses.index(min(losses))
    assert last["epoch"] == 2
    scores = [state.get("best_model_score") for state in last["callbacks"].values()]
    assert any(score == pytest.approx(min(losses)) for score in scores if score is not None)

    figures = [Cell((run.figure("x20/auroc"),)) for run in (begun, replace_folder(begun, "half"))]
    assert f"| default | {figures[0]} | 0.973 | " in said.out
    assert f"| half | {figures[1]} | – | " in said.out

    code, said = run_sweep(rows)
    assert code == 0
    assert "[1/2] base seed 0: done before\n[2/2] half seed 0: done before\n" in said.out
    assert (begun.folder / "log.txt").read_text() == log

    half.write_text("model: {init_args: {distillation: 0.4}}\n")
    code, said = run_sweep(rows)
    assert code == 2
    assert f"{output}/half/seed_0: made with other configs (half.yaml)" in said.err


def replace_folder(run, name):
    return replace(run, folder=run.folder.parents[1] / name / run.folder.name)
