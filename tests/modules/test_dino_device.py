"""DINO on a device that only claims to be a GPU: its steps mix no devices and wait for nothing."""

from typing import Any

import pytest
import torch
from foreign_device import DEVICE, Watch, abroad
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from road import Road
from torch import Tensor

from dasmil.data import TileDataModule, ViewOptions
from dasmil.data.views import PackedTiles
from dasmil.modules import DINOModule
from dasmil.modules.dino import HeadOptions

STEPS = 3
SMALL = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_options": {"depth": 1, "embed_dim": 24, "num_heads": 2},
    "image_size": 32,
}
HEAD = {"output_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8}
VIEWS = {"global_crop_px": 32, "local_crop_px": 16, "num_local_crops": 2}


def make_module(head: dict[str, Any]) -> DINOModule:
    torch.manual_seed(0)
    return DINOModule(**SMALL, head=HeadOptions(**HEAD, **head))


class ForeignStrategy(SingleDeviceStrategy):
    def __init__(self) -> None:
        super().__init__(DEVICE, accelerator=CPUAccelerator())

    def setup_environment(self) -> None:
        """Do nothing: the accelerator would refuse the device."""

    def model_to_device(self) -> None:
        assert self.lightning_module is not None
        abroad(self.lightning_module)._device = DEVICE

    def teardown(self) -> None:
        """Leave the weights where they are."""


class PinnedTiles(TileDataModule):
    """Batches in pinned memory, as a DataLoader returns them if there is a GPU."""

    _is_on_gpu = True

    def __init__(self, *args: Any, watch: Watch, **options: Any):
        super().__init__(*args, **options)
        self.watch = watch
        self.logged: list[tuple[int, int]] = []  # waits and copies before each batch

    def transfer_batch_to_device(self, batch: Any, *args: Any) -> Any:
        self.logged.append((len(self.watch.waits), len(self.watch.pageable)))
        assert isinstance(batch, PackedTiles)
        if Watch.active:
            batch = PackedTiles(*(part.pin_memory() for part in batch[:3]), batch.shapes)
        return super().transfer_batch_to_device(batch, *args)


class Steps(Callback):
    """The losses of the steps, and the operations that were logged when the last one had ended."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"])

    def on_train_epoch_end(self, *_: Any) -> None:
        self.end = len(self.watch.waits), len(self.watch.pageable)


def train(
    module: DINOModule, road: Road, views: dict[str, Any], strategy: str | Strategy, watch: Watch
) -> tuple[Steps, PinnedTiles]:
    steps = Steps(watch)
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=STEPS,
        strategy=strategy,
        accelerator="cpu" if isinstance(strategy, str) else "auto",
        logger=False,
        callbacks=[steps],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=3.0,
        default_root_dir=road.root,
    )
    options = ViewOptions(**{**VIEWS, **views})
    data = PinnedTiles(road.tiles, "x20", batch_size=4, num_workers=0, views=options, watch=watch)
    trainer.fit(module, datamodule=data)
    return steps, data


@pytest.mark.parametrize(
    ("views", "head"),
    [({}, {}), ({"num_local_crops": 0}, {}), ({}, {"batch_norm": True})],
    ids=["default", "large views alone", "batch norm"],
)
def test_a_step_of_dino_waits_for_nothing(
    road: Road, views: dict[str, Any], head: dict[str, Any]
) -> None:
    here, _ = train(make_module(head), road, views, "auto", Watch())
    module = make_module(head)
    with Watch() as watch:
        there, data = train(module, road, views, ForeignStrategy(), watch)
        losses = [loss.cpu() for loss in there.losses]
    torch.testing.assert_close(losses, here.losses, rtol=1e-5, atol=0)
    assert len(data.logged) == STEPS
    waits = watch.waits[data.logged[0][0] : there.end[0]]
    assert not waits, "\n".join(waits)
    # in its first step Lightning moves the sums of what is logged to the device
    pageable = watch.pageable[data.logged[1][1] : there.end[1]]
    assert not pageable, "\n".join(pageable)
    assert not watch.unordered, "\n".join(watch.unordered)
