"""D1-D21, where paper and released code differ: what the default does, what the switch does.

And what the presets `paper`, `mil4wsi` and `mil4wsi_lung` set each of them to.
"""

import csv
import inspect
from collections import Counter
from copy import deepcopy
from dataclasses import asdict, fields, replace
from math import cos, exp, log, pi
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from bag_factory import CLASSES, make_bag, make_graphs, neighbours_of, write_bags
from bags.orphans import without_first
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from models import leaves, make_module, make_network
from PIL import Image
from road import CONFIGS, embed_command
from torch import Tensor, nn
from torch_geometric.nn import GATConv

import dasmil
from dasmil.bags import bag_graph, bag_path, join_graphs, read_bag, write_bag
from dasmil.bags.output import ScaleOutput
from dasmil.callbacks import BestCheckpoint
from dasmil.cli import main
from dasmil.data import BagDataModule, TileDataModule
from dasmil.data.split import DRAWING, SplitOptions
from dasmil.demo.slides import write_pyramid
from dasmil.embedding.extractor import Extractor
from dasmil.errors import InputError
from dasmil.geometry import PyramidGrid
from dasmil.losses import bag_loss, criticality_loss, distillation_loss
from dasmil.methods.dasmil import DASMIL, ObjectiveOptions, objective
from dasmil.metrics import slide_metrics
from dasmil.modules import MILModule
from dasmil.modules.options import nested_options
from dasmil.nn import GAT
from dasmil.slides.cohort import SlideRow
from dasmil.slides.reader import Slide
from dasmil.slides.splits import split_cohort
from dasmil.units import TilePx, parse_scales

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


# One bag of two scales: coarse tiles 0 (children 0, 1), 1 (child 2) and 2, which has none.
PARENT = torch.tensor([0, 0, 1])
PTR = {"x10": torch.tensor([0, 3]), "x20": torch.tensor([0, 3])}
LABEL = torch.tensor([1])


def leaf(*rows: float) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)[:, None].requires_grad_()


def says(bag: float, instances: tuple[float, ...], attention: tuple[float, ...]) -> ScaleOutput:
    rows = len(instances)
    index, shown = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.bool)
    return ScaleOutput(leaf(bag), leaf(*instances), leaf(*attention), index, shown)


def two_scales() -> dict[str, ScaleOutput]:
    return {
        "x10": says(0.4, (1.0, -2.0, 3.0), (0.5, 0.2, 0.3)),
        "x20": says(-0.7, (0.5, 2.5, -1.0), (0.1, 0.6, 0.3)),
    }


def total_of(output: dict[str, ScaleOutput], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    total, terms = objective(output, {"x20": PARENT}, PTR, LABEL, ObjectiveOptions(**options))
    return total[0], terms


def sigmoid(y: float) -> float:
    return 1 / (1 + exp(-y))


def two_point_kl(first: float, second: float) -> float:
    """KL between (σ(y), σ(-y)) of two logits."""
    p, q = sigmoid(first), sigmoid(second)
    return p * log(p / q) + (1 - p) * log((1 - p) / (1 - q))


# The losses


def test_d1_the_teacher_comes_first_or_as_printed_the_student() -> None:
    student, teacher = leaf(0.4), leaf(-0.7)
    default = distillation_loss(student, teacher, 1.0)
    printed = distillation_loss(student, teacher, 1.0, direction="student_teacher")
    assert default.item() == pytest.approx(two_point_kl(-0.7, 0.4))
    assert printed.item() == pytest.approx(two_point_kl(0.4, -0.7))
    assert default.item() != pytest.approx(printed.item(), rel=1e-3)


def test_d2_the_factor_tau_squared_is_there_or_not() -> None:
    student, teacher, tau = leaf(0.4), leaf(-0.7), 1.5
    bare = two_point_kl(-0.7 / tau, 0.4 / tau)
    assert distillation_loss(student, teacher, tau).item() == pytest.approx(tau**2 * bare)
    without = distillation_loss(student, teacher, tau, squared_temperature=False)
    assert without.item() == pytest.approx(bare)


def test_d3_several_classes_are_one_softmax_or_halves_of_a_binary_divergence_each() -> None:
    s, t = [0.4, -1.0, 2.0], [1.0, 0.3, -0.5]
    student, teacher = (torch.tensor([y], dtype=torch.float64) for y in (s, t))
    p, q = ([exp(y) / sum(map(exp, ys)) for y in ys] for ys in (t, s))
    softmax = sum(a * log(a / b) for a, b in zip(p, q, strict=True))
    assert distillation_loss(student, teacher, 1.0).item() == pytest.approx(softmax)
    binary = sum(two_point_kl(b, a) for a, b in zip(s, t, strict=True)) / 2
    per_class = distillation_loss(student, teacher, 1.0, class_distribution="per_class")
    assert per_class.item() == pytest.approx(binary)
    one_softmax, one_binary = (
        distillation_loss(leaf(0.4), leaf(-0.7), 1.0, class_distribution=kind).item()
        for kind in ("softmax", "per_class")
    )
    assert one_softmax == one_binary == pytest.approx(two_point_kl(-0.7, 0.4))


def test_d4_binary_for_one_logit_and_cross_entropy_for_more() -> None:
    """Two classes share a logit or, by the switch, have two; training takes both."""
    one = bag_loss(torch.tensor([[0.4]]), torch.tensor([1])).item()
    assert one == pytest.approx(-log(sigmoid(0.4)))
    two = bag_loss(torch.tensor([[0.1, 0.5]]), torch.tensor([1])).item()
    assert two == pytest.approx(-log(exp(0.5) / (exp(0.1) + exp(0.5))))
    graph = join_graphs(make_graphs((9, 4), labels=(0, 1)))
    for one_logit, width in ((True, 1), (False, 2)):
        module = small_module(one_logit=one_logit)
        total, _ = module.objective(module(graph), graph)
        assert module(graph)["x20"].bag_logits.shape == (2, width)
        total.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_d5_log_space_or_a_small_number_added_to_every_probability() -> None:
    """It matters where the student is sure and wrong: log space has no ceiling."""
    student, teacher = leaf(-40.0), leaf(40.0)
    assert distillation_loss(student, teacher, 1.0).item() == pytest.approx(40.0)
    added = distillation_loss(student, teacher, 1.0, epsilon=True).item()
    high, low = ((p + 1e-7) / (1 + 1e-8) for p in (1.0, 0.0))
    assert added == pytest.approx(high * log(high / low) + low * log(low / high), rel=1e-6)
    near = [distillation_loss(leaf(0.4), leaf(-0.7), 1.0, epsilon=e).item() for e in (False, True)]
    assert 0 < abs(near[0] - near[1]) < 1e-6


def test_d6_the_coarse_bag_loss_is_discounted_or_as_printed_the_fine_one() -> None:
    weights = {"distillation": 0.25, "criticality": 0.0, "instance": 0.0}
    coarse, terms = total_of(two_scales(), **weights)
    fine, _ = total_of(two_scales(), **weights, discounted="fine")
    kd = 0.25 * terms["distillation/x10"]
    expected = 0.75 * terms["bag/x10"] + terms["bag/x20"] + kd
    assert coarse.item() == pytest.approx(expected.item())
    printed = terms["bag/x10"] + 0.75 * terms["bag/x20"] + kd
    assert fine.item() == pytest.approx(printed.item())


def test_d6_with_lambda_one_the_printed_form_leaves_the_teachers_bag_head_without_labels() -> None:
    for discounted, learns in (("coarse", True), ("fine", False)):
        output = two_scales()
        total, _ = total_of(output, instance=0.0, discounted=discounted)
        total.backward()
        gradient = output["x20"].bag_logits.grad
        assert (gradient is not None and bool(gradient.any())) is learns


def test_d7_the_largest_instance_logit_has_a_label_loss_at_both_scales_or_none() -> None:
    """Weight 1, not discounted whatever λ."""
    tops = -log(sigmoid(3.0)) - log(sigmoid(2.5))
    for distillation in (0.0, 0.6, 1.0):
        default, _ = total_of(two_scales(), distillation=distillation)
        without, _ = total_of(two_scales(), distillation=distillation, instance=0.0)
        half, _ = total_of(two_scales(), distillation=distillation, instance=0.5)
        assert (default - without).item() == pytest.approx(tops)
        assert (half - without).item() == pytest.approx(tops / 2)


# Distances of tile 0 and 1 to their children: 1.0 - 1.5 and -2.0 + 1.0 by mean.
SQUARES = (0.25, 1.0)


def crit(**options: Any) -> float:
    return total_of(two_scales(), **options)[1]["criticality/x10"].item()


def test_d8_a_mean_over_the_tiles_or_as_printed_a_sum() -> None:
    assert crit() == pytest.approx(sum(SQUARES) / 2)
    assert crit(criticality_reduction="sum") == pytest.approx(sum(SQUARES))


def test_d9_the_mean_of_the_children_or_as_released_the_largest() -> None:
    assert crit() == pytest.approx(sum(SQUARES) / 2)
    assert crit(children_pooling="max") == pytest.approx(((1.0 - 2.5) ** 2 + 1.0) / 2)


def test_d10_instance_logits_or_the_attention_are_compared() -> None:
    assert crit() == pytest.approx(sum(SQUARES) / 2)
    by_attention = ((0.5 - 0.35) ** 2 + (0.2 - 0.3) ** 2) / 2
    assert crit(criticality_scores="attention") == pytest.approx(by_attention)


def test_d11_the_teacher_gets_no_gradient_or_one_from_both_terms() -> None:
    for name, kind in (("distillation/x10", "bag_logits"), ("criticality/x10", "instance_logits")):
        for detach in (True, False):
            output = two_scales()
            _, terms = total_of(output, detach_teacher=detach)
            terms[name].backward()
            teacher, student = getattr(output["x20"], kind), getattr(output["x10"], kind)
            assert student.grad.any()
            assert (teacher.grad is None) is detach
            if not detach:
                assert teacher.grad.any()
    default = two_scales()
    total_of(default)[1]["distillation/x10"].backward()
    assert default["x20"].bag_logits.grad is None


def test_d12_the_coarse_head_sees_all_tiles_or_those_with_children() -> None:
    """L_CRIT is there in both cases only where a tile has children."""
    torch.manual_seed(0)
    (graph,) = make_graphs((12,))
    childless = graph.parent["x20"] == 0
    graph.parent["x20"][childless] = -1
    model = make_network({"x10": 6, "x20": 6}, 1, 8, 8, query_dim=4).eval()
    released = make_network(
        {"x10": 6, "x20": 6}, 1, 8, 8, query_dim=4, coarse_instances="parents"
    ).eval()
    released.load_state_dict(model.state_dict())
    everything, parents = model(graph)["x10"], released(graph)["x10"]
    assert everything.shown.all() and everything.attention.all()
    assert (~parents.shown).nonzero().tolist() == [[0]]
    h = model.pgnn(graph)["x10"]
    alone = model.heads["x10"](h[1:], torch.tensor([0, len(h) - 1]))
    torch.testing.assert_close(parents.bag_logits, alone.bag_logits)
    torch.testing.assert_close(parents.attention[1:], alone.attention)
    assert not parents.attention[0].any()
    assert not torch.allclose(parents.bag_logits, everything.bag_logits)

    coarse, fine = torch.zeros(3, 1), torch.ones(3, 1)
    coarse[2] = 100.0  # has no children
    assert criticality_loss(coarse, fine, PARENT, PTR["x10"]).item() == 1.0


def test_d12_the_instance_loss_is_that_of_the_tiles_that_are_seen() -> None:
    """The largest coarse logit, 3.0, is that of the tile without children."""
    output = two_scales()
    assert total_of(output)[1]["instance/x10"].item() == pytest.approx(-log(sigmoid(3.0)))
    output["x10"] = replace(output["x10"], shown=torch.tensor([True, True, False]))
    assert total_of(output)[1]["instance/x10"].item() == pytest.approx(-log(sigmoid(1.0)))


# The network


def test_d13_the_graph_attention_is_that_of_the_released_code() -> None:
    """3 heads averaged, dropout 0.2, itself among its neighbours, 384 → 384 → 256, no σ between."""
    model = make_network({"x10": 384, "x20": 384})
    pgnn = model.pgnn
    gats = [*pgnn.scale_gats.values(), pgnn.union_gat]
    for gat in gats:
        conv = gat.conv
        assert isinstance(conv, GATConv)
        assert (conv.heads, conv.concat, conv.dropout) == (3, False, 0.2)
        assert (conv.add_self_loops, conv.negative_slope) == (True, 0.2)
    assert [(g.conv.in_channels, g.conv.out_channels) for g in gats] == [
        *[(384, 384)] * 2,
        (384, 256),
    ]
    (graph,) = make_graphs((9,), dims=384)
    model.eval()
    h = [gat(graph.features[s].float(), graph.neighbours[s]) for s, gat in pgnn.scale_gats.items()]
    assert (torch.cat(h) < 0).any()  # nothing cuts them off between the layers
    expected = pgnn.union_gat(torch.cat(h), graph.union)
    assert torch.equal(torch.cat(list(pgnn(graph).values())), expected)
    other = make_network(
        {"x10": 6, "x20": 6}, 1, 8, 4, heads=2, attention_dropout=0.1
    ).pgnn.union_gat
    assert (other.conv.heads, other.conv.dropout, other.conv.out_channels) == (2, 0.1, 4)


def test_d14_half_of_the_nodes_lose_their_edges_in_training_or_none() -> None:
    """1000 pairs: an edge is there when both of its ends are, so for a quarter of them."""
    pairs = torch.arange(2000).reshape(2, 1000)
    pairs = neighbours_of(torch.cat([pairs, pairs.flip(0)], dim=1), 2000)
    nobody = neighbours_of(torch.empty(2, 0, dtype=torch.int64), 2000)
    x = torch.randn(2000, 3)

    def share_without_edge(gat: GAT) -> float:
        alone = gat(x, nobody)
        torch.manual_seed(0)
        return (gat(x, pairs) == alone).all(1).float().mean().item()

    default, without = (GAT(3, 3, attention_dropout=0.0, **o) for o in ({}, {"node_dropout": 0.0}))
    assert 0.69 < share_without_edge(default.train()) < 0.81
    assert share_without_edge(default.eval()) == 0.0
    assert share_without_edge(without.train()) == 0.0


def test_d15_no_residual_or_a_plain_or_a_gated_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    edges = neighbours_of(torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]]), 4)
    default, plain, glu = (
        GAT(6, 6, residual=r).eval()  # type: ignore[arg-type]
        for r in ("none", "plain", "glu")
    )
    assert GAT(6, 6).residual == "none"
    for gat in (plain, glu):
        gat.conv.load_state_dict(default.conv.state_dict())
    h = default(x, edges)
    torch.testing.assert_close(h, default.conv(x, edges.edge_index()))
    assert torch.equal(plain(x, edges), x + h)
    first, _, second = glu.gate.mlp
    assert (first.out_features, second.out_features) == (3, 6)
    gate = torch.sigmoid(second(F.elu(first(h))))
    torch.testing.assert_close(glu(x, edges), x + h * gate)
    with pytest.raises(InputError, match="the same width"):
        make_network({"x10": 384, "x20": 384}, residual="glu")  # out_dim is 256


# Training and figures


def merged(*files: str) -> dict[str, Any]:
    """Options of the model, the data and the trainer, a later file on top of an earlier."""
    found: dict[str, Any] = {"model": {}, "data": {}, "trainer": {}}
    for file in files:
        content = yaml.safe_load((CONFIGS / file).read_text())
        found["model"] |= leaves(content["model"].get("init_args", {}))
        found["data"] |= content["data"].get("init_args", {})
        found["trainer"] |= content.get("trainer", {})
    return found


def small_module(**options: Any) -> MILModule:
    torch.manual_seed(0)
    small = {"hidden_dim": 8, "out_dim": 8, "query_dim": 4}
    bag_format = make_bag().header.bag_format()
    return make_module(**{**small, "classes": CLASSES, "bag_format": bag_format, **options})


def quiet_trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(
        default_root_dir=folder, accelerator="cpu", num_sanity_val_steps=0, **quiet, **options
    )


ADAM = {  # betas, weight decay of the first epoch, end of the cosine
    "mil.yaml": ((0.5, 0.9), 0.0, 1e-5),
    "preset/paper.yaml": ((0.9, 0.999), 0.0, 1e-5),
    "preset/mil4wsi.yaml": ((0.5, 0.9), 5e-3, 5e-6),
    "preset/mil4wsi_lung.yaml": ((0.5, 0.9), 5e-3, 5e-6),
}


@pytest.mark.parametrize("config", list(ADAM))
def test_d16_adam_and_its_cosine_are_those_of_the_config(config: str, tmp_path: Path) -> None:
    betas, weight_decay, end = ADAM[config]
    arguments = merged("mil.yaml", config)
    assert arguments["trainer"]["max_epochs"] == 200
    wanted = ("learning_rate", "min_learning_rate", "betas", "weight_decay", "decay_below")
    module = small_module(**{n: v for n, v in arguments["model"].items() if n in wanted})
    module._trainer = quiet_trainer(tmp_path, max_epochs=200)
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]
    assert type(optimizer) is torch.optim.Adam
    (group,) = optimizer.param_groups
    assert (tuple(group["betas"]), group["weight_decay"], group["lr"]) == (
        betas,
        weight_decay,
        2e-4,
    )
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}
    rates = []
    for _ in range(200):
        rates.append(group["lr"])
        optimizer.step()
        schedule.step()
    expected = [end + (2e-4 - end) * (1 + cos(pi * epoch / 200)) / 2 for epoch in range(201)]
    assert [*rates, group["lr"]] == pytest.approx(expected)


class Rates(Callback):
    """The learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_d16_the_rate_changes_once_an_epoch_over_all_epochs(tmp_path: Path) -> None:
    data = make_data(write_bags(tmp_path, LABELS, SPLIT))
    rates = Rates()
    trainer = quiet_trainer(tmp_path, max_epochs=4, callbacks=[rates], enable_checkpointing=False)
    module = small_module(learning_rate=0.1, min_learning_rate=0.02, bag_format=None, classes=None)
    trainer.fit(module, datamodule=data)
    steps = len(data.rows_of("train"))
    expected = [0.02 + 0.08 * (1 + cos(pi * epoch / 4)) / 2 for epoch in range(4)]
    assert rates.seen == pytest.approx([rate for rate in expected for _ in range(steps)])


PARTS = ("train", "train", "val", "test")
SPLIT = {f"{letter}{number}": part for number, part in enumerate(PARTS) for letter in "nt"}
LABELS: dict[str, str | None] = {s: CLASSES[s[0] == "t"] for s in SPLIT}


def make_data(folder: Path, stage: str = "fit", **arguments: Any) -> BagDataModule:
    data = BagDataModule(folder, CLASSES, num_workers=0, **arguments)
    data.setup(stage)
    return data


def seen(loader: Any) -> list[str]:
    return [slide_id for graph in loader for slide_id in graph.slide_ids]


def test_d17_one_tenth_of_the_training_patients_is_for_validation(tmp_path: Path) -> None:
    """Stratified by label and grouped by patient; the official test slides stay what they are."""
    labels = {f"{c}{n:02}": CLASSES[c == "t"] for n in range(46) for c in "nt"}
    split = {s: "test" if int(s[1:]) < 6 else "train" for s in labels}
    patients = {s: f"{s[0]}-{int(s[1:]) // 2}" for s in labels}  # two slides each
    data = make_data(write_bags(tmp_path, labels, split, patients))
    for part, count in (("train", 36), ("val", 4), ("test", 6)):  # of each label
        letters = Counter(row.slide_id[0] for row in data.rows_of(part))
        assert letters == {"n": count, "t": count}
    for patient in set(patients.values()):
        assert len({data.splits[s] for s in labels if patients[s] == patient}) == 1
    assert {s for s, part in data.splits.items() if part == "test"} == {
        s for s, part in split.items() if part == "test"
    }


def test_d17_validation_is_the_test_part_only_by_switch_and_with_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder = write_bags(tmp_path, LABELS, SPLIT)
    data = make_data(folder)
    assert not [w for w in recwarn if "D17" in str(w.message)]
    assert seen(data.val_dataloader()) == ["n2", "t2"]
    with pytest.warns(UserWarning, match="the validation slides are the test slides"):
        released = make_data(folder, split=SplitOptions(val_part="test"))
    assert seen(released.val_dataloader()) == seen(released.test_dataloader()) == ["n3", "t3"]


@pytest.mark.filterwarnings("ignore:.*D17")
@pytest.mark.parametrize("val_part", ["val", "test"])
def test_d17_fitting_opens_no_test_slide_unless_by_switch(
    tmp_path: Path, val_part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = set()

    def remember(path: Path, scales: Any = None) -> Any:
        opened.add(path.stem)
        return read_bag(path)

    monkeypatch.setattr("dasmil.data.bag_dataset.read_bag", remember)
    fit_one_epoch(tmp_path, split=SplitOptions(val_part=val_part))
    assert opened == {s for s, part in SPLIT.items() if part in ("train", val_part)}


def test_d17_the_best_epoch_is_that_of_the_validation_slides() -> None:
    keeper, last = yaml.safe_load((CONFIGS / "mil.yaml").read_text())["trainer"]["callbacks"]
    assert last["init_args"]["filename"] == "last" and "monitor" not in last["init_args"]
    assert keeper["class_path"] == "BestCheckpoint"
    best = BestCheckpoint(**keeper.get("init_args", {}))
    assert (best.monitor, best.mode, best.filename) == ("val/auroc", "max", "best")


def fit_one_epoch(
    folder: Path, *more_test_slides: str, **arguments: Any
) -> tuple[ModelCheckpoint, BagDataModule, MILModule]:
    """A model after one epoch on the bags of ``SPLIT``."""
    labels = LABELS | {s: CLASSES[s[0] == "t"] for s in more_test_slides}
    split = SPLIT | dict.fromkeys(more_test_slides, "test")
    data = make_data(write_bags(folder, labels, split), **arguments)
    keeper = ModelCheckpoint(folder / "kept", "best", monitor="val/auroc", mode="max")
    module = small_module(bag_format=None, classes=None)
    quiet_trainer(folder, max_epochs=1, callbacks=[keeper]).fit(module, datamodule=data)
    return keeper, data, module


def test_d18_accuracy_is_at_one_half_whatever_the_labels_that_are_evaluated() -> None:
    """Scores that a threshold chosen on them would part without a mistake."""
    positive = np.array([0.55, 0.6, 0.8, 0.9])
    probabilities = np.stack([1 - positive, positive], 1)
    figures = slide_metrics(probabilities, np.array([0, 0, 1, 1]))
    assert (figures["auroc"], figures["accuracy"]) == (1.0, 0.5)
    for number in range(16):  # under any labels the same slides are called positive: all
        labels = np.array([number >> k & 1 for k in range(4)])
        assert slide_metrics(probabilities, labels)["accuracy"] == labels.mean()


def test_d18_the_other_threshold_is_chosen_on_validation_and_kept(tmp_path: Path) -> None:
    """Halfway between the two validation slides; testing, under any labels, leaves it alone."""
    keeper, data, _ = fit_one_epoch(tmp_path, "t4", "t5")
    chosen = dasmil.load(keeper.best_model_path).card.thresholds
    assert set(chosen) == {"x10", "x20"}
    for scale, points in chosen.items():
        threshold = points["youden"]
        normal, tumour = (positive_of(keeper.best_model_path, data, s)[scale] for s in ("n2", "t2"))
        upper = tumour if tumour > normal else 1.0  # else no threshold parts the two
        expected = (upper + (normal if tumour > normal else max(normal, tumour))) / 2
        assert threshold == pytest.approx(expected, abs=1e-6)

    tested = [row.slide_id for row in data.rows_of("test")]
    scores = {s: positive_of(keeper.best_model_path, data, s)["x20"] for s in tested}
    for second in "tn":  # which of the two kinds is called tumour in the table
        labels = {row.slide_id: CLASSES[row.slide_id[0] == second] for row in data.rows}
        write_bags(tmp_path, labels, data.splits)
        for given in (chosen, *({s: {"youden": t} for s in chosen} for t in (0.0, 1.0))):
            module = dasmil.load(keeper.best_model_path)
            module.bind(replace(module.card, thresholds=deepcopy(given)))
            module.load_state_dict(dasmil.load(keeper.best_model_path).state_dict())
            (found,) = quiet_trainer(tmp_path).test(
                module, datamodule=make_data(tmp_path, "test"), verbose=False
            )
            assert module.card.thresholds == given

            def accuracy(threshold: float, second: str = second) -> float:
                return float(
                    np.mean([(p >= threshold) == (s[0] == second) for s, p in scores.items()])
                )

            assert found["test/x20/accuracy"] == pytest.approx(accuracy(0.5))
            at_given = found["test/x20/accuracy_at_val_threshold"]
            assert at_given == pytest.approx(accuracy(given["x20"]["youden"]))


def test_d18_the_threshold_that_suits_the_test_slides_is_named_for_it(tmp_path: Path) -> None:
    """Only `test` reports it, and never as the accuracy."""
    _, data, module = fit_one_epoch(tmp_path)
    trainer = quiet_trainer(tmp_path)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    (validated,) = trainer.validate(module, datamodule=data, verbose=False)
    assert "test/x20/accuracy_at_test_threshold" in tested
    assert not any("test_threshold" in name for name in validated)


def positive_of(checkpoint: str, data: BagDataModule, slide_id: str) -> dict[str, float]:
    """The probability of the second class at each scale."""
    with torch.inference_mode():
        output = dasmil.load(checkpoint)(bag_graph(data.read_bag(slide_id)))
    return {scale: says.bag_logits.sigmoid().item() for scale, says in output.items()}


# Pixels and slides


class MeanColour(nn.Module):
    """Features that can be computed by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def test_d19_tiles_are_normalised_as_in_pretraining_or_as_released_not_at_all() -> None:
    tiles = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    plain = tiles.float().mean((2, 3)) / 255
    normal = Extractor(MeanColour(), "mean", 8, **IMAGENET)
    released = Extractor(MeanColour(), "mean", 8, (0.0,) * 3, (1.0,) * 3)
    mean, std = (torch.tensor(IMAGENET[name]) for name in ("mean", "std"))
    torch.testing.assert_close(normal(tiles), (plain - mean) / std)
    torch.testing.assert_close(released(tiles), plain)
    assert normal.card.fingerprint != released.card.fingerprint  # their features never mix


def test_d19_the_default_of_pretraining_is_imagenets(tmp_path: Path) -> None:
    """The same for the crops that DINO sees and for the extractor that comes of it."""
    data = TileDataModule(tmp_path, "x20")
    assert (data.mean, data.std) == (IMAGENET["mean"], IMAGENET["std"])
    for view in data.transform.transforms:
        (step,) = (t for t in view.transform.transforms if type(t).__name__ == "Normalize")
        assert (tuple(step.mean), tuple(step.std)) == (data.mean, data.std)


def write_glass(path: Path, mpp: float, downsamples: tuple[int, ...]) -> None:
    """The same 256 µm of glass: the left half dark, scanned at any mpp."""
    side = round(256 / mpp)
    pixels = np.full((side, side, 3), 250, np.uint8)
    pixels[:, : side // 2] = (120, 60, 110)
    write_pyramid(path, pixels, mpp, downsamples)


@pytest.mark.parametrize(
    ("mpp", "downsamples"), [(0.25, (1, 2, 4)), (0.25, (1, 4)), (0.5, (1, 2)), (0.4, (1,))]
)
def test_d20_a_scale_is_an_mpp_whatever_the_scanner_and_its_levels(
    tmp_path: Path, mpp: float, downsamples: tuple[int, ...]
) -> None:
    """A x20 tile of 64 px is 32 µm of glass: dark left of 128 µm, bright right of it."""
    write_glass(tmp_path / "glass.tiff", mpp, downsamples)
    scales = parse_scales(["x10", "x20"])
    assert [scale.mpp for scale in scales] == [1.0, 0.5]
    with Slide(SlideRow("glass", tmp_path / "glass.tiff")) as slide:
        assert slide.mpp == pytest.approx(mpp, rel=1e-4)
        grid = PyramidGrid(scales, TilePx(64), slide.mpp)
        assert grid.shape(1, slide.size_px0) == (8, 8)
        for number, side_um in ((0, 64), (1, 32)):
            columns = 256 // side_um
            cells = np.array([[0, column] for column in range(columns)])
            boxes_px0 = grid.boxes_px0(number, cells)
            widths_um = (boxes_px0[:, 2] - boxes_px0[:, 0]) * mpp
            assert widths_um == pytest.approx(side_um, abs=2 * mpp)
            for column, box in enumerate(boxes_px0):
                tile = slide.read(box, (64, 64))
                is_dark = column < columns // 2
                assert tile.shape == (64, 64, 3)
                assert bool(tile[:, 8:-8].mean() < 150) is is_dark


def test_d20_the_table_may_say_the_scale_and_nothing_is_taken_for_40x(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(path)
    assert Slide(SlideRow("photo", path, mpp=0.46)).mpp == 0.46
    assert Slide(SlideRow("photo", path, magnification=20)).mpp == 0.5
    with pytest.raises(InputError, match="records neither mpp nor objective power"):
        Slide(SlideRow("photo", path))


def read_status(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="") as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def test_d21_tile_and_embed_name_a_slide_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(80, 200, (512, 512, 3)).astype(np.uint8)
    pixels[..., 1] //= 2
    for name in ("good", "gone"):
        write_pyramid(tmp_path / f"{name}.tiff", pixels, 0.5, (1,))
    (tmp_path / "broken.tiff").write_text("this is no slide")
    names = ("good", "broken", "gone")
    table = "\n".join(["slide_id,path", *(f"{name},{name}.tiff" for name in names)])
    (tmp_path / "cohort.csv").write_text(table)
    tiles, bags = tmp_path / "tiles", tmp_path / "bags"
    tile = ["tile", "--cohort", str(tmp_path / "cohort.csv"), "--output", str(tiles)]
    assert main([*tile, "--scales", "[x20]", "--tile_px", "128", "--workers", "1"]) == 1
    status = read_status(tiles / "status.csv")
    assert [status[name]["state"] for name in names] == ["done", "failed", "done"]
    assert "broken.tiff" in status["broken"]["message"]
    assert "failed: broken" in capsys.readouterr().out

    (tmp_path / "gone.tiff").unlink()
    assert main(embed_command(tiles, bags, {"x20": "random:test_vit"})) == 1
    status = read_status(bags / "status.csv")
    assert [status[name]["state"] for name in names] == ["done", "not tiled", "failed"]
    assert "no such file" in status["gone"]["message"]
    assert "failed: gone" in capsys.readouterr().out


def test_d21_a_slide_without_bag_is_named_and_a_damaged_bag_stops_the_run(tmp_path: Path) -> None:
    folder = write_bags(tmp_path, LABELS, SPLIT, missing=["n1"])
    with pytest.warns(UserWarning, match=r"1 slide\(s\) .* left out: n1"):
        data = make_data(folder)
    whole = bag_path(folder, "t1").read_bytes()
    bag_path(folder, "t1").write_bytes(whole[: len(whole) // 2])
    module = small_module(bag_format=None, classes=None)
    trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    with pytest.raises(InputError, match=r"t1\.safetensors"):
        trainer.fit(module, datamodule=data)


# The presets. Each row: D number, default, as printed, as released (Camelyon16), as released (Lung)

COLUMNS = ("mil.yaml", "preset/paper.yaml", "preset/mil4wsi.yaml", "preset/mil4wsi_lung.yaml")
TABLE: dict[str, tuple[str, Any, Any, Any, Any]] = {
    "kl_direction": (
        "D1", "teacher_student", "student_teacher", "teacher_student", "teacher_student"
    ),
    "squared_temperature": ("D2", True, True, False, False),
    "class_distribution": ("D3", "softmax", "softmax", "per_class", "per_class"),
    "one_logit": ("D4", True, False, True, True),
    "epsilon": ("D5", False, False, True, True),
    "discounted": ("D6", "coarse", "fine", "coarse", "coarse"),
    "instance": ("D7", 1.0, 0.0, 1.0, 1.0),
    "criticality_reduction": ("D8", "mean", "sum", "mean", "mean"),
    "children_pooling": ("D9", "mean", "mean", "max", "max"),
    "criticality_scores": ("D10", "logits", "attention", "logits", "logits"),
    "detach_teacher": ("D11", True, False, True, True),
    "coarse_instances": ("D12", "all", "all", "parents", "parents"),
    "heads": ("D13", 3, 3, 3, 3),
    "attention_dropout": ("D13", 0.2, 0.2, 0.2, 0.2),
    "hidden_dim": ("D13", 384, 384, 384, 384),
    "out_dim": ("D13", 256, 256, 256, 384),
    "node_dropout": ("D14", 0.5, 0.0, 0.5, 0.5),
    "residual": ("D15", "none", "none", "none", "glu"),
    "bag_classifier_init": ("D16", "lecun", "torch", "torch", "torch"),
    "learning_rate": ("D16", 2e-4, 2e-4, 2e-4, 2e-4),
    "min_learning_rate": ("D16", 1e-5, 1e-5, 5e-6, 5e-6),
    "betas": ("D16", [0.5, 0.9], [0.9, 0.999], [0.5, 0.9], [0.5, 0.9]),
    "weight_decay": ("D16", 5e-3, 0.0, 5e-3, 5e-3),
    "decay_below": ("D16", 0.9, None, None, None),
    "distillation": ("λ", 1.0, 1.0, 1.0, 1.0),
    "criticality": ("β", 1.0, 1.0, 1.0, 1.0),
    "temperature": ("τ", 1.5, 1.5, 1.5, 1.5),
}  # fmt: skip
DATA_TABLE: dict[str, tuple[str, Any, Any, Any, Any]] = {
    "batch_size": ("D16", 1, 1, 1, 1),
    "val_fraction": ("D17", 0.1, 0.1, 0.0, 0.0),
    "val_part": ("D17", "val", "val", "test", "test"),
}
TRAINER = {config: {} if "paper" in config else {"max_epochs": 200} for config in COLUMNS[1:]}
# What is no difference between paper and released code: ours, of Tables 4 and 5, of M > 2 scales,
# or a fact about the data.
NO_DIFFERENCE = {
    "standardize",
    "query_dim",
    "contextualize",
    "concatenate_parents",
    "pooling",
    "distillation_pairs",
    "class_weights",
    "specificity",
    "patient_pooling",
}
DATA_NO_DIFFERENCE = {
    "bags",
    "classes",
    "scales",
    "num_workers",
    "test_fraction",
    "seed",
    "num_folds",
    "fold",
    "table",
    "weighted_sampling",
    "allow_seen_slides",
    "other_cohort",
    "cache",
}


def column(table: dict[str, tuple[str, Any, Any, Any, Any]], config: str) -> dict[str, Any]:
    return {name: row[1 + COLUMNS.index(config)] for name, row in table.items()}


@pytest.mark.parametrize("config", COLUMNS[1:])
def test_a_preset_pins_every_switch_and_nothing_else(config: str) -> None:
    content = yaml.safe_load((CONFIGS / config).read_text())
    options = content["model"]["init_args"]
    assert nested_options(DASMIL, leaves(options)) == options  # each in its group
    content["model"]["init_args"] = leaves(options)
    content["data"]["init_args"] = leaves(content["data"]["init_args"])
    expected = {
        "model": {"init_args": column(TABLE, config)},
        "data": {"init_args": column(DATA_TABLE, config)},
        "trainer": TRAINER[config],
    }
    assert content == {name: part for name, part in expected.items() if part}
    types = {name: type(value) for name, value in content["model"]["init_args"].items()}
    assert types == {name: type(value) for name, value in column(TABLE, config).items()}


def test_the_config_without_a_preset_and_the_code_have_the_default_column() -> None:
    content = yaml.safe_load((CONFIGS / "mil.yaml").read_text())
    assert content["model"] == {"class_path": "DASMIL"}
    assert content["data"] == {"class_path": "BagDataModule"}
    parameters = inspect.signature(BagDataModule.__init__).parameters
    drawn = inspect.signature(split_cohort).parameters  # None is "not given" in the DataModule
    of_data = {name: p.default for name, p in parameters.items()}
    of_data |= asdict(SplitOptions()) | {name: drawn[name].default for name in DRAWING}
    for defaults, table in ((leaves(DASMIL().options), TABLE), (of_data, DATA_TABLE)):
        for name, value in column(table, "mil.yaml").items():
            assert defaults[name] == value, name


def test_no_switch_is_forgotten() -> None:
    """A new argument of model or data is either in the table or said to be no difference."""
    assert set(leaves(DASMIL().options)) == set(TABLE) | NO_DIFFERENCE
    parameters = set(inspect.signature(BagDataModule.__init__).parameters) - {"self", "split"}
    of_split = {field.name for field in fields(SplitOptions)}
    assert parameters | of_split == set(DATA_TABLE) | DATA_NO_DIFFERENCE
    numbers = {row[0] for row in (TABLE | DATA_TABLE).values()}
    assert {f"D{n}" for n in range(1, 18)} <= numbers


@pytest.mark.filterwarnings("ignore:.*D17")
@pytest.mark.parametrize("config", COLUMNS)
def test_each_preset_can_be_trained_and_tested_with(config: str, tmp_path: Path) -> None:
    """Real widths, and orphans and childless tiles in a bag."""
    folder = write_bags(tmp_path, LABELS, SPLIT, dims=384)
    bag = without_first(make_bag("n0", dims=384, num_tiles=12), "x10", 1)
    write_bag(bag_path(folder, "n0"), bag)
    arguments = merged("mil.yaml", config)
    split = SplitOptions(**arguments["data"].pop("split", {}))
    data = BagDataModule(folder, CLASSES, split=split, **{**arguments["data"], "num_workers": 0})
    module = make_module(**arguments["model"])
    trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)
    loss = float(trainer.callback_metrics["train/loss"])
    (figures,) = trainer.test(module, datamodule=data, verbose=False)
    assert np.isfinite([loss, figures["test/loss"]]).all()
    for name, value in column(TABLE, config).items():
        assert leaves(module.options)[name] == value
