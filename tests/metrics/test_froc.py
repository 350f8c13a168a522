"""FROC by arithmetic, and against the challenge's procedure followed step by step."""

from math import isnan

import numpy as np
import pytest
from scipy import ndimage
from skimage import measure

from dasmil.metrics.froc import (
    FALSE_POSITIVES,
    Detections,
    Froc,
    Lesions,
    SlideHits,
    detections,
    evaluation_downsample,
    evaluation_lesions,
    froc,
    slide_hits,
)


def challenge(slides: list[tuple[np.ndarray | None, Detections]]) -> tuple[list, float]:
    """What Evaluation_FROC.py does at level 5, one detection and one threshold at a time.

    Parameters
    ----------
    slides: each the mask of its lesions (None where it has no mask file), and its detections.
    """
    level_pixel = 0.243 * 32
    wrong, found, num_wanted = [], [], 0
    for mask, detected in slides:
        if mask is None:
            wrong.extend(detected.scores.tolist())
            continue
        grey = np.where(mask, 255, 0).astype(np.uint8)
        far = ndimage.distance_transform_edt(255 - grey)
        regions = measure.label(
            ndimage.binary_fill_holes(far < 75 / (level_pixel * 2)), connectivity=2
        )
        isolated = {
            region.label
            for region in measure.regionprops(regions)
            if region.axis_major_length < 275 / level_pixel
        }
        best = dict.fromkeys(range(1, regions.max() + 1), 0.0)
        for score, (x, y) in zip(detected.scores.tolist(), detected.xy_px0.tolist(), strict=True):
            here = int(regions[int(y / 32), int(x / 32)])
            if here == 0:
                wrong.append(score)
            elif here not in isolated and score > best[here]:
                best[here] = score
        found.extend(best.values())
        num_wanted += len(best) - len(isolated)
    points = []
    for threshold in sorted(set(wrong + found))[1:]:
        num_wrong = sum(score >= threshold for score in wrong)
        points.append((num_wrong / len(slides), sum(s >= threshold for s in found) / num_wanted))
    points.append((0.0, 0.0))
    x, y = zip(*points[::-1], strict=True)
    return points, float(np.mean(np.interp([0.25, 0.5, 1, 2, 4, 8], x, y)))


def random_mask(rng: np.random.Generator) -> np.ndarray:
    """Blobs of 1 to 60 pixels, some with a hole, some at the border or nearly touching."""
    mask = np.zeros((200, 300), dtype=bool)
    y, x = np.indices(mask.shape)
    for _ in range(rng.integers(1, 9)):
        centre, radius = rng.uniform(0, [200, 300]), rng.uniform(0.8, 30)
        away = np.hypot((y - centre[0]) * rng.uniform(0.5, 2), x - centre[1])
        mask |= (away < radius) & (away >= radius * rng.choice([0, 0.7]))
    return mask


def random_detections(rng: np.random.Generator, mask: np.ndarray | None) -> Detections:
    """Anywhere, and some more where lesions are; scores with many ties."""
    xy = rng.integers(0, [300, 200], (rng.integers(0, 30), 2))
    if mask is not None and mask.any():
        inside = np.argwhere(mask)[:, ::-1]
        xy = np.concatenate([xy, rng.choice(inside, rng.integers(0, 8))])
    xy = xy * 32 + rng.integers(0, 32, xy.shape)
    return Detections(rng.integers(1, 40, len(xy)) / 64, xy)


@pytest.mark.parametrize("seed", range(12))
def test_the_figures_are_the_challenge_s(seed):
    rng = np.random.default_rng(seed)
    slides = []
    for _ in range(rng.integers(2, 6)):
        mask = random_mask(rng) if rng.random() < 0.7 or not slides else None
        slides.append((mask, random_detections(rng, mask)))
    hits = []
    for mask, detected in slides:
        lesions = None if mask is None else evaluation_lesions(mask, 32)
        hits.append(slide_hits(detected, lesions))
    curve = froc(hits)
    points, score = challenge(slides)
    assert list(zip(curve.false_positives, curve.sensitivity, strict=True)) == points
    assert curve.score == score and 0 < score <= 1


class TestLesions:
    def test_a_lesion_grows_by_less_than_five_pixels(self):
        """4.82 px: four along an axis, and (4, 2) or (3, 3) but not (4, 3) across."""
        mask = np.zeros((40, 60), dtype=bool)
        mask[20, 30] = True
        grown = evaluation_lesions(mask, 32).labels > 0
        assert grown.sum() == 69  # the lattice points of a circle of radius 4.82
        assert grown[20, 26:35].all() and grown[16:25, 30].all()
        assert grown[23, 33] and grown[22, 34] and not grown[23, 34]
        assert not grown[20, 25] and not grown[20, 35]

    def test_lesions_that_touch_by_a_corner_are_one(self):
        """The second grown pixel, 5 down and 9 right of the first, meets it at (2, 4) alone."""
        mask = np.zeros((40, 60), dtype=bool)
        mask[10, 10] = mask[15, 19] = True
        lesions = evaluation_lesions(mask, 32)
        assert lesions.num_labels == 1
        assert lesions.labels[12, 14] == lesions.labels[13, 15] == 1
        assert lesions.labels[12, 15] == lesions.labels[13, 14] == 0

    def test_lesions_that_lie_close_are_one(self):
        """A gap of 8 pixels is closed by 4 from either side, one of 9 is not."""
        mask = np.zeros((100, 300), dtype=bool)
        mask[20:60, 20:60] = mask[20:60, 69:109] = mask[20:60, 117:157] = True  # gaps 9 and 8
        lesions = evaluation_lesions(mask, 32)
        assert lesions.num_labels == 2
        assert lesions.labels[40, 40] != lesions.labels[40, 90] == lesions.labels[40, 130]

    def test_a_hole_belongs_to_the_lesion(self):
        mask = np.zeros((100, 100), dtype=bool)
        mask[10:90, 10:90], mask[30:70, 30:70] = True, False
        labels = evaluation_lesions(mask, 32).labels
        assert labels[50, 50] == 1

    @pytest.mark.parametrize(("length", "isolated"), [(20, True), (30, False)])
    def test_short_lesions_are_isolated_tumour_cells(self, length, isolated):
        """The major axis of a grown square of L + 8 pixels is 2 / √3 of its side: 32.3 or 43.9."""
        mask = np.zeros((100, 100), dtype=bool)
        mask[10 : 10 + length, 10 : 10 + length] = True
        lesions = evaluation_lesions(mask, 32)
        assert lesions.isolated == ({1} if isolated else set())
        assert lesions.num_lesions == int(not isolated)

    def test_an_empty_mask(self):
        lesions = evaluation_lesions(np.zeros((10, 20), dtype=bool), 32)
        assert (lesions.num_labels, lesions.num_lesions) == (0, 0)
        assert lesions.labels.shape == (10, 20)

    @pytest.mark.parametrize(
        ("mpp", "downsample"),
        [(0.226, 32), (0.243, 32), (0.25, 32), (0.172, 32), (0.343, 32), (0.17, 64), (0.5, 16)],
    )
    def test_all_slides_of_camelyon16_are_judged_at_level_5(self, mpp, downsample):
        assert evaluation_downsample(mpp) == downsample

    def test_a_slide_coarser_than_the_evaluation_is_judged_as_it_is(self):
        assert evaluation_downsample(20.0) == 1


def two_lesions_and_isolated_cells() -> Lesions:
    labels = np.zeros((100, 100), dtype=np.int32)
    labels[:20, :20], labels[:20, 50:70], labels[50:55, 50:55] = 1, 2, 3
    return Lesions(labels, frozenset([3]), 32)


class TestHits:
    def test_the_best_detection_inside_a_lesion_counts_and_those_in_isolated_cells_do_not(self):
        xy = np.array([(0, 0), (639, 639), (640, 0), (50 * 32, 0), (51 * 32, 51 * 32), (9999, 0)])
        found = Detections(np.array([0.5, 0.7, 0.9, 0.3, 0.99, 0.1]), xy)
        hits = slide_hits(found, two_lesions_and_isolated_cells())
        assert hits.false_positives.tolist() == [0.9, 0.1]
        assert hits.hits.tolist() == [0.7, 0.3, 0]
        assert hits.num_lesions == 2

    def test_a_normal_slide_has_false_positives_alone(self):
        found = Detections(np.array([0.5]), np.array([[1, 2]]))
        hits = slide_hits(found, None)
        assert (hits.false_positives.tolist(), len(hits.hits), hits.num_lesions) == ([0.5], 0, 0)


def hits(false_positives, lesions, num_lesions=None):
    scores = np.array(lesions, dtype=float)
    num_lesions = len(scores) if num_lesions is None else num_lesions
    return SlideHits(np.array(false_positives, dtype=float), scores, num_lesions)


class TestCurve:
    def test_a_curve_by_hand(self):
        """Two slides, four lesions, one missed: thresholds are 0.9, 0.8, 0.6, 0.5 and 0.3."""
        curve = froc([hits([0.8, 0.5], [0.9, 0.6, 0]), hits([0.3], [0.3])])
        assert curve.false_positives.tolist() == [1.5, 1, 0.5, 0.5, 0, 0]
        assert curve.sensitivity.tolist() == [0.75, 0.5, 0.5, 0.25, 0.25, 0]
        assert curve.at == {0.25: 0.25, 0.5: 0.5, 1: 0.5, 2: 0.75, 4: 0.75, 8: 0.75}
        assert curve.score == pytest.approx((0.25 + 0.5 + 0.5 + 3 * 0.75) / 6)

    def test_if_no_lesion_is_missed_the_lowest_detection_is_lost(self):
        """As in the script: of two lesions that are found, and nothing else, one counts."""
        assert froc([hits([], [0.9, 0.8])]).score == 0.5
        assert froc([hits([], [0.9, 0.8, 0], 2)]).score == 1  # the 0 of isolated cells
        assert froc([hits([0.1], [0.9, 0.8])]).score == 1

    def test_isolated_cells_are_not_to_be_found(self):
        assert froc([hits([0.1], [0.9, 0, 0], 1)]).score == 1

    def test_nothing_detected(self):
        assert froc([hits([], [0, 0])]).score == 0

    def test_not_defined_without_lesions(self):
        assert isnan(froc([hits([0.5, 0.7], [])]).score)
        assert isnan(froc([hits([], [])]).score)

    def test_six_points(self):
        assert tuple(Froc(np.zeros(1), np.zeros(1)).at) == FALSE_POSITIVES


def suppressed_by_search(scores, boxes, radius, min_score):
    """The best that is left, as long as there is one."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    left, kept = np.where(scores > min_score, scores, -1.0), []
    while left.max() >= 0:
        best = int(left.argmax())
        kept.append((float(scores[best]), *centres[best].astype(int).tolist()))
        left[np.hypot(*(centres - centres[best]).T) <= radius] = -1
    return kept


class TestDetections:
    @pytest.mark.parametrize("radius", [0, 63, 64, 150])
    @pytest.mark.parametrize("min_score", [0, 0.5])
    def test_the_best_tile_then_the_best_not_near_it(self, radius, min_score):
        rng = np.random.default_rng(radius)
        corner = rng.permutation(np.stack(np.divmod(np.arange(144), 12), axis=1))[:100] * 64
        boxes, scores = np.concatenate([corner, corner + 64], axis=1), rng.integers(0, 20, 100) / 20
        found = detections(scores, boxes, radius, min_score)
        wanted = suppressed_by_search(scores, boxes, radius, min_score)
        assert [(s, *xy) for s, xy in zip(found.scores, found.xy_px0.tolist())] == [
            (s, x, y) for s, x, y in wanted
        ]
        assert len(wanted) < (scores > min_score).sum() or radius < 64

    def test_of_a_row_of_tiles_every_third_is_left(self):
        """512 px tiles: 768 px away is the next but one, at 1,024."""
        left = np.arange(7) * 512
        boxes = np.stack([left, np.zeros(7), left + 512, np.full(7, 512)], axis=1).astype(int)
        found = detections(np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]), boxes, 768)
        assert found.xy_px0.tolist() == [[256, 256], [1280, 256], [2304, 256], [3328, 256]]
        assert found.scores.tolist() == [0.9, 0.7, 0.5, 0.3]

    def test_a_slide_without_tiles(self):
        found = detections(np.zeros(0), np.zeros((0, 4), dtype=np.int64), 768)
        assert found.scores.shape == (0,) and found.xy_px0.shape == (0, 2)
