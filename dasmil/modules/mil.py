"""Training and evaluation of any method.

D numbers: ``.github/docs/paper.md``.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from dasmil.bags import BagGraph
from dasmil.bags.output import ScaleOutput
from dasmil.data.bag_dataset import UnreadBag
from dasmil.data.bags import BagDataModule
from dasmil.embedding.weights import refuse_other_keys
from dasmil.errors import InputError, join_few
from dasmil.losses import bag_loss
from dasmil.metrics.evaluated_slides import Evaluation
from dasmil.modules.binding import (
    fitted_card,
    refuse_other_data,
    refuse_other_network,
    warn_few_slides,
)
from dasmil.modules.card import ModelCard, describe_model, read_card, refuse_other_options
from dasmil.modules.finite_loss import ADVICE
from dasmil.modules.options import EvaluationOptions, OptimizerOptions, option_types
from dasmil.modules.resume import refuse_other_settings
from dasmil.modules.slide_results import (
    SlideResult,
    evaluate_results,
    gather_results,
    mean_losses,
    not_finite,
    slide_results,
    warn_constant_scales,
)
from dasmil.modules.training import TrainingModule
from dasmil.modules.weight_decay import BagLosses
from dasmil.nn.standardize import Standardize
from dasmil.slides.study import is_same_study

SHOWN_METRICS = ("val/auroc", "val/loss", "test/auroc")  # in the progress bar


class MILModule(TrainingModule):
    """Trains and evaluates a method on bags.

    A method overrides :meth:`build`, and if it needs more, :meth:`objective`, :attr:`uses_edges`,
    :attr:`uses_all_weights`, :attr:`output_scales` and :meth:`choose_scales`. One with several
    optimisers overrides ``training_step`` and ``configure_optimizers`` too.

    Parameters
    ----------
    optimizer:
        learning rate, schedule and weight decay.
    evaluation:
        operating points and pooling over a patient's slides.
    standardize:
        subtract the mean of the training tiles' features and divide by their standard deviation.
    one_logit:
        give two classes one logit (binary cross-entropy) instead of two (cross-entropy).
    class_weights:
        weights of the label losses, one per class in the order of data.classes; ``balanced`` is
        inverse to the classes' frequencies among the training slides.

    Attributes
    ----------
    network: made by :meth:`build`.
    evaluation: the result of the last evaluation.
    failed: its slides whose output is not finite.
    results: its results per slide.
    losses: the mean over them of each term of the objective, and of ``loss``.
    """

    network: nn.Module

    def __init__(
        self,
        optimizer: OptimizerOptions = OptimizerOptions(),
        evaluation: EvaluationOptions = EvaluationOptions(),
        standardize: bool = False,
        one_logit: bool = True,
        class_weights: list[float] | Literal["balanced"] | None = None,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.optimizer_options = optimizer
        self.evaluation_options = evaluation
        self.one_logit = one_logit
        self.class_weights = class_weights
        self._card: ModelCard | None = None
        self.standardize: Standardize | None = None
        self.results: list[SlideResult] = []
        self.losses: dict[str, float] = {}
        self.evaluation: Evaluation | None = None
        self.failed: list[str] = []
        self._standardizes = standardize
        self._bag_losses = BagLosses()

    # What a method overrides

    def build(self, in_dims: Mapping[str, int], num_logits: int) -> nn.Module:
        """Make the network, which turns a BagGraph into a ScaleOutput per scale.

        The output of the last scale is the model's answer.

        Parameters
        ----------
        in_dims: width of the tile features per scale, coarse to fine.
        num_logits: C; 1 for two classes with one logit.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override build")

    def objective(
        self, output: Mapping[str, ScaleOutput], graph: BagGraph
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss per bag, shape (B,), and its individual terms.

        By default the label loss of the answer.
        """
        scale = list(output)[-1]
        loss = bag_loss(output[scale].bag_logits, graph.labels)
        return self.label_weight(graph.labels) * loss, {f"bag/{scale}": loss}

    @property
    def uses_edges(self) -> bool:
        """Whether the network reads the edges of a graph; if not, they are not made."""
        return False

    @property
    def uses_all_weights(self) -> bool:
        """Whether every training step gives every weight a gradient; DDP must know."""
        return True

    @property
    def output_scales(self) -> tuple[str, ...]:
        """The scales of the output, coarse to fine."""
        return self.scales[-1:]

    def choose_scales(self, available: Sequence[str]) -> Sequence[str]:
        """The scales that the network reads, of those that the bags hold.

        Raises
        ------
        InputError
            if the bags do not hold what it reads.
        """
        return available

    # The card, and what follows from it

    def bind(self, card: ModelCard) -> "MILModule":
        """Make the network for the bags and classes of a card; returns the module itself."""
        self._card = card
        scales = card.bag_format["scales"]
        in_dims = {name: scale["extractor"]["feature_dim"] for name, scale in scales.items()}
        self.standardize = Standardize(in_dims) if self._standardizes else None
        self.network = self.build(in_dims, self.num_logits)
        return self

    @property
    def card(self) -> ModelCard:
        """The card that ``fit`` has made, or that :meth:`bind` was given.

        Raises
        ------
        RuntimeError
            if there is none yet.
        """
        if self._card is None:
            raise RuntimeError("the model knows no bags yet: fit it, or bind it to a ModelCard")
        return self._card

    @property
    def is_bound(self) -> bool:
        """Whether there is a card, and with it a network."""
        return self._card is not None

    @property
    def scales(self) -> tuple[str, ...]:
        """The scales that the network reads, coarse to fine."""
        return self.card.scales

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels in their order."""
        return self.card.classes

    @property
    def num_logits(self) -> int:
        """C, the number of logits."""
        return 1 if len(self.classes) == 2 and self.one_logit else len(self.classes)

    @property
    def logit_classes(self) -> tuple[str, ...]:
        """The class of each logit; a single logit is the positive class's."""
        return self.classes[-self.num_logits :]

    @property
    def tile_px(self) -> int:
        """Side of a tile in pixels."""
        return int(self.card.bag_format["tile_px"])

    def label_weight(self, labels: Tensor) -> Tensor | float:
        """The weight of each bag's label loss, shape (B,); 1 without class weights."""
        weights = self.card.class_weights
        if weights is None:
            return 1.0
        # a list copied to a GPU would make the host wait
        return torch.stack([weight * (labels == n) for n, weight in enumerate(weights)]).sum(0)

    # Setup and checkpoints

    def setup(self, stage: str) -> None:
        strategy, data = self.trainer.strategy, self.datamodule
        if isinstance(strategy, DDPStrategy) and not self.uses_all_weights:
            strategy._ddp_kwargs["find_unused_parameters"] = True  # Lightning has no setter
        if not isinstance(data, BagDataModule):
            return
        if stage == "fit":  # so that the checkpoint can be read
            refuse_other_options(self.options, option_types(type(self)), "model")
        before = self._card
        if before is None:
            self.bind(ModelCard(tuple(data.classes), data.bag_format))
        else:
            refuse_other_data(before, data)
        if stage != "fit":
            return
        self._card = fitted_card(self.card, before, data, self.class_weights)
        warn_few_slides(data)
        if self.standardize is not None:
            for scale, (mean, std) in data.train_statistics().items():
                self.standardize.set_statistics(scale, mean, std)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        where = "the checkpoint" if self._trainer is None else self.trainer.ckpt_path
        options, card = read_card(checkpoint, where, type(self))
        if self._card is not None:
            self._card = replace(self._card, thresholds=card.thresholds)
        data = None if self._trainer is None else self.datamodule
        if not isinstance(data, BagDataModule):
            return
        refuse_other_data(card, data)
        refuse_other_network(options, self.flat_options, where)
        refuse_other_keys(self, checkpoint["state_dict"], where)
        if not self.trainer.training:
            return
        if not is_same_study(card.split, data.study()):
            raise InputError(
                f"{data.folder}: its split is not the one that the checkpoint was trained with; "
                "resume with the same cohort table and the same options data.split"
            )
        refuse_other_settings(checkpoint, self.settings(), where)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint |= self.description()

    def description(self) -> dict[str, Any]:
        """The entries of a checkpoint that describe its model, as plain values."""
        return describe_model(type(self), self.options, self.card)

    # Steps

    def forward(self, graph: BagGraph) -> dict[str, ScaleOutput]:
        """The output for all bags of a graph, per scale, coarse to fine."""
        if self.standardize is not None:
            graph = self.standardize(graph)
        return dict(self.network(graph))

    def training_step(self, graph: BagGraph, batch_idx: int) -> Any:
        total, terms = self.objective(self(graph), graph)
        return self.log_losses(graph, total, terms)

    def log_losses(self, graph: BagGraph, total: Tensor, terms: Mapping[str, Tensor]) -> Tensor:
        """Log the losses (B,) of a training step and check them; returns their mean."""
        loss, slide_ids = total.mean(), graph.slide_ids
        self.log_dict(
            {**{f"train/{name}": term.mean() for name, term in terms.items()}, "train/loss": loss},
            on_step=False,
            on_epoch=True,
            batch_size=graph.num_bags,
            sync_dist=True,
        )
        self.log("train/loss_step", loss, prog_bar=self.shows_bar, batch_size=graph.num_bags)
        self.finite_loss.watch(self.global_step, loss, lambda: slide_ids)
        if self.optimizer_options.decay_below is not None:
            bag_losses = [term for name, term in terms.items() if name.startswith("bag/")]
            self._bag_losses.add(graph.labels, bag_losses)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: BagGraph, batch_idx: int) -> None:
        """Set the next epoch's weight decay; checkpoints hold it in the optimiser's state."""
        options = self.optimizer_options
        if options.decay_below is not None and self.trainer.is_last_batch:
            is_on = self._bag_losses.pop_worst() < options.decay_below
            for group in self.trainer.optimizers[0].param_groups:
                group["weight_decay"] = options.weight_decay if is_on else 0.0

    def configure_optimizers(self) -> Any:
        return self.adam(self.parameters())

    def adam(self, parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
        """Adam and its schedule for some of the weights, in Lightning's format."""
        options = self.optimizer_options
        epochs = self.trainer.max_epochs
        if not epochs or epochs < 1:
            raise InputError("trainer.max_epochs: the cosine schedule needs a number of epochs")
        optimizer = torch.optim.Adam(
            parameters,
            lr=options.learning_rate,
            betas=(options.betas[0], options.betas[1]),  # a list, if from a file
            weight_decay=options.weight_decay if options.decay_below is None else 0.0,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, epochs, eta_min=options.min_learning_rate
        )
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    # Evaluation

    def on_validation_epoch_start(self) -> None:
        self.finite_loss.check()
        self.results = []

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, graph: BagGraph, batch_idx: int) -> dict[str, ScaleOutput]:
        output = self(graph)
        total, terms = self.objective(output, graph)
        data = self.datamodule
        rows = data.rows if isinstance(data, BagDataModule) else ()
        patients = {row.slide_id: row.patient for row in rows if row.slide_id in graph.slide_ids}
        self.results += slide_results(graph, output, {**terms, "loss": total}, patients)
        return output

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self._evaluate("val")

    def on_test_epoch_end(self) -> None:
        self._evaluate("test")

    def predict_step(self, graph: BagGraph | UnreadBag, batch_idx: int) -> dict[str, ScaleOutput]:
        return {} if isinstance(graph, UnreadBag) else self(graph)

    def _evaluate(self, stage: str) -> None:
        """Merge the results of all processes, choose thresholds in a fit, and log the metrics."""
        self.results = gather_results(self.results)
        self.failed = not_finite(self.results)
        is_fit = self.trainer.state.fn == TrainerFn.FITTING
        if is_fit and self.failed:
            raise InputError(
                f"fit: the output is not finite for {len(self.failed)} validation slide(s): "
                f"{join_few(self.failed)}; {ADVICE}"
            )
        specificity = self.evaluation_options.specificity
        evaluation = evaluate_results(self.results, self.classes, specificity)
        card = self.card
        if is_fit and card.val_part != "test" and len(self.classes) == 2:
            card = self._card = replace(card, thresholds=evaluation.operating_points())
        self.evaluation = evaluation = replace(evaluation, thresholds=card.thresholds)
        metrics: dict[str, float] = {}
        for scale in evaluation.scales:
            metrics = evaluation.metrics(scale)
            if stage == "test" and not self.failed:
                metrics |= evaluation.test_chosen_metrics(scale)
            self._log_metrics({f"{stage}/{scale}/{k}": value for k, value in metrics.items()})
        self.losses = mean_losses(self.results)
        metrics |= self.losses  # after those of the last scale, the answer
        self._log_metrics({f"{stage}/{k}": value for k, value in metrics.items()})
        if stage == "val" and not is_fit:
            warn_constant_scales(self.results, "this model")
        present = len(evaluation.labels.unique())
        if present < len(self.classes) and stage == "test":
            warnings.warn(
                f"AUROC is not defined: the {stage} slides hold {present} of "
                f"{len(self.classes)} classes",
                stacklevel=2,
            )

    def on_train_end(self) -> None:
        warn_constant_scales(self.results, "the model of the last epoch")

    def _log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log values that are equal in all processes.

        Lightning asks for a reduction: the maximum of equal values is exact, their mean need not
        be.
        """
        for name, value in metrics.items():
            shown = name in SHOWN_METRICS
            self.log(name, value, prog_bar=shown, sync_dist=True, reduce_fx="max")
