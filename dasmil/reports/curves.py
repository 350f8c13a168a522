"""Curves over slides."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_roc


def roc_figure(
    probabilities: Mapping[str, Tensor], labels: Tensor, classes: Sequence[str]
) -> Figure:
    """ROC of every scale; for more than two classes one curve a class, each against the rest.

    Parameters
    ----------
    probabilities: per scale (n, P).
    labels: (n,) int64.
    """
    shown = range(1, 2) if len(classes) == 2 else range(len(classes))
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.7", linestyle=":")
    for scale, values in probabilities.items():
        for number in shown:
            target = (labels == number).long()
            if len(target.unique()) < 2:
                continue  # no curve is defined; slide_metrics says so with a nan
            false_positive, true_positive, _ = binary_roc(values[:, number], target)
            area = binary_auroc(values[:, number], target)
            label = f"{scale} {classes[number]}: AUROC {area:.3f}"
            axes.plot(false_positive, true_positive, label=label, drawstyle="steps-post")
    axes.set(xlabel="1 − specificity", ylabel="sensitivity", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.set_title(f"ROC, {len(labels)} slides")
    if len(axes.lines) > 1:
        axes.legend(loc="lower right")
    return figure
