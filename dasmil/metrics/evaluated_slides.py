"""The slides of a split with the probabilities of one model, and their metrics."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dasmil.errors import MAX_NAMED, InputError
from dasmil.metrics.intervals import (
    FEW_PATIENTS,
    MIN_PATIENTS,
    metric_intervals,
    threshold_intervals,
)
from dasmil.metrics.slide import (
    Array,
    BoolArray,
    IntArray,
    as_array,
    slide_metrics,
    specificity_threshold,
    threshold_metrics,
    youden_threshold,
)

YOUDEN = "youden"  # the operating point that accuracy is reported at
AT_SPECIFICITY = ("sensitivity", "specificity")  # metrics reported at the other points


@dataclass(frozen=True)
class Evaluation:
    """All slides of a split (val or test), sorted by slide_id.

    Parameters
    ----------
    classes: in the order of the labels; the second of two is the positive one.
    slide_ids: (n,).
    patients: (n,); the slide_id if a slide has no patient.
    labels: (n,) int64.
    probabilities: per scale, coarse to fine, (n, P) float64.
    thresholds: per scale and operating point (``youden``, ``specificity_0.9``) the probability
        above which a slide is called positive, chosen on the validation slides; (n,) if slides of
        several models are pooled. None for more than two classes, or if none were chosen.
    specificity: of the second operating point, and of the sensitivity that is reported.
    folds: (n,) int64 the model that each slide was evaluated with; None for a single model.
    """

    classes: tuple[str, ...]
    slide_ids: tuple[str, ...]
    patients: tuple[str, ...]
    labels: Tensor
    probabilities: Mapping[str, Tensor]
    thresholds: Mapping[str, Mapping[str, float | Tensor]] | None = None
    specificity: float = 0.9
    folds: Tensor | None = None
    _intervals: dict[str, dict[str, tuple[float, float]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def scales(self) -> tuple[str, ...]:
        """Coarse to fine; the last one is the answer."""
        return tuple(self.probabilities)

    def metrics(self, scale: str, names: Collection[str] | None = None) -> dict[str, float]:
        """:func:`dasmil.metrics.slide_metrics`, and the metrics at the validation thresholds.

        Parameters
        ----------
        names: only these metrics; all if None.

        Returns
        -------
        ``accuracy_at_val_threshold``, ``balanced_accuracy_…``, ``f1_…``, ``sensitivity_…`` and
        ``specificity_at_val_threshold`` for Youden's threshold, and for each other operating point
        ``sensitivity_at_val_specificity_0.9`` and ``specificity_at_val_specificity_0.9``. With
        ``folds``, ``auroc_same_fold``.
        """
        return {name: float(value) for name, value in self.inputs(scale).metrics(names).items()}

    def inputs(self, scale: str) -> "Inputs":
        """The arrays that the metrics of a scale are computed from."""
        probabilities = as_array(self.probabilities[scale])
        return Inputs(
            probabilities=probabilities,
            margins={
                point: probabilities[:, 1] - np.asarray(threshold, dtype=np.float64)
                for point, threshold in (self.thresholds or {}).get(scale, {}).items()
            },
            labels=as_array(self.labels),
            folds=None if self.folds is None else as_array(self.folds),
            specificity=self.specificity,
        )

    def test_chosen_metrics(self, scale: str) -> dict[str, float]:
        """Accuracy at the threshold that is best for these very slides (Youden).

        Much of the literature reports it. It is optimistically biased, and its name says so. Empty
        for more than two classes.
        """
        if len(self.classes) != 2:
            return {}
        positive = self.probabilities[scale][:, 1]
        margin = as_array(positive) - youden_threshold(positive, self.labels)
        accuracy = threshold_metrics(margin, as_array(self.labels) == 1)["accuracy"]
        return {"accuracy_at_test_threshold": float(accuracy)}

    def operating_points(self) -> dict[str, dict[str, float]]:
        """Per scale the thresholds chosen on these slides; call it on validation slides only.

        Empty for more than two classes.
        """
        if len(self.classes) != 2:
            return {}
        return {
            scale: {
                YOUDEN: youden_threshold(values[:, 1], self.labels),
                f"specificity_{self.specificity:g}": specificity_threshold(
                    values[:, 1], self.labels, self.specificity
                ),
            }
            for scale, values in self.probabilities.items()
        }

    def by_patient(self, pooling: Literal["mean", "max"] = "mean") -> "Evaluation":
        """One row per patient, sorted; ``slide_ids`` are then the patients.

        Two classes: a patient's probability of the positive class is the mean or the maximum over
        the slides, and a patient with a positive slide is positive. More: the mean or the maximum
        per class, normalised to sum to 1. The thresholds are still those of slides.

        Raises
        ------
        InputError
            if a patient has slides of several of more than two classes.
        """
        slides: dict[str, list[int]] = defaultdict(list)
        for number, patient in enumerate(self.patients):
            slides[patient].append(number)
        patients = tuple(sorted(slides))
        return replace(
            self,
            slide_ids=patients,
            patients=patients,
            labels=torch.tensor([self._label_of(name, slides[name]) for name in patients]),
            probabilities={
                scale: torch.stack([_pool(values[slides[name]], pooling) for name in patients])
                for scale, values in self.probabilities.items()
            },
        )

    def _label_of(self, patient: str, slides: list[int]) -> int:
        labels = sorted(set(self.labels[slides].tolist()))
        if len(labels) > 1 and len(self.classes) > 2:
            names = " and ".join(self.classes[label] for label in labels)
            raise InputError(
                f"patient {patient}: its slides have the labels {names}, so the patient has no "
                "label; give each of these slides its own patient_id, or none"
            )
        return labels[-1]

    @property
    def num_patients(self) -> dict[str, int]:
        """Patients with a slide of each class; one with slides of two classes counts in both."""
        pairs = set(zip(self.labels.tolist(), self.patients))
        counts = Counter(label for label, _ in pairs)
        return {name: counts[number] for number, name in enumerate(self.classes)}

    @property
    def why_no_interval(self) -> str:
        """Which classes have too few patients for any interval or p; "" if none has."""
        few = _few(self.num_patients, MIN_PATIENTS)
        needed = f"and {MIN_PATIENTS} are needed"
        return f"too few patients for any interval or p: {few}, {needed}" if few else ""

    @property
    def warning(self) -> str:
        """Which classes have so few patients that intervals are rough; "" if none has."""
        few = _few(self.num_patients, FEW_PATIENTS)
        return f"few patients: {few}" if few else ""

    def intervals(self, scale: str) -> dict[str, tuple[float, float]]:
        """95 % interval of each of :meth:`metrics`; see :mod:`dasmil.metrics.intervals`.

        The error of the validation thresholds themselves is not included.

        Returns
        -------
        Lower and upper end per metric. Both are nan for ``calibration_error``, for a metric that is
        not defined, and for all metrics if a class has too few patients
        (:attr:`why_no_interval`).
        """
        if scale not in self._intervals:  # takes seconds if there are many classes
            self._intervals[scale] = self._compute_intervals(scale)
        return dict(self._intervals[scale])

    def _compute_intervals(self, scale: str) -> dict[str, tuple[float, float]]:
        inputs = self.inputs(scale)
        intervals = dict.fromkeys(inputs.metrics(), (nan, nan))
        if self.why_no_interval or not np.isfinite(inputs.probabilities).all():
            return intervals
        patients = np.unique(self.patients, return_inverse=True)[1]
        intervals |= metric_intervals(
            inputs.probabilities, inputs.labels, patients, self.specificity, inputs.folds
        )
        for point, margin in inputs.margins.items():
            of_point = threshold_intervals(
                margin, inputs.probabilities[:, 1], inputs.labels == 1, patients
            )
            named = {name + point_suffix(point): ends for name, ends in of_point.items()}
            intervals |= {name: ends for name, ends in named.items() if name in intervals}
        return intervals


@dataclass(frozen=True)
class Inputs:
    """The arrays of one scale; leading axes are variants of the slides.

    Parameters
    ----------
    probabilities: (..., n, P).
    margins: (..., n) per operating point, probability of the positive class less the threshold.
    labels: (n,).
    folds: (n,), or None.
    specificity: as in :class:`Evaluation`.
    """

    probabilities: Array
    margins: Mapping[str, Array]
    labels: IntArray
    folds: IntArray | None
    specificity: float

    def select(self, keep: BoolArray) -> "Inputs":
        """Only the slides of ``keep``, (n,)."""
        return replace(
            self,
            probabilities=self.probabilities[..., keep, :],
            margins={point: margin[..., keep] for point, margin in self.margins.items()},
            labels=self.labels[keep],
            folds=None if self.folds is None else self.folds[keep],
        )

    def metrics(self, names: Collection[str] | None = None) -> dict[str, Array]:
        """:meth:`Evaluation.metrics`, each of shape (...,)."""
        metrics = slide_metrics(
            self.probabilities, self.labels, self.specificity, names, self.folds
        )
        for point, margin in self.margins.items():
            suffix = point_suffix(point)
            wanted = None if point == YOUDEN else set(AT_SPECIFICITY)
            if names is not None:
                asked = {name.removesuffix(suffix) for name in names if name.endswith(suffix)}
                wanted = asked if wanted is None else asked & wanted
            of_point = threshold_metrics(margin, self.labels == 1, wanted)
            metrics |= {name + suffix: value for name, value in of_point.items()}
        return metrics


def pool(evaluations: Sequence[Evaluation], scale: str) -> Evaluation:
    """Pool the test sets of a cross-validation at one scale; each becomes a fold.

    Each slide keeps the threshold of its own model. A slide of two test sets occurs twice.
    """
    points = [(each.thresholds or {}).get(scale, {}) for each in evaluations]
    thresholds = {
        point: torch.tensor([each[point] for each in points], dtype=torch.float64)
        for point in points[0]
        if all(point in each for each in points)
    }
    sizes = torch.tensor([len(each.slide_ids) for each in evaluations])
    return replace(
        evaluations[0],
        slide_ids=tuple(slide for each in evaluations for slide in each.slide_ids),
        patients=tuple(patient for each in evaluations for patient in each.patients),
        labels=torch.cat([each.labels for each in evaluations]),
        probabilities={scale: torch.cat([each.probabilities[scale] for each in evaluations])},
        thresholds={
            scale: {point: of.repeat_interleave(sizes) for point, of in thresholds.items()}
        },
        folds=torch.arange(len(evaluations)).repeat_interleave(sizes)
        if len(evaluations) > 1
        else None,
    )


def point_suffix(point: str) -> str:
    """The end of the names of metrics at an operating point."""
    return "_at_val_threshold" if point == YOUDEN else f"_at_val_{point}"


def _few(num_patients: Mapping[str, int], limit: int) -> str:
    """The classes with fewer patients than the limit, for a sentence; "" if there are none."""
    few = [f"{num} with slides of {name}" for name, num in num_patients.items() if num < limit]
    if len(few) > MAX_NAMED:
        few = [*few[: MAX_NAMED - 1], f"few of {len(few) - MAX_NAMED + 1} more classes"]
    return " and ".join(few)


def _pool(probabilities: Tensor, pooling: Literal["mean", "max"]) -> Tensor:
    """(m, P) of a patient's slides → (P,)."""
    if probabilities.shape[1] == 2:
        positive = probabilities[:, 1]
        pooled = positive.mean() if pooling == "mean" else positive.max()
        return torch.stack([1 - pooled, pooled])
    pooled = probabilities.mean(dim=0) if pooling == "mean" else probabilities.amax(dim=0)
    return pooled / pooled.sum()
