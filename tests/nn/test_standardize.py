from dataclasses import replace

import numpy as np
import pytest
import torch
from bag_factory import make_graphs, write_bags

from dasmil.bags import bag_path, read_bag, write_bag
from dasmil.data import BagDataModule
from dasmil.nn import Standardize


def test_it_changes_nothing_before_it_knows_the_statistics():
    graph = make_graphs([9], scales=("x2.5", "x5"))[0]
    after = Standardize({"x2.5": 6, "x5": 6})(graph)
    assert all(torch.equal(after.features[s], graph.features[s]) for s in graph.scales)


def test_features_are_centred_and_scaled_and_a_constant_one_only_centred():
    graph = make_graphs([9])[0]
    module = Standardize({"x10": 6, "x20": 6})
    mean, std = torch.arange(6.0), torch.tensor([1.0, 2.0, 4.0, 0.0, 1.0, 1.0])
    module.set_statistics("x20", mean, std)
    after = module(graph).features
    expected = (graph.features["x20"] - mean) / torch.tensor([1.0, 2.0, 4.0, 1.0, 1.0, 1.0])
    assert torch.equal(after["x20"], expected)
    assert torch.equal(after["x10"], graph.features["x10"])


def test_the_statistics_are_those_of_the_training_tiles_alone(tmp_path):
    labels = {f"s{i}": ("normal", "tumour")[i % 2] for i in range(8)}
    split = {s: ("train", "train", "val", "test")[i // 2] for i, s in enumerate(labels)}
    write_bags(tmp_path, labels, split)
    data = BagDataModule(tmp_path, ["normal", "tumour"])
    data.setup("fit")
    bags = [read_bag(bag_path(tmp_path, s)) for s, part in split.items() if part == "train"]
    for scale, (mean, std) in data.train_statistics().items():
        tiles = np.concatenate([bag.features[scale].double().numpy() for bag in bags])
        np.testing.assert_allclose(mean, tiles.mean(0), atol=1e-6)
        np.testing.assert_allclose(std, tiles.std(0), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_feature_that_varies_by_rounding_alone_is_only_centred(tmp_path, dtype):
    """Columns: constants, constants that alternate with their neighbour, and one that varies."""
    labels = {f"s{i}": ("normal", "tumour")[i % 2] for i in range(8)}
    split = {s: ("train", "train", "val", "test")[i // 2] for i, s in enumerate(labels)}
    write_bags(tmp_path, labels, split, dims=64)
    constants = torch.linspace(-3e3, 3e3, 62).to(dtype)
    above = torch.from_numpy(
        np.nextafter(constants.numpy(), np.array(np.inf, constants.numpy().dtype))
    )
    for slide_id in labels:
        path = bag_path(tmp_path, slide_id)
        bag = read_bag(path)
        features = {}
        for scale, x in bag.features.items():
            x = x.to(dtype).clone()
            x[:, :62] = constants
            x[::2, 31:62] = above[31:]
            x[:, 62] = 0
            features[scale] = x
        write_bag(path, replace(bag, features=features))
    data = BagDataModule(tmp_path, ["normal", "tumour"])
    data.setup("fit")
    for mean, std in data.train_statistics().values():
        assert not std[:63].any()
        assert std[63] > 0.1
        assert torch.equal(mean[:31], constants.float()[:31])
