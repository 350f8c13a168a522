"""A part of the cohort as one model sees it, and the figures of it."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dasmil.errors import InputError
from dasmil.metrics.bootstrap import interval, resamples
from dasmil.metrics.slide import (
    slide_metrics,
    specificity_threshold,
    threshold_metrics,
    youden_threshold,
)

YOUDEN = "youden"  # the operating point that accuracy is reported at
AT_SPECIFICITY = ("sensitivity", "specificity")  # what is reported at the other ones


@dataclass(frozen=True)
class Evaluation:
    """All slides of a part (val or test), sorted by slide_id.

    Parameters
    ----------
    classes: in the order of the labels; of two, the second is the positive one.
    slide_ids: (n,).
    patients: (n,); a slide without a patient is its own.
    labels: (n,) int64.
    probabilities: per scale, coarse to fine, (n, P) float64.
    thresholds: per scale and operating point (``youden``, ``specificity_0.9``) the probability
        above which a slide is called positive, chosen on the validation slides; None for more than
        two classes, or where nobody chose any.
    specificity: wanted of the second operating point, and of the sensitivity that is reported.
    """

    classes: tuple[str, ...]
    slide_ids: tuple[str, ...]
    patients: tuple[str, ...]
    labels: Tensor
    probabilities: Mapping[str, Tensor]
    thresholds: Mapping[str, Mapping[str, float]] | None = None
    specificity: float = 0.9

    @property
    def scales(self) -> tuple[str, ...]:
        """Coarse to fine; the finest one's prediction is the final one."""
        return tuple(self.probabilities)

    def figures(
        self, scale: str, names: Collection[str] | None = None, index: Tensor | None = None
    ) -> dict[str, float]:
        """:func:`slide_metrics`, and the figures at the thresholds of the validation slides.

        Parameters
        ----------
        names: only these figures; all where None.
        index: (m,) of the slides that count, with repetition; all where None.

        Returns
        -------
        ``accuracy_at_val_threshold``, ``balanced_accuracy_…``, ``f1_…``, ``sensitivity_…`` and
        ``specificity_at_val_threshold`` for Youden's threshold, and for each other operating point
        ``sensitivity_at_val_specificity_0.9`` and ``specificity_at_val_specificity_0.9``.
        """
        probabilities, labels = self.probabilities[scale], self.labels
        if index is not None:
            probabilities, labels = probabilities[index], labels[index]
        figures = slide_metrics(probabilities, labels, self.specificity, names)
        for point, threshold in (self.thresholds or {}).get(scale, {}).items():
            suffix = "_at_val_threshold" if point == YOUDEN else f"_at_val_{point}"
            wanted = None if point == YOUDEN else set(AT_SPECIFICITY)
            if names is not None:
                asked = {name.removesuffix(suffix) for name in names if name.endswith(suffix)}
                wanted = asked if wanted is None else asked & wanted
            found = threshold_metrics(probabilities[:, 1], labels, threshold, wanted)
            figures |= {name + suffix: value for name, value in found.items()}
        return figures

    def test_chosen_figures(self, scale: str) -> dict[str, float]:
        """Accuracy at the threshold that suits these very slides best (Youden).

        What much of the literature reports; no honest figure, and named as such. Nothing for more
        than two classes.
        """
        if len(self.classes) != 2:
            return {}
        positive = self.probabilities[scale][:, 1]
        threshold = youden_threshold(positive, self.labels)
        accuracy = threshold_metrics(positive, self.labels, threshold)["accuracy"]
        return {"accuracy_at_test_threshold": accuracy}

    def operating_points(self) -> dict[str, dict[str, float]]:
        """Per scale the thresholds that these slides choose: for the validation slides only.

        Nothing for more than two classes.
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

    def select(self, index: Tensor) -> "Evaluation":
        """Of the slides (m,) alone, in this order and with repetition."""
        chosen = index.tolist()
        return replace(
            self,
            slide_ids=tuple(self.slide_ids[number] for number in chosen),
            patients=tuple(self.patients[number] for number in chosen),
            labels=self.labels[index],
            probabilities={scale: values[index] for scale, values in self.probabilities.items()},
        )

    def by_patient(self, pooling: Literal["mean", "max"] = "mean") -> "Evaluation":
        """One row a patient, sorted; ``slide_ids`` are the patients then.

        A patient's probability is the mean or the maximum over the slides of that of the positive
        class; for more than two classes of each class, made to sum to 1. Of two classes, a patient
        is positive when one of the slides is. The thresholds stay those of slides.

        Raises
        ------
        InputError
            when a patient has slides of several of more than two classes.
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
                f"patient {patient}: has slides of {names}, so there is no label of the patient; "
                "give each slide of such a patient a patient_id of its own, or none"
            )
        return labels[-1]

    def intervals(
        self, scale: str, num: int = 1000, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """95 % percentile interval of each of :meth:`figures`, over draws of patients.

        Stratified by the labels of the patient's slides. The thresholds of the validation slides
        are given, not drawn.
        """
        draws = [
            self.figures(scale, index=index)
            for index in resamples(self.patients, self.labels.tolist(), num, seed)
        ]
        return {name: interval([draw[name] for draw in draws]) for name in draws[0]}


def _pool(probabilities: Tensor, pooling: Literal["mean", "max"]) -> Tensor:
    """(m, P) of a patient's slides → (P,)."""
    if probabilities.shape[1] == 2:
        positive = probabilities[:, 1]
        pooled = positive.mean() if pooling == "mean" else positive.max()
        return torch.stack([1 - pooled, pooled])
    pooled = probabilities.mean(dim=0) if pooling == "mean" else probabilities.amax(dim=0)
    return pooled / pooled.sum()
