"""Training and evaluation of DAS-MIL."""

import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics.functional.classification import binary_accuracy

from dasmil.bags import BagGraph, describe_difference
from dasmil.data.bags import BagDataModule
from dasmil.distributed import gather_lists
from dasmil.errors import InputError
from dasmil.files import write_csv
from dasmil.losses import ObjectiveOptions, objective
from dasmil.metrics import class_probabilities, slide_metrics, youden_threshold
from dasmil.nn import DASMIL, ScaleOutput, Standardize
from dasmil.reports.curves import roc_figure


@dataclass(frozen=True)
class SlideResult:
    """What evaluation keeps of one slide; tensors on the CPU.

    Parameters
    ----------
    logits: per scale (C,).
    losses: the terms of the objective and their weighted ``total``.
    """

    slide_id: str
    label: int
    logits: dict[str, Tensor]
    losses: dict[str, float]


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
    contextualize:
        false leaves the graph out: the heads see the extractors' features (Table 5).
    concatenate_parents:
        a head sees each tile's vector with its parent's, [10x ‖ 20x] (Table 4).
    coarse_instances:
        the coarse heads see all tiles, or only parents of tiles (D12).
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
        of Adam (D16).
    classes:
        no option: ``fit`` takes it from data.classes, and the checkpoint keeps it.
    bag_format:
        no option: scales, tile size and extractors of the bags, likewise.
    split:
        no option: the part of each slide, likewise.
    val_part:
        no option: data.val_part, likewise.
    thresholds:
        no option: per scale the probability from which on a slide is called positive; ``fit``
        chooses it on the validation slides (D18), unless they are the test slides.
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
        contextualize: bool = True,
        concatenate_parents: bool = False,
        coarse_instances: Literal["all", "parents"] = "all",
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
        classes: list[str] | None = None,
        bag_format: dict[str, Any] | None = None,
        split: dict[str, str] | None = None,
        val_part: str = "val",
        thresholds: dict[str, float] | None = None,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.hparams["betas"] = list(betas)
        self.options = ObjectiveOptions(
            **{field.name: self.hparams[field.name] for field in fields(ObjectiveOptions)}
        )
        self.results: list[SlideResult] = []
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
            contextualize=hp["contextualize"],
            concatenate_parents=hp["concatenate_parents"],
            coarse_instances=hp["coarse_instances"],
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
            self.hparams["split"], self.hparams["val_part"] = data.split, data.val_part
            if self.standardize is not None:
                for scale, (mean, std) in data.train_statistics().items():
                    self.standardize.set_statistics(scale, mean, std)
            log_dir = self.trainer.log_dir
            if log_dir is not None and self.trainer.is_global_zero:
                rows = ({"slide_id": s, "split": part} for s, part in data.split.items())
                write_csv(Path(log_dir) / "split.csv", ("slide_id", "split"), rows)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        if not isinstance(data, BagDataModule):
            return
        hparams = checkpoint["hyper_parameters"]
        self._refuse_other_data(hparams, data)
        if self.trainer.training and hparams["split"] != data.split:
            raise InputError(
                f"{data.folder}: its parts are not those that the checkpoint was trained with; "
                "resume with the same cohort table, fractions and data.split_seed"
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
        return objective(output, graph.parent, graph.ptr, graph.labels, self.options)

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
        self.log("train/loss_step", total.mean(), prog_bar=True, batch_size=graph.num_bags)
        return total.mean()

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        if not self.trainer.max_epochs or self.trainer.max_epochs < 1:
            raise InputError("trainer.max_epochs: the cosine schedule needs a number of epochs")
        optimizer = torch.optim.Adam(
            self.parameters(),
            lr=hp["learning_rate"],
            betas=tuple(hp["betas"]),
            weight_decay=hp["weight_decay"],
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, self.trainer.max_epochs, eta_min=hp["min_learning_rate"]
        )
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    # Evaluation: every process keeps its slides, all are gathered at the end of the epoch, and each
    # slide counts once, however often the sampler had to repeat it.

    def on_validation_epoch_start(self) -> None:
        self.results = []

    def on_test_epoch_start(self) -> None:
        self.results = []

    def validation_step(self, graph: BagGraph, batch_idx: int) -> None:
        self._keep(graph)

    def test_step(self, graph: BagGraph, batch_idx: int) -> None:
        self._keep(graph)

    def on_validation_epoch_end(self) -> None:
        self._log_results("val")

    def on_test_epoch_end(self) -> None:
        self._log_results("test")

    def predict_step(self, graph: BagGraph, batch_idx: int) -> dict[str, ScaleOutput]:
        return self(graph)

    def _keep(self, graph: BagGraph) -> None:
        output = self(graph)
        total, terms = self.objective(output, graph)
        losses = {**terms, "total": total}
        for bag, slide_id in enumerate(graph.slide_ids):
            self.results.append(
                SlideResult(
                    slide_id,
                    int(graph.labels[bag]),
                    {name: out.bag_logits[bag].float().cpu() for name, out in output.items()},
                    {name: float(term[bag]) for name, term in losses.items()},
                )
            )

    def _log_results(self, stage: str) -> None:
        unique = {result.slide_id: result for result in gather_lists(self.results)}
        self.results = [unique[slide_id] for slide_id in sorted(unique)]
        labels = torch.tensor([result.label for result in self.results])
        probabilities = {
            scale: class_probabilities(torch.stack([r.logits[scale] for r in self.results]))
            for scale in self.scales
        }
        for scale in self.scales:
            figures = slide_metrics(probabilities[scale], labels)
            figures |= self._threshold_metrics(stage, scale, probabilities[scale], labels)
            self._log_figures({f"{stage}/{scale}/{k}": value for k, value in figures.items()})
        self._log_figures({f"{stage}/{k}": value for k, value in figures.items()}, prog_bar=True)
        for name in self.results[0].losses:
            mean = sum(result.losses[name] for result in self.results) / len(self.results)
            self._log_figures({f"{stage}/{'loss' if name == 'total' else name}": mean})
        if len(labels.unique()) < len(self.classes) and stage == "test":
            warnings.warn(
                f"AUROC is not defined: the {stage} slides hold "
                f"{len(labels.unique())} of {len(self.classes)} classes",
                stacklevel=2,
            )
        if isinstance(self.logger, TensorBoardLogger) and self.trainer.is_global_zero:
            figure = roc_figure(probabilities, labels, self.classes)
            self.logger.experiment.add_figure(f"{stage}/roc", figure, self.current_epoch)

    def _threshold_metrics(
        self, stage: str, scale: str, probabilities: Tensor, labels: Tensor
    ) -> dict[str, float]:
        """Accuracies of a two-class task at thresholds other than 0.5 (D18).

        At the threshold of the validation slides; and, as much of the literature reports it, at the
        one that suits the test slides best, which is no honest figure and is named for what it is.
        """
        if probabilities.shape[1] != 2:
            return {}
        positive = probabilities[:, 1]
        own = youden_threshold(positive, labels)
        if self.trainer.state.fn == TrainerFn.FITTING and self.hparams["val_part"] != "test":
            self.hparams["thresholds"] = {**(self.hparams["thresholds"] or {}), scale: own}
        figures = {}
        if self.hparams["thresholds"] is not None:
            chosen = self.hparams["thresholds"][scale]
            figures["accuracy_at_val_threshold"] = binary_accuracy(positive, labels, chosen)
        if stage == "test":
            figures["accuracy_at_test_threshold"] = binary_accuracy(positive, labels, own)
        return {name: value.item() for name, value in figures.items()}

    def _log_figures(self, figures: dict[str, float], prog_bar: bool = False) -> None:
        """Values that are the same in every process already."""
        self.log_dict(figures, prog_bar=prog_bar, rank_zero_only=False, sync_dist=False)

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
        name, best = self._selection
        if isinstance(self.logger, TensorBoardLogger) and best is not None:
            self.logger.log_metrics({name: float(best)}, step=self.current_epoch)

    def _plain_hparams(self) -> dict[str, Any]:
        plain = {k: v for k, v in self.hparams.items() if isinstance(v, int | float | bool)}
        return {**plain, "scales": "+".join(self.scales), "classes": "/".join(self.classes)}
