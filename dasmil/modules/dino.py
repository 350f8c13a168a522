"""Self-supervised pretraining of one scale's extractor.

Paper: Bontempo et al. 2023, section 3, "Feature Extraction"; the method and its schedules are
Caron et al. 2021 (DINO), the loss, head and crops lightly's.
"""

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import (
    deactivate_requires_grad,
    get_weight_decay_parameters,
    update_momentum,
)
from lightly.utils.scheduler import cosine_schedule, cosine_warmup_schedule
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchvision.utils import make_grid

from dasmil.data.tiles import TileDataModule
from dasmil.embedding.networks import refuse_cut_patches, vit_backbone
from dasmil.embedding.record import ExtractorRecord
from dasmil.embedding.weights import refuse_other_keys
from dasmil.errors import InputError, some_of
from dasmil.modules.finite import FiniteLoss
from dasmil.modules.going_on import (
    KEY,
    refuse_broken_state,
    refuse_other_settings,
    training_settings,
)
from dasmil.seeds import seed_step
from dasmil.slides.study import join_records, plain_records, read_records
from dasmil.tensors import at_least_float32

SHOWN_TILES = 8


class DINONetwork(nn.Module):
    """A ViT with DINO's projection head; student and teacher are one each."""

    head: DINOProjectionHead

    def __init__(self, backbone: nn.Module, head: DINOProjectionHead):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: Tensor) -> Tensor:
        """(N, 3, S, S) → (N, K)."""
        return self.head(self.backbone(crops))


class DINOModule(LightningModule):
    """DINO for a timm ViT; the teacher's backbone is what ``embed`` takes from the checkpoint.

    Parameters
    ----------
    backbone:
        timm name of a ViT.
    backbone_options:
        what to change of it, for example ``{patch_size: 8, depth: 4}``.
    image_size:
        side in pixels at which whole tiles are embedded later.
    drop_path:
        stochastic depth of the student.
    output_dim:
        width of the projection head's output, DINO's number of prototypes.
    hidden_dim:
        width of the projection head.
    bottleneck_dim:
        width of the projection head before its last layer.
    batch_norm:
        normalise inside the head over the batch, DINO's ``use_bn_in_head``.
    norm_last_layer:
        keep the norm of the last layer's weights fixed.
    freeze_last_layer_epochs:
        epochs in which the last layer does not learn.
    student_temperature:
        τ_s, temperature of the student network.
    teacher_temperature:
        τ_t, of the teacher network, from and to.
    teacher_temperature_epochs:
        over how many epochs τ_t rises.
    center_momentum:
        of the teacher's centre.
    teacher_momentum:
        of the teacher's weights, from and to.
    learning_rate:
        for 256 tiles a step over all devices; scaled linearly to the actual number.
    min_learning_rate:
        end of the cosine.
    warmup_epochs:
        of the learning rate.
    weight_decay:
        from and to; biases and norms have none.
    """

    schedules_by_step = True

    def __init__(
        self,
        backbone: str = "vit_small_patch16_224",
        backbone_options: dict[str, Any] | None = None,
        image_size: int = 256,
        drop_path: float = 0.1,
        output_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
        freeze_last_layer_epochs: int = 1,
        student_temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.04, 0.07),
        teacher_temperature_epochs: int = 30,
        center_momentum: float = 0.9,
        teacher_momentum: tuple[float, float] = (0.996, 1.0),
        learning_rate: float = 5e-4,
        min_learning_rate: float = 1e-6,
        warmup_epochs: int = 10,
        weight_decay: tuple[float, float] = (0.04, 0.4),
    ):
        super().__init__()
        self.save_hyperparameters()
        options = backbone_options or {}
        student = vit_backbone(backbone, image_size, {**options, "drop_path_rate": drop_path})
        teacher = vit_backbone(backbone, image_size, options)
        head = (student.num_features, hidden_dim, bottleneck_dim, output_dim, batch_norm)
        self.student = DINONetwork(
            student,
            DINOProjectionHead(*head, freeze_last_layer_epochs, norm_last_layer),
        )
        self.teacher = DINONetwork(
            teacher, DINOProjectionHead(*head, norm_last_layer=norm_last_layer)
        )
        self.teacher.load_state_dict(self.student.state_dict())
        deactivate_requires_grad(self.teacher)
        self.dino_loss = DINOLoss(
            output_dim,
            warmup_teacher_temp=teacher_temperature[0],
            teacher_temp=teacher_temperature[1],
            warmup_teacher_temp_epochs=teacher_temperature_epochs,
            student_temp=student_temperature,
            center_momentum=center_momentum,
        )
        self.record: dict[str, Any] | None = None
        self._teacher_step = 0
        self._steps_before: int | None = None  # of the training that this one goes on with
        self._finite_loss = FiniteLoss()

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, TileDataModule):
            for what, size in data.crop_sizes.items():
                name, network = self.hparams["backbone"], self.teacher.backbone
                refuse_cut_patches(network, name, f"data.{what}", size)
            record = ExtractorRecord(
                name=self.hparams["backbone"],
                options=self.hparams["backbone_options"] or {},
                image_size=self.hparams["image_size"],
                mean=data.mean,
                std=data.std,
                scale=data.scale,
                mpp=data.mpp,
                tile_px=data.tile_px,
                trained_on=plain_records(data.records),
            )
            self.record = asdict(record)

    def on_train_start(self) -> None:
        refuse_broken_state(self.trainer)
        self._teacher_step = self.global_step  # of a training that goes on, not 0
        if self._steps_before not in (None, self._num_steps):
            raise InputError(
                f"fit: the schedules of this training were made for {self._steps_before} steps, "
                f"its tiles would now make {self._num_steps}; go on with the same tiles and split, "
                "or start another run"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """What stochastic depth draws depends on seed, epoch and place alone."""
        world, rank = self.trainer.world_size, self.trainer.global_rank
        seed_step(self.current_epoch, batch_idx * world + rank)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Weights that go on have seen the slides of before, whatever is trained on now."""
        where = "the checkpoint" if self._trainer is None else self.trainer.ckpt_path
        refuse_other_keys(self, checkpoint.get("state_dict"), where)
        if self._trainer is not None and self.trainer.training:
            refuse_other_settings(checkpoint, self._settings(), where)
            self._steps_before = checkpoint.get("steps")
        if self.record is None:
            return
        before = checkpoint.get("extractor")  # None after a training with other data
        before = None if before is None else ExtractorRecord.read(before, where).trained_on
        if before is None or self.record["trained_on"] is None:
            self.record["trained_on"] = None
            return
        now = read_records(self.record["trained_on"])
        seen = join_records(now, read_records(before))
        self.record["trained_on"] = plain_records(seen)
        more = sorted({record.slide_id for record in seen} - {record.slide_id for record in now})
        if more and self.trainer.is_global_zero:
            print(
                f"fit: the checkpoint was trained on {len(more)} further slide(s), which stay in "
                f"its record: {some_of(more)}"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._finite_loss.check_weights(checkpoint["state_dict"])
        checkpoint["extractor"] = self.record
        checkpoint[KEY], checkpoint["steps"] = self._settings(), self._num_steps

    def _settings(self) -> dict[str, Any]:
        return training_settings(self.trainer, self, getattr(self.trainer, "datamodule", None))

    def training_step(self, crops: list[Tensor], batch_idx: int) -> Tensor:
        """``crops``: two large views, then the small ones; each (B, 3, S, S)."""
        self._follow_schedules()
        large, small = crops[:2], crops[2:]
        with torch.no_grad():
            teacher_out = self.teacher(torch.cat(large))  # (2B, K)
        student_out = [*self.student(torch.cat(large)).chunk(2)]
        if small:
            student_out += self.student(torch.cat(small)).chunk(len(small))
        teacher_out = at_least_float32(teacher_out)
        self._log_teacher(teacher_out)
        loss = self._loss(teacher_out, student_out)
        size = len(crops[0])
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
        self.log("train/loss_step", loss, prog_bar=True)
        slides = partial(self._slides_of, self.current_epoch, batch_idx)
        self._finite_loss.watch(self.global_step, loss, slides)
        if batch_idx == 0 and self.current_epoch == 0:
            self._show(crops)
        return loss

    def _slides_of(self, epoch: int, batch_idx: int) -> list[str]:
        """Slides of the tiles of a batch of this process, as far as known."""
        data = getattr(self.trainer, "datamodule", None)
        return data.slides_of(epoch, batch_idx) if isinstance(data, TileDataModule) else []

    def on_train_epoch_end(self) -> None:
        self._finite_loss.check()

    def _loss(self, teacher_out: Tensor, student_out: list[Tensor]) -> Tensor:
        """DINO's loss of two large views (2B, K) and of all views (B, K) each, in float32.

        Under autocast lightly's matrix product would round it to half precision.
        """
        with torch.autocast(teacher_out.device.type, enabled=False):
            views = [at_least_float32(view) for view in student_out]
            return self.dino_loss(list(teacher_out.chunk(2)), views, epoch=self.current_epoch)

    def on_after_backward(self) -> None:
        self.student.head.cancel_last_layer_gradients(self.current_epoch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step == self._teacher_step:
            return  # gradients are still being accumulated
        self._teacher_step = self.global_step
        start, end = self.hparams["teacher_momentum"]
        momentum = cosine_schedule(self.global_step, self._num_steps + 1, start, end)
        update_momentum(self.student, self.teacher, momentum)
        self.log("schedule/teacher_momentum", momentum)

    @property
    def _num_steps(self) -> int:
        return int(self.trainer.estimated_stepping_batches)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if not self.trainer.max_epochs or self.trainer.max_epochs < 1:
            raise InputError("trainer.max_epochs: DINO's schedules need a number of epochs")
        decayed, not_decayed = get_weight_decay_parameters([self.student])
        groups = [
            {"name": "decayed", "params": decayed},
            {"name": "not decayed", "params": not_decayed, "weight_decay": 0.0},
        ]
        hp = self.hparams
        return torch.optim.AdamW(groups, lr=self._base_rate, weight_decay=hp["weight_decay"][0])

    @property
    def _base_rate(self) -> float:
        data = getattr(self.trainer, "datamodule", None)
        batch_size = data.batch_size if isinstance(data, TileDataModule) else 256
        tiles = batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
        return float(self.hparams["learning_rate"] * tiles / 256)

    def _follow_schedules(self) -> None:
        """Learning rate and weight decay of this step."""
        hp, steps = self.hparams, self._num_steps
        warmup_steps = round(steps * min(1, hp["warmup_epochs"] / (self.trainer.max_epochs or 1)))
        rate = cosine_warmup_schedule(
            self.global_step,
            steps + 1,
            self._base_rate,
            hp["min_learning_rate"],
            warmup_steps=warmup_steps,
            warmup_start_value=self._base_rate / max(1, warmup_steps),
        )
        decay = cosine_schedule(self.global_step, steps + 1, *hp["weight_decay"])
        for group in self.trainer.optimizers[0].param_groups:
            # lightly 1.5.20 returns NumPy numbers, which no safely loaded checkpoint may hold
            group["lr"] = float(rate)
            if group["name"] == "decayed":
                group["weight_decay"] = float(decay)
        self.log_dict({"schedule/learning_rate": rate, "schedule/weight_decay": decay})

    def _log_teacher(self, teacher_out: Tensor) -> None:
        """A collapse shows: the entropy goes to 0 (one output wins) or to log K (all alike)."""
        loss, epoch = self.dino_loss, self.current_epoch
        warm = epoch < loss.warmup_teacher_temp_epochs
        temperature = float(loss.teacher_temp_schedule[epoch]) if warm else loss.teacher_temp
        p = ((teacher_out - loss.center[0]) / temperature).softmax(dim=1)
        self.log_dict(
            {
                "schedule/teacher_temperature": temperature,
                "teacher/entropy": torch.special.entr(p).sum(1).mean(),
                "teacher/entropy_of_mean": torch.special.entr(p.mean(0)).sum(),
                "teacher/centre_norm": loss.center.norm(),
            }
        )

    def _show(self, crops: list[Tensor]) -> None:
        """A picture of what goes in: one row a tile, one column a view."""
        if not isinstance(self.logger, TensorBoardLogger) or not self.trainer.is_global_zero:
            return
        side = crops[0].shape[-1]
        views = torch.stack(
            [nn.functional.interpolate(view[:SHOWN_TILES], (side, side)) for view in crops], dim=1
        )  # (tiles, views, 3, S, S)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        mean = torch.tensor(data.mean, device=views.device).view(3, 1, 1)
        std = torch.tensor(data.std, device=views.device).view(3, 1, 1)
        picture = make_grid((views.flatten(0, 1) * std + mean).clamp(0, 1), nrow=len(crops))
        self.logger.experiment.add_image("train/crops", picture, self.global_step)
