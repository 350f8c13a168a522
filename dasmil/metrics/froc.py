"""The free-response ROC of Camelyon16: share of lesions found per number of false positives.

Ehteshami Bejnordi et al., JAMA 318(22), 2017. The challenge's script, Evaluation_FROC.py, is the
definition: the same detections and the same masks give the same numbers here. The script rounds the
scores of hits to float32; here they are float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_fill_holes, distance_transform_edt
from scipy.spatial import KDTree
from skimage.measure import label, regionprops

from dasmil.metrics.slide import Array, IntArray

EVALUATION_UM = 0.243 * 2**5  # width of a pixel at the script's level 5
GROWTH_PX = 75 / (EVALUATION_UM * 2)  # lesions grow by less: half of 75 µm, five tumour cells
ISOLATED_PX = 275 / EVALUATION_UM  # shorter grown lesions are isolated tumour cells: 200 + 75 µm
FALSE_POSITIVES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # per slide
NMS_RADIUS_UM = 187.0


def evaluation_downsample(mpp: float) -> int:
    """Downsampling factor of the mask on which a slide's detections are judged.

    The script assumes 0.243 µm/px for every slide and judges at level 5, one pixel for 32 x 32.
    Here the factor is the power of two whose pixel is nearest to that of the script, 7.776 µm, on a
    logarithmic scale, and the script's thresholds apply in pixels. Slides of 0.172 to 0.344 µm/px,
    which include all of Camelyon16 (0.226 to 0.243), are judged exactly as the script does.

    Parameters
    ----------
    mpp: µm per pixel of the slide's level 0.
    """
    return int(2 ** max(0, round(log2(EVALUATION_UM / mpp))))


@dataclass(frozen=True)
class Lesions:
    """The lesions of a slide, on the mask on which detections are judged.

    Parameters
    ----------
    labels: (H, W) int32; 0 outside lesions.
    isolated: labels of isolated tumour cells: finding them is neither a hit nor a false positive.
    downsample: level-0 pixels per pixel of the labels.
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

    Lesions grow by less than 75 / (2 · 7.776) = 4.82 pixels, holes are filled, and regions that
    then touch, even at a corner, are one lesion. Lesions whose major axis (of the ellipse with the
    same second moments) is below 275 / 7.776 = 35.4 pixels are isolated tumour cells. Only the part
    of the mask around its lesions is computed; the rest has no effect.

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
    regions = regionprops(labels[part])
    isolated = frozenset(r.label for r in regions if r.axis_major_length < ISOLATED_PX)
    return Lesions(labels, isolated, downsample)


@dataclass(frozen=True)
class Detections:
    """Points of a slide that are called positive.

    Parameters
    ----------
    scores: (M,) probabilities, above 0.
    xy_px0: (M, 2) level-0 pixels.
    """

    scores: Array
    xy_px0: npt.NDArray[np.int64]


def detections(
    scores: Array, boxes_px0: IntArray, radius_px0: float, min_score: float = 0.0
) -> Detections:
    """Non-maximum suppression: the best tile's centre, then the best one not near it, and so on.

    The challenge does not prescribe how detections are found. Liu et al. (arXiv:1703.02442) and Li
    and Ping (MIDL 2018) do it in this way, with a radius of 768 level-0 pixels of Camelyon16, 187
    µm (``NMS_RADIUS_UM``). They stop at a probability of 0.5. Here there is no limit by default: it
    could only cut the curve short, and tile scores of multiple-instance learning are not
    calibrated.

    Parameters
    ----------
    scores: (N,) probabilities.
    boxes_px0: (N, 4) left, top, right, bottom.
    radius_px0: tiles whose centre is at most this far from a detection are suppressed.
    min_score: tiles that do not exceed it are suppressed.

    Returns
    -------
    Detections, the highest score first; the first tile of equal scores.
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
    """The hits and false positives of a slide's detections.

    Parameters
    ----------
    false_positives: (F,) scores of detections outside every lesion.
    hits: (L,) highest score inside each label; 0 if missed, and for isolated tumour cells.
    num_lesions: number of labels without isolated tumour cells.
    """

    false_positives: Array
    hits: Array
    num_lesions: int


def slide_hits(detected: Detections, lesions: Lesions | None) -> SlideHits:
    """The script's compute_FP_TP_Probs; a slide without lesions has only false positives.

    Parameters
    ----------
    detected: the slide's detections.
    lesions: None for a normal slide.
    """
    if lesions is None:
        return SlideHits(detected.scores, np.zeros(0), 0)
    limits = np.array(lesions.labels.shape[::-1]) - 1
    columns, rows = np.minimum(detected.xy_px0 // lesions.downsample, limits).T
    labels = lesions.labels[rows, columns]
    hits = np.zeros(lesions.num_labels + 1)
    np.maximum.at(hits, labels, detected.scores)
    hits[[0, *lesions.isolated]] = 0
    return SlideHits(detected.scores[labels == 0], hits[1:], lesions.num_lesions)


@dataclass(frozen=True)
class Froc:
    """A FROC curve.

    Parameters
    ----------
    false_positives: (T,) mean number per slide, descending to 0.
    sensitivity: (T,) share of all lesions that are found.
    """

    false_positives: Array
    sensitivity: Array

    @property
    def at(self) -> dict[float, float]:
        """Sensitivity at ¼, ½, 1, 2, 4 and 8 false positives per slide, interpolated linearly.

        Beyond the end of the curve it is the last sensitivity.
        """
        ascending = self.false_positives[::-1], self.sensitivity[::-1]
        return dict(
            zip(FALSE_POSITIVES, np.interp(FALSE_POSITIVES, *ascending).tolist(), strict=True)
        )

    @property
    def score(self) -> float:
        """The challenge's score: the mean of :attr:`at`."""
        return float(np.mean(list(self.at.values())))


def froc(slides: Sequence[SlideHits]) -> Froc:
    """The script's computeFROC, over all slides, normal ones included.

    The thresholds are all scores except the lowest, and one above all scores. Missed lesions and
    isolated tumour cells have the score 0, which is then the lowest; without any of them the
    lowest detection is lost. The sensitivity is nan if no slide has a lesion.
    """
    false_positives = np.sort(np.concatenate([s.false_positives for s in slides]))
    hits = np.sort(np.concatenate([s.hits for s in slides]))
    thresholds = np.unique(np.concatenate([false_positives, hits]))[1:]

    def reaching(scores: Array) -> Array:
        return np.append(len(scores) - np.searchsorted(scores, thresholds), 0.0)

    num_lesions = sum(s.num_lesions for s in slides)
    sensitivity = reaching(hits) / (num_lesions or np.nan)
    return Froc(reaching(false_positives) / len(slides), sensitivity)
