"""Mistakes on the command line: one sentence with the option's name, whatever the verb."""

import json

import pytest
import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from road import CONFIGS

from dasmil.arguments import SentenceParser, join_scales
from dasmil.cli import main

DASMIL = "fit --config configs/mil.yaml"
DINO = "fit --config configs/dino.yaml"
FIT = f"{DASMIL} --data.bags BAGS --data.classes [a,b] --output RUN"
TILE = "tile --cohort COHORT --output OUT --scales [x10]"
EMBED = "embed --tiles TILES --output OUT"
TRIDENT = "import trident BAGS"

MISTAKES = [  # command, what its sentence says
    ("trian", "no verb 'trian'"),
    ("tets", "no verb 'tets'; did you mean test?"),
    ("fit", "give --config configs/mil.yaml"),
    (DASMIL, "give --data.bags and --data.classes"),
    (f"{DASMIL} --data.bags BAGS", "give --data.classes"),
    (DINO, "give --data.tiles and --data.scale"),
    (FIT, "BAGS: does not exist; give data.bags the folder that embed wrote"),
    (f"{FIT} --data.classes [a]", "data.classes: ['a'] must name at least two"),
    (f"{FIT} --data.quargs 1", "--data.quargs: no such option, see --help"),
    (f"{FIT} --data.bagz B", "--data.bagz: no such option; did you mean --data.bags?"),
    (
        f"{DASMIL} --data.bags BAGS --data.classes [a,b]",
        "fit: give --output, the folder of the run",
    ),
    (f"{FIT} --model.network.head 3", "--model.network.head: no such option; did you mean"),
    (f"{FIT} --model.network.hidden_dim many", "hidden_dim: 'many' is not a whole number"),
    (
        f"{FIT} --model.temperature 2",
        "--model.temperature: its name is --model.objective.temperature",
    ),
    (f"{FIT} --model.objective.temperature -1", "temperature: τ = -1.0 is not positive"),
    (f"{FIT} --model=ABMILL", "--model: no method 'ABMILL'"),
    (f"{FIT} --model ABMILL", "--model: no method 'ABMILL'; there are ABMIL, CLAM, "),
    (f"{FIT} --model dasmil.modules.DASMILModule", "DASMILModule is DASMIL now"),
    (f"{FIT} --model ABMIL --model.objective.temperature 2", "no such option"),
    ("fit --config configs/dasmil.yaml", "it is configs/mil.yaml now"),
    (f"{FIT} --config configs/ablation/tau_2.0.yaml", "an ablation is an option of a row now"),
    (f"{FIT} --data.cache disk", "--data.cache: 'disk' is not one of none, ram, device"),
    (f"{FIT} --trainer.max_epochs ten", "--trainer.max_epochs: 'ten' is not a whole number"),
    (f"{FIT} --trainer.precision 8", "--trainer.precision: '8' is not one of 64, 32, 16, "),
    (f"{FIT} --trainer.max_epoch 3", "--trainer.max_epoch: no such option; did you mean --trainer"),
    (f"{FIT} --trainer.strategy xyz", "invalid strategy name: `strategy='xyz'`"),
    (f"{FIT} --trainer.devices 0", "`Trainer(devices='0')` value is not a valid input"),
    (f"{FIT} --trainer.accelerator gpu", "trainer.accelerator: no GPU was found on this machine"),
    (f"{EMBED} --extractors.x10 A --trainer.accelerator cuda", "no GPU was found on this machine"),
    (f"{EMBED} --extractors.x10 A --trainer.accelerator mps", "no Apple GPU was found on this"),
    (f"{FIT} --model dasmil.modules.Nope", "'Nope'"),
    (f"{FIT} --config none.yaml", "none.yaml: no such config"),
    (f"{FIT} --config broken.yaml", "broken.yaml: not YAML with keys"),
    ("fit --resume NOWHERE", "NOWHERE: does not exist; give --resume"),
    ("test", "give --ckpt_path"),
    ("predict --bags BAGS", "give --ckpt_path"),
    ("test --ckpt_path none.ckpt", "give --bags"),
    ("test --ckpt_path . --bags BAGS", ".: is a folder; give the file of a checkpoint"),
    ("validate --ckpt_path none.ckpt --bags BAGS", "none.ckpt: does not exist"),
    ("tile --cohort COHORT", "give --output and --scales"),
    ("tile --cohort", "--cohort: its value is missing"),
    (f"{TILE} --tile_px big", "--tile_px: 'big' is not a whole number"),
    (f"{TILE} --scales x10", "--scales: 'x10' is not a list such as [a,b]"),
    (f"{TILE} --tissue.mppp 3", "--tissue.mppp: no such option; did you mean --tissue.mpp?"),
    (f"{TILE} --artefacts.pen [pink]", "artefacts: pen ('pink',) is not"),
    (TILE, "COHORT: does not exist; give a cohort table"),
    (f"{TILE} slide.svs", "slide.svs: no such option"),
    ("embed --output OUT", "give --tiles and --extractors"),
    (f"{EMBED} --extractors.x10 A --batch_size x", "--batch_size: 'x' is not a whole number"),
    (f"{EMBED} --extractors.x10.model A --extractors.x10.image_sise 64", "image_sise: no such"),
    (f"{EMBED} --extractors.x10.model A --extractors.x10.mean big", "mean: 'big' is not a list"),
    (f"{EMBED} --extractors.x10 A", "TILES: does not exist; give --tiles"),
    ("status", "give FOLDER"),
    ("status NOWHERE", "NOWHERE: does not exist"),
    ("compare", "give RUN_DIR"),
    ("contact-sheet", "give TILES"),
    ("contact-sheet NOWHERE", "NOWHERE: does not exist"),
    ("export", "give BAGS and OUTPUT"),
    ("export NOWHERE OUT", "NOWHERE: does not exist"),
    ("demo", "give --output"),
    ("sweep --output OUT --seeds [a]", "--seeds: 'a' is not a whole number"),
    ("sweep --output OUT --rows [{labl:a}]", "--rows"),
    ("import tridnet", "no verb 'import tridnet'; did you mean import trident?"),
    (TRIDENT, "give --features"),
    (f"{TRIDENT} --features.x10 NOWHERE", "NOWHERE: no such folder"),
    (f"{TRIDENT} --features.x10 F --dtype float8", "--dtype: 'float8' is not one of keep, float16"),
]


@pytest.mark.parametrize(("command", "sentence"), MISTAKES, ids=lambda text: text[-40:])
def test_a_mistake_is_answered_with_one_sentence(command, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: False)
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("a: [1")
    assert main(command.split()) == 2
    printed, said = capsys.readouterr()
    assert printed == ""
    assert said.startswith("error: ") and said.count("\n") == 1
    assert sentence in said and len(said) < 300
    assert list(tmp_path.iterdir()) == [tmp_path / "broken.yaml"]


def test_every_scale_takes_every_setting_in_any_order(tmp_path, capsys):
    file = tmp_path / "embed.yaml"
    file.write_text("extractors: {x10: {model: A, options: {init_values: 1e-5}}, x5: D}\n")
    command = f"{EMBED} --config {file} --extractors.x10.image_size 64 --extractors.x20 B"
    command += " --extractors.x20.mean [0.1,0.2,0.3] --extractors.x2.5.pooling=cls"
    command += " --extractors.x2.5.model C --extractors.x2.5.image_size 32"
    whole = ["--extractors.x40", "{model: E, image_size: 96}"]
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), *whole, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["tiles"] == "TILES"
    found = printed["extractors"]
    asked = {
        "x10": {"model": "A", "image_size": 64, "options": {"init_values": 1e-5}},
        "x5": "D",
        "x20": {"model": "B", "mean": [0.1, 0.2, 0.3]},
        "x2.5": {"model": "C", "pooling": "cls", "image_size": 32},
        "x40": {"model": "E", "image_size": 96},
    }
    assert found.keys() == asked.keys()
    for scale, settings in asked.items():
        if isinstance(settings, str):
            assert found[scale] == settings
        else:
            assert settings.items() <= found[scale].items()


def test_folders_of_features_go_together_with_those_of_a_scale_with_a_dot():
    command = "--features.x2.5 A --cohort C --features.x10=B --patches.x10 P"
    option, values, *rest = join_scales(command.split())
    assert (rest, option) == (["--cohort", "C"], "--config")
    assert json.loads(values) == {"features": {"x2.5": "A", "x10": "B"}, "patches": {"x10": "P"}}


SHIPPED = [
    (TILE, "tile.yaml"),
    (f"{EMBED} --extractors.x10 E", "embed.yaml"),
    (FIT, "mil.yaml"),
    ("sweep --output OUT --bags BAGS", "sweep/table2.yaml"),
]


@pytest.mark.parametrize(("command", "name"), SHIPPED, ids=lambda text: text.split()[0])
def test_a_shipped_config_is_found_from_any_folder(command, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--config", f"configs/{name}", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert yaml.safe_load((CONFIGS / name).read_text()).keys() <= printed.keys()


def test_a_config_of_that_name_in_the_current_folder_wins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tile.yaml").write_text("tile_px: 77\n")
    with pytest.raises(SystemExit, match="0"):
        main([*TILE.split(), "--config=configs/tile.yaml", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["tile_px"] == 77


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("[no,yes]", ["no", "yes"]),
        ("[0, 1]", ["0", "1"]),
        ("[01, 1e3, 1_000, null, ~]", ["01", "1e3", "1_000", "null", "~"]),
        ("[Off, y, True, 2024-01-01]", ["Off", "y", "True", "2024-01-01"]),
        ("['no', \"01\", normal, ü é]", ["no", "01", "normal", "ü é"]),
        ("null", None),
    ],
)
@pytest.mark.parametrize("name", ["data.classes", "truth_classes"])
def test_labels_are_text_whatever_yaml_makes_of_them(tmp_path, name, text, labels):
    parser = SentenceParser()
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument(f"--{name}", type=list[str] | None)
    parser.add_argument("--more", type=list[bool] | None)
    (tmp_path / "one line.yaml").write_text(f"more: [no]\n{name}: {text}  # no\n")
    items = (
        "null" if labels is None else "".join(f"\n  - {i.strip()}" for i in text[1:-1].split(","))
    )
    (tmp_path / "lines.yaml").write_text(f"{name}: {items}\nmore: [no]\n")
    for args in (
        [f"--{name}", text],
        [f"--{name}={text}"],
        ["--config", str(tmp_path / "one line.yaml")],
        ["--config", str(tmp_path / "lines.yaml")],
        ["--config", f"{{{name}: {text}}}"],
    ):
        assert parser.parse_args(["--more", "[no]", *args])[name] == labels
    assert parser.parse_args(["--config", str(tmp_path / "lines.yaml")]).more == [False]


def test_one_batch_is_not_all_batches(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever unions of int and float a library has asked ``typing`` for."""
    names = ("limit_train_batches", "limit_val_batches", "overfit_batches", "val_check_interval")
    limits = [word for name in names for word in (f"--trainer.{name}", "1")]
    fit = ["fit", "--config", "configs/mil.yaml", "--data.bags", "b", "--data.classes", "[a,b]"]
    with pytest.raises(SystemExit):
        main([*fit, "--output", "run", *limits, "--print_config"])
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert [(trainer[name], type(trainer[name])) for name in names] == [(1, int)] * 4
    assert main([*fit, "--output", "run", "--trainer.limit_train_batches", "half"]) == 2
    assert "trainer.limit_train_batches: 'half' is no number" in capsys.readouterr().err
