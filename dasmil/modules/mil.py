"""Training and evaluation of any method."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from dasmil.bags import BagGraph, describe_difference
from dasmil.bags.output import ScaleOutput
from dasmil.data.bags import BagDataModule, UnreadBag
from dasmil.embedding.weights import refuse_other_keys
from dasmil.errors import InputError, some_of
from dasmil.losses import bag_loss, balanced_weights
from dasmil.metrics.evaluated_slides import Evaluation
from dasmil.modules.card import CARD, METHOD, OPTIONS, ModelCard, read_card
from dasmil.modules.decay import BagLosses
from dasmil.modules.evaluation import (
    CONSTANT,
    SlideResult,
    constant_scales,
    evaluation_of,
    gather_results,
    mean_losses,
    not_finite,
    slide_results,
)
from dasmil.modules.finite import ADVICE, FiniteLoss
from dasmil.modules.going_on import (
    KEY,
    refuse_broken_state,
    refuse_other_settings,
    training_settings,
)
from dasmil.modules.options import (
    EvaluationOptions,
    OptimizerOptions,
    flat_options,
    plain_options,
)
from dasmil.nn.standardize import Standardize
from dasmil.seeds import seed_step, training_seed
from dasmil.slides.study import (
    Study,
    is_same_study,
    join_records,
    place_slides,
    plain_records,
    read_records,
)

FEW_SLIDES = 10  # of a class: at an AUROC of 0.8 its standard error is then 0.1
NOT_OF_NETWORK = ("optimizer", "evaluation", "objective", "class_weights")


class MILModule(LightningModule):
    """Trains and evaluates a method on bags; a method says what its network and its loss are.

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
        subtract the mean of the training tiles' features and divide by their spread.
    one_logit:
        give two classes one logit (binary cross-entropy) instead of two (cross-entropy; D4).
    class_weights:
        of the label losses, one per class in the order of data.classes; ``balanced`` is inverse to
        the classes' frequencies among the training slides.

    Attributes
    ----------
    network: made by :meth:`build`.
    evaluation: the result of the last evaluation.
    failed: its slides whose output is not finite.
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
        self.evaluation: Evaluation | None = None
        self.failed: list[str] = []
        self._standardizes = standardize
        self._finite_loss = FiniteLoss()
        self._bag_losses = BagLosses()

    # What a method says

    def build(self, in_dims: Mapping[str, int], num_logits: int) -> nn.Module:
        """The network: BagGraph → ScaleOutput per scale; the last one is the answer.

        Parameters
        ----------
        in_dims: width of the tile features per scale, coarse to fine.
        num_logits: C; 1 for two classes with one logit.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its network is")

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

    # What it knows

    def bind(self, card: ModelCard) -> "MILModule":
        """Make the network for the bags and classes of a card; returns the module itself."""
        self._card = card
        scales = card.bag_format["scales"]
        in_dims = {name: scale["extractor"]["feature_dim"] for name, scale in scales.items()}
        self.standardize = Standardize(in_dims) if self._standardizes else None
        self.network = self.build(in_dims, self.num_logits)
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The options that the module was made with, as plain values."""
        return plain_options(self.hparams_initial)

    @property
    def flat_options(self) -> dict[str, Any]:
        """The same by names such as ``objective.temperature``."""
        return flat_options(self.options)

    @property
    def card(self) -> ModelCard:
        """What ``fit`` has found out, or :meth:`bind` was given.

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
        return self.card.classes

    @property
    def num_logits(self) -> int:
        return 1 if len(self.classes) == 2 and self.one_logit else len(self.classes)

    @property
    def logit_classes(self) -> tuple[str, ...]:
        """The class of each logit; a single logit is the positive class's."""
        return self.classes[-self.num_logits :]

    @property
    def tile_px(self) -> int:
        return int(self.card.bag_format["tile_px"])

    def label_weight(self, labels: Tensor) -> Tensor | float:
        """The weight of each bag's label loss, shape (B,); 1 if all classes count alike."""
        weights = self.card.class_weights
        return 1.0 if weights is None else torch.tensor(weights, device=labels.device)[labels]

    # How it is set up, and goes on

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and not self.uses_all_weights:
            strategy._ddp_kwargs["find_unused_parameters"] = True  # Lightning has no setter
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, BagDataModule):
            return
        before = self._card
        if before is None:
            self.bind(ModelCard(tuple(data.classes), data.bag_format))
        else:
            self._refuse_other_data(before, data)
        if stage != "fit":
            return
        self._card = replace(
            self.card,
            split=data.study() if before is None else self._join_study(before, data),
            val_part=data.val_part,
            class_weights=self._resolve_class_weights(list(data.class_counts().values())),
            seed=training_seed(),
        )
        _warn_of_few(data)
        if self.standardize is not None:
            for scale, (mean, std) in data.train_statistics().items():
                self.standardize.set_statistics(scale, mean, std)

    def _resolve_class_weights(self, counts: list[int]) -> tuple[float, ...] | None:
        weights = self.class_weights
        if weights is None:
            return None
        if weights == "balanced":
            return tuple(balanced_weights(counts))
        if len(weights) != len(counts) or min(weights) < 0:
            raise InputError(
                f"model.class_weights: {weights} must be {len(counts)} weights of 0 or more, one "
                f"for each of {', '.join(self.classes)}"
            )
        return tuple(weights)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        where = "the checkpoint" if self._trainer is None else self.trainer.ckpt_path
        found = read_card(checkpoint, where, type(self))
        if self._card is not None:
            self._card = replace(self._card, thresholds=found.card.thresholds)
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        if not isinstance(data, BagDataModule):
            return
        self._refuse_other_data(found.card, data)
        self._refuse_other_network(found.options)
        refuse_other_keys(self, checkpoint["state_dict"], where)
        if not self.trainer.training:
            return
        if not is_same_study(found.card.split, data.study()):
            raise InputError(
                f"{data.folder}: its parts are not those that the checkpoint was trained with; "
                "resume with the same cohort table, fractions and data.split_seed"
            )
        settings = training_settings(self.trainer, self, data)
        refuse_other_settings(checkpoint, settings, where)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._finite_loss.check_weights(checkpoint["state_dict"])
        data = getattr(self.trainer, "datamodule", None)
        checkpoint[KEY] = training_settings(self.trainer, self, data)
        checkpoint |= self.description()

    def description(self) -> dict[str, Any]:
        """The entries of a checkpoint that say which model it holds, as plain values."""
        cls = type(self)
        is_ours = cls.__module__.startswith("dasmil.methods.")
        name = cls.__name__ if is_ours else f"{cls.__module__}.{cls.__qualname__}"
        return {METHOD: name, OPTIONS: self.options, CARD: self.card.plain()}

    def on_train_start(self) -> None:
        refuse_broken_state(self.trainer)

    @staticmethod
    def _join_study(card: ModelCard, data: BagDataModule) -> Any:
        """The slides that the weights will have met: those of the data, and those met before."""
        if not card.split:
            warnings.warn(
                "it is not known which slides these weights were trained on before, so the new "
                "checkpoint does not know its test slides either",
                stacklevel=2,
            )
            return ()
        met = read_records(card.split)
        study = Study(met, data.cohort, data.digests, data.other_cohort)
        place_slides(data.cohort, study, data.val_part, data.split, data.split, str(data.folder))
        place_slides(data.cohort, study, "test", data.split, data.split, str(data.folder))
        return plain_records(join_records(read_records(data.study()), met))

    def _refuse_other_network(self, trained: Mapping[str, Any]) -> None:
        """A config on top of a checkpoint may ask for a network that was never trained."""
        before = flat_options(trained)
        other = [
            f"model.{name} {now} instead of {before[name]}"
            for name, now in self.flat_options.items()
            if name in before and now != before[name] and name.split(".")[0] not in NOT_OF_NETWORK
        ]
        if other:
            raise InputError(
                f"{self.trainer.ckpt_path}: its network was trained with other options, here are "
                f"{some_of(other)}; leave them out, also as part of a --config"
            )

    @staticmethod
    def _refuse_other_data(card: ModelCard, data: BagDataModule) -> None:
        difference = describe_difference(card.bag_format, data.bag_format)
        if difference:
            raise InputError(f"{data.folder}: the bags hold {difference}, which this model knows")
        if list(card.classes) != data.classes:
            raise InputError(
                f"data.classes: {', '.join(data.classes)}, but this model was trained with "
                f"{', '.join(card.classes)} in that order"
            )

    # Steps

    def forward(self, graph: BagGraph) -> dict[str, ScaleOutput]:
        """The output for each bag, per scale, coarse to fine."""
        if self.standardize is not None:
            graph = self.standardize(graph)
        return dict(self.network(graph))

    def on_train_batch_start(self, batch: BagGraph, batch_idx: int) -> None:
        """What dropout draws depends on seed, epoch and place alone; see :mod:`dasmil.seeds`."""
        world, rank = self.trainer.world_size, self.trainer.global_rank
        seed_step(self.current_epoch, batch_idx * world + rank)

    def training_step(self, graph: BagGraph, batch_idx: int) -> Any:
        total, terms = self.objective(self(graph), graph)
        return self.note_losses(graph, total, terms)

    def note_losses(self, graph: BagGraph, total: Tensor, terms: Mapping[str, Tensor]) -> Tensor:
        """Log the losses (B,) of a training step and watch that they are finite; their mean."""
        logged = {f"train/{name}": term.mean() for name, term in terms.items()}
        self.log_dict(
            {**logged, "train/loss": total.mean()},
            on_step=False,
            on_epoch=True,
            batch_size=graph.num_bags,
            sync_dist=True,
        )
        loss, slide_ids = total.mean(), graph.slide_ids
        self.log("train/loss_step", loss, prog_bar=True, batch_size=graph.num_bags)
        self._finite_loss.watch(self.global_step, loss, lambda: slide_ids)
        if self.optimizer_options.decay_below is not None:
            of_bags = [term for name, term in terms.items() if name.startswith("bag/")]
            self._bag_losses.note(graph.labels, of_bags)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: BagGraph, batch_idx: int) -> None:
        """Weight decay of the next epoch; every checkpoint has it in the optimiser's state."""
        options = self.optimizer_options
        if options.decay_below is not None and self.trainer.is_last_batch:
            acts = self._bag_losses.take() < options.decay_below
            for group in self.trainer.optimizers[0].param_groups:
                group["weight_decay"] = options.weight_decay if acts else 0.0

    def on_train_epoch_end(self) -> None:
        self._finite_loss.check()

    def configure_optimizers(self) -> Any:
        return self.adam(self.parameters())

    def adam(self, parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
        """Adam with its schedule, as Lightning wants it, for some of the weights."""
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
        self._finite_loss.check()
        self.results = []

    def on_test_epoch_start(self) -> None:
        self.results = []

    def validation_step(self, graph: BagGraph, batch_idx: int) -> dict[str, ScaleOutput]:
        return self._evaluate(graph)

    def test_step(self, graph: BagGraph, batch_idx: int) -> dict[str, ScaleOutput]:
        return self._evaluate(graph)

    def on_validation_epoch_end(self) -> None:
        self._log_results("val")

    def on_test_epoch_end(self) -> None:
        self._log_results("test")

    def predict_step(self, graph: BagGraph | UnreadBag, batch_idx: int) -> dict[str, ScaleOutput]:
        return {} if isinstance(graph, UnreadBag) else self(graph)

    def _evaluate(self, graph: BagGraph) -> dict[str, ScaleOutput]:
        output = self(graph)
        total, terms = self.objective(output, graph)
        data = getattr(self.trainer, "datamodule", None)
        rows = data.rows if isinstance(data, BagDataModule) else ()
        patients = {row.slide_id: row.patient for row in rows if row.slide_id in graph.slide_ids}
        self.results += slide_results(graph, output, {**terms, "loss": total}, patients)
        return output

    def _log_results(self, stage: str) -> None:
        self.results = gather_results(self.results)
        specificity = self.evaluation_options.specificity
        found = evaluation_of(self.results, self.classes, None, specificity)
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        self.failed = not_finite(self.results)
        if fitting and self.failed:
            raise InputError(
                f"fit: the output is not finite for {len(self.failed)} validation slide(s): "
                f"{some_of(self.failed)}; {ADVICE}"
            )
        card = self.card
        if fitting and card.val_part != "test" and len(self.classes) == 2:
            card = self._card = replace(card, thresholds=found.operating_points())
        self.evaluation = replace(found, thresholds=card.thresholds)
        metrics: dict[str, float] = {}
        for scale in self.evaluation.scales:
            metrics = self.evaluation.metrics(scale)
            if stage == "test" and not self.failed:
                metrics |= self.evaluation.test_chosen_metrics(scale)
            self._log_metrics({f"{stage}/{scale}/{k}": value for k, value in metrics.items()})
        self._log_metrics({f"{stage}/{k}": value for k, value in metrics.items()})
        self._log_metrics({f"{stage}/{k}": v for k, v in self.mean_losses().items()})
        if stage == "val" and not fitting:
            self._warn_of_constant_scales("this model")
        present = len(self.evaluation.labels.unique())
        if present < len(self.classes) and stage == "test":
            warnings.warn(
                f"AUROC is not defined: the {stage} slides hold {present} of "
                f"{len(self.classes)} classes",
                stacklevel=2,
            )

    def mean_losses(self) -> dict[str, float]:
        """Mean over the evaluated slides of each term of the objective, and of ``loss``."""
        return mean_losses(self.results)

    def on_train_end(self) -> None:
        self._warn_of_constant_scales("the model of the last epoch")

    def _warn_of_constant_scales(self, which: str) -> None:
        """Adam turns weight decay into whole steps towards zero if gradients are smaller."""
        dead = constant_scales(self.results)
        if dead:
            warnings.warn(
                f"{', '.join(dead)}: {which} gives bag logits that differ by less than "
                f"{CONSTANT:g} over the {len(self.results)} validation slides: this scale has "
                "learned nothing; set model.standardize to true, or train for longer, and if "
                "model.optimizer.decay_below is null, lower model.optimizer.weight_decay",
                stacklevel=2,
            )

    def _log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log values that are the same in every process already.

        Lightning asks for a reduction of them. The maximum of equal values is exact, their mean
        need not be.
        """
        for name, value in metrics.items():
            shown = name in ("val/auroc", "val/loss", "test/auroc")
            self.log(name, value, prog_bar=shown, sync_dist=True, reduce_fx="max")


class SingleScaleModule(MILModule):
    """A method that works at one scale.

    Parameters
    ----------
    scale:
        which one; the finest of the bags if null.
    options:
        of :class:`MILModule`.
    """

    def __init__(self, scale: str | None = None, **options: Any):
        super().__init__(**options)
        self.scale = scale

    def choose_scales(self, available: Sequence[str]) -> Sequence[str]:
        """The scale of the option, or the finest one."""
        scale = self.scale or available[-1]
        if scale not in available:
            raise InputError(
                f"model.scale: {scale} is none of the scales of the bags, {', '.join(available)}"
            )
        return [scale]


def _warn_of_few(data: BagDataModule) -> None:
    """The AUROC of a few slides takes few values: many epochs tie, or one is best by chance."""
    few = {name: n for name, n in data.class_counts(data.val_part).items() if n < FEW_SLIDES}
    if few:
        counts = " and ".join(f"{n} {name}" for name, n in few.items())
        warnings.warn(
            f"{data.folder}: only {counts} slide(s) choose the epoch of best.ckpt, fewer than "
            f"{FEW_SLIDES} of a class; its metrics on them say little: raise data.val_fraction, or "
            "choose settings over all of data.num_folds",
            stacklevel=2,
        )
