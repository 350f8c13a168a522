"""Every method through every verb, and resumed exactly."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bag_factory import CLASSES, write_bags
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from modules.test_mil_module import quiet_trainer
from road import CONF, CONFIGS, Road

import dasmil
from dasmil import methods
from dasmil.bags import BagGraph, bag_graph, bag_path, read_bag
from dasmil.bags.output import ScaleOutput
from dasmil.cli import main
from dasmil.data import BagDataModule
from dasmil.modules import MILModule

METHODS = {  # with small networks
    "ABMIL": {"network": {"attention_dim": 4}},
    "CLAM": {"network": {"hidden_dim": 8, "attention_dim": 4}},
    "DASMIL": {"network": {"hidden_dim": 8, "out_dim": 8, "query_dim": 4}},
    "DTFD": {"network": {"hidden_dim": 8, "attention_dim": 4}},
}


def test_every_method_is_here() -> None:
    classes = {name for name in methods.__all__ if isinstance(getattr(methods, name), type)}
    assert classes == set(METHODS)


class OneOptimiserPerTier(methods.DTFD):
    """DTFD as released: two losses, two backward passes and two optimisers."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, graph: BagGraph, batch_idx: int) -> None:
        total, terms = self.objective(self(graph), graph)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(terms["pseudo_bag/x20"].mean(), retain_graph=True)
        self.manual_backward(terms["bag/x20"].mean())
        super().on_before_optimizer_step(optimizers[0])
        for optimizer in optimizers:
            optimizer.step()
        self.log_losses(
            graph, total.detach(), {name: loss.detach() for name, loss in terms.items()}
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing: Lightning calls this once per optimiser, and a step clips once."""

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        schedules: Any = self.lr_schedulers()
        for schedule in schedules:
            schedule.step()

    def configure_optimizers(self) -> Any:
        second = list(self.network.second.parameters())
        kept = set(map(id, second))
        first = [weight for weight in self.network.parameters() if id(weight) not in kept]
        return [self.adam(first), self.adam(second)]


def make(name: str) -> MILModule:
    from dasmil.modules.options import typed_options

    if name == "OneOptimiserPerTier":
        return OneOptimiserPerTier(**typed_options(methods.DTFD, METHODS["DTFD"]))
    method = getattr(methods, name)
    return method(**typed_options(method, METHODS[name]))


class StopsAfter(Callback):
    """Ends a training after an epoch, as if it was killed."""

    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        trainer.should_stop = trainer.current_epoch == self.epoch


def write_eight_bags(folder: Path) -> Path:
    labels = {f"s{n}": CLASSES[n % 2] for n in range(8)}
    split = {f"s{n}": "train" if n < 6 else "val" for n in range(8)}
    return write_bags(folder, labels, split)


def fit_two_epochs(
    name: str, bags: Path, output: Path, ckpt_path: str | None = None, *callbacks: Callback
) -> tuple[MILModule, str]:
    """The trained module and the path of its last checkpoint."""
    seed_everything(0)
    data = BagDataModule(bags, CLASSES, num_workers=0)
    keeper = ModelCheckpoint(output, "last")
    trainer = quiet_trainer(output, max_epochs=2, callbacks=[*callbacks, keeper])
    module = make(name)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, keeper.best_model_path


@pytest.mark.parametrize("name", [*METHODS, "OneOptimiserPerTier"])
def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(
    name: str, tmp_path: Path
) -> None:
    bags = write_eight_bags(tmp_path / "bags")
    whole, _ = fit_two_epochs(name, bags, tmp_path / "whole")
    first, path = fit_two_epochs(name, bags, tmp_path / "broken", None, StopsAfter(0))
    again, _ = fit_two_epochs(name, bags, tmp_path / "again", path)
    changed = 0
    for key, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[key]), key
        changed += not torch.equal(weight, first.state_dict()[key])
    assert changed > 0 and again.trainer.current_epoch == 2


def test_one_optimiser_of_dtfd_equals_the_two_released_ones(tmp_path: Path) -> None:
    bags = write_eight_bags(tmp_path / "bags")
    one, _ = fit_two_epochs("DTFD", bags, tmp_path / "one")
    two, _ = fit_two_epochs("OneOptimiserPerTier", bags, tmp_path / "two")
    assert len(two.configure_optimizers()) == 2
    torch.testing.assert_close(one.state_dict(), two.state_dict())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "ABMIL" else pytest.mark.slow)
        for name in METHODS
        if name != "DASMIL"  # as all other tests of commands train it
    ],
)
def test_a_method_goes_through_every_verb_by_its_name_alone(
    name: str, road: Road, tmp_path: Path
) -> None:
    run, config = tmp_path / "run", str(CONFIGS / "mil.yaml")
    fit = ["fit", "--config", config, "--model.class_path", name, "--data.bags", str(road.bags)]
    fit += ["--data.classes", "[normal,tumour]", "--data.num_workers", "0", "--output", str(run)]
    fit += ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]
    assert main(fit) == 0
    assert not list(run.glob("version_*"))
    checkpoint = str(run / "checkpoints" / "best.ckpt")
    model = ["--ckpt_path", checkpoint, "--bags", str(road.bags), "--data.num_workers", "0"]
    assert main(["validate", *model]) == 0
    assert main(["test", *model, "--truth", str(road.cohort.parent / "truth")]) == 0
    metrics = json.loads((run / "test" / "test_metrics.json").read_text())
    assert {"test/x20/auroc", "test/auroc", "test/x20/instance_auroc"} <= set(metrics)
    assert not [key for key in metrics if "x10" in key]
    assert main(["predict", *model, "--output", str(tmp_path / "P")]) == 0
    with open(tmp_path / "P" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["state"] for row in rows} == {"done"}
    module = dasmil.load(checkpoint)
    assert type(module) is getattr(methods, name) and module.scales == ("x20",)
    bag = read_bag(bag_path(road.bags, rows[0]["slide_id"]), ["x20"])
    with torch.inference_mode():
        logits = module(bag_graph(bag, edges=False))["x20"].bag_logits[0]
    assert float(rows[0]["logit/x20/tumour"]) == pytest.approx(float(logits[-1]), abs=1e-5)


@pytest.mark.slow
def test_methods_are_compared_and_swept(road: Road, tmp_path: Path) -> None:
    """A row names its method; runs of several methods stand in one table."""
    table = tmp_path / "table.yaml"
    table.write_text(
        f"base: [{CONFIGS / 'mil.yaml'}, {CONF / 'bags.yaml'}]\nseeds: [0]\ncolumns: [x20/auroc]\n"
        "rows:\n  - {label: ABMIL, set: {model.class_path: ABMIL}}\n"
        "  - {label: plain, set: {model.class_path: ABMIL, model.network.gated: false}}\n"
    )
    output = tmp_path / "sweep"
    sweep = ["sweep", "--config", str(table), "--bags", str(road.bags), "--output", str(output)]
    assert main(sweep) == 0
    assert (output / "class_path_ABMIL" / "seed_0" / "test" / "test_metrics.json").is_file()
    rows = ["class_path_ABMIL", "class_path_ABMIL+gated_false"]
    folders = [str(output / row / "seed_0") for row in rows]
    assert main(["compare", *folders, "--output", str(tmp_path / "compared")]) == 0


def test_a_method_of_ones_own_is_named_in_code_or_on_the_command_line(
    road: Road, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A file alone cannot name it."""
    run, own = tmp_path / "run", "methods.own_method.Mean"
    fit = ["fit", "--config", str(CONFIGS / "mil.yaml"), "--config", str(CONF / "bags.yaml")]
    fit += ["--model.class_path", own, "--data.bags", str(road.bags), "--output", str(run)]
    fit += ["--model.widths", "[3,0]", "--model.pair", "[0.5,2]", "--model.names", "[a,b]"]
    assert main(fit) == 0
    checkpoint = str(run / "checkpoints" / "best.ckpt")
    model = ["--ckpt_path", checkpoint, "--bags", str(road.bags), "--data.num_workers", "0"]
    assert main(["test", *model]) == 2
    assert "its method 'methods.own_method.Mean' is none of ABMIL" in capsys.readouterr().err
    assert main(["test", *model, "--model.class_path", own]) == 0
    from methods.own_method import Mean

    loaded = dasmil.load(checkpoint, method=Mean)
    assert type(loaded) is Mean
    expected = {"shift": -1, "widths": [3, 0], "pair": [0.5, 2.0], "names": ["a", "b"]}
    assert loaded.options.items() >= expected.items()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("network.attention_dim", "0", "model.network: attention_dim 0 is not a whole number"),
        ("network.dropout", "3", "model.network: dropout 3.0 is not a number from 0 to 1"),
        ("optimizer.learning_rate", "-1", "model.optimizer: learning_rate -1.0 is not a number"),
    ],
)
def test_an_option_that_no_checkpoint_may_hold_is_refused_before_the_first_epoch(
    road: Road, tmp_path: Path, capsys: pytest.CaptureFixture, option: str, value: str, message: str
) -> None:
    fit = ["fit", "--config", str(CONFIGS / "mil.yaml"), "--config", str(CONF / "bags.yaml")]
    fit += ["--model.class_path", "CLAM", "--data.bags", str(road.bags)]
    fit += ["--output", str(tmp_path / "run"), f"--model.{option}", value]
    assert main(fit) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_fit_does_not_begin_in_the_folder_of_another_one(
    road: Road, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its config would describe the checkpoints of the other."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").write_bytes(b"")
    (run / "config.yaml").write_text("before")
    fit = ["fit", "--config", str(CONFIGS / "mil.yaml"), "--config", str(CONF / "bags.yaml")]
    assert main([*fit, "--data.bags", str(road.bags), "--output", str(run)]) == 2
    assert f"go on with it by fit --resume {run}" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == "before"
    assert sorted(path.name for path in run.rglob("*")) == [
        "checkpoints",
        "config.yaml",
        "last.ckpt",
    ]


@pytest.mark.parametrize(
    "shapes",
    [
        {"bag_logits": (2,)},
        {"attention": (5,)},
        {"attention": (5, 1)},
        {"instance_logits": (4, 3)},
        {"bag_index": (5, 1)},
    ],
)
def test_an_output_of_other_shapes_is_refused_when_it_is_created(shapes: dict) -> None:
    right = {"bag_logits": (2, 3), "instance_logits": (5, 3), "attention": (5, 3)}
    right["bag_index"] = (5,)
    ScaleOutput(**{name: torch.zeros(shape) for name, shape in right.items()})
    with pytest.raises(ValueError, match=next(iter(shapes))):
        ScaleOutput(**{name: torch.zeros(shape) for name, shape in (right | shapes).items()})
