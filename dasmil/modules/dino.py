"""Self-supervised pretraining of one scale's extractor.

Papers: Bontempo et al. 2023, section 3, "Feature Extraction"; the method and its schedules are
those of Caron et al. 2021 (DINO), the loss, head and crops lightly's.
"""

from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import (
    deactivate_requires_grad,
    get_weight_decay_parameters,
    update_momentum,
)
from lightly.utils.scheduler import cosine_schedule, cosine_warmup_schedule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchvision.utils import make_grid

from dasmil.data.tiles import TileDataModule
from dasmil.embedding.networks import refuse_cut_patches, vit_backbone
from dasmil.embedding.record import ExtractorRecord
from dasmil.embedding.weights import refuse_other_keys
from dasmil.errors import InputError, join_few
from dasmil.modules.dino_loss import PreciseLoss
from dasmil.modules.resume import refuse_other_settings
from dasmil.modules.training import TrainingModule
from dasmil.slides.study import join_records, plain_records, read_records
from dasmil.tensors import at_least_float32

SHOWN_TILES = 8


@dataclass(frozen=True)
class HeadOptions:
    """DINO's projection head.

    Parameters
    ----------
    output_dim:
        width of the output, DINO's number of prototypes.
    hidden_dim:
        width of the hidden layers.
    bottleneck_dim:
        width before the last layer.
    batch_norm:
        normalise over the batch inside the head, DINO's ``use_bn_in_head``; with several GPUs each
        over its own part, so the result depends on their number unless
        ``--trainer.sync_batchnorm true`` is given.
    norm_last_layer:
        keep the norm of the last layer's weights fixed.
    freeze_last_layer_epochs:
        number of first epochs in which the last layer does not learn.
    """

    output_dim: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    batch_norm: bool = False
    norm_last_layer: bool = True
    freeze_last_layer_epochs: int = 1


@dataclass(frozen=True)
class ObjectiveOptions:
    """DINO's loss, and how the teacher network follows the student network.

    Parameters
    ----------
    student_temperature:
        τ_s, temperature of the student network.
    teacher_temperature:
        τ_t, temperature of the teacher network, from and to.
    teacher_temperature_epochs:
        number of epochs over which τ_t rises.
    center_momentum:
        momentum of the teacher network's centre.
    teacher_momentum:
        momentum of the teacher network's weights, from and to.
    """

    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    teacher_temperature_epochs: int = 30
    center_momentum: float = 0.9
    teacher_momentum: tuple[float, float] = (0.996, 1.0)


@dataclass(frozen=True)
class ScheduleOptions:
    """AdamW with a cosine schedule over the steps.

    Parameters
    ----------
    learning_rate:
        peak for 256 tiles per step over all devices; scaled linearly to the actual number.
    min_learning_rate:
        learning rate of the last step.
    warmup_epochs:
        number of epochs over which the learning rate rises.
    weight_decay:
        from and to; biases and norms have none.
    """

    learning_rate: float = 5e-4
    min_learning_rate: float = 1e-6
    warmup_epochs: int = 10
    weight_decay: tuple[float, float] = (0.04, 0.4)


class DINOModule(TrainingModule):
    """DINO for a timm ViT; ``embed`` takes the teacher network's backbone from the checkpoint.

    Parameters
    ----------
    backbone:
        timm name of a ViT.
    backbone_options:
        what to change in it, for example ``{patch_size: 8, depth: 4}``.
    image_size:
        side in pixels at which whole tiles are embedded later.
    drop_path:
        rate of stochastic depth in the student network.
    head:
        the projection head.
    objective:
        temperatures and momenta.
    optimizer:
        learning rate, schedule and weight decay.
    """

    follows_steps = True

    def __init__(
        self,
        backbone: str = "vit_small_patch16_224",
        backbone_options: dict[str, Any] | None = None,
        image_size: int = 256,
        drop_path: float = 0.1,
        head: HeadOptions = HeadOptions(),
        objective: ObjectiveOptions = ObjectiveOptions(),
        optimizer: ScheduleOptions = ScheduleOptions(),
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.objective_options = objective
        self.optimizer_options = optimizer
        options = backbone_options or {}
        student = vit_backbone(backbone, image_size, {**options, "drop_path_rate": drop_path})
        teacher = vit_backbone(backbone, image_size, options)
        widths = (student.num_features, head.hidden_dim, head.bottleneck_dim, head.output_dim)
        norms = {"batch_norm": head.batch_norm, "norm_last_layer": head.norm_last_layer}
        frozen = head.freeze_last_layer_epochs
        student_head = DINOProjectionHead(*widths, freeze_last_layer=frozen, **norms)
        teacher_head = DINOProjectionHead(*widths, **norms)
        # (N, 3, S, S) → (N, K)
        self.student: Any = nn.Sequential(OrderedDict(backbone=student, head=student_head))
        self.teacher: Any = nn.Sequential(OrderedDict(backbone=teacher, head=teacher_head))
        self.teacher.load_state_dict(self.student.state_dict())
        deactivate_requires_grad(self.teacher)
        self.dino_loss = PreciseLoss(
            head.output_dim,
            warmup_teacher_temp=objective.teacher_temperature[0],
            teacher_temp=objective.teacher_temperature[1],
            warmup_teacher_temp_epochs=objective.teacher_temperature_epochs,
            student_temp=objective.student_temperature,
            center_momentum=objective.center_momentum,
        )
        self.record: dict[str, Any] | None = None
        self._steps_before: int | None = None  # of the training that this one resumes

    def setup(self, stage: str) -> None:
        data, hp = self.datamodule, self.hparams
        if not isinstance(data, TileDataModule):
            return
        for name in ("global_crop_px", "local_crop_px"):
            side_px = getattr(data.view_options, name)
            refuse_cut_patches(self.teacher.backbone, hp["backbone"], f"data.views.{name}", side_px)
        record = ExtractorRecord(
            name=hp["backbone"],
            options=hp["backbone_options"] or {},
            image_size=hp["image_size"],
            mean=data.mean,
            std=data.std,
            scale=data.scale,
            mpp=data.mpp,
            tile_px=data.tile_px,
            trained_on=plain_records(data.records),
        )
        self.record = asdict(record)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self._steps_before not in (None, self._num_steps):
            raise InputError(
                f"fit: the schedules of this training were made for {self._steps_before} steps, "
                f"its tiles would now make {self._num_steps}; resume with the same tiles and "
                "split, or start another run"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the slides that the weights have met before to those of this training."""
        where = "the checkpoint" if self._trainer is None else self.trainer.ckpt_path
        refuse_other_keys(self, checkpoint.get("state_dict"), where)
        if self._trainer is not None and self.trainer.training:
            refuse_other_settings(checkpoint, self.settings(), where)
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
                f"its record: {join_few(more)}"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["extractor"], checkpoint["steps"] = self.record, self._num_steps

    def training_step(self, crops: list[Tensor], batch_idx: int) -> Tensor:
        """Mean loss of a batch.

        Parameters
        ----------
        crops: two large views, then the small ones; each (B, 3, S, S).
        """
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
        self.log("train/loss_step", loss, prog_bar=self.shows_bar)
        data, epoch = self.datamodule, self.current_epoch
        is_known = isinstance(data, TileDataModule)
        self.finite_loss.watch(
            self.global_step, loss, lambda: data.slides_of(epoch, batch_idx) if is_known else []
        )
        if batch_idx == 0 and self.current_epoch == 0:
            self._show_crops(crops)
        return loss

    def _loss(self, teacher_out: Tensor, student_out: list[Tensor]) -> Tensor:
        """DINO's loss in float32; under autocast lightly would round it to half precision.

        Parameters
        ----------
        teacher_out: (2 B, K) of the two large views.
        student_out: (B, K) per view.
        """
        with torch.autocast(teacher_out.device.type, enabled=False):
            views = [at_least_float32(view) for view in student_out]
            return self.dino_loss(list(teacher_out.chunk(2)), views, epoch=self.current_epoch)

    def on_after_backward(self) -> None:
        self.student.head.cancel_last_layer_gradients(self.current_epoch)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Let the teacher network follow each step of the optimiser."""
        super().optimizer_step(*args, **kwargs)
        step = self.global_step + 1  # Lightning counts this step later
        momentum = cosine_schedule(
            step, self._num_steps + 1, *self.objective_options.teacher_momentum
        )
        update_momentum(self.student, self.teacher, momentum)
        self._log_numbers({"schedule/teacher_momentum": momentum})

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
        decay = self.optimizer_options.weight_decay[0]
        return torch.optim.AdamW(groups, lr=self._base_rate, weight_decay=decay)

    @property
    def _base_rate(self) -> float:
        data = self.datamodule
        batch_size = data.batch_size if isinstance(data, TileDataModule) else 256
        tiles = batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
        return float(self.optimizer_options.learning_rate * tiles / 256)

    def _follow_schedules(self) -> None:
        """Set the learning rate and weight decay of this step."""
        options, steps = self.optimizer_options, self._num_steps
        warmup_share = options.warmup_epochs / (self.trainer.max_epochs or 1)
        warmup_steps = round(steps * min(1, warmup_share))
        rate = cosine_warmup_schedule(
            self.global_step,
            steps + 1,
            self._base_rate,
            options.min_learning_rate,
            warmup_steps=warmup_steps,
            warmup_start_value=self._base_rate / max(1, warmup_steps),
        )
        decay = cosine_schedule(self.global_step, steps + 1, *options.weight_decay)
        for group in self.trainer.optimizers[0].param_groups:
            # lightly 1.5.20 returns NumPy numbers, which no safely loaded checkpoint may hold
            group["lr"] = float(rate)
            if group["name"] == "decayed":
                group["weight_decay"] = float(decay)
        self._log_numbers({"schedule/learning_rate": rate, "schedule/weight_decay": decay})

    def _log_numbers(self, numbers: dict[str, float]) -> None:
        """Log numbers that the CPU knows, as tensors that stay there.

        Lightning would copy a number to the GPU in each step, and make the host wait for the copy.
        """
        self.log_dict({k: torch.tensor(v, dtype=torch.float32) for k, v in numbers.items()})

    def _log_teacher(self, teacher_out: Tensor) -> None:
        """Log what shows a collapse: an entropy of 0 (one output wins) or log K (all equal)."""
        loss = self.dino_loss
        temperature = loss.teacher_temperature(self.current_epoch)
        self._log_numbers({"schedule/teacher_temperature": temperature})
        p = ((teacher_out - loss.center[0]) / temperature).softmax(dim=1)
        self.log_dict(
            {
                "teacher/entropy": torch.special.entr(p).sum(1).mean(),
                "teacher/entropy_of_mean": torch.special.entr(p.mean(0)).sum(),
                "teacher/centre_norm": loss.center.norm(),
            }
        )

    def _show_crops(self, crops: list[Tensor]) -> None:
        """Show a picture of the input in TensorBoard: one row per tile, one column per view."""
        if not isinstance(self.logger, TensorBoardLogger) or not self.trainer.is_global_zero:
            return
        side = crops[0].shape[-1]
        views = torch.stack(
            [nn.functional.interpolate(view[:SHOWN_TILES], (side, side)) for view in crops], dim=1
        )  # (tiles, views, 3, S, S)
        data = self.datamodule
        mean = torch.tensor(data.mean, device=views.device).view(3, 1, 1)
        std = torch.tensor(data.std, device=views.device).view(3, 1, 1)
        picture = make_grid((views.flatten(0, 1) * std + mean).clamp(0, 1), nrow=len(crops))
        self.logger.experiment.add_image("train/crops", picture, self.global_step)
