import numpy as np

from dasmil.interop.features.digest import features_digest


def test_the_digest_is_of_coordinates_and_features_and_not_of_their_type() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((300, 4)).astype(np.float16)
    place = rng.integers(0, 9_999, (300, 2))
    digest = features_digest(features, place)
    big = features.astype(">f4"), place.astype(np.int32)
    assert features_digest(*big) == digest
    other_place, other_features = place.copy(), features.copy()
    other_place[7, 1] += 1
    other_features[0, 0] += 1
    assert features_digest(features, other_place) != digest
    assert features_digest(other_features, place) != digest


def test_slides_without_tiles_are_not_the_same_slide() -> None:
    assert features_digest(np.zeros((0, 4)), np.zeros((0, 2))) == ""
