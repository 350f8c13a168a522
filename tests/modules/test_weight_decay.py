"""Weight decay lets no bag head stop before it has learned (D16)."""

from math import inf, log
from pathlib import Path
from typing import Any

import pytest
import torch
from bag_factory import CLASSES, make_bag, write_cohort_csv
from models import make_module
from modules.test_mil_module import quiet_trainer

from dasmil.bags import bag_path, write_bag
from dasmil.data import BagDataModule
from dasmil.modules import MILModule
from dasmil.modules.weight_decay import BagLosses

OF_THE_RELEASE = {"decay_below": None, "bag_classifier_init": "torch"}
VAL = dict.fromkeys(["s12", "s13", "s14", "s15"], "val")


def faint_bags(folder: Path, shift: float) -> Path:
    """16 small bags; one feature of the tumours' tiles is larger than in the others."""
    labels = {f"s{number}": CLASSES[number % 2] for number in range(16)}
    write_cohort_csv(folder / "cohort.csv", labels, dict.fromkeys(labels, "train") | VAL)
    for seed, (slide_id, label) in enumerate(labels.items()):
        bag = make_bag(slide_id, dims=16, num_tiles=24, side=8, seed=seed)
        for values in bag.features.values():
            values[:, 0] += shift * CLASSES.index(label)
        write_bag(bag_path(folder, slide_id), bag)
    return folder


def trained(folder: Path, epochs: int, **options: Any) -> tuple[MILModule, dict[str, float]]:
    """The module, and by how much its bag logits differ over the validation slides."""
    torch.manual_seed(0)
    data = BagDataModule(folder, CLASSES, batch_size=12, num_workers=0, cache="ram")
    small = {"hidden_dim": 16, "out_dim": 16, "query_dim": 8, "learning_rate": 5e-3}
    module = make_module(**small, **options)
    checks = {"check_val_every_n_epoch": epochs, "enable_checkpointing": False}
    trainer = quiet_trainer(folder, max_epochs=epochs, **checks)
    trainer.fit(module, datamodule=data)
    logits = {s: [float(r.logits[s]) for r in module.results] for s in module.scales}
    return module, {scale: max(z) - min(z) for scale, z in logits.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "dies"), [({}, False), (OF_THE_RELEASE, True)])
def test_the_coarse_bag_head_lives_by_default(
    options: dict[str, Any], dies: bool, tmp_path: Path
) -> None:
    module, ranges = trained(faint_bags(tmp_path, shift=0.2), 100, **options)
    assert (ranges["x10"] < 1e-3) == dies, ranges
    assert decay_of(module) == 5e-3
    if not dies:
        assert min(ranges.values()) > 0.1, ranges


def decay_of(module: MILModule) -> float:
    """What the optimiser's state, and so a checkpoint, says of the next epoch."""
    (group,) = module.trainer.optimizers[0].param_groups
    return float(group["weight_decay"])


def test_no_weight_decay_while_a_scale_is_no_better_than_chance(tmp_path: Path) -> None:
    folder = faint_bags(tmp_path, shift=0.0)
    assert decay_of(trained(folder, 1)[0]) == 0.0
    assert decay_of(trained(folder, 1, decay_below=1e6)[0]) == 5e-3


def test_the_worst_scale_is_compared_with_the_entropy_of_the_labels() -> None:
    """Three slides of four are negative: to know that much is chance."""
    chance = log(4) - 0.75 * log(3)
    losses = BagLosses()
    losses.add(torch.tensor([0, 1]), [torch.tensor([0.1, 0.2]), torch.tensor([0.5, chance])])
    losses.add(torch.tensor([0, 0]), [torch.tensor([0.1, 0.0]), torch.tensor([1.5, chance])])
    assert losses.pop_worst() == pytest.approx((2.0 + 2 * chance) / 4 / chance)
    losses.add(torch.tensor([2, 2]), [torch.zeros(2)])
    assert losses.pop_worst() == inf
