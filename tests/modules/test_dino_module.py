import csv
from math import cos, log, pi
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightly.loss import DINOLoss
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from road import NUM_SLIDES

from dasmil.data import SplitOptions, TileDataModule, ViewOptions
from dasmil.data.views import TensorViews
from dasmil.embedding.restricted import load_checkpoint
from dasmil.errors import InputError
from dasmil.modules import DINOModule, dino
from dasmil.modules.dino import HeadOptions, ScheduleOptions
from dasmil.modules.dino_loss import PreciseLoss
from dasmil.modules.options import typed_options
from dasmil.slides.cohort import read_cohort
from dasmil.slides.study import SlideRecord, plain_records, read_records

SMALL = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_options": {"depth": 1, "embed_dim": 24, "num_heads": 2},
    "image_size": 32,
    "drop_path": 0.0,
    "head": HeadOptions(output_dim=32, hidden_dim=16, bottleneck_dim=8),
}
VIEWS = {"global_crop_px": 32, "local_crop_px": 16, "num_local_crops": 1}


def small_data(road, views=(), **options):
    views = ViewOptions(**{**VIEWS, **dict(views)})
    options = {"batch_size": 4, "tiles_per_epoch": 16, "num_workers": 0, "views": views, **options}
    return TileDataModule(road.tiles, "x20", **options)


class Watch(Callback):
    """Copies of the networks around every step."""

    def __init__(self):
        self.before, self.after = [], []

    @staticmethod
    def copy(module):
        names = ("student", "teacher")
        return {
            n: {k: v.clone() for k, v in getattr(module, n).state_dict().items()} for n in names
        }

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.append(self.copy(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append(self.copy(pl_module))


@pytest.fixture(scope="module")
def watched(road, tmp_path_factory):
    """Two epochs of four steps, with the logged figures of every step."""
    torch.manual_seed(0)
    watch, folder = Watch(), tmp_path_factory.mktemp("dino")
    logger = CSVLogger(folder, flush_logs_every_n_steps=1)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=logger,
        callbacks=[watch],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = DINOModule(**SMALL, optimizer=ScheduleOptions(0.064, 1e-6, 1, (0.1, 0.3)))
    trainer.fit(module, datamodule=small_data(road))
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        logged = [row for row in csv.DictReader(file) if row["train/loss_step"]]
    return watch, logged, module


def test_the_teacher_starts_as_the_student_and_follows_it(watched):
    watch, logged, _ = watched
    first = watch.before[0]
    assert all(torch.equal(first["student"][k], first["teacher"][k]) for k in first["student"])
    for step in range(len(watch.before) - 1):
        before, after = watch.before[step], watch.before[step + 1]
        momentum = float(logged[step]["schedule/teacher_momentum"])
        for name, teacher in before["teacher"].items():
            expected = momentum * teacher + (1 - momentum) * after["student"][name]
            assert torch.allclose(after["teacher"][name], expected, atol=1e-6), name


def test_the_last_layer_learns_only_after_its_frozen_epochs(watched):
    watch, _, _ = watched
    weights = [copy["student"]["head.last_layer.weight_v"] for copy in watch.after]
    first = watch.before[0]["student"]["head.last_layer.weight_v"]
    assert torch.equal(weights[3], first)  # end of epoch 0
    assert not torch.equal(weights[7], first)
    moved = watch.after[3]["student"]["backbone.blocks.0.mlp.fc1.weight"]
    assert not torch.equal(moved, watch.before[0]["student"]["backbone.blocks.0.mlp.fc1.weight"])


def test_the_schedules_are_those_of_the_paper(watched):
    """4 warm-up steps of 8; 4 tiles a step, so the peak is 0.064 · 4 / 256 = 0.001."""
    _, logged, _ = watched
    rates = [float(row["schedule/learning_rate"]) for row in logged]
    assert rates[:4] == sorted(rates[:4])
    assert rates[4] == pytest.approx(1e-3, rel=0.05)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    decays = [float(row["schedule/weight_decay"]) for row in logged]
    expected = [0.3 - 0.2 * (1 + cos(pi * step / 8)) / 2 for step in range(8)]
    assert decays == pytest.approx(expected, abs=1e-6)
    momenta = [float(row["schedule/teacher_momentum"]) for row in logged]
    assert momenta == sorted(momenta) and momenta[0] >= 0.996 and momenta[-1] == pytest.approx(1)


def test_numpy_numbers_of_the_schedules_stay_out_of_the_checkpoint(road, tmp_path, monkeypatch):
    """lightly 1.5.20 returns them, and no safely loaded checkpoint may hold them."""
    for name in ("cosine_schedule", "cosine_warmup_schedule"):
        schedule = getattr(dino, name)
        monkeypatch.setattr(dino, name, lambda *a, of=schedule, **k: np.float64(of(*a, **k)))
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(DINOModule(**SMALL), datamodule=small_data(road))
    trainer.save_checkpoint(tmp_path / "one step.ckpt")
    (state,) = torch.load(tmp_path / "one step.ckpt", weights_only=True)["optimizer_states"]
    values = [group[name] for group in state["param_groups"] for name in ("lr", "weight_decay")]
    assert [type(value) for value in values] == [float] * 4


def test_a_collapse_would_show(watched):
    _, logged, module = watched
    for row in logged:
        assert 0 < float(row["teacher/entropy"]) <= float(row["teacher/entropy_of_mean"]) + 1e-5
        assert float(row["teacher/entropy_of_mean"]) <= log(SMALL["head"].output_dim) + 1e-5
    assert float(logged[-1]["teacher/centre_norm"]) > 0
    seen = {}
    module.log_dict = seen.update
    module._log_teacher(module.dino_loss.center[0].expand(4, -1))
    assert float(seen["teacher/entropy"]) == pytest.approx(log(SMALL["head"].output_dim), rel=1e-5)


def test_the_checkpoint_knows_what_it_was_trained_on(road):
    record = load_checkpoint(road.dino["x10"])["extractor"]
    assert (record["scale"], record["mpp"], record["tile_px"]) == ("x10", 1.0, 32)
    assert record["mean"] == (0.485, 0.456, 0.406)
    train = {row.slide_id for row in read_cohort(road.cohort) if row.split == "train"}
    assert {seen["slide_id"] for seen in record["trained_on"]} == train
    assert len(train) == NUM_SLIDES["train"]
    assert all(seen["digest"] and seen["patient_id"] for seen in record["trained_on"])


def test_a_resumed_training_remembers_the_slides_it_has_seen(road, tmp_path, capsys):
    content = load_checkpoint(road.dino["x20"])
    before = read_records(content["extractor"]["trained_on"])
    table = tmp_path / "split.csv"
    table.write_text(f"slide_id,split\n{before[0].slide_id},train\n{before[1].slide_id},test\n")
    data = small_data(road, split=SplitOptions(0.0, table=str(table)))
    del content["settings"], content["steps"]  # an older version goes on with any settings
    torch.save(content, tmp_path / "before.ckpt")
    module = DINOModule(**typed_options(DINOModule, content["hyper_parameters"]))
    trainer = Trainer(
        max_epochs=content["epoch"] + 2,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with pytest.warns(UserWarning, match="does not name"):
        trainer.fit(module, datamodule=data, ckpt_path=tmp_path / "before.ckpt", weights_only=True)
    assert [row.slide_id for row in data.rows] == [before[0].slide_id]
    trainer.save_checkpoint(tmp_path / "further.ckpt")
    seen = load_checkpoint(tmp_path / "further.ckpt")["extractor"]["trained_on"]
    assert read_records(seen) == before
    assert f"{len(before) - 1} further slide(s)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "seen"),
    [({"trained_on": ["old"]}, ["now", "old"]), ({"trained_on": None}, None), (None, None)],
)
def test_an_older_checkpoint_keeps_the_slides_it_has_seen(before, seen):
    module = DINOModule(**SMALL)
    module.record = {"trained_on": plain_records([SlideRecord("now")])}
    module._trainer = SimpleNamespace(is_global_zero=True, training=False, ckpt_path="old.ckpt")
    record = {"name": "test_vit", "options": {}, "image_size": 64, "mean": (0.5,) * 3}
    record |= {"std": (0.5,) * 3, "scale": "x20", "mpp": 0.5, "tile_px": 64}
    before = None if before is None else record | before
    older = {"extractor": before, "state_dict": module.state_dict()}
    module.on_load_checkpoint(older)
    found = module.record["trained_on"]
    assert (None if found is None else [record["slide_id"] for record in found]) == seen


def test_the_crops_are_shown_in_tensorboard(road):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(road.root / "runs" / "dino_x20"))
    events.Reload()
    assert "train/crops" in events.Tags()["images"]
    picture = events.Images("train/crops")[0]
    assert (picture.width, picture.height) == (4 * 34 + 2, 4 * 34 + 2)  # 4 tiles by 2 + 2 views


def test_only_training_slides_are_read(road):
    data = small_data(road)
    data.setup("fit")
    assert {row.split for row in data.rows} == {"train"}
    views = next(iter(data.train_dataloader()))
    assert [tuple(view.shape) for view in views] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)]


def first_loss(road, **options):
    """Of one step of a trainer."""
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"accelerator": "cpu", "logger": False, **options.pop("trainer", {})},
    )
    trainer.fit(DINOModule(**SMALL), datamodule=small_data(road, **options))
    assert trainer.global_step == 1
    return trainer.callback_metrics["train/loss"].item()


def test_views_made_after_the_transfer_train_as_those_made_before_it(road, monkeypatch):
    """As on a GPU, on the CPU."""
    made = []
    batch = TensorViews.batch
    monkeypatch.setattr(TensorViews, "batch", lambda *args: made.append(1) or batch(*args))
    before = first_loss(road)
    assert not made
    monkeypatch.setattr(TileDataModule, "_is_on_gpu", True)
    assert first_loss(road) == pytest.approx(before, rel=0.02)
    assert made


class Crops(Callback):
    """The batches of a training."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)


@pytest.mark.parametrize("is_on_gpu", [False, True])
def test_half_precision_rounds_the_views_and_not_what_is_drawn(
    road, tmp_path, monkeypatch, is_on_gpu
):
    monkeypatch.setattr(TileDataModule, "_is_on_gpu", is_on_gpu)
    exact, rounded = Crops(), Crops()
    before = first_loss(road, trainer={"callbacks": [exact]})
    options = {"callbacks": [rounded], "precision": "bf16-true", "log_every_n_steps": 1}
    options["logger"] = TensorBoardLogger(tmp_path)  # of the crops too
    halved = first_loss(road, trainer=options)
    for one, other in zip(exact.batches[0], rounded.batches[0], strict=True):
        assert torch.equal(one.bfloat16(), other)
    assert halved == pytest.approx(before, rel=0.02)


def test_centre_and_temperature_stay_in_float32():
    """In half precision a temperature of 0.07 would be 0.0698, and the centre would hardly move."""
    torch.manual_seed(0)
    found, expected = PreciseLoss(16, 0.04, 0.07, 2), DINOLoss(16, 0.04, 0.07, 2)
    teacher, student = list(torch.randn(2, 4, 16)), list(torch.randn(3, 4, 16))
    found.bfloat16()
    for epoch in range(4):
        loss = expected(teacher, student, epoch=epoch)
        torch.set_default_dtype(torch.bfloat16)  # as Lightning does
        try:
            assert torch.equal(found(teacher, student, epoch), loss)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found.center, expected.center)
        temperature = float(expected.teacher_temp_schedule[epoch]) if epoch < 2 else 0.07
        assert found.teacher_temperature(epoch) == pytest.approx(temperature, rel=1e-6)
    found.bfloat16()
    assert torch.equal(found.center, expected.center)
    assert found.double().center.dtype == torch.float64


def test_lightlys_own_transform_can_be_chosen(road, monkeypatch):
    def refuse(*_):
        raise AssertionError("not by PIL")

    monkeypatch.setattr(TensorViews, "__call__", refuse)
    monkeypatch.setattr(TensorViews, "draw", refuse)
    loss = first_loss(road, views={"augmentation_backend": "pil"})
    assert 0 < loss < 2 * log(SMALL["head"].output_dim)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_trains_on_the_same_views(road):
    there = first_loss(road, trainer={"accelerator": "gpu", "devices": 1})
    assert there == pytest.approx(first_loss(road), rel=0.02)


def test_under_autocast_the_loss_is_that_of_float32():
    torch.manual_seed(0)
    module = DINOModule(**SMALL)
    teacher, views = torch.randn(8, 32).bfloat16(), list(torch.randn(3, 4, 32).bfloat16())
    start = module.dino_loss.center.clone()
    expected = module._loss(teacher.float(), [view.float() for view in views])
    module.dino_loss.center = start
    with torch.autocast("cpu", torch.bfloat16):
        found = module._loss(teacher.float(), views)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"local_crop_px": 20},
            "data.views.local_crop_px: 20 px is no whole .* take 16 or 32",
        ),
        ({"global_crop_px": 40}, "data.views.global_crop_px: 40 px is no whole .* take 32 or 48"),
    ],
)
def test_crops_that_are_no_whole_number_of_patches_are_refused(road, tmp_path, options, words):
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(InputError, match=words):
        trainer.fit(DINOModule(**SMALL), datamodule=small_data(road, options))


def test_an_image_size_that_is_no_whole_number_of_patches_is_refused():
    with pytest.raises(InputError, match=r"image_size: 40 px is no whole number .* take 32 or 48"):
        DINOModule(**{**SMALL, "image_size": 40})
