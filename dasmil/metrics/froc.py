"""The free-response ROC of Camelyon16: lesions found at so many false positives a slide.

Ehteshami Bejnordi et al., JAMA 318(22), 2017. The challenge's script, Evaluation_FROC.py, is the
definition: the same detections and the same masks give the same figures here. Where the script
rounds the scores of hits to float32, scores stay in float64 here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_fill_holes, distance_transform_edt
from scipy.spatial import KDTree
from skimage.measure import label, regionprops

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.integer]

EVALUATION_UM = 0.243 * 2**5  # width of a pixel at the script's level 5
GROWTH_PX = 75 / (EVALUATION_UM * 2)  # lesions grow by less than this: 75 µm, five tumour cells
ISOLATED_PX = 275 / EVALUATION_UM  # a shorter grown lesion is isolated tumour cells: 200 + 75 µm
FALSE_POSITIVES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # a slide
NMS_RADIUS_UM = 187.0


def evaluation_downsample(mpp: float) -> int:
    """Of the mask on which a slide's detections are judged.

    The script takes every slide for 0.243 µm/px and judges at level 5, one pixel for 32 x 32. Here
    it is the power of two whose pixel is nearest to its 7.776 µm on a logarithmic scale, and the
    script's thresholds are taken in pixels: slides of 0.172 to 0.344 µm/px, with all of Camelyon16
    (0.226 to 0.243) among them, are judged exactly as the script does.

    Parameters
    ----------
    mpp: of the slide's level 0.
    """
    return int(2 ** max(0, round(log2(EVALUATION_UM / mpp))))


@dataclass(frozen=True)
class Lesions:
    """The lesions of a slide, as detections are judged by them.

    Parameters
    ----------
    labels: (H, W) int32; 0 where there is none.
    isolated: labels of isolated tumour cells, which are neither to be found nor a mistake.
    downsample: level-0 pixels a pixel of the labels.
    """

    labels: npt.NDArray[np.int32]
    isolated: frozenset[int]
    downsample: int

    @property
    def num_labels(self) -> int:
        return int(self.labels.max(initial=0))

    @property
    def num_lesions(self) -> int:
        """Without isolated tumour cells."""
        return self.num_labels - len(self.isolated)


def evaluation_lesions(mask: npt.NDArray[np.bool_], downsample: int) -> Lesions:
    """The script's computeEvaluationMask and computeITCList.

    Lesions grow by less than 75 / (2 · 7.776) = 4.82 pixels, holes are filled, and what then
    touches, also by a corner, is one lesion. Those whose major axis (of the ellipse with the same
    second moments) is below 275 / 7.776 = 35.4 pixels are isolated tumour cells. Only the part of
    the mask around its lesions is computed; nothing elsewhere can matter.

    Parameters
    ----------
    mask: (H, W) bool, True inside a lesion.
    downsample: of the mask; see :func:`evaluation_downsample`.
    """
    labels = np.zeros(mask.shape, dtype=np.int32)
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if len(rows) == 0:
        return Lesions(labels, frozenset(), downsample)
    margin = int(GROWTH_PX) + 2
    part = tuple(
        slice(max(0, int(a[0]) - margin), int(a[-1]) + 1 + margin) for a in (rows, columns)
    )
    grown = distance_transform_edt(~mask[part]) < GROWTH_PX
    labels[part] = label(binary_fill_holes(grown), connectivity=2)
    isolated = [
        region.label
        for region in regionprops(labels[part])
        if region.axis_major_length < ISOLATED_PX
    ]
    return Lesions(labels, frozenset(isolated), downsample)


@dataclass(frozen=True)
class Detections:
    """Places of a slide that are called positive.

    Parameters
    ----------
    scores: (M,) probabilities, above 0.
    xy_px0: (M, 2) level-0 pixels.
    """

    scores: FloatArray
    xy_px0: npt.NDArray[np.int64]


def detections(
    scores: FloatArray, boxes_px0: IntArray, radius_px0: float, min_score: float = 0.0
) -> Detections:
    """Non-maximum suppression: the best tile's centre, then the best not near it, and so on.

    The challenge leaves to its participants how they find detections. This is the way of Liu et
    al. (arXiv:1703.02442) and of Li and Ping (MIDL 2018), whose radius is 768 level-0 pixels of
    Camelyon16, 187 µm (``NMS_RADIUS_UM``). They stop at a probability of 0.5, here there is no end
    by default: it could only cut the curve short, and tile scores of multiple-instance learning are
    not calibrated.

    Parameters
    ----------
    scores: (N,) probabilities.
    boxes_px0: (N, 4) left, top, right, bottom.
    radius_px0: tiles whose centre is at most this far from a detection are no detections.
    min_score: nor are tiles that do not exceed it.

    Returns
    -------
    The highest score first; of equal scores the first tile.
    """
    centres = (boxes_px0[:, :2] + boxes_px0[:, 2:]) / 2
    is_free = scores > min_score
    kept = []
    if len(scores):
        tree = KDTree(centres)
        for tile in np.argsort(-scores, kind="stable"):
            if is_free[tile]:
                kept.append(tile)
                is_free[tree.query_ball_point(centres[tile], radius_px0)] = False
    rows = np.array(kept, dtype=np.int64)
    return Detections(scores[rows], centres[rows].astype(np.int64))


@dataclass(frozen=True)
class SlideHits:
    """What a slide's detections have found.

    Parameters
    ----------
    false_positives: (F,) scores of detections outside every lesion.
    hits: (L,) highest score inside each label; 0 where missed, and for isolated tumour cells.
    num_lesions: of the labels, those that are to be found.
    """

    false_positives: FloatArray
    hits: FloatArray
    num_lesions: int


def slide_hits(found: Detections, lesions: Lesions | None) -> SlideHits:
    """The script's compute_FP_TP_Probs; a slide without lesions has false positives alone.

    Parameters
    ----------
    found: the slide's detections.
    lesions: None for a normal slide.
    """
    if lesions is None:
        return SlideHits(found.scores, np.zeros(0), 0)
    limits = np.array(lesions.labels.shape[::-1]) - 1
    columns, rows = np.minimum(found.xy_px0 // lesions.downsample, limits).T
    labels = lesions.labels[rows, columns]
    hits = np.zeros(lesions.num_labels + 1)
    np.maximum.at(hits, labels, found.scores)
    hits[[0, *lesions.isolated]] = 0
    return SlideHits(found.scores[labels == 0], hits[1:], lesions.num_lesions)


@dataclass(frozen=True)
class Froc:
    """A curve, and its figure.

    Parameters
    ----------
    false_positives: (T,) mean number a slide, descending to 0.
    sensitivity: (T,) share of all lesions that are found.
    """

    false_positives: FloatArray
    sensitivity: FloatArray

    @property
    def at(self) -> dict[float, float]:
        """Sensitivity at ¼, ½, 1, 2, 4 and 8 false positives a slide, interpolated linearly.

        Beyond the end of the curve its last sensitivity counts.
        """
        ascending = self.false_positives[::-1], self.sensitivity[::-1]
        return dict(
            zip(FALSE_POSITIVES, np.interp(FALSE_POSITIVES, *ascending).tolist(), strict=True)
        )

    @property
    def score(self) -> float:
        """The challenge's figure: the mean of these six."""
        return float(np.mean(list(self.at.values())))


def froc(slides: Sequence[SlideHits]) -> Froc:
    """The script's computeFROC, over all slides, normal ones too.

    Every score is a threshold but the lowest, and last comes one above all. A lesion that is missed
    or not to be found scores 0, so the lowest is that 0; only where there is no such lesion the
    lowest detection is lost. Nan where no slide has a lesion.
    """
    false_positives = np.sort(np.concatenate([s.false_positives for s in slides]))
    hits = np.sort(np.concatenate([s.hits for s in slides]))
    thresholds = np.unique(np.concatenate([false_positives, hits]))[1:]

    def reaching(scores: FloatArray) -> FloatArray:
        return np.append(len(scores) - np.searchsorted(scores, thresholds), 0.0)

    num_lesions = sum(s.num_lesions for s in slides)
    sensitivity = reaching(hits) / (num_lesions or np.nan)
    return Froc(reaching(false_positives) / len(slides), sensitivity)
