"""Which weight decay suits every task: the study behind the optimiser's default (D16).

A variant is an optimiser's decay and what belongs to it. Each is trained on the demo cohort, the
colon task, GlaS (frozen ImageNet features) and synthetic bags, by :class:`DASMIL` and
:class:`BagDataModule` alone; ``.github/docs/paper.md`` has the commands that make the bags, and the
table. Only validation slides are evaluated, after the last epoch: test slides are never read.

    python tests/benchmarks/study_weight_decay.py --bags glas=GLAS colon=COLON demo=demo_run/bags

Every run is appended to ``--runs`` (one JSON object per line) and is not made again.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything

sys.path.insert(0, str(Path(__file__).parent.parent))

from bag_factory import CLASSES, make_bag, write_cohort_csv

from dasmil.bags import bag_path, write_bag
from dasmil.data import BagDataModule, SplitOptions
from dasmil.methods import DASMIL
from dasmil.methods.dasmil import NetworkOptions
from dasmil.modules import OptimizerOptions

WIDTH = 64  # hidden_dim and out_dim
BATCH = 4  # small bags; the rates are four times those of a slide per step
DEAD = 1e-3  # range of a scale's bag logits over the validation slides
STRENGTH = {"x10": 0.4, "x20": 0.6}  # of the synthetic signal, in lengths of the noise
FAINT = 0.7  # part of the strength in the task of that name


@dataclass(frozen=True)
class Task:
    """A cohort, how it is divided, and how long a model is trained on it.

    Parameters
    ----------
    num_folds: of the test part, which is left alone; None where the cohort table has the parts.
    val_fraction: part of the patients of the other folds on which a variant is judged.
    standardize, rate: as in the task's config; a variant may change them.
    """

    classes: tuple[str, str]
    epochs: int
    num_folds: int | None = None
    val_fraction: float = 0.1
    standardize: bool = False
    rate: float = 8e-4


TASKS = {
    "synthetic": Task((CLASSES[0], CLASSES[1]), epochs=80),
    "faint": Task((CLASSES[0], CLASSES[1]), epochs=160),
    "glas": Task(("benign", "malignant"), epochs=40, num_folds=4, val_fraction=0.35),
    "colon": Task(("none", "epithelial"), epochs=60, num_folds=3, val_fraction=0.3),
    "colon, its config": Task(("none", "epithelial"), 60, 3, 0.3, standardize=True, rate=2e-3),
    "demo": Task(("normal", "tumour"), epochs=40, standardize=True, rate=2e-3),
}


@dataclass(frozen=True)
class Variant:
    """A weight decay and what belongs to it.

    Parameters
    ----------
    decay: its strength.
    kind: ``l2`` adds it to the gradient (Adam), ``decoupled`` to the step (AdamW).
    on: the parameters that decay: ``all``, ``matrices`` (no bias, no attention vector), the
        matrices of the ``graph``, without the heads, or the ``inner`` layers: all but the heads'
        classifiers.
    starts: the part of the epochs after which it begins.
    below: ``decay_below`` of the module; None: always.
    rate: factor on the task's learning rate.
    standardize: features with the mean and spread of the training tiles.
    gain: factor on torch's initial weights of the bag classifiers; LeCun's is √3.
    """

    decay: float
    kind: Literal["l2", "decoupled"] = "l2"
    on: Literal["all", "matrices", "graph", "inner"] = "all"
    starts: float = 0.0
    below: float | None = None
    rate: float = 1.0
    standardize: bool = False
    gain: float = 1.0


VARIANTS = {
    "default": Variant(5e-3, below=0.9, gain=3**0.5),  # as DASMIL has it
    "0": Variant(0.0),
    "5e-5": Variant(5e-5),
    "5e-4": Variant(5e-4),
    "1e-3": Variant(1e-3),
    "5e-3": Variant(5e-3),
    "5e-3 after learning": Variant(5e-3, below=0.9),
    "5e-3 from 1/4 of the epochs on": Variant(5e-3, starts=0.25),
    "5e-3 on matrices": Variant(5e-3, on="matrices"),
    "5e-3 on the graph": Variant(5e-3, on="graph"),
    "5e-3, none on classifiers": Variant(5e-3, on="inner"),
    "decoupled 1": Variant(1.0, kind="decoupled"),
    "decoupled 10": Variant(10.0, kind="decoupled"),
    "decoupled 30": Variant(30.0, kind="decoupled"),
    "0, standardised": Variant(0.0, standardize=True),
    "5e-3, standardised": Variant(5e-3, standardize=True),
    "5e-3 after learning, standardised": Variant(5e-3, below=0.9, standardize=True),
    "5e-3, none on classifiers, standardised": Variant(5e-3, on="inner", standardize=True),
    "0, 2.5 × rate": Variant(0.0, rate=2.5),
    "5e-3, standardised, 2.5 × rate": Variant(5e-3, standardize=True, rate=2.5),
    "0, bag classifier × 4": Variant(0.0, gain=4.0),
    "1e-3, bag classifier × 4": Variant(1e-3, gain=4.0),
    "5e-3, bag classifier × 4": Variant(5e-3, gain=4.0),
    "5e-3, bag classifier × 8": Variant(5e-3, gain=8.0),
    "5e-3 after learning, bag classifier × 2": Variant(5e-3, below=0.9, gain=2.0),
    "5e-3 after learning, bag classifier × 4": Variant(5e-3, below=0.9, gain=4.0),
    "5e-3 on the graph, bag classifier × 4": Variant(5e-3, on="graph", gain=4.0),
    "5e-3, none on classifiers, bag classifier × 4": Variant(5e-3, on="inner", gain=4.0),
}


class StudyModule(DASMIL):
    """The module with the weight decay of a variant.

    With ``below`` it is the product's own code; the other variants have an optimiser of their own.
    """

    def __init__(self, variant: Variant, task: Task):
        super().__init__(
            network=NetworkOptions(hidden_dim=WIDTH, out_dim=WIDTH, bag_classifier_init="torch"),
            optimizer=OptimizerOptions(
                learning_rate=task.rate * variant.rate,
                weight_decay=variant.decay,
                decay_below=variant.below,
            ),
            standardize=task.standardize or variant.standardize,
        )
        self.variant = variant

    def configure_optimizers(self) -> Any:
        with torch.no_grad():
            for head in self.network.heads.values():
                head.bag_classifier.weight.mul_(self.variant.gain)
        made = super().configure_optimizers()
        if self.variant.below is not None:
            return made
        (group,) = made["optimizer"].param_groups
        named = list(self.named_parameters())
        groups = [
            {"params": [p for name, p in named if self._decays(name) == decays]}
            for decays in (True, False)
        ]
        kind = torch.optim.Adam if self.variant.kind == "l2" else torch.optim.AdamW
        options = {"lr": group["lr"], "betas": group["betas"], "weight_decay": 0.0}
        optimizer = kind([g for g in groups if g["params"]], fused=True, **options)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, self.trainer.max_epochs, eta_min=self.optimizer_options.min_learning_rate
        )
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _decays(self, name: str) -> bool:
        is_matrix = name.endswith("weight")  # a GAT's attention vectors are att_src, att_dst
        return {
            "all": True,
            "matrices": is_matrix,
            "graph": is_matrix and "pgnn" in name,
            "inner": "classifier" not in name,
        }[self.variant.on]

    def on_train_epoch_start(self) -> None:
        if self.variant.below is None:
            begun = self.current_epoch >= self.variant.starts * self.trainer.max_epochs
            (decayed, *_) = self.trainer.optimizers[0].param_groups
            decayed["weight_decay"] = self.variant.decay if begun else 0.0


def make_synthetic_bags(
    folder: Path, seed: int, strength: float = 1.0, num_slides: int = 80
) -> Path:
    """Two scales of noise; in a tumour a few x10 tiles and their children are shifted alike."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shift = torch.from_numpy(rng.standard_normal(32)).half()  # of the length of a tile's noise
    ids = [f"s{number:02}" for number in range(num_slides)]
    labels = {slide_id: CLASSES[number % 2] for number, slide_id in enumerate(ids)}
    split = {slide_id: "train" if n < num_slides // 2 else "val" for n, slide_id in enumerate(ids)}
    for slide_id, label in labels.items():
        bag = make_bag(slide_id, dims=32, num_tiles=48, side=8, seed=int(rng.integers(2**32)))
        if label == CLASSES[1]:
            chosen = torch.from_numpy(rng.choice(len(bag.grid["x10"]), 2, replace=False))
            children = torch.isin(bag.parent["x20"], chosen.int())
            features = {scale: values.clone() for scale, values in bag.features.items()}
            features["x10"][chosen] += strength * STRENGTH["x10"] * shift
            features["x20"][children] += strength * STRENGTH["x20"] * shift
            bag = replace(bag, features=features)
        write_bag(bag_path(folder, slide_id), bag)
    write_cohort_csv(folder / "cohort.csv", labels, split)
    return folder


def train(task: Task, bags: Path, variant: Variant, seed: int, fold: int | None) -> dict[str, Any]:
    """What the model of the last epoch says of the validation slides."""
    seed_everything(seed, verbose=False)
    data = BagDataModule(
        bags,
        list(task.classes),
        batch_size=BATCH,
        cache="ram",
        num_workers=0,
        split=SplitOptions(task.val_fraction, seed=seed, num_folds=task.num_folds, fold=fold),
    )
    module = StudyModule(variant, task)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=task.epochs,
        check_val_every_n_epoch=task.epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.monotonic()
    trainer.fit(module, datamodule=data)
    assert module.evaluation is not None
    logits = {s: torch.stack([r.logits[s] for r in module.results]) for s in module.scales}
    return {
        "auroc": {scale: module.evaluation.metrics(scale)["auroc"] for scale in module.scales},
        "range": {scale: float(x.max() - x.min()) for scale, x in logits.items()},
        "bag_loss": float(trainer.callback_metrics["val/bag/x20"]),
        "slides": len(module.results),
        "steps": trainer.global_step,
        "seconds": time.monotonic() - start,
    }


def table(runs: Iterable[dict[str, Any]]) -> str:
    """Markdown: one row per task and variant; mean ± sd over seeds and folds."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        found[run["task"], run["variant"]].append(run)
    lines = [
        "| task | weight decay | x10 AUROC | x20 AUROC | dead | x20 bag loss | runs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task, name in product(TASKS, VARIANTS):
        made = found[task, name]
        if made:
            coarse, fine = ([run["auroc"][scale] for run in made] for scale in ("x10", "x20"))
            dead = sum(min(run["range"].values()) < DEAD for run in made)
            cells = [f"{fmean(values):.3f} ± {pstdev(values):.3f}" for values in (coarse, fine)]
            cells += [str(dead), f"{fmean(run['bag_loss'] for run in made):.2f}", str(len(made))]
            lines.append(f"| {task} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bags", nargs="*", default=[], help="TASK=FOLDER of glas, colon, demo")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, help="default: synthetic and --bags")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folds", type=int, default=99, help="the first ones alone, to screen")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--runs", type=Path, default=Path("study_weight_decay.jsonl"))
    options = parser.parse_args(args)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folders = {name: Path(path) for name, path in (text.split("=", 1) for text in options.bags)}
    known = {"synthetic", "faint", *folders}
    tasks = options.tasks or [name for name in TASKS if name.split(",")[0] in known]

    lines = options.runs.read_text().splitlines() if options.runs.exists() else []
    runs = [json.loads(line) for line in lines]
    done = {(r["task"], r["variant"], r["seed"], r["fold"]) for r in runs}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in options.seeds:
            for name, strength in (("synthetic", 1.0), ("faint", FAINT)):
                folders[name] = make_synthetic_bags(Path(scratch, f"{name}{seed}"), seed, strength)
            for task, name in ((t, v) for v in options.variants for t in tasks):
                for fold in range(min(TASKS[task].num_folds or 1, options.folds)):
                    if (task, name, seed, fold) in done:
                        continue
                    chosen = fold if TASKS[task].num_folds else None
                    bags = folders[task.split(",")[0]]
                    made = train(TASKS[task], bags, VARIANTS[name], seed, chosen)
                    run = {"task": task, "variant": name, "seed": seed, "fold": fold, **made}
                    with open(options.runs, "a") as file:
                        file.write(json.dumps(run) + "\n")
                    runs.append(run)
    shown = (r for r in runs if r["task"] in tasks and r["variant"] in options.variants)
    print(table(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
