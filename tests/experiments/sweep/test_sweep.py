"""The whole, on synthetic slides."""

import csv
import json
import shlex
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

import pytest
import torch
import yaml
from road import CONF, CONFIGS, REPOSITORY

from dasmil.cli import main
from dasmil.experiments.compare.compare import compare
from dasmil.experiments.sweep.processes import Children, last_error
from dasmil.experiments.sweep.runs import SweepRow, plan
from dasmil.experiments.sweep.sweep import sweep
from dasmil.experiments.sweep.table import Cell
from dasmil.files import write_text
from dasmil.tables import read_csv, write_csv

MEAN = {
    **{"model.network.contextualize": False, "model.network.pooling": "mean"},
    **{"model.objective.instance": 0.0, "data.scales": ["x20"]},
}
MEAN_FOLDER = "contextualize_false+pooling_mean+instance_0.0+scales_x20"
BASE = ("configs/mil.yaml", str(CONF / "dasmil.yaml"))


@pytest.fixture
def in_this_process(monkeypatch):
    """Run the steps without starting Python and importing torch for each, and compare quickly."""

    def call(self, arguments, log, slot):
        with open(log, "a") as file:
            file.write(f"$ python -m dasmil {shlex.join(arguments)}\n")
            start = file.tell()
            with redirect_stdout(file), redirect_stderr(file):
                code = main(arguments)
        return last_error(log.read_text()[start:], code) if code else ""

    monkeypatch.setattr(Children, "call", call)
    monkeypatch.setattr("dasmil.experiments.compare.compare.compare", partial(compare, draws=10))


@pytest.mark.parametrize(
    "where", ["here", pytest.param("in processes of their own", marks=pytest.mark.slow)]
)
def test_a_sweep_by_command(road, tmp_path, capsys, monkeypatch, request, where):
    """One row was broken off after an epoch, and one cannot be fitted."""
    if where == "here":
        request.getfixturevalue("in_this_process")
    monkeypatch.chdir(REPOSITORY)
    keepers = yaml.safe_load((CONFIGS / "mil.yaml").read_text())["trainer"]["callbacks"]
    keepers[0]["init_args"] = {"monitor": "val/loss", "mode": "min"}  # no two epochs are equal
    by_loss, broken = tmp_path / "by_loss.yaml", tmp_path / "broken.yaml"
    by_loss.write_text(yaml.safe_dump({"trainer": {"max_epochs": 3, "callbacks": keepers}}))
    broken.write_text("data: {init_args: {classes: [normal, other]}}\n")
    rows = [{"label": "default", "paper": {"x20/auroc": 0.973}}]
    base, output = [*BASE, str(by_loss)], tmp_path / "out"

    def run_sweep(rows):
        table = tmp_path / "table.yaml"
        columns = ["x20/auroc", "accuracy"]
        table.write_text(yaml.safe_dump({"rows": rows, "base": base, "columns": columns}))
        given = ["--bags", str(road.bags), "--output", str(output), "--seeds", "[0]"]
        code = main(["sweep", "--config", str(table), *given])
        return code, capsys.readouterr()

    bags = {None: road.bags.resolve()}
    [[begun]] = plan([SweepRow("default")], base, [0], output.resolve(), bags)
    write_text(begun.folder / "run.json", json.dumps(begun.record()))
    assert main([*begun.fit(), "--trainer.max_steps", "6"]) == 0
    (begun.folder / "val" / "val_evaluation.json").unlink()  # as if killed after its first epoch
    config = (begun.folder / "config.yaml").read_text()
    write_text(begun.folder / "config.yaml", config.replace("max_steps: 6", "max_steps: -1"))
    capsys.readouterr()

    code, said = run_sweep([*rows, {"label": "broken", "configs": [str(broken)]}])
    assert code == 1
    assert "base seed 0: x20/auroc " in said.out
    assert "broken seed 0: failed: error: " in said.out
    assert "has the label 'tumour'" in said.out
    assert f"| default | {Cell((begun.metric('x20/auroc'),))} | 0.973 | " in said.out
    assert not (output / "sweep_compare" / "compare.md").exists()

    log = (begun.folder / "log.txt").read_text()
    assert f"fit --resume {begun.folder} " in log
    losses = [float(row["val/loss"]) for row in read_csv(begun.folder / "history.csv")[1]]
    assert len(losses) == 3
    best, last = (
        torch.load(begun.checkpoints / f"{name}.ckpt", weights_only=True)
        for name in ("best", "last")
    )
    assert best["epoch"] == losses.index(min(losses))
    assert last["epoch"] == 2

    code, said = run_sweep(rows)
    assert code == 0
    assert "[1/1] base seed 0: done before\n" in said.out
    assert (begun.folder / "log.txt").read_text() == log
    assert "default" in (output / "sweep_compare" / "compare.md").read_text()

    by_loss.write_text("trainer: {max_epochs: 4}\n")
    code, said = run_sweep(rows)
    assert code == 2
    assert f"{output}/base/seed_0: made with other configs (by_loss.yaml)" in said.err


@pytest.mark.slow
def test_each_fold_trains_nothing_on_its_test_slides(road, tmp_path, in_this_process):
    """Two folds from slide files to the table; each slide is tested once and by strangers."""
    columns, rows = read_csv(road.cohort)
    folder = road.cohort.parent
    rows = [{**row, "split": "", "path": folder / row["path"]} for row in rows]
    write_csv(tmp_path / "cohort.csv", columns, rows)
    tile, embed = tmp_path / "tile.yaml", tmp_path / "embed.yaml"
    tile.write_text("tile_px: 32\nworkers: 1\n")
    embed.write_text("num_workers: 0\n")
    output = tmp_path / "out"
    code = sweep(
        output,
        cohort=tmp_path / "cohort.csv",
        truth=folder / "truth",
        tile=("configs/tile.yaml", str(tile)),
        extractor=("configs/dino.yaml", str(CONF / "dino.yaml")),
        embed=(str(embed),),
        base=BASE,
        rows=(SweepRow("all"), SweepRow("mean", set=MEAN)),
        columns=("auroc", "x20/instance_auroc", "x10/accuracy"),
        seeds=(0,),
        folds=2,
    )
    assert code == 0

    tested = []
    for fold in (0, 1):
        extractors = json.loads((output / f"bags/fold_{fold}/extractors.json").read_text())
        for row in ("base", MEAN_FOLDER):
            run = output / row / f"fold_{fold}" / "seed_0"
            part = {r["slide_id"]: r["split"] for r in read_csv(run / "split.csv")[1]}
            train = sorted(slide_id for slide_id, name in part.items() if name == "train")
            assert len(train) >= 3
            for scale in ("x10", "x20"):
                seen = sorted(record["slide_id"] for record in extractors[scale]["trained_on"])
                assert seen == train
            slides = [r["slide_id"] for r in read_csv(run / "test" / "test_slides.csv")[1]]
            assert sorted(slides) == sorted(s for s, name in part.items() if name == "test")
            tested += [(row, slide_id) for slide_id in slides]
    everything = [(row, r["slide_id"]) for row in ("base", MEAN_FOLDER) for r in rows]
    assert sorted(tested) == sorted(everything)

    with open(output / "sweep.csv", newline="") as file:
        cells = {(r["label"], r["column"]): r for r in csv.DictReader(file)}
    assert [cells["all", column]["n"] for column in ("auroc", "x20/instance_auroc")] == ["2", "2"]
    assert cells["mean", "x20/instance_auroc"]["n"] == "2"
    assert cells["all", "x10/accuracy"]["n"] == "2"
    assert cells["mean", "x10/accuracy"]["n"] == "0"  # it reads x20 alone
    assert "mean ± sd over 2 folds × 1 seed (0)" in (output / "sweep.md").read_text()
    assert (output / "sweep_compare" / "compare.md").is_file()
