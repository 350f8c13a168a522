"""TensorBoard's table of hyperparameters."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor


class HyperParameters(Callback):
    """Log the options of a method beside the best value of the metric that chooses the epoch."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if isinstance(trainer.logger, TensorBoardLogger):
            name, _ = _selection(trainer)
            trainer.logger.log_hyperparams(_scalars(pl_module), {name: float("nan")})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name, best = _selection(trainer)
        if isinstance(trainer.logger, TensorBoardLogger) and best is not None:
            trainer.logger.log_metrics({name: float(best)}, step=trainer.current_epoch)


def _scalars(module: Any) -> dict[str, Any]:
    options = module.flat_options
    plain = {name: v for name, v in options.items() if isinstance(v, int | float | bool)}
    about = {"scales": "+".join(module.scales), "classes": "/".join(module.classes)}
    return {"method": type(module).__name__, **plain, **about}


def _selection(trainer: Trainer) -> tuple[str, Tensor | None]:
    """TensorBoard's name of the metric by which the checkpoint is chosen, and its best value."""
    keeper = trainer.checkpoint_callback
    monitor = getattr(keeper, "monitor", None) or "val/auroc"
    return f"hp/{monitor.replace('/', '_')}", getattr(keeper, "best_model_score", None)
