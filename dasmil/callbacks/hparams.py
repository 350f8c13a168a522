"""TensorBoard's table of hyperparameters."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor


class HyperParameters(Callback):
    """Log the options of a module with the best value of the metric that chooses the epoch."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if isinstance(trainer.logger, TensorBoardLogger):
            name, _ = _selection(trainer)
            trainer.logger.log_hyperparams(
                _scalars(pl_module), {name: float("nan")} if name else {}
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name, best = _selection(trainer)
        if isinstance(trainer.logger, TensorBoardLogger) and name and best is not None:
            trainer.logger.log_metrics({name: float(best)}, step=trainer.current_epoch)


def _scalars(module: Any) -> dict[str, Any]:
    options = module.flat_options
    scalars: dict[str, Any] = {
        name: v for name, v in options.items() if isinstance(v, int | float | bool)
    }
    if hasattr(module, "classes"):  # a method, not an extractor
        scalars |= {"scales": "+".join(module.scales), "classes": "/".join(module.classes)}
    return {"method": type(module).__name__, **scalars}


def _selection(trainer: Trainer) -> tuple[str, Tensor | None]:
    """TensorBoard's name of the metric that chooses the checkpoint, and its best value.

    "" and None if no metric chooses it.
    """
    keeper = trainer.checkpoint_callback
    monitor = getattr(keeper, "monitor", None)
    name = f"hp/{monitor.replace('/', '_')}" if monitor else ""
    return name, getattr(keeper, "best_model_score", None)
