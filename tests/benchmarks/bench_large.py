"""A large folder and a large bag: ``status`` and opening of many bags, ``predict`` of many tiles.

Memory is the largest sum of the resident sets of all processes of the command, looked at every
20 ms; the limits are those that the project asks for, on two cores.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from bag_factory import CLASSES, write_cohort_csv
from bags.hollow import write_hollow
from bench_bags import open_bags, write_cohort
from cases import WIDTH, make_bag
from gigapixel import peak_bytes
from lightning.pytorch import Trainer
from models import make_module
from table import Row

from dasmil.bags import bag_path, write_bag
from dasmil.reports.status_summary import status

EXTRACTORS = '{"x10": {"trained_on": []}, "x20": {"trained_on": []}}'


def measure(quick: bool) -> Iterator[Row]:
    num_bags, num_tiles = (4, 64) if quick else (20_000, 1_250_000)
    with tempfile.TemporaryDirectory() as folder:
        yield from measure_folder(Path(folder), num_bags)
    with tempfile.TemporaryDirectory() as folder:
        yield from measure_bag(Path(folder), num_tiles)


def measure_folder(folder: Path, num_bags: int) -> Iterator[Row]:
    for slide_id in write_cohort(folder, num_bags - 2):
        write_hollow(bag_path(folder, slide_id), 3000, WIDTH)
    (folder / "extractors.json").write_text(EXTRACTORS)
    start = time.perf_counter()
    with redirect_stdout(StringIO()):
        status((folder,))
    taken = time.perf_counter() - start
    yield Row("large", f"status of {num_bags:,} bags", "s", taken, limit=3, limit_is="asked for")
    start = time.perf_counter()
    open_bags(folder, "none")
    taken = time.perf_counter() - start
    yield Row("large", f"fit opens {num_bags:,} bags", "s", taken, limit=20, limit_is="asked for")


def measure_bag(folder: Path, num_tiles: int) -> Iterator[Row]:
    bags, checkpoint = folder / "bags", folder / "model.ckpt"
    bags.mkdir()
    write_cohort_csv(bags / "cohort.csv", {"slide": None})
    bag = make_bag(num_tiles)
    write_bag(bag_path(bags, "slide"), bag)
    model = make_module(classes=CLASSES, bag_format=bag.header.bag_format())
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    model.trainer = trainer
    trainer.strategy.connect(model)
    trainer.save_checkpoint(checkpoint)
    counts = " + ".join(f"{n:,} {scale}" for scale, n in reversed(bag.num_tiles().items()))
    del bag
    for accelerator in ("cpu", "gpu") if torch.cuda.is_available() else ("cpu",):
        command = [sys.executable, "-m", "dasmil", "predict", "--ckpt_path", str(checkpoint)]
        command += ["--bags", str(bags), "--output", str(folder / accelerator)]
        command += ["--data.num_workers", "0", "--trainer.accelerator", accelerator]
        command += ["--trainer.enable_progress_bar", "false"]
        start = time.perf_counter()
        peak = peak_bytes(command)["tree"]
        taken = time.perf_counter() - start
        case = f"predict {counts}" + (", GPU" if accelerator == "gpu" else "")
        yield Row("large", case, "GB", peak / 1e9, limit=8, limit_is="asked for")
        yield Row("large", case, "s", taken)
