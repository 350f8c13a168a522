"""The verb ``demo``: the whole pipeline on synthetic slides, run by the verbs as a user would."""

import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dasmil.config_files import configs_folder
from dasmil.demo.slides import write_cohort
from dasmil.errors import InputError
from dasmil.files import write_text
from dasmil.slides.cohort import read_cohort
from dasmil.units import parse_scales

TILE_PX = 64
SIZE_PX0 = (1024, 1024)  # half a millimetre
STEPS = "steps.json"  # the commands that have succeeded
RunVerb = Callable[[Sequence[str]], int]  # verb and arguments → exit code


def demo(
    output: Path, seed: int = 0, scales: tuple[str, ...] = ("x10", "x20"), *, run_verb: RunVerb
) -> int:
    """Draw a synthetic cohort and run tile, fit (DINO), embed, fit (DAS-MIL), test and predict.

    No step before ``test`` sees a test slide. At the end it prints the test metrics, the AUROC of
    the instance scores against the drawn truth, and the folders of pictures and curves.

    Parameters
    ----------
    output:
        folder for all files; steps that are complete in it are skipped.
    seed:
        seed of the slides and of every training.
    scales:
        scales of the tiles, the extractors and the model.
    run_verb:
        function of the command line that runs a command and returns its exit code.

    Returns
    -------
    The exit code, 0.

    Raises
    ------
    InputError
        if a step fails, or the folder holds another cohort.
    """
    names = [scale.name for scale in parse_scales(scales)]
    start = time.monotonic()
    print("drawing a cohort of synthetic slides", flush=True)
    cohort = write_cohort(output / "cohort", seed=seed, size_px0=SIZE_PX0, workers=2)
    for arguments in demo_commands(output, cohort, seed, names):
        command = "python -m dasmil " + shlex.join(arguments)
        done = _done_commands(output)
        print(f"\n$ {command}" + ("   (done before)" if command in done else ""), flush=True)
        if command not in done:
            code = run_verb(resumed(arguments))
            if code != 0:
                raise InputError(
                    f"demo: step {arguments[0]!r} failed with exit code {code}; see above"
                )
            write_text(output / STEPS, json.dumps([*done, command], indent=2))
    print_summary(output, cohort, names, time.monotonic() - start)
    return 0


def resumed(arguments: list[str]) -> list[str]:
    """The arguments that go on with an interrupted ``fit``; those of another step unchanged."""
    folder = Path(arguments[arguments.index("--output") + 1]) if arguments[0] == "fit" else None
    if folder is None or not (folder / "config.yaml").is_file():
        return arguments
    return ["fit", "--resume", str(folder)]


def _done_commands(output: Path) -> list[str]:
    path = output / STEPS
    return json.loads(path.read_text()) if path.exists() else []


def demo_commands(
    output: Path, cohort: Path, seed: int, names: Sequence[str]
) -> Iterator[list[str]]:
    """The commands, each as a user would type it."""
    tiles, bags, runs = (str(output / name) for name in ("tiles", "bags", "runs"))
    configs = configs_folder()
    scales = f"[{','.join(names)}]"
    same_seed = ["--seed_everything", str(seed)]
    yield [
        *("tile", "--config", str(configs / "tile.yaml"), "--cohort", str(cohort)),
        *("--output", tiles, "--scales", scales, "--tile_px", str(TILE_PX)),
    ]
    extractors = []
    for scale in names:
        yield [
            *("fit", "--config", str(configs / "dino.yaml")),
            *("--config", str(configs / "demo" / "dino.yaml"), *same_seed),
            *("--data.tiles", tiles, "--data.scale", scale),
            *("--output", f"{runs}/dino_{scale}"),
        ]
        checkpoint = output / "runs" / f"dino_{scale}" / "checkpoints" / "last.ckpt"
        extractors += [f"--extractors.{scale}", str(checkpoint)]
    yield ["embed", "--tiles", tiles, "--output", bags, *extractors]
    yield [
        *("fit", "--config", str(configs / "mil.yaml")),
        *("--config", str(configs / "demo" / "dasmil.yaml"), *same_seed),
        *("--data.bags", bags, "--output", f"{runs}/dasmil"),
    ]
    checkpoint = output / "runs" / "dasmil" / "checkpoints" / "best.ckpt"
    model = ["--ckpt_path", str(checkpoint), "--bags", bags]
    truth = ["--truth", str(cohort.parent / "truth")]
    yield ["test", *model, *truth]
    yield ["predict", *model, "--output", str(output / "predictions")]


def print_summary(output: Path, cohort: Path, names: Sequence[str], seconds: float) -> None:
    """Print the test metrics per scale, and where the other results are."""
    test = output / "runs" / "dasmil" / "test"
    metrics = json.loads((test / "test_metrics.json").read_text())
    num_test = sum(row.split == "test" for row in read_cohort(cohort))
    print(f"\n{num_test} test slides, which no step has seen before:")
    for scale in names:
        auroc, accuracy = (metrics[f"test/{scale}/{name}"] for name in ("auroc", "accuracy"))
        print(f"  {scale:>4}  AUROC {auroc:.3f}  accuracy at 0.5 {accuracy:.3f}")
    finest = names[-1]
    instance = metrics[f"test/{finest}/instance_auroc"]
    print(f"  {finest:>4}  instance AUROC {instance:.3f} (tile at least half lesion, test slides)")
    print(f"all metrics   {test / 'test_metrics.csv'}, {test / 'figures'}")
    print(f"overlays      {output / 'predictions' / 'overlays'}")
    print(f"tile pictures {output / 'tiles' / 'qc'}")
    print(f"curves        tensorboard --logdir {output / 'runs'}")
    print(f"took {seconds / 60:.1f} minutes")
