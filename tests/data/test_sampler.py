"""The order of training: shared by processes, drawn with weights, the same if resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bag_factory import CLASSES, write_bags
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from dasmil.data import BagDataModule
from dasmil.data.sampler import TrainingSampler
from dasmil.errors import InputError


def order(num_slides: int, epoch: int = 0, **options: Any) -> list[int]:
    sampler = TrainingSampler(num_slides, **options)
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    assert len(drawn) == len(sampler)
    return drawn


def test_each_slide_comes_once_an_epoch_in_an_order_of_seed_and_epoch() -> None:
    first = order(20)
    assert sorted(first) == list(range(20))
    assert order(20) == first
    assert order(20, epoch=1) != first != order(20, seed=1)


@pytest.mark.parametrize("num_slides", [1, 4, 10])
@pytest.mark.parametrize("batches", [2, 3])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_processes_see_the_very_batches_that_one_process_accumulates(
    num_slides: int, batches: int, batch_size: int
) -> None:
    """In the same steps; fewer slides than a step needs come as often as it takes."""
    plain = order(num_slides)
    alone = order(num_slides, batch_size=batch_size, accumulated=batches)
    assert len(alone) == -(-num_slides // (batches * batch_size)) * batches * batch_size
    assert alone == [plain[place % num_slides] for place in range(len(alone))]
    for rank in range(batches):
        share = order(num_slides, batch_size=batch_size, world=batches, rank=rank)
        in_batches = [alone[i : i + batch_size] for i in range(0, len(alone), batch_size)]
        assert share == [slide for batch in in_batches[rank::batches] for slide in batch]


def test_a_single_batch_a_step_may_be_smaller_at_the_end() -> None:
    assert sorted(order(7, batch_size=3)) == list(range(7))


class Seen(Callback):
    """The slides of every training batch, by epoch."""

    def __init__(self) -> None:
        self.slides: list[tuple[int, tuple[str, ...]]] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, number: int) -> None:
        self.slides.append((trainer.current_epoch, batch.slide_ids))


class Keep(Checkpoint):
    """Checkpoints at every moment at which a ModelCheckpoint may write one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "step")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "validated")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "ended")

    def _save(self, trainer: Trainer, moment: str) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if not trainer.sanity_checking and (
            moment != "step" or batches == 2 or trainer.is_last_batch
        ):
            trainer.save_checkpoint(self.folder / f"{moment}_{batches}.ckpt")


class Still(LightningModule):
    """Learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        return self.weight.sum()

    def validation_step(self, batch: Any, number: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


LABELS = {f"{c}{n}": CLASSES[c == "t"] for n in range(5) for c in "nt"}
SPLIT = {s: "val" if s.endswith("4") else "train" for s in LABELS}  # 8 to train on


@pytest.mark.parametrize(
    ("data", "trainer"),
    [
        pytest.param({}, {}, marks=pytest.mark.slow),
        ({"num_workers": 1, "weighted_sampling": True}, {}),
        pytest.param({"batch_size": 2}, {"accumulate_grad_batches": 3}, marks=pytest.mark.slow),
    ],
    ids=["plain", "workers", "accumulated"],
)
def test_a_training_resumes_after_a_whole_epoch_with_the_slides_that_are_left(
    tmp_path: Path, data: dict[str, Any], trainer: dict[str, Any]
) -> None:
    """From before and after the validation there; a checkpoint within an epoch is refused."""
    write_bags(tmp_path / "bags", LABELS, SPLIT)

    def fit(name: str, ckpt_path: Path | None = None) -> list[tuple[int, tuple[str, ...]]]:
        seen = Seen()
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        Trainer(
            max_epochs=3,
            accelerator="cpu",
            callbacks=[seen, Keep(tmp_path / name)],
            **quiet,
            **trainer,
        ).fit(
            Still(),
            datamodule=BagDataModule(tmp_path / "bags", CLASSES, **{"num_workers": 0, **data}),
            ckpt_path=ckpt_path,
            weights_only=True,
        )
        return seen.slides

    whole = fit("whole")
    each = len(whole) // 3
    assert [epoch for epoch, _ in whole] == [0] * each + [1] * each + [2] * each
    for moment in ("step", "validated", "ended"):
        checkpoint = tmp_path / "whole" / f"{moment}_{each}.ckpt"
        assert fit(f"from_{moment}", checkpoint) == whole[each:]
    with pytest.raises(InputError, match=r"step_2\.ckpt: saved within an epoch"):
        fit("from_step_2", tmp_path / "whole" / "step_2.ckpt")
