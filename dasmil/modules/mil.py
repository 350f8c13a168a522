"""Training and evaluation of DAS-MIL."""

import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from dasmil.bags import BagGraph, describe_difference
from dasmil.data.bags import BagDataModule, UnreadBag
from dasmil.embedding.weights import refuse_other_keys
from dasmil.errors import InputError, some_of
from dasmil.losses import ObjectiveOptions, balanced_weights, objective
from dasmil.metrics.evaluation import Evaluation
from dasmil.modules.card import read_card
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
from dasmil.nn import DASMIL, ScaleOutput, Standardize
from dasmil.seeds import seed_step
from dasmil.slides.study import (
    Study,
    is_same_study,
    join_records,
    place_slides,
    plain_records,
    read_records,
)

# options that decide what the network makes of a bag; dropout and first weights act in training
# alone, and the backend of a GAT changes nothing
OF_NETWORK = (
    *("standardize", "one_logit", "hidden_dim", "out_dim", "heads", "residual", "query_dim"),
    *("contextualize", "concatenate_parents", "coarse_instances", "pooling"),
)
FEW_SLIDES = 10  # of a class: at an AUROC of 0.8 its standard error is then 0.1


class DASMILModule(LightningModule):
    """DAS-MIL with the objective of Eq. 3, Adam and a cosine schedule (paper, section 4).

    Parameters
    ----------
    standardize:
        subtract the mean of the training tiles' features and divide by their spread.
    one_logit:
        give two classes one logit (binary cross-entropy) instead of two (cross-entropy; D4).
    hidden_dim:
        width between the two graph layers.
    out_dim:
        width of the contextualised features H.
    heads:
        attention heads of each GAT, averaged (D13).
    attention_dropout:
        probability of dropping an attention coefficient of a GAT (D13).
    node_dropout:
        probability that a node loses its edges in a training step (D14).
    residual:
        of each GAT: none, plain (x + h) or glu (x + GLU(h)) (D15).
    query_dim:
        width of the MIL head's queries.
    bag_classifier_init:
        variance of the bag classifier's first weights: lecun (1 / fan-in) or torch (a third of it)
        (D16).
    contextualize:
        false leaves the graph out: the heads see the extractors' features (Table 5).
    concatenate_parents:
        a head sees each tile's vector with its parent's, [10x ‖ 20x] (Table 4).
    coarse_instances:
        the coarse heads see all tiles, or only parents of tiles (D12).
    gat_backend:
        how a GAT sums over neighbours: gather, or PyG's GATConv, which is equal, slower and larger.
    pooling:
        of the heads: the paper's attention, or for comparison the mean or max of instance logits.
    distillation:
        λ of Eq. 3.
    criticality:
        β of Eq. 3.
    instance:
        weight of the max-instance loss (D7).
    temperature:
        τ of Eq. 1.
    discounted:
        whose bag loss (1 − λ) discounts: the coarse scales', or the fine one's (D6).
    distillation_pairs:
        with three scales or more: taught by the next finer one, or all by the finest.
    kl_direction:
        KL(teacher ‖ student), or the other way round (D1).
    squared_temperature:
        τ² before the KL (D2).
    class_distribution:
        softmax over the classes, or a two-point distribution per class (D3).
    epsilon:
        (p + 1e-7) / (1 + 1e-8) instead of log space (D5).
    criticality_scores:
        what Eq. 2 compares: instance logits, or attention (D10).
    children_pooling:
        GraphPooling of Eq. 2: mean or max of the children (D9).
    criticality_reduction:
        of Eq. 2 over the tiles: mean or sum (D8).
    detach_teacher:
        no gradient reaches the finer scale from Eq. 1 and Eq. 2 (D11).
    learning_rate:
        start of the cosine over the epochs.
    min_learning_rate:
        end of the cosine (D16).
    betas:
        of Adam (D16).
    weight_decay:
        of Adam, as L2 (D16).
    decay_below:
        the weight decay acts in epochs after one in which the mean bag loss of every scale over
        the training slides was less than this part of chance, the entropy of their labels; null:
        always (D16).
    class_weights:
        of the label losses, one a class in the order of data.classes; ``balanced`` is inverse to
        the classes' frequencies among the training slides.
    specificity:
        for which a second threshold is chosen on the validation slides.
    patient_pooling:
        of the slides' probabilities where a patient has several slides.
    classes:
        no option: ``fit`` takes it from data.classes, and the checkpoint keeps it.
    bag_format:
        no option: scales, tile size and extractors of the bags, likewise.
    split:
        no option: a record per slide of the study, see :mod:`dasmil.slides.study`; likewise. Empty
        if it is not known which slides the weights were trained on.
    val_part:
        no option: data.val_part, likewise.
    thresholds:
        no option: per scale and operating point the probability from which on a slide is called
        positive; ``fit`` chooses them on the validation slides (D18), unless they are the test
        slides.
    """

    def __init__(
        self,
        standardize: bool = False,
        one_logit: bool = True,
        hidden_dim: int = 384,
        out_dim: int = 256,
        heads: int = 3,
        attention_dropout: float = 0.2,
        node_dropout: float = 0.5,
        residual: Literal["none", "plain", "glu"] = "none",
        query_dim: int = 128,
        bag_classifier_init: Literal["lecun", "torch"] = "lecun",
        contextualize: bool = True,
        concatenate_parents: bool = False,
        coarse_instances: Literal["all", "parents"] = "all",
        gat_backend: Literal["gather", "gatconv"] = "gather",
        pooling: Literal["attention", "mean", "max"] = "attention",
        distillation: float = 1.0,
        criticality: float = 1.0,
        instance: float = 1.0,
        temperature: float = 1.5,
        discounted: Literal["coarse", "fine"] = "coarse",
        distillation_pairs: Literal["neighbours", "finest"] = "neighbours",
        kl_direction: Literal["teacher_student", "student_teacher"] = "teacher_student",
        squared_temperature: bool = True,
        class_distribution: Literal["softmax", "per_class"] = "softmax",
        epsilon: bool = False,
        criticality_scores: Literal["logits", "attention"] = "logits",
        children_pooling: Literal["mean", "max"] = "mean",
        criticality_reduction: Literal["mean", "sum"] = "mean",
        detach_teacher: bool = True,
        learning_rate: float = 2e-4,
        min_learning_rate: float = 1e-5,
        betas: tuple[float, float] = (0.5, 0.9),
        weight_decay: float = 5e-3,
        decay_below: float | None = 0.9,
        class_weights: list[float] | Literal["balanced"] | None = None,
        specificity: float = 0.9,
        patient_pooling: Literal["mean", "max"] = "mean",
        classes: list[str] | None = None,
        bag_format: dict[str, Any] | None = None,
        split: list[dict[str, str | None]] | dict[str, str] | None = None,
        val_part: str = "val",
        thresholds: dict[str, dict[str, float]] | None = None,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.hparams["betas"] = list(betas)
        self.options = ObjectiveOptions(
            **{field.name: self.hparams[field.name] for field in fields(ObjectiveOptions)}
        )
        if not 0 < specificity < 1:
            raise InputError(f"specificity: {specificity} is not between 0 and 1")
        self.results: list[SlideResult] = []
        self.evaluation: Evaluation | None = None  # of the last part that was evaluated
        self.failed: list[str] = []  # its slides whose output is not finite
        self._finite_loss = FiniteLoss()
        self._bag_losses = BagLosses()
        self.network: DASMIL
        self.standardize: Standardize | None
        if bag_format is not None:
            self._build()

    def _build(self) -> None:
        hp = self.hparams
        scales = hp["bag_format"]["scales"]
        in_dims = {name: scale["extractor"]["feature_dim"] for name, scale in scales.items()}
        self.standardize = Standardize(in_dims) if hp["standardize"] else None
        self.network = DASMIL(
            in_dims,
            self.num_logits,
            hidden_dim=hp["hidden_dim"],
            out_dim=hp["out_dim"],
            heads=hp["heads"],
            attention_dropout=hp["attention_dropout"],
            node_dropout=hp["node_dropout"],
            residual=hp["residual"],
            query_dim=hp["query_dim"],
            bag_classifier_init=hp["bag_classifier_init"],
            contextualize=hp["contextualize"],
            concatenate_parents=hp["concatenate_parents"],
            coarse_instances=hp["coarse_instances"],
            gat_backend=hp["gat_backend"],
            pooling=hp["pooling"],
        )

    @property
    def scales(self) -> tuple[str, ...]:
        """Names, coarse to fine; the last one's prediction is the final one."""
        return tuple(self.hparams["bag_format"]["scales"])

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.hparams["classes"])

    @property
    def num_logits(self) -> int:
        return 1 if len(self.classes) == 2 and self.hparams["one_logit"] else len(self.classes)

    @property
    def logit_classes(self) -> tuple[str, ...]:
        """The class of each logit; a single logit is the positive class's."""
        return self.classes[-self.num_logits :]

    @property
    def tile_px(self) -> int:
        return int(self.hparams["bag_format"]["tile_px"])

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, BagDataModule):
            return
        if self.hparams["bag_format"] is None:
            self.hparams["bag_format"] = data.bag_format
            self.hparams["classes"] = data.classes
            self._build()
        else:
            self._refuse_other_data(self.hparams, data)
        if stage == "fit":
            self.hparams["split"] = self._go_on(data)
            self.hparams["val_part"] = data.val_part
            self._set_class_weights(list(data.class_counts().values()))
            _warn_of_few(data)
            if self.standardize is not None:
                for scale, (mean, std) in data.train_statistics().items():
                    self.standardize.set_statistics(scale, mean, std)

    def _set_class_weights(self, counts: list[int]) -> None:
        weights = self.hparams["class_weights"]
        if weights == "balanced":
            self.hparams["class_weights"] = balanced_weights(counts)
        elif weights is not None and (len(weights) != len(counts) or min(weights) < 0):
            raise InputError(
                f"model.class_weights: {weights} must be {len(counts)} weights of 0 or more, one "
                f"for each of {', '.join(self.classes)}"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        where = "the checkpoint" if self._trainer is None else self.trainer.ckpt_path
        hparams = read_card(checkpoint, where, type(self))
        self.hparams["thresholds"] = hparams.get("thresholds")
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        if not isinstance(data, BagDataModule):
            return
        self._refuse_other_data(hparams, data)
        self._refuse_other_network(hparams)
        refuse_other_keys(self, checkpoint["state_dict"], where)
        if self.trainer.training and not is_same_study(hparams.get("split"), data.study()):
            raise InputError(
                f"{data.folder}: its parts are not those that the checkpoint was trained with; "
                "resume with the same cohort table, fractions and data.split_seed"
            )
        if self.trainer.training:
            settings = training_settings(self.trainer, self, data)
            refuse_other_settings(checkpoint, settings, where)

    def on_train_start(self) -> None:
        refuse_broken_state(self.trainer)

    def _go_on(self, data: BagDataModule) -> Any:
        """The slides that the weights will have met: those of the data, and those met before."""
        before = self.hparams["split"]
        if before is None:
            return data.study()
        if not before:
            warnings.warn(
                "it is not known which slides these weights were trained on before, so the new "
                "checkpoint does not know its test slides either",
                stacklevel=2,
            )
            return before
        met = read_records(before)
        study = Study(met, data.cohort, data.digests, data.other_cohort)
        place_slides(data.cohort, study, data.val_part, data.split, data.split, str(data.folder))
        place_slides(data.cohort, study, "test", data.split, data.split, str(data.folder))
        return plain_records(join_records(read_records(data.study()), met))

    def _refuse_other_network(self, hparams: Mapping[str, Any]) -> None:
        """A config on top of a checkpoint may ask for a network that was never trained."""
        other = [
            f"model.{name} {self.hparams[name]} instead of {hparams[name]}"
            for name in OF_NETWORK
            if name in hparams and self.hparams[name] != hparams[name]
        ]
        if other:
            raise InputError(
                f"{self.trainer.ckpt_path}: its network was trained with other options, here are "
                f"{some_of(other)}; leave them out, also as part of a --config"
            )

    @staticmethod
    def _refuse_other_data(hparams: Any, data: BagDataModule) -> None:
        difference = describe_difference(hparams["bag_format"], data.bag_format)
        if difference:
            raise InputError(f"{data.folder}: the bags hold {difference}, which this model knows")
        if list(hparams["classes"]) != data.classes:
            raise InputError(
                f"data.classes: {', '.join(data.classes)}, but this model was trained with "
                f"{', '.join(hparams['classes'])} in that order"
            )

    def forward(self, graph: BagGraph) -> dict[str, ScaleOutput]:
        """What each scale says of each bag, coarse to fine."""
        if self.standardize is not None:
            graph = self.standardize(graph)
        return self.network(graph)

    def objective(
        self, output: dict[str, ScaleOutput], graph: BagGraph
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 3 a bag (B,), and its terms."""
        weights = self.hparams["class_weights"]
        if weights is not None:
            weights = torch.tensor(weights, device=graph.labels.device)
        return objective(output, graph.parent, graph.ptr, graph.labels, self.options, weights)

    def on_train_batch_start(self, batch: BagGraph, batch_idx: int) -> None:
        """What dropout draws depends on seed, epoch and place alone; see :mod:`dasmil.seeds`."""
        world, rank = self.trainer.world_size, self.trainer.global_rank
        seed_step(self.current_epoch, batch_idx * world + rank)

    def training_step(self, graph: BagGraph, batch_idx: int) -> Tensor:
        total, terms = self.objective(self(graph), graph)
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
        if self.hparams["decay_below"] is not None:
            self._bag_losses.note(graph.labels, [terms[f"bag/{scale}"] for scale in self.scales])
        return loss

    def on_train_batch_end(self, outputs: Any, batch: BagGraph, batch_idx: int) -> None:
        """Weight decay of the next epoch; every checkpoint has it in the optimiser's state."""
        below = self.hparams["decay_below"]
        if below is not None and self.trainer.is_last_batch:
            acts = self._bag_losses.take() < below
            for group in self.trainer.optimizers[0].param_groups:
                group["weight_decay"] = self.hparams["weight_decay"] if acts else 0.0

    def on_train_epoch_end(self) -> None:
        self._finite_loss.check()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._finite_loss.check_weights(checkpoint["state_dict"])
        data = getattr(self.trainer, "datamodule", None)
        checkpoint[KEY] = training_settings(self.trainer, self, data)

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        if not self.trainer.max_epochs or self.trainer.max_epochs < 1:
            raise InputError("trainer.max_epochs: the cosine schedule needs a number of epochs")
        optimizer = torch.optim.Adam(
            self.parameters(),
            lr=hp["learning_rate"],
            betas=tuple(hp["betas"]),
            weight_decay=hp["weight_decay"] if hp["decay_below"] is None else 0.0,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, self.trainer.max_epochs, eta_min=hp["min_learning_rate"]
        )
        return {"optimizer": optimizer, "lr_scheduler": schedule}

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
        found = evaluation_of(self.results, self.classes, None, self.hparams["specificity"])
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        self.failed = not_finite(self.results)
        if fitting and self.failed:
            raise InputError(
                f"fit: the output is not finite for {len(self.failed)} validation slide(s): "
                f"{some_of(self.failed)}; {ADVICE}"
            )
        if fitting and self.hparams["val_part"] != "test" and len(self.classes) == 2:
            self.hparams["thresholds"] = found.operating_points()
        self.evaluation = replace(found, thresholds=self.hparams["thresholds"])
        for scale in self.scales:
            figures = self.evaluation.figures(scale)
            if stage == "test" and not self.failed:
                figures |= self.evaluation.test_chosen_figures(scale)
            self._log_figures({f"{stage}/{scale}/{k}": value for k, value in figures.items()})
        self._log_figures({f"{stage}/{k}": value for k, value in figures.items()})
        self._log_figures({f"{stage}/{k}": v for k, v in mean_losses(self.results).items()})
        if stage == "val" and not fitting:
            self._warn_of_constant_scales("this model")
        present = len(self.evaluation.labels.unique())
        if present < len(self.classes) and stage == "test":
            warnings.warn(
                f"AUROC is not defined: the {stage} slides hold {present} of "
                f"{len(self.classes)} classes",
                stacklevel=2,
            )

    def _warn_of_constant_scales(self, which: str) -> None:
        """Adam turns weight decay into whole steps towards zero if gradients are smaller."""
        dead = constant_scales(self.results)
        if dead:
            warnings.warn(
                f"{', '.join(dead)}: {which} gives bag logits that differ by less than "
                f"{CONSTANT:g} over the {len(self.results)} validation slides: this scale has "
                "learned nothing; set model.standardize to true, or train for longer, and if "
                "model.decay_below is null, lower model.weight_decay",
                stacklevel=2,
            )

    def _log_figures(self, figures: dict[str, float]) -> None:
        """Log values that are the same in every process already.

        Lightning asks for a reduction of them. The maximum of equal values is exact, their mean
        need not be.
        """
        for name, value in figures.items():
            shown = name in ("val/auroc", "val/loss", "test/auroc")
            self.log(name, value, prog_bar=shown, sync_dist=True, reduce_fx="max")

    @property
    def _selection(self) -> tuple[str, Tensor | None]:
        """The figure by which the checkpoint is chosen: TensorBoard's name and the best value."""
        keeper = self.trainer.checkpoint_callback
        monitor = getattr(keeper, "monitor", None) or "val/auroc"
        return f"hp/{monitor.replace('/', '_')}", getattr(keeper, "best_model_score", None)

    def on_fit_start(self) -> None:
        if isinstance(self.logger, TensorBoardLogger):
            name, _ = self._selection
            self.logger.log_hyperparams(self._plain_hparams(), {name: float("nan")})

    def on_train_end(self) -> None:
        """Hyperparameters beside the best validation figure, for TensorBoard's HPARAMS table."""
        self._warn_of_constant_scales("the model of the last epoch")
        name, best = self._selection
        if isinstance(self.logger, TensorBoardLogger) and best is not None:
            self.logger.log_metrics({name: float(best)}, step=self.current_epoch)

    def _plain_hparams(self) -> dict[str, Any]:
        plain = {k: v for k, v in self.hparams.items() if isinstance(v, int | float | bool)}
        return {**plain, "scales": "+".join(self.scales), "classes": "/".join(self.classes)}


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
