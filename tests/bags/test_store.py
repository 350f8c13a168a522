"""Bag files: what is written comes back, and everything else is refused in one sentence."""

import json
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bag_factory import make_bag
from bags.orphans import without_first
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dasmil.bags import Bag, Neighbours, bag_graph, bag_path, read_bag, read_header, write_bag
from dasmil.bags.store import graph_bytes
from dasmil.errors import InputError
from dasmil.json_text import pack_metadata, unpack_metadata


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = bag_path(tmp_path, "slide")
    write_bag(path, make_bag(scales=("x5", "x20"), dims={"x5": 3, "x20": 4}, num_tiles=25))
    return path


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return unpack_metadata(file.metadata())


def refusal(path: Path) -> str:
    """The sentence that refuses the bag, and its header alone just so."""
    with pytest.raises(InputError) as of_bag:
        read_bag(path)
    with pytest.raises(InputError) as of_header:
        read_header(path)
    assert str(of_bag.value) == str(of_header.value)
    assert str(path) in str(of_bag.value)
    return str(of_bag.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("num_tiles", [0, 1, 30])
@pytest.mark.parametrize("scales", [("x20",), ("x2.5", "x5", "x20")])
def test_a_bag_comes_back_with_its_features_in_their_precision(
    tmp_path: Path, scales: tuple[str, ...], num_tiles: int, dtype: torch.dtype
) -> None:
    made = make_bag("a", scales, dims={s: 3 + n for n, s in enumerate(scales)}, num_tiles=num_tiles)
    generator = torch.Generator().manual_seed(1)
    exact = {
        n: torch.randn(t.shape, generator=generator).to(dtype) for n, t in made.features.items()
    }
    path = bag_path(tmp_path, "a")
    write_bag(path, replace(made, features=exact))

    found = read_bag(path)
    assert found.header == made.header == read_header(path)
    assert found.scales == scales
    for name in scales:
        assert found.features[name].dtype == dtype
        np.testing.assert_array_equal(found.features[name].numpy(), exact[name].numpy())
        assert found.grid[name].dtype == torch.int32
        assert torch.equal(found.grid[name], made.grid[name])
    assert set(found.parent) == set(scales[1:])
    for name in scales[1:]:
        assert found.parent[name].dtype == torch.int32
        assert torch.equal(found.parent[name], made.parent[name])


def test_orphans_come_back_as_orphans(tmp_path: Path) -> None:
    bag = without_first(make_bag("a", ("x5", "x10", "x20"), num_tiles=30), "x10", 2)
    write_bag(bag_path(tmp_path, "a"), bag)
    found = read_bag(bag_path(tmp_path, "a"))
    assert (found.parent["x20"] == -1).any()
    assert all(torch.equal(found.parent[s], bag.parent[s]) for s in ("x10", "x20"))


def test_the_header_has_the_promised_fields(written: Path) -> None:
    tensors = load_file(written)
    names = {f"{kind}/{scale}" for kind in ("features", "grid") for scale in ("x5", "x20")}
    assert set(tensors) == {*names, "parent/x20"}
    metadata = metadata_of(written)
    assert metadata["format"] == "dasmil-bag-2"
    assert metadata["slide_id"] == "slide"
    assert json.loads(metadata["scales"]) == {"x5": 2.0, "x20": 0.5}
    assert json.loads(metadata["size_px0"]) == [20_000, 10_000]
    assert json.loads(metadata["extractors"])["x20"]["fingerprint"] == "f" * 64


def test_writing_again_replaces_the_bag_and_leaves_no_other_file(written: Path) -> None:
    write_bag(written, make_bag(num_tiles=3))
    assert read_bag(written).num_tiles()["x20"] == 3
    assert list(written.parent.iterdir()) == [written]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.safetensors").endswith("no such bag file")


@pytest.mark.parametrize("kept", [0, 5, 300, -1], ids=["nothing", "size", "header", "but one byte"])
def test_a_truncated_file_is_refused(written: Path, kept: int) -> None:
    written.write_bytes(written.read_bytes()[:kept])
    sentence = refusal(written)
    assert "cannot be read as a bag" in sentence
    assert "delete it and embed again" in sentence


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.safetensors"
    path.write_text("these are not tensors at all, but quite a long text")
    assert "cannot be read as a bag" in refusal(path)


@pytest.mark.parametrize("metadata", [None, {"title": "weights"}])
def test_foreign_safetensors_are_refused(tmp_path: Path, metadata: dict | None) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(2, 2)}, path, metadata)
    assert "its format is None, this version reads 'dasmil-bag-2'" in refusal(path)


def test_another_format_version_is_refused(written: Path) -> None:
    save_file(
        load_file(written),
        written,
        pack_metadata({**metadata_of(written), "format": "dasmil-bag-1"}),
    )
    sentence = refusal(written)
    assert "'dasmil-bag-1'" in sentence
    assert "embed the slide again" in sentence


def test_a_file_that_breaks_a_promise_is_refused(written: Path) -> None:
    tensors = load_file(written)
    save_file(
        {**tensors, "grid/x20": tensors["grid/x20"] + 4},
        written,
        pack_metadata(metadata_of(written)),
    )
    with pytest.raises(InputError, match="bag slide: x20: a tile is not inside its parent"):
        read_bag(written)


def test_a_file_without_one_of_its_scales_is_refused(written: Path) -> None:
    tensors = load_file(written)
    del tensors["features/x5"]
    save_file(tensors, written, pack_metadata(metadata_of(written)))
    with pytest.raises(InputError, match="bag slide: features of one of the scales x5, x20"):
        read_bag(written)


def with_feature(bag: Bag, value: float, dtype: torch.dtype) -> Bag:
    features = {name: tensor.float() for name, tensor in bag.features.items()}
    features["x20"][0, 0] = value
    return replace(bag, features={name: t.to(dtype) for name, t in features.items()})


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(float("nan"), torch.float32), (70_000.0, torch.float16), (float("inf"), torch.float32)],
    ids=["nan", "too large for float16", "infinite"],
)
def test_unreadable_values_are_not_written(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    with pytest.raises(InputError, match="x20: some features are not finite"):
        write_bag(bag_path(tmp_path, "slide"), with_feature(make_bag(), value, dtype))
    assert list(tmp_path.iterdir()) == []


def test_single_precision_holds_what_half_precision_cannot(tmp_path: Path) -> None:
    write_bag(bag_path(tmp_path, "slide"), with_feature(make_bag(), 70_000.0, torch.float32))
    assert read_bag(bag_path(tmp_path, "slide")).features["x20"][0, 0] == 70_000.0


def test_metadata_that_are_no_json_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "slide.safetensors"
    save_file({"features/x10": torch.zeros(1, 2)}, path, {"dasmil": "[1,2"})
    for read in (read_bag, read_header):
        with pytest.raises(InputError, match="cannot be read as a bag"):
            read(path)


# Tensors that lie in the file

PYRAMID = ("x5", "x10", "x20")


def resident_kb(path: Path) -> int:
    """How much of a mapped file this process has looked at."""
    maps = Path("/proc/self/smaps")
    if not maps.exists():
        pytest.skip("only Linux says which pages of a file were looked at")
    parts = maps.read_text().split("VmFlags:")
    mine = [part.splitlines() for part in parts if str(path) in part]
    assert mine, "the file is not mapped"
    return sum(int(x.split()[1]) for lines in mine for x in lines if x.startswith("Rss:"))


def write_wide(path: Path) -> Bag:
    """4 MB of features at each of three scales."""
    dims = {"x5": 60_000, "x10": 30_000, "x20": 20_000}
    bag = make_bag("slide", PYRAMID, dims, num_tiles=100, side=20)
    write_bag(path, bag)
    return bag


@pytest.mark.parametrize("scales", [["x10", "x20"], ["x5"], ["x5", "x20"]])
def test_features_of_other_scales_are_not_read(tmp_path: Path, scales: list[str]) -> None:
    path = bag_path(tmp_path, "slide")
    written = write_wide(path)
    bag = read_bag(path, scales)
    size = {name: written.features[name].nbytes / 1024 for name in PYRAMID}
    assert min(size.values()) > 2_000
    assert resident_kb(path) < sum(size[name] for name in scales) + 1_000
    expected = read_bag(path).select(scales)
    assert bag.header == expected.header
    for name in scales:
        assert torch.equal(bag.features[name], expected.features[name])
        assert torch.equal(bag.grid[name], expected.grid[name])
    assert all(torch.equal(bag.parent[name], expected.parent[name]) for name in bag.parent)
    assert resident_kb(path) > sum(size.values())  # the other scales were read just now


def test_values_that_are_not_finite_are_refused_at_the_scales_that_are_read(tmp_path: Path) -> None:
    """A foreign file: ours are looked at when they are written."""
    path = bag_path(tmp_path, "slide")
    write_bag(path, make_bag("slide", PYRAMID))
    tensors = load_file(path)
    tensors["features/x5"][0, 1] = float("nan")
    save_file(tensors, path, pack_metadata(metadata_of(path)))
    for scales in (None, ["x5", "x20"]):
        with pytest.raises(InputError) as caught:
            read_bag(path, scales)
        assert str(caught.value) == (
            "bag slide: x5: some features are not finite; embed the slide again"
        )
    assert read_bag(path, ["x10", "x20"]).scales == ("x10", "x20")


def test_a_bag_that_was_read_stays_when_its_file_is_replaced(tmp_path: Path) -> None:
    path, other = bag_path(tmp_path, "slide"), bag_path(tmp_path, "other")
    first, second = make_bag("slide", num_tiles=200, seed=1), make_bag("slide", num_tiles=3, seed=2)
    write_bag(path, first)
    write_bag(other, second)
    bag = read_bag(path)
    os.replace(other, path)
    again = read_bag(path)
    path.unlink()
    for found, made in ((bag, first), (again, second)):
        found.validate()
        for name in made.scales:
            assert torch.equal(found.features[name], made.features[name])
            assert torch.equal(found.grid[name], made.grid[name])


def test_changes_of_a_bag_in_memory_do_not_reach_its_file(written: Path) -> None:
    before = written.read_bytes()
    bag = read_bag(written)
    bag.features["x20"].zero_()
    bag.parent["x20"].fill_(7)
    del bag
    assert written.read_bytes() == before


def tensor_bytes(part: object) -> int:
    """Of all tensors in a graph, however it is made up."""
    if isinstance(part, Tensor):
        return part.nbytes
    if isinstance(part, Mapping):
        return sum(tensor_bytes(value) for value in part.values())
    if is_dataclass(part):
        own = sum(tensor_bytes(getattr(part, field.name)) for field in fields(part))
        return own + (tensor_bytes(part.seers) if isinstance(part, Neighbours) else 0)
    return 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("scales", [None, ["x5", "x20"], ["x10"]])
def test_the_memory_of_a_graph_is_estimated_from_its_file(
    tmp_path: Path, scales: list[str] | None, dtype: torch.dtype
) -> None:
    """Every cell of the grid is taken, so every tile has all the neighbours that it can have."""
    made = make_bag("slide", PYRAMID, 48, num_tiles=32 * 32, side=32)
    path = bag_path(tmp_path, "slide")
    write_bag(path, replace(made, features={n: t.to(dtype) for n, t in made.features.items()}))
    told = graph_bytes(path, scales)
    taken = tensor_bytes(bag_graph(read_bag(path, scales)))
    assert taken <= told
    assert told < 1.3 * taken or scales == ["x10"]  # one scale alone has no lists of all scales
