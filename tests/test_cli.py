import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from road import COLON, CONF, CONFIGS, NUM_SLIDES, RANDOM, embed_command, fit_dasmil
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dasmil
from dasmil.bags import bag_path, read_bag
from dasmil.cli import main
from dasmil.files import file_sha256
from dasmil.slides.cohort import read_cohort

LIGHTNING_VERBS = ("fit", "validate", "test", "predict")
YAMLS = [
    *sorted(CONFIGS.rglob("*.yaml")),
    *(path for folder in (CONF, COLON) for path in sorted(folder.glob("*.yaml"))),
]


@pytest.fixture(scope="module")
def trained(road):
    """Checkpoint of a DAS-MIL that has been fitted by command."""
    assert main(fit_dasmil(road.bags, road.root / "runs")) == 0
    return road.root / "runs" / "dasmil" / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="module")
def predicted(road, trained):
    folder = road.root / "predictions"
    assert main(["predict", *evaluation(road, trained), "--output", str(folder)]) == 0
    return folder


def evaluation(road, checkpoint):
    quiet = ["--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]
    return ["--ckpt_path", str(checkpoint), "--bags", str(road.bags), *quiet]


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def base_of(path: Path) -> Path | None:
    """The config on top of which a partial one goes, by its first comment."""
    first = path.read_text().splitlines()[0]
    return CONFIGS / first.rsplit("configs/", 1)[1] if "on top of configs/" in first else None


def arguments_for(path: Path) -> list[str]:
    """The verb of a config and what it leaves to the command line."""
    configs = [str(p) for p in (base_of(path), path) if p is not None]
    merged = {}
    for config in configs:
        merged = {**merged, **yaml.safe_load(Path(config).read_text())}
    options = [text for config in configs for text in ("--config", config)]
    if "rows" in merged:
        return ["sweep", *options, "--bags", "B", "--output", "O"]
    if "model" in merged:
        dino = "DINOModule" in Path(configs[0]).read_text()
        given = ["--data.tiles", "T", "--data.scale", "x20"] if dino else ["--data.bags", "B"]
        classes = any("classes:" in Path(config).read_text() for config in configs)
        given += [] if dino or classes else ["--data.classes", "[a,b]"]
        return ["fit", *options, *given]
    if "num_workers" in merged:
        return ["embed", *options, "--tiles", "T", "--output", "O", "--extractors.x20", "E"]
    return ["tile", *options, "--cohort", "C", "--output", "O"]


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_yaml_is_understood(path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*arguments_for(path), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert_contains(printed, yaml.safe_load(path.read_text()))


def assert_contains(printed, written):
    """What the file says is what the verb will run with."""
    for key, value in written.items():
        if isinstance(value, dict):
            assert_contains(printed[key], value)
        else:
            is_class = key == "class_path" and printed[key].endswith(f".{value}")
            assert printed[key] == value or is_class or isinstance(value, list), key


@pytest.mark.parametrize(
    "path", [path for path in YAMLS if path.parent == CONFIGS], ids=lambda path: path.name
)
def test_a_typing_mistake_in_a_yaml_is_named(path, tmp_path, capsys):
    content = yaml.safe_load(path.read_text())
    place = content["model"].setdefault("init_args", {}) if "model" in content else content
    place["num_haeds"] = 3
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(content))
    arguments = [str(wrong) if text == str(path) else text for text in arguments_for(path)]
    assert main([*arguments, "--print_config"]) == 2
    assert "num_haeds: no such option" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "--version",
        "import --help",
        "sweep --help",
        "demo --help",
    ],
)
def test_verbs_without_torch_do_not_import_it(command):
    assert "torch" not in modules_after(command.split())


@pytest.mark.slow
def test_tile_does_not_wait_for_torch(road, tmp_path):
    command = ["tile", "--config", str(CONFIGS / "tile.yaml"), "--output", str(tmp_path / "tiles")]
    command += ["--cohort", str(road.cohort), "--workers", "1"]
    assert "torch" not in modules_after(command)
    assert (tmp_path / "tiles" / "status.csv").exists()


def modules_after(command):
    """All that a fresh process has imported when the command is done."""
    program = (
        "import sys\nfrom dasmil.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('modules:', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command], check=True, capture_output=True, text=True
    )
    return done.stdout.rsplit("modules:", 1)[1].split()


def test_a_fit_that_is_ended_from_outside_has_not_ended_well(monkeypatch, capsys):
    """Lightning's own exit code is 0: a script would go on and test half a model."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    def ended(verb, args):
        raise SIGTERMException

    monkeypatch.setattr("dasmil.lightning_cli.run", ended)
    assert main(["fit"]) == 143
    assert "fit was ended by SIGTERM" in capsys.readouterr().err


def test_the_run_folder_records_the_run(road, trained):
    run = trained.parents[1]
    parts = {row["slide_id"]: row["split"] for row in read_rows(run / "split.csv")}
    assert parts == {row.slide_id: row.split for row in read_cohort(road.cohort)}
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 2
    assert list(run.glob("events.out.tfevents.*"))


def test_tensorboard_shows_curves_roc_and_hyperparameters(trained):
    events = EventAccumulator(str(trained.parents[1]))
    events.Reload()
    scalars = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in ("train/loss", "train/criticality/x10", "val/loss", "val/x10/auroc", "val/auroc"):
        assert len(scalars[tag]) == 2, tag  # one an epoch
    assert scalars["hp/val_auroc"][-1] == max(scalars["val/auroc"])
    pictures = EventAccumulator(str(trained.parents[1] / "val"))
    pictures.Reload()
    for name in ("roc", "precision_recall", "calibration", "confusion", "scores"):
        assert len(pictures.Images(f"val/{name}")) == 1
        assert (trained.parents[1] / "val" / "figures" / f"{name}.png").is_file()
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert b"learning_rate" in str(events.summary_metadata).encode()


def test_the_checkpoint_is_complete_in_itself(road, trained):
    model = dasmil.load(trained)
    assert not model.training
    assert model.scales == ("x10", "x20")
    assert model.classes == ("normal", "tumour")
    assert model.tile_px == 32
    record = json.loads((road.bags / "extractors.json").read_text())
    for scale, values in model.card.bag_format["scales"].items():
        assert values["extractor"]["fingerprint"] == record[scale]["fingerprint"]


def test_predict_writes_every_slide_with_its_logits(road, trained, predicted):
    rows = read_rows(predicted / "predictions.csv")
    assert [row["slide_id"] for row in rows] == [r.slide_id for r in read_cohort(road.cohort)]
    logits = ["logit/x10/tumour", "logit/x20/tumour"]
    points = ("0.5", "val_threshold", "val_specificity_0.9")
    called = [f"called_at_{point}" for point in points]
    about = ["slide_id", "patient_id", "label", "split"]
    probabilities = ["prob/normal", "prob/tumour"]
    last = ["checkpoint_sha256", "state", "message"]
    assert list(rows[0]) == [*about, *logits, *probabilities, *called, *last]
    assert [row["split"] for row in rows] == [r.split for r in read_cohort(road.cohort)]
    assert {row["checkpoint_sha256"] for row in rows} == {file_sha256(trained)}
    model = dasmil.load(trained)
    for row in rows:
        graph = dasmil.bags.bag_graph(read_bag(bag_path(road.bags, row["slide_id"])))
        with torch.inference_mode():
            output = model(graph)
        for scale in model.scales:
            expected = float(output[scale].bag_logits)
            assert float(row[f"logit/{scale}/tumour"]) == pytest.approx(expected, abs=1e-5)
        expected = torch.sigmoid(output["x20"].bag_logits).item()
        assert float(row["prob/tumour"]) == pytest.approx(expected, abs=1e-5)
        assert float(row["prob/normal"]) == pytest.approx(1 - expected, abs=1e-5)


def test_predict_writes_every_tile_in_its_place(road, predicted):
    slide_id = read_cohort(road.cohort)[0].slide_id
    rows = read_rows(predicted / "instances" / f"{slide_id}.csv")
    place = ["scale", "row", "col", "x0_px0", "y0_px0", "size_px0"]
    assert list(rows[0]) == [*place, "logit/tumour", "attention/tumour"]
    counts = read_bag(bag_path(road.bags, slide_id)).num_tiles()
    for scale, size_px0 in (("x10", 64), ("x20", 32)):
        tiles = [row for row in rows if row["scale"] == scale]
        assert len(tiles) == counts[scale]
        assert {int(tile["size_px0"]) for tile in tiles} == {size_px0}
        assert all(int(t["x0_px0"]) == int(t["col"]) * size_px0 for t in tiles)
        assert all(int(t["y0_px0"]) == int(t["row"]) * size_px0 for t in tiles)
        assert sum(float(t["attention/tumour"]) for t in tiles) == pytest.approx(1, abs=1e-4)


def test_predict_draws_every_slide_and_scale(road, predicted):
    expected = {f"{r.slide_id}_{s}.png" for r in read_cohort(road.cohort) for s in ("x10", "x20")}
    assert {path.name for path in (predicted / "overlays").iterdir()} == expected


@pytest.mark.slow
@pytest.mark.draws
def test_test_and_validate_take_the_same_arguments(road, trained, predicted, tmp_path):
    rows = {row["slide_id"]: row for row in read_rows(predicted / "predictions.csv")}
    for verb, part, stage in (("test", "test", "test"), ("validate", "val", "val")):
        folder = tmp_path / verb
        assert main([verb, *evaluation(road, trained), "--output", str(folder)]) == 0
        metrics = json.loads((folder / f"{stage}_metrics.json").read_text())
        ids = [row.slide_id for row in read_cohort(road.cohort) if row.split == part]
        right = [
            (float(rows[i]["prob/tumour"]) > 0.5) == (rows[i]["label"] == "tumour") for i in ids
        ]
        assert len(ids) == NUM_SLIDES[part]
        assert metrics[f"{stage}/x20/accuracy"] == pytest.approx(sum(right) / len(ids))
        positive = [float(rows[i]["prob/tumour"]) for i in ids if rows[i]["label"] == "tumour"]
        negative = [float(rows[i]["prob/tumour"]) for i in ids if rows[i]["label"] == "normal"]
        wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
        assert metrics[f"{stage}/auroc"] == pytest.approx(sum(wins) / len(wins), abs=1e-6)


@pytest.mark.slow
def test_another_checkpoint_never_replaces_what_a_folder_holds(
    road, trained, predicted, tmp_path, capsys
):
    other = tmp_path / "other.ckpt"
    content = torch.load(trained, weights_only=True)
    torch.save({**content, "epoch": 99}, other)
    for verb in ("test", "validate"):
        command = [verb, *evaluation(road, trained), "--output", str(tmp_path / verb)]
        assert main(command) == 0
        said = f"{verb}: {2 + (verb == 'test')} slides are {verb.removesuffix('e')}ed, "
        assert said in capsys.readouterr().out
        if verb == "test":
            assert main(command) == 0  # the same checkpoint may
        command = [verb, *evaluation(road, other), "--output", str(tmp_path / verb)]
        assert main(command) == 2
        hashes = [file_sha256(path)[:12] for path in (trained, other)]
        words = "holds the metrics of another checkpoint ({}, this one is {})".format(*hashes)
        assert words in capsys.readouterr().err
    assert main(["predict", *evaluation(road, other), "--output", str(predicted)]) == 2
    assert "holds the predictions of another checkpoint" in capsys.readouterr().err
    table = tmp_path / "split.csv"
    parts = {row.slide_id: row.split for row in read_cohort(road.cohort)}
    parts |= {next(s for s, part in parts.items() if part == "test"): "train"}
    table.write_text("\n".join(["slide_id,split", *(f"{s},{p}" for s, p in parts.items())]))
    command = ["test", *evaluation(road, trained), "--data.split.table", str(table)]
    assert main([*command, "--output", str(tmp_path / "test")]) == 2
    assert "holds the metrics of other test slides" in capsys.readouterr().err


def test_split_options_of_the_command_line_are_obeyed_or_refused(road, trained, tmp_path, capsys):
    command = ["test", *evaluation(road, trained), "--output", str(tmp_path)]
    assert main([*command, "--data.split.num_folds", "2", "--data.split.fold", "0"]) == 2
    assert (
        "data.split.num_folds: the split column already names val slides" in capsys.readouterr().err
    )
    table = tmp_path / "table.csv"
    parts = {row.slide_id: row.split for row in read_cohort(road.cohort)}
    trained_on = next(s for s, part in parts.items() if part == "train")
    table.write_text(f"slide_id,split\n{trained_on},test\n")
    config = tmp_path / "options.yaml"
    config.write_text(f"data:\n  init_args:\n    split: {{table: {table}}}\n")
    for given in (["--data.split.table", str(table)], ["--config", str(config)]):
        assert main([*command, *given]) == 2
        assert f"{trained_on} (trained on)" in capsys.readouterr().err


def test_an_option_that_asks_for_another_network_is_refused(road, trained, capsys):
    command = ["test", *evaluation(road, trained)]
    widths = ["--model.network.hidden_dim", "384", "--model.network.out_dim", "256"]
    assert main([*command, *widths]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {trained}: its network was trained with other options, here ")
    assert "model.network.hidden_dim 384 instead of 16, model.network.out_dim 256 instead" in said
    others = ["--model.network.coarse_instances", "parents"]  # with weights that fit
    assert main([*command, *others]) == 2
    assert "model.network.coarse_instances parents instead of all" in capsys.readouterr().err
    assert main([*command, "--config", "configs/mil.yaml"]) == 0  # which asks for none


@pytest.mark.slow
def test_the_figures_do_not_depend_on_the_batch_size(road, trained, tmp_path):
    figures = []
    for size in ("1", "3"):
        folder = tmp_path / size
        command = ["test", *evaluation(road, trained), "--data.batch_size", size]
        assert main([*command, "--output", str(folder)]) == 0
        figures.append(json.loads((folder / "test_metrics.json").read_text()))
    assert figures[0] == pytest.approx(figures[1], abs=1e-5)


def test_bags_of_foreign_extractors_are_refused(road, trained, tmp_path, capsys):
    other = tmp_path / "bags"
    assert main(embed_command(road.tiles, other, RANDOM)) == 0
    command = ["test", "--ckpt_path", str(trained), "--bags", str(other), "--data.num_workers", "0"]
    assert main(command) == 2
    assert "features of the extractor test_vit" in capsys.readouterr().err


def test_predict_without_an_output_says_so(road, trained, capsys):
    assert main(["predict", *evaluation(road, trained)]) == 2
    assert "give --output" in capsys.readouterr().err


def test_a_dino_checkpoint_is_no_model_to_test(road, capsys):
    assert main(["test", "--ckpt_path", str(road.dino["x20"]), "--bags", str(road.bags)]) == 2
    assert "holds no model of bags" in capsys.readouterr().err


@pytest.mark.slow
def test_a_slide_file_that_is_gone_leaves_an_empty_canvas_and_says_so(
    road, trained, tmp_path, capsys
):
    import shutil

    bags = tmp_path / "bags"
    shutil.copytree(road.bags, bags)
    row = read_cohort(road.cohort)[0]
    table = (bags / "cohort.csv").read_text().replace(row.path.name, "gone.tiff")
    (bags / "cohort.csv").write_text(table)
    quiet = ["--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]
    command = ["predict", "--ckpt_path", str(trained), "--bags", str(bags), *quiet]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    assert f"overlay of {row.slide_id} on an empty canvas" in capsys.readouterr().out
    assert (tmp_path / "out" / "overlays" / f"{row.slide_id}_x20.png").exists()


@pytest.mark.parametrize("verb", LIGHTNING_VERBS)
def test_a_checkpoint_is_never_loaded_from_a_url(road, verb, capsys):
    """From one, Lightning would unpickle whatever it holds."""
    arguments = fit_dasmil(road.bags, road.root / "runs")[1:] if verb == "fit" else []
    arguments += [] if verb == "fit" else ["--bags", str(road.bags)]
    assert main([verb, *arguments, "--ckpt_path", "http://localhost:1/model.ckpt"]) == 2
    said = capsys.readouterr().err
    assert "localhost:1/model.ckpt" in said and said.startswith("error: ")
