"""Places that cannot be written, and runs that are not whole: one sentence, from every verb."""

import shutil
from pathlib import Path

import pytest
import torch
from road import embed_command, fit_dasmil, fit_dino, tile_command

from dasmil.cli import main


@pytest.fixture(scope="module")
def run(road):
    """Folder of a DAS-MIL that has been fitted and tested by command."""
    runs = road.root / "runs of places"
    assert main(fit_dasmil(road.bags, runs)) == 0
    checkpoint = runs / "dasmil" / "checkpoints" / "best.ckpt"
    assert main(["test", *evaluation(road, checkpoint)]) == 0
    return runs / "dasmil"


def evaluation(road, checkpoint):
    quiet = ["--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]
    return ["--ckpt_path", str(checkpoint), "--bags", str(road.bags), *quiet]


def commands(road, run, place: Path) -> dict[str, list[str]]:
    """Each verb with this output."""
    random = {"x10": "random:test_vit", "x20": "random:test_vit"}
    checkpoint = run / "checkpoints" / "best.ckpt"
    return {
        "tile": tile_command(road.cohort, place),
        "embed": embed_command(road.tiles, place, random),
        "fit": fit_dasmil(road.bags, place),
        "fit dino": fit_dino(road.tiles, "x20", place),
        "validate": ["validate", *evaluation(road, checkpoint), "--output", str(place)],
        "test": ["test", *evaluation(road, checkpoint), "--output", str(place)],
        "predict": ["predict", *evaluation(road, checkpoint), "--output", str(place)],
        "export": ["export", str(road.bags), str(place)],
        "compare": ["compare", str(run), "--output", str(place / "table")],
        "contact-sheet": ["contact-sheet", str(road.tiles), "--output", str(place / "page.html")],
        "demo": ["demo", "--output", str(place)],
        "sweep": [
            *("sweep", "--bags", str(road.bags), "--output", str(place)),
            *("--configs", "[configs/dasmil.yaml]", "--base", "[]"),
        ],
        "import dino": ["import", "dino-checkpoint", str(dino(road)), str(place / "out.ckpt")],
    }


def dino(road):
    """Weights of DINO, in its authors' format."""
    from dasmil.embedding.networks import vit_backbone

    path = road.root / "released.pth"
    if not path.is_file():
        state = vit_backbone("vit_tiny_patch16_224", 224, {}).state_dict()
        torch.save({"teacher": {f"backbone.{key}": value for key, value in state.items()}}, path)
    return path


VERBS = (
    *("tile", "embed", "fit", "fit dino", "validate", "test", "predict", "export", "compare"),
    *("contact-sheet", "demo", "sweep", "import dino"),
)


def refusal(command, capsys):
    """What a command says that is refused."""
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and "Traceback" not in said
    return said


@pytest.mark.parametrize("kind", ["a file", "below a file", "read-only"])
@pytest.mark.parametrize("verb", VERBS)
def test_an_output_that_cannot_be_written_is_said(road, run, tmp_path, capsys, verb, kind):
    file = tmp_path / "file"
    file.write_text("mine")
    place = {"a file": file, "below a file": file / "deep", "read-only": Path("/proc/dasmil")}[kind]
    said = refusal(commands(road, run, place)[verb], capsys)
    assert str(file) in said or "/proc" in said
    assert file.read_text() == "mine"


def hostile_file(tmp_path):
    """A checkpoint that would make a file."""

    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    torch.save({"state_dict": Hostile()}, tmp_path / "hostile.ckpt")
    return tmp_path / "hostile.ckpt"


def cut_file(run, tmp_path):
    whole = (run / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    return tmp_path / "cut.ckpt"


@pytest.mark.parametrize("verb", ["fit", "fit dino", "validate", "test", "predict", "embed"])
def test_every_verb_refuses_a_pickle_and_a_cut_file_in_our_words(road, run, tmp_path, capsys, verb):
    command = commands(road, run, tmp_path / "out")[verb]
    for path, words in (
        (hostile_file(tmp_path), "is not loaded: it asks for"),
        (cut_file(run, tmp_path), "damaged or cut short"),
    ):
        if verb == "embed":
            with_it = embed_command(road.tiles, tmp_path / "out", {"x10": path, "x20": path})
        else:
            with_it = [*command, "--ckpt_path", str(path)]
        said = refusal(with_it, capsys)
        assert f"{path}: " in said and words in said and "weights_only" not in said
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def changed_run(run, folder, **changed):
    shutil.copytree(run, folder)
    for name, content in changed.items():
        path = folder / {"config": "config.yaml", "last": "checkpoints/last.ckpt"}[name]
        path.write_bytes(content)
    return ["fit", "--resume", str(folder)]


@pytest.mark.parametrize(
    "config",
    [
        b"a: !!python/object/apply:os.system [touch run]",
        b"trainer: !!python/name:os.system",
        b"seed_everything: 0",
        b"trainer: 5",
        b"trainer: {logger: [1]}",
        b"trainer: {logger: {class_path: 5}}",
        b"",
        b"[1]",
        b"a: b: c",
        b"[" * 10**5,
        b"\xff\xfe\x00",
    ],
)
def test_a_config_of_a_run_that_is_none_is_said(run, tmp_path, capsys, config):
    said = refusal(changed_run(run, tmp_path / "run", config=config), capsys)
    assert str(tmp_path / "run" / "config.yaml") in said


def test_a_last_checkpoint_that_was_cut_is_said(run, tmp_path, capsys):
    whole = (run / "checkpoints" / "last.ckpt").read_bytes()
    for cut in (b"", whole[:100], whole[: len(whole) // 2], whole[:-30]):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        said = refusal(changed_run(run, tmp_path / "run", last=cut), capsys)
        assert f"{tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}: damaged or cut short" in said


OTHER_STATES = {
    "loops": lambda c: {**c, "loops": 5},
    "no loops": lambda c: {k: v for k, v in c.items() if k != "loops"},
    "optimiser": lambda c: {**c, "optimizer_states": [5]},
    "no optimiser": lambda c: {k: v for k, v in c.items() if k != "optimizer_states"},
    "an optimiser's shape": lambda c: change_state(c, lambda value: torch.ones(3)),
    "an optimiser's NaN": lambda c: change_state(c, lambda value: value * torch.nan),
    "schedule": lambda c: {**c, "lr_schedulers": "x"},
    "callbacks": lambda c: {**c, "callbacks": [1]},
    "version": lambda c: {**c, "pytorch-lightning_version": "x"},
    "settings": lambda c: {**c, "settings": [1]},
    "hyperparameters": lambda c: {**c, "hyper_parameters": 5},
    "a class": lambda c: {
        **c,
        "hyper_parameters": {**c["hyper_parameters"], "_class_path": "os.system"},
    },
    "weights": lambda c: {
        **c,
        "state_dict": {k: v * torch.nan for k, v in c["state_dict"].items()},
    },
}


def change_state(content, change):
    (optimizer,) = content["optimizer_states"]
    state = {
        number: {k: v if v.ndim == 0 else change(v) for k, v in each.items()}
        for number, each in optimizer["state"].items()
    }
    return {**content, "optimizer_states": [{**optimizer, "state": state}]}


@pytest.mark.parametrize("what", OTHER_STATES)
def test_a_training_that_cannot_be_taken_up_is_said(run, tmp_path, capsys, what):
    """The run is not at its end, and of 50 epochs in the checkpoint too: nothing else is wrong."""
    command = changed_run(run, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    content["settings"]["trainer.max_epochs"] = 50
    torch.save(OTHER_STATES[what](content), last)
    said = refusal([*command, "--trainer.max_epochs", "50"], capsys)
    assert "goes on with the settings that it began with" not in said
