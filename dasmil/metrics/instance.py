"""Instance-level metrics of two classes: do the positive tiles score highest?"""

from collections.abc import Sequence
from math import nan

import torch
from torch import Tensor

from dasmil.metrics.slide import as_array, auroc


def instance_auroc(scores: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """AUROC of all tiles of all slides together: a tie counts one half.

    Parameters
    ----------
    scores: per slide (N,) probabilities of the positive class.
    truth: per slide (N,) bool.

    Returns
    -------
    nan if no tile or every tile is positive, or if a score is not finite.
    """
    return _auroc(torch.cat([*scores, torch.zeros(0)]), torch.cat([*truth, torch.zeros(0).bool()]))


def instance_auroc_per_slide(scores: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Mean over the slides of the AUROC of the slide's tiles; parameters as :func:`instance_auroc`.

    It depends only on the order inside a slide. Slides without tiles of both kinds are left out;
    nan if none is left.
    """
    each = [_auroc(s, t) for s, t in zip(scores, truth, strict=True) if len(t.unique()) == 2]
    return sum(each) / len(each) if each else nan


def _auroc(scores: Tensor, truth: Tensor) -> float:
    if not scores.isfinite().all():
        return nan
    return float(auroc(as_array(scores), as_array(truth).astype(bool)))
