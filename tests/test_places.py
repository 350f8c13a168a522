"""Places that cannot be written, and runs that are not whole: one sentence, from every verb."""

import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from feature_files import write_clam, write_stamp, write_trident
from mil4wsi_cases import block, make_data, write_data
from models import make_network
from road import RANDOM, REPOSITORY, embed_command, fit_dasmil, fit_dino, tile_command

from dasmil.cli import main
from dasmil.interop.mil4wsi.checkpoint import released_names
from dasmil.tables import read_csv


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
    checkpoint = run / "checkpoints" / "best.ckpt"
    return {
        "tile": tile_command(road.cohort, place),
        "embed": embed_command(road.tiles, place, RANDOM),
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
            *("--configs", "[configs/mil.yaml]", "--base", "[]"),
        ],
        "status": ["status", str(place)],
        "import dino": ["import", "dino-checkpoint", str(dino(road)), str(place / "out.ckpt")],
        **imports(road.root / "files of others", place),
    }


def imports(root: Path, place: Path) -> dict[str, list[str]]:
    """The other kinds of import, each of one small slide or model."""
    cells = [(0, 0), (1, 0), (0, 1)]
    trident = write_trident(root, "s1", 20, cells)
    corners = [(256 * x, 256 * y) for x, y in cells]
    clam, patches = write_clam(root / "clam", "s1", corners, level=0, downsample=1)
    stamp = write_stamp(root, "s1", cells, tile_um=128.0)
    graphs = root / "graphs"
    write_data(graphs, "test", 0, make_data(block(0, 0)))
    network = make_network({"x10": 6, "x20": 6}, 1, 6, 5, 2, residual="none").state_dict()
    names = released_names("x10", "x20", has_gates=False)
    torch.save({theirs: network[ours] for ours, theirs in names.items()}, root / "model.pt")
    model = ["mil4wsi-checkpoint", str(root / "model.pt"), str(place / "out.ckpt")]
    of_clam = ["--features.x20", str(clam), "--patches.x20", str(patches), "--encoder", "resnet50"]
    kinds = {
        "trident": ["trident", str(place), "--features.x20", str(trident)],
        "clam": ["clam", str(place), *of_clam],
        "stamp": ["stamp", str(place), "--features.x20", str(stamp)],
        "mil4wsi-bags": ["mil4wsi-bags", str(graphs), str(place)],
        "mil4wsi-checkpoint": model,
    }
    return {f"import {kind}": ["import", *words] for kind, words in kinds.items()}


def dino(road):
    """Weights of DINO, in its authors' format."""
    from dasmil.embedding.networks import vit_backbone

    path = road.root / "released.pth"
    if not path.is_file():
        state = vit_backbone("vit_tiny_patch16_224", 224, {}).state_dict()
        torch.save({"teacher": {f"backbone.{key}": value for key, value in state.items()}}, path)
    return path


IMPORTS = ("trident", "clam", "stamp", "mil4wsi-bags", "mil4wsi-checkpoint")
VERBS = (
    *("tile", "embed", "fit", "fit dino", "validate", "test", "predict", "export", "compare"),
    *("contact-sheet", "demo", "sweep", "status", "import dino"),
    *(f"import {kind}" for kind in IMPORTS),
)


@contextmanager
def read_only_disk(folder: Path, content: Path | None = None):
    """A disk of its own, with a copy of a folder, that only the machine's owner may mount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount a disk")
    try:
        if content is not None:
            shutil.copytree(content, folder / content.name)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def refusal(command, capsys):
    """What a command says that is refused."""
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and "Traceback" not in said
    return said


@pytest.mark.parametrize(
    "kind",
    ["a file", *(pytest.param(k, marks=pytest.mark.slow) for k in ("below a file", "read-only"))],
)
@pytest.mark.parametrize("verb", VERBS)
def test_an_output_that_cannot_be_written_is_named(road, run, tmp_path, capsys, verb, kind):
    file = tmp_path / "file"
    file.write_text("mine")
    place = {"a file": file, "below a file": file / "deep", "read-only": Path("/proc/dasmil")}[kind]
    said = refusal(commands(road, run, place)[verb], capsys)
    assert str(file) in said or "/proc" in said
    assert file.read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "status"])
def test_an_output_on_a_read_only_disk_is_named(road, run, tmp_path, capsys, verb):
    with read_only_disk(tmp_path / "disk") as disk:
        said = refusal(commands(road, run, disk / "out")[verb], capsys)
    assert f"error: {disk}" in said and "Read-only file system; name another place" in said


def test_a_status_that_cannot_be_written_is_said(road, run, tmp_path, capsys):
    copy = shutil.copytree(road.tiles, tmp_path / "tiles")
    (copy / "status.csv").unlink()
    with read_only_disk(tmp_path / "disk", copy) as disk:
        said = refusal(commands(road, run, disk / "tiles")["status"], capsys)
    assert f"error: {disk / 'tiles'}" in said and "Read-only file system" in said


@pytest.mark.parametrize("kind", IMPORTS)
def test_the_same_import_succeeds_elsewhere(road, tmp_path, kind):
    assert main(imports(road.root / "files of others", tmp_path / "out")[f"import {kind}"]) == 0


REMOVING = """
import shutil, sys
from dasmil.cli import main
from dasmil.work.worker import Worker
settle = Worker.settle
def settle_and_remove(worker, *what):
    settle(worker, *what)
    Worker.settle = settle
    while worker.folder.exists():  # the status thread may write into it
        shutil.rmtree(worker.folder, ignore_errors=True)
Worker.settle = settle_and_remove
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("verb", ["tile", pytest.param("embed", marks=pytest.mark.slow)])
def test_an_output_that_is_removed_after_the_first_slide_is_named(road, run, tmp_path, verb):
    out = tmp_path / "out"
    command = commands(road, run, out)[verb]
    program = [sys.executable, "-c", REMOVING, *command]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert said.startswith(f"error: {out}")
    assert said.endswith(
        "No such file or directory; name another place, or run it again if its folder was "
        "removed meanwhile"
    )
    assert main(command) == 0
    assert {row["state"] for row in read_csv(out / "status.csv")[1]} == {"done"}


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
def test_a_config_that_is_not_of_a_run_is_refused(run, tmp_path, capsys, config):
    said = refusal(changed_run(run, tmp_path / "run", config=config), capsys)
    assert str(tmp_path / "run" / "config.yaml") in said


def test_a_truncated_last_checkpoint_is_named(run, tmp_path, capsys):
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
    "a method": lambda c: {**c, "method": "os.system"},
    "another method": lambda c: {**c, "method": "ABMIL"},
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


@pytest.mark.slow
@pytest.mark.parametrize("what", OTHER_STATES)
def test_a_training_that_cannot_be_resumed_is_refused(run, tmp_path, capsys, what):
    """The run is not at its end, and of 50 epochs in the checkpoint too: nothing else is wrong."""
    command = changed_run(run, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    content["settings"]["trainer.max_epochs"] = 50
    torch.save(OTHER_STATES[what](content), last)
    said = refusal([*command, "--trainer.max_epochs", "50"], capsys)
    assert str(last) in said and "resumes only with the settings" not in said


def test_other_settings_are_said_with_the_checkpoint(run, tmp_path, capsys):
    command = changed_run(run, tmp_path / "run")
    said = refusal([*command, "--trainer.max_epochs", "50"], capsys)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert said.startswith(
        f"error: {last}: a training resumes only with the settings of its config"
    )
    assert "trainer.max_epochs 50 instead of" in said


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_verb_that_does_not_train_speaks_of_no_training(road, run, tmp_path, capsys, verb):
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    del content["pytorch-lightning_version"]
    path = tmp_path / "no version.ckpt"
    torch.save(content, path)
    command = commands(road, run, tmp_path / "out")[verb]
    said = refusal([*command, "--ckpt_path", str(path)], capsys)
    assert said.startswith(f"error: {path}: it cannot be loaded (KeyError: ")
    assert said.endswith("); give a checkpoint as fit wrote it")
