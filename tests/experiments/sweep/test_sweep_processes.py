"""What is called, in which order, and what becomes of it; a stand-in takes the place of dasmil."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from stand_in import option, plan_one

from dasmil.endings import ending_on_sigterm
from dasmil.errors import InputError
from dasmil.experiments.sweep.processes import gpus, last_error, make_slots
from dasmil.experiments.sweep.runs import SweepRow
from dasmil.experiments.sweep.sweep import sweep
from dasmil.files import write_text


def test_it_starts_without_torch():
    code = "import sys, dasmil.experiments.sweep.sweep; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture
def cohort(tmp_path):
    write_text(tmp_path / "cohort.csv", "slide_id,path\n")
    return tmp_path / "cohort.csv"


@pytest.fixture
def arguments(tmp_path, cohort, own):
    """Of a sweep over the whole road: two folds, two scales, two rows."""
    return {
        **{"output": tmp_path / "out", "cohort": cohort, "extractor": (str(own),)},
        **{"configs": (str(own), "demo/dasmil.yaml"), "seeds": (7,), "folds": 2},
        **{"columns": ("accuracy",), "name": "t"},
    }


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"configs": ()}, "sweep: nothing to run"),
        ({"jobs": 0}, "sweep: --jobs must be at least one"),
        ({"seeds": ()}, "sweep: --seeds must be at least one"),
        ({"folds": 1}, "sweep: --folds 1 must be at least two"),
        ({"cohort": None}, "sweep: give either --bags, .* or --cohort"),
        ({"bags": "bags"}, "sweep: give either --bags, .* or --cohort"),
        ({"cohort": None, "bags": "none"}, "none: does not exist; give --bags the folder"),
        ({"cohort": "none"}, "none: does not exist; give --cohort a CSV"),
        ({"truth": "none"}, "none: no such folder; give --truth a folder of annotations"),
        ({"truth_classes": ("Gland",)}, "sweep: --truth_classes needs --truth"),
        ({"scales": ("x20", "twenty")}, "scale 'twenty': write a magnification"),
    ],
)
def test_impossible_requests_are_refused_before_any_work(
    arguments, tmp_path, bags, stand_in, wrong, words
):
    places = {"bags", "cohort", "truth"}
    wrong = {k: tmp_path / v if k in places and v else v for k, v in wrong.items()}
    with pytest.raises(InputError, match=words):
        sweep(**{**arguments, **wrong})
    assert not (tmp_path / "out").exists()
    assert stand_in.new_calls() == []


# where and with what


@pytest.mark.parametrize(
    ("jobs", "visible", "slots"),
    [
        (1, "0,1", [None]),  # one step at a time may use all GPUs
        (2, "", [None, None]),
        (2, "-1", [None, None]),
        (2, "3", [None, None]),
        (2, "3, 5", ["3", "5"]),
        (3, "GPU-a,GPU-b", ["GPU-a", "GPU-b", "GPU-a"]),
    ],
)
def test_parallel_steps_get_one_gpu_each_if_there_are_several(jobs, visible, slots, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    made = make_slots(jobs, gpus(), num_cores=8)
    assert [slot.get("CUDA_VISIBLE_DEVICES") for slot in made] == slots


def test_parallel_steps_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert make_slots(1, [], num_cores=8) == [{}]
    assert make_slots(3, [], num_cores=8) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert make_slots(3, [], num_cores=2) == [{"OMP_NUM_THREADS": "1"}] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert make_slots(2, [], num_cores=8) == [{"OMP_NUM_THREADS": "5"}] * 2


def test_without_an_environment_variable_the_machine_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == []
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 'GPU 0: H200 (UUID: a)'\necho 'GPU 1: H200 (UUID: b)'\n")
    script.chmod(0o755)
    assert gpus() == ["0", "1"]


def test_the_last_error_is_printed_with_its_context():
    log = 'error: an old one\nepoch 1\nerror: Parser key "model":\n  no such\n    key\nusage\n'
    assert last_error(log, 2) == 'error: Parser key "model": no such key'
    assert last_error("a\nRuntimeError: CUDA\n", 1) == "RuntimeError: CUDA"
    assert (
        last_error("failed: s1: no mpp\ntile: 1 done, 1 failed; see\n", 1) == "failed: s1: no mpp"
    )
    assert last_error("epoch 1\n", -9) == "exit code -9"


# runs


def test_runs_in_parallel_see_one_gpu_each(
    tmp_path, bags, own, stand_in, compared, monkeypatch, capsys
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stand_in.before("sleep 0.2")
    output = tmp_path / "out"
    assert sweep(output, bags, configs=(str(own),), seeds=(0, 1, 1, 2, 3), jobs=2) == 0
    said = capsys.readouterr().out
    assert "[4/4] own seed " in said and "auroc not defined" in said
    assert "| own | – | 0.500 ± 0.000 |" in said
    seen = [(run / "log.txt").read_text() for run in (output / "own").iterdir()]
    assert {line for log in seen for line in log.splitlines() if "gpu=" in line} == {
        "gpu=3 threads=1",
        "gpu=5 threads=1",
    }
    assert (output / "sweep.md").read_text() in said
    assert compared == [({output.resolve() / "own": "own"}, output / "sweep_compare")]


def test_a_run_that_fails_costs_a_line(tmp_path, bags, own, stand_in, compared, capsys):
    stand_in.before("case $all in *seed_1*) echo error: no luck; exit 3;; esac")
    assert sweep(tmp_path / "out", bags, configs=(str(own),), seeds=(0, 1), name="t") == 1
    said = capsys.readouterr().out
    log = tmp_path / "out" / "own" / "seed_1" / "log.txt"
    assert f"[2/2] own seed 1: failed: error: no luck; see {log}" in said
    assert "| own | – | 0.500 (1 of 2) |" in said
    with open(tmp_path / "out" / "t.csv", newline="") as file:
        assert [row["n"] for row in csv.DictReader(file)] == ["0", "1"]
    assert compared == []  # it would be of less than was asked for


def test_an_interrupted_run_resumes(tmp_path, bags, own, stand_in, compared):
    run = plan_one(tmp_path, own)
    arguments = {"output": tmp_path / "out", "bags": bags, "configs": (str(own),), "seeds": (0,)}
    write_text(run.folder / "run.json", json.dumps(run.record()))
    write_text(run.folder / "config.yaml", "data: {init_args: {allow_seen_slides: false}}\n")
    with open(run.folder / "config.yaml", "a") as file:
        file.write("trainer: {accelerator: cpu}\n")
    stand_in.before("[ $verb = fit ] || exit 1")
    assert sweep(**arguments) == 1
    assert not (tmp_path / "out" / "sweep.md").exists()  # it would have no number
    fit, test = stand_in.new_calls()
    assert fit == f"fit --resume {run.folder} --data.bags {bags}"
    assert test.startswith(f"test --ckpt_path {run.checkpoints}/best.ckpt --bags {bags} ")

    write_text(run.folder / "val" / "val_evaluation.json", "{}")  # the end of a fit
    stand_in.before("true")
    assert sweep(**arguments) == 0
    assert stand_in.new_calls() == [test]
    assert sweep(**arguments) == 0
    assert stand_in.new_calls() == []


def test_rows_are_compared_by_the_runs_of_their_table_alone(
    tmp_path, bags, own, stand_in, compared, capsys
):
    """``compare`` takes all that lies in a row's folder."""
    rows = tuple(SweepRow(label, (str(own),)) for label in ("one", "the same"))
    arguments = {"output": tmp_path / "out", "bags": bags, "rows": rows}
    assert sweep(**arguments, seeds=(0, 1)) == 0
    [(folders, _)] = compared
    assert folders == {tmp_path / "out" / "own": "one"}
    capsys.readouterr()
    assert sweep(**arguments, seeds=(1,)) == 0
    reason = f"sweep: no sweep_compare, because {tmp_path}/out/own/seed_0 is"
    assert reason in capsys.readouterr().out
    assert len(compared) == 1


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_children(tmp_path, bags, own, stand_in, capsys, by):
    stand_in.before(f"echo $$ > {tmp_path}/pid; exec sleep 1000")
    pid = tmp_path / "pid"

    def stop():
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), by)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    try:
        threading.Thread(target=stop, daemon=True).start()
        with pytest.raises((KeyboardInterrupt, SystemExit)), ending_on_sigterm():
            sweep(tmp_path / "out", bags, configs=(str(own),), jobs=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert "failed" not in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "own").iterdir())) == 1  # nothing else was begun
    assert not list((tmp_path / "out").rglob("done.txt"))


# the whole road


def test_each_fold_has_its_own_bag_steps(
    arguments, cohort, own, tmp_path, stand_in, compared, capsys
):
    truth = tmp_path / "truth"
    write_text(truth / "a.csv", "x,y\n")
    assert sweep(**arguments, truth=truth) == 0
    out = tmp_path / "out"
    calls = stand_in.new_calls()
    tile, per_fold = calls[0], [calls[1:8], calls[8:]]
    assert tile.startswith("tile --config ") and "/configs/tile.yaml " in tile
    assert tile.endswith(f" --cohort {cohort} --output {out}/tiles --scales [x10,x20]")
    for fold, of_fold in enumerate(per_fold):
        assert [call.split()[0] for call in of_fold] == [
            *("fit", "fit", "embed"),  # extractors of x10 and x20, and the bags
            *("fit", "test", "fit", "test"),  # two rows
        ]
        x10, x20, embed, *runs = of_fold
        for scale, call in (("x10", x10), ("x20", x20)):
            assert option(call, "--config") == [str(own)]
            assert option(call, "--data.tiles") == [f"{out}/tiles"]
            assert option(call, "--data.scale") == [scale]
            assert option(call, "--output") == [f"{out}/extractors/fold_{fold}/{scale}"]
            last = f"{out}/extractors/fold_{fold}/{scale}/checkpoints/last.ckpt"
            assert option(embed, f"--extractors.{scale}") == [last]
        assert option(embed, "--tiles") == [f"{out}/tiles"]
        assert option(embed, "--output") == [f"{out}/bags/fold_{fold}"]
        for call in (x10, x20, runs[0], runs[2]):
            assert option(call, "--data.split.num_folds") == ["2"]
            assert option(call, "--data.split.fold") == [str(fold)]
        for fit, test in (runs[:2], runs[2:]):
            assert option(fit, "--data.bags") == option(test, "--bags")
            assert option(fit, "--data.bags") == [f"{out}/bags/fold_{fold}"]
            assert option(fit, "--seed_everything") == ["7"]
            assert option(test, "--truth") == [str(truth)]
        assert option(runs[1], "--output") == [f"{out}/own/fold_{fold}/seed_7/test"]

    said = capsys.readouterr().out
    assert "[1/11] tiles: 2 done, 1 empty, " in said
    assert "[2/11] extractor x10 fold 0: train/loss 1.250, " in said
    assert "[4/11] bags fold 0: 2 done, 1 empty, " in said
    assert "[11/11] dasmil fold 1 seed 7: accuracy 0.500, " in said
    assert f"test slides of {cohort}, mean ± sd over 2 folds × 1 seed (7)\n" in said
    assert "| own | 0.500 ± 0.000 |" in said
    rows = {out / "own": "own", out / "dasmil": "dasmil"}
    assert compared == [(rows, out / "t_compare")]


def test_without_folds_the_bag_steps_are_done_once(arguments, tmp_path, stand_in, compared):
    assert sweep(**{**arguments, "folds": None, "scales": ("x20",)}) == 0
    tile, extractor, embed, fit, *_ = stand_in.new_calls()
    out = tmp_path / "out"
    assert option(embed, "--extractors.x20") == [f"{out}/extractors/x20/checkpoints/last.ckpt"]
    assert option(embed, "--output") == option(fit, "--data.bags") == [f"{out}/bags"]
    assert not any("--data.split.fold" in call for call in (tile, extractor, embed, fit))


def test_given_bags_serve_all_folds(tmp_path, bags, own, stand_in, compared):
    assert sweep(tmp_path / "out", bags, configs=(str(own),), seeds=(0,), folds=3) == 0
    fits = [call for call in stand_in.new_calls() if call.startswith("fit")]
    assert [option(fit, "--data.split.fold") for fit in fits] == [["0"], ["1"], ["2"]]
    assert all(option(fit, "--data.bags") == [str(bags)] for fit in fits)


def test_a_preparation_that_fails_takes_its_fold_along(
    arguments, tmp_path, stand_in, compared, capsys
):
    stand_in.before("case $output in */fold_0/x20) echo error: no luck; exit 3;; esac")
    assert sweep(**arguments) == 1
    said = capsys.readouterr().out
    wrong = f"error: no luck; see {tmp_path}/out/extractors/fold_0/x20/log.txt\n"
    assert f"] extractor x20 fold 0: failed: {wrong}" in said
    for name in ("bags fold 0", "own fold 0 seed 7", "dasmil fold 0 seed 7"):
        assert f"] {name}: failed: extractor x20 fold 0: {wrong}" in said
    assert "| own | 0.500 (1 of 2) |" in said
    assert all(f"[{number}/11] " in said for number in range(1, 12))
    assert not (tmp_path / "out" / "own" / "fold_0").exists()
    stand_in.new_calls()

    stand_in.before("true")  # and now only what is missing
    assert sweep(**arguments) == 0
    assert [call.split()[0] for call in stand_in.new_calls()] == [
        *("fit", "embed", "fit", "test", "fit", "test")
    ]
    said = capsys.readouterr().out
    assert said.count(": done before\n") == 7
    assert "| own | 0.500 ± 0.000 |" in said


def test_a_killed_extractor_training_resumes(arguments, own, tmp_path, stand_in, compared):
    """From its last epoch; another one in its place is refused."""
    out = tmp_path / "out"
    begun = "touch $output/config.yaml; kill -9 $$"
    stand_in.before(f"case $output in */fold_0/x20) {begun};; esac")
    assert sweep(**arguments) == 1
    stand_in.new_calls()
    stand_in.before("true")
    own.write_text("trainer: {max_epochs: 4}\n")
    with pytest.raises(InputError, match=r"extractors/fold_0/x10: made with other configs"):
        sweep(**arguments)
    own.write_text("trainer: {max_epochs: 3}\n")
    assert sweep(**arguments) == 0
    resume = f"fit --resume {out}/extractors/fold_0/x20 --data.tiles {out}/tiles"
    assert stand_in.new_calls()[0] == resume


def test_no_more_steps_at_a_time_than_jobs_and_none_before_its_time(
    arguments, tmp_path, stand_in, compared
):
    """Each process notes how many there are beside it, and what is done already."""
    out, running = tmp_path / "out", tmp_path / "running"
    running.mkdir()
    stand_in.before(
        f'marks=$(find {out} -name done.txt); echo "$verb $output" $marks >> {tmp_path}/seen; '
        f"touch {running}/$$; ls {running} | wc -l >> {tmp_path}/num; sleep 0.1; rm {running}/$$"
    )
    assert sweep(**{**arguments, "jobs": 2}) == 0
    assert max(int(line) for line in (tmp_path / "num").read_text().split()) == 2

    lines = [line.split() for line in (tmp_path / "seen").read_text().splitlines()]
    done = {(verb, made): set(marks) for verb, made, *marks in lines}
    for fold in ("fold_0", "fold_1"):
        extractors = [f"{out}/extractors/{fold}/{scale}" for scale in ("x10", "x20")]
        for extractor in extractors:
            assert f"{out}/tiles/done.txt" in done["fit", extractor]
        assert {f"{e}/done.txt" for e in extractors} <= done["embed", f"{out}/bags/{fold}"]
        for row in ("own", "dasmil"):
            assert f"{out}/bags/{fold}/done.txt" in done["fit", f"{out}/{row}/{fold}/seed_7"]


def test_two_sweeps_do_not_make_the_same_step(tmp_path, bags, own, stand_in, compared, capsys):
    end = tmp_path / "end"
    stand_in.before(f"until [ -e {end} ]; do sleep 0.02; done")
    arguments = {"output": tmp_path / "out", "bags": bags, "configs": (str(own),), "seeds": (0,)}
    other = threading.Thread(target=sweep, kwargs=arguments)
    other.start()
    while not stand_in.calls_file.exists():
        time.sleep(0.01)
    assert sweep(**arguments) == 1
    assert "own seed 0: failed: another sweep is running this step" in capsys.readouterr().out
    end.touch()
    other.join()
    assert len(stand_in.new_calls()) == 2
