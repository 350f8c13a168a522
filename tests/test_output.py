"""What commands print where no terminal is."""

import io
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from road import embed_command, fit_dasmil, fit_dino

import dasmil
from dasmil import cli, progress, quiet
from dasmil.cli import main
from dasmil.errors import InputError

BAR = ["--trainer.enable_progress_bar", "true"]  # which the tests' configs switch off
NUMBER = r"\d+\.\d{4}"


@pytest.fixture(scope="module")
def trained(road, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    assert main(fit_dasmil(road.bags, runs)) == 0
    return runs / "dasmil" / "checkpoints" / "best.ckpt"


def lines_of(command, capsys):
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "\r" not in out + err and err == ""
    return out.splitlines()


def test_fit_prints_a_line_per_epoch(road, tmp_path, capsys):
    lines = lines_of([*fit_dasmil(road.bags, tmp_path), *BAR], capsys)
    values = rf"train/loss {NUMBER}, val/loss {NUMBER}, "
    values += rf"val/x10/auroc {NUMBER}, val/x20/auroc {NUMBER}"
    for number in range(2):
        assert re.fullmatch(rf"epoch {number} \(last: 1\): {values}, \d+\.\d s", lines[number])
    assert lines[2].startswith("fit: checkpoint ")
    assert len([line for line in lines if line.startswith("val: x")]) == 2
    assert len(lines) < 10


def test_fit_of_an_extractor_prints_a_line_per_epoch(road, tmp_path, capsys):
    lines = lines_of([*fit_dino(road.tiles, "x20", tmp_path), *BAR], capsys)
    assert re.fullmatch(rf"epoch 0 \(last: 0\): train/loss {NUMBER}, \d+\.\d s", lines[0])
    assert len(lines) == 2 and lines[1].startswith("fit: checkpoint ")


def test_test_prints_a_line_per_scale(road, trained, tmp_path, capsys):
    command = ["test", "--ckpt_path", str(trained), "--bags", str(road.bags)]
    command += ["--data.num_workers", "0", "--output", str(tmp_path)]
    lines = [line for line in lines_of(command, capsys) if "AUROC" in line]
    assert [line.split(";")[0][:-5] for line in lines] == [
        "test: x10: AUROC ",
        "test: x20: AUROC ",
    ]
    assert all(
        "; 3 slides of 3 patients (too few patients for any interval or p: " in line
        for line in lines
    )


def test_a_warning_is_one_sentence_without_a_place_in_the_code(road, trained):
    main(["test", "--ckpt_path", str(trained)])  # refused, but Lightning is imported
    text = warnings.formatwarning("few slides", UserWarning, "dasmil/x.py", 3, "warnings.warn()")
    assert text == "warning: few slides\n"


def test_of_many_processes_the_first_one_warns(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    quiet.hush()
    where = str(Path(quiet.__file__).parent / "data" / "bags.py")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert warnings.formatwarning("few slides", UserWarning, where, 3) == ""
    assert warnings.formatwarning("no such kernel", UserWarning, "torch.py", 3) != ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert warnings.formatwarning("few slides", UserWarning, where, 3) == "warning: few slides\n"


def test_of_many_processes_the_first_one_prints_an_error(monkeypatch, capsys):
    """The others wait to be ended by it, and print an error of their own after that."""
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    for name in ("LOCAL_RANK", "NODE_RANK"):
        with monkeypatch.context() as environment:
            environment.setenv(name, "1")
            assert main(["trian"]) == 2
    assert waited == [cli.FIRST_PRINTS_S] * 2
    assert main(["trian"]) == 2
    assert len(waited) == 2 and capsys.readouterr().err.count("error: no verb 'trian'") == 3


def test_embed_prints_no_bar(road, tmp_path, capsys):
    command = embed_command(road.tiles, tmp_path, road.dino)
    command[command.index("--trainer.enable_progress_bar") + 1] = "true"
    assert all(line.startswith("embed: ") for line in lines_of(command, capsys))


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    log = io.StringIO()
    assert list(progress.progress(range(3), "tile", unit="slide", file=log)) == [0, 1, 2]
    pattern = r"tile: \d of 3 slides after 00:00, \S+ to go"
    lines = log.getvalue().splitlines()
    assert lines and all(re.fullmatch(pattern, line) for line in lines)
    monkeypatch.undo()
    log = io.StringIO()
    bar = progress.progress(desc="embed", total=9, unit="tile", file=log)
    bar.set_postfix_str("waiting for other workers")
    bar.update(9)
    bar.close()
    assert log.getvalue() == ""  # it took less than two minutes


def test_weights_with_other_keys_are_named(road, trained, tmp_path, capsys):
    checkpoint = torch.load(trained, weights_only=True)
    first = next(iter(checkpoint["state_dict"]))
    checkpoint["state_dict"]["some.other"] = checkpoint["state_dict"].pop(first)
    path = tmp_path / "changed.ckpt"
    torch.save(checkpoint, path)
    said = f"{path}: its weights are not those of its model (missing: {first}; unexpected: some."
    assert main(["test", "--ckpt_path", str(path), "--bags", str(road.bags)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")
    assert main([*fit_dasmil(road.bags, tmp_path), "--ckpt_path", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")
    with pytest.raises(InputError, match=re.escape(said)):
        dasmil.load(path)


def test_a_reader_that_has_seen_enough_ends_the_output_quietly(road):
    command = [sys.executable, "-m", "dasmil", "status", str(road.tiles)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_the_sheet_of_a_bag_folder_names_its_tiles(road, capsys):
    assert main(["contact-sheet", str(road.bags)]) == 2
    assert f"give the folder that `tile` has written, and this one as --bags {road.bags}" in (
        capsys.readouterr().err
    )
