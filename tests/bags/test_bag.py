"""The promises of a bag, and what makes two bags of different kind."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from bag_factory import make_bag, make_card, with_changes
from bags.orphans import without_first
from torch import Tensor

from dasmil.bags import Bag, BagHeader, ExtractorCard, describe_difference, describe_other_bag
from dasmil.errors import InputError
from dasmil.geometry import Extent
from dasmil.headers import Header
from dasmil.units import Mpp, Scale, TilePx


def with_tensor(bag: Bag, kind: str, scale: str, tensor: Tensor) -> Bag:
    return with_changes(bag, **{kind: {**getattr(bag, kind), scale: tensor}})


def without(bag: Bag, kind: str, scale: str) -> Bag:
    return with_changes(bag, **{kind: {n: t for n, t in getattr(bag, kind).items() if n != scale}})


def changed(bag: Bag, kind: str, scale: str, index: object, value: object) -> Bag:
    tensor = getattr(bag, kind)[scale].clone()
    tensor[index] = value
    return with_tensor(bag, kind, scale, tensor)


def reordered(bag: Bag, scale: str) -> Bag:
    """The finest tiles in reverse, each with its own features and parent."""
    for kind in ("features", "grid", "parent"):
        bag = with_tensor(bag, kind, scale, getattr(bag, kind)[scale].flip(0))
    return bag


def twice(bag: Bag, scale: str) -> Bag:
    """The last of the finest tiles a second time in place of the one before, its sibling or not."""
    for kind in ("grid", "parent"):
        tensor = getattr(bag, kind)[scale]
        bag = with_tensor(bag, kind, scale, torch.cat([tensor[:-2], tensor[-1:], tensor[-1:]]))
    return bag


@pytest.mark.parametrize("num_tiles", [0, 1, 40])
@pytest.mark.parametrize("scales", [("x20",), ("x10", "x20"), ("x5", "x20"), ("x2.5", "x5", "x20")])
def test_a_whole_bag_is_accepted(scales: tuple[str, ...], num_tiles: int) -> None:
    bag = make_bag(
        scales=scales, dims={s: 3 + n for n, s in enumerate(scales)}, num_tiles=num_tiles
    )
    bag.validate()
    assert bag.scales == scales
    assert bag.num_tiles()[scales[-1]] == num_tiles


BROKEN: list[tuple[str, Callable[[Bag], Bag], str]] = [
    ("no features", lambda b: without(b, "features", "x10"), "features of one of .*x10.* missing"),
    ("no grid", lambda b: without(b, "grid", "x20"), "grid of one of .*x20.* missing"),
    ("no parents", lambda b: without(b, "parent", "x20"), "needs parents"),
    ("parents above all", lambda b: with_tensor(b, "parent", "x5", b.parent["x10"]), "coarsest"),
    (
        "no extractor",
        lambda b: replace(b, extractors={"x5": make_card()}),
        "extractors of x5, x10, x20",
    ),
    (
        "rows",
        lambda b: with_tensor(b, "features", "x10", b.features["x10"][1:]),
        r"x10: features \(\d+, 6\) for \d+ tiles",
    ),
    (
        "flat features",
        lambda b: with_tensor(b, "features", "x5", b.features["x5"][:, 0]),
        r"x5: features \(\d+,\) for \d+ tiles",
    ),
    (
        "three columns",
        lambda b: with_tensor(b, "grid", "x5", b.grid["x5"][:, [0, 1, 1]]),
        "x5: the grid must be non-negative int32",
    ),
    (
        "width",
        lambda b: with_tensor(b, "features", "x20", b.features["x20"][:, :5]),
        "x20: features are not as wide",
    ),
    (
        "wide grid",
        lambda b: with_tensor(b, "grid", "x10", b.grid["x10"].long()),
        "x10: the grid must be non-negative int32",
    ),
    (
        "negative grid",
        lambda b: changed(b, "grid", "x5", (0, 1), -1),
        "x5: the grid must be non-negative int32",
    ),
    (
        "wide parents",
        lambda b: with_tensor(b, "parent", "x20", b.parent["x20"].long()),
        r"x20: parents must be \(N,\) int32",
    ),
    (
        "fewer parents",
        lambda b: with_tensor(b, "parent", "x10", b.parent["x10"][1:]),
        r"x10: parents must be \(N,\) int32",
    ),
    (
        "negative parent",
        lambda b: changed(b, "parent", "x20", 0, -2),
        r"x20: a parent is not among the \d+ of x10",
    ),
    (
        "parent beyond the last",
        lambda b: changed(b, "parent", "x10", -1, len(b.grid["x5"])),
        r"x10: a parent is not among the \d+ of x5",
    ),
    (
        "an orphan after a child",
        lambda b: changed(b, "parent", "x20", 5, -1),
        "x20: tiles are not in the order of their parents",
    ),
    (
        "double features",
        lambda b: with_tensor(b, "features", "x10", b.features["x10"].double()),
        r"x10: features must be float16 or float32, not torch\.float64",
    ),
    (
        "whole features",
        lambda b: with_tensor(b, "features", "x10", b.features["x10"].int()),
        r"x10: features must be float16 or float32, not torch\.int32",
    ),
    ("order", lambda b: reordered(b, "x20"), "x20: tiles are not in the order of their parents"),
    (
        "outside the parent",
        lambda b: with_tensor(b, "grid", "x20", b.grid["x20"] + 2),
        "x20: a tile is not inside its parent",
    ),
    (
        "one tile outside its parent",
        lambda b: changed(b, "grid", "x10", (3, 0), b.grid["x10"][3, 0] + 2),
        "x10: a tile is not inside its parent",
    ),
    (
        "a child of the first tile outside it",
        lambda b: changed(b, "grid", "x20", (0, 1), b.grid["x20"][0, 1] + 2),
        "x20: a tile is not inside its parent",
    ),
    ("one place twice", lambda b: twice(b, "x20"), "x20: two tiles have the same place"),
    (
        "nan",
        lambda b: changed(b, "features", "x10", (2, 3), float("nan")),
        "x10: some features are not finite",
    ),
    (
        "infinite",
        lambda b: changed(b, "features", "x20", (0, 0), -float("inf")),
        "x20: some features are not finite",
    ),
]


@pytest.mark.parametrize(
    ("break_it", "reason"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN]
)
def test_a_broken_promise_is_refused_by_slide_and_scale(
    break_it: Callable[[Bag], Bag], reason: str
) -> None:
    bag = make_bag("S-17", scales=("x5", "x10", "x20"), num_tiles=40)
    with pytest.raises(InputError, match=rf"^bag S-17: .*{reason}"):
        break_it(bag).validate()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_feature_that_is_not_finite_is_found_anywhere(value: float, dtype: torch.dtype) -> None:
    """Also where the minimum and maximum are made of whole vectors and a rest."""
    bag = make_bag(num_tiles=37, dims=7)
    bag = replace(bag, features={n: t.to(dtype) for n, t in bag.features.items()})
    for row in range(37):
        broken = changed(bag, "features", "x20", (row, row % 7), value)
        broken.validate_structure()
        with pytest.raises(InputError, match="bag slide: x20: some features are not finite"):
            broken.validate_features()
    largest = torch.finfo(dtype).max
    far = changed(bag, "features", "x20", 0, largest)
    changed(far, "features", "x20", 1, -largest).validate_features()


def test_orphans_are_accepted_and_nothing_below_minus_one() -> None:
    """Tiles of another tool whose parent was not kept; they lie first."""
    bag = make_bag(scales=("x5", "x10", "x20"), num_tiles=40)
    for scale, coarser, count in (("x10", "x5", 1), ("x20", "x10", 2)):
        orphaned = without_first(bag, coarser, count)
        orphaned.validate()
        assert (orphaned.parent[scale] == -1).any()
        with pytest.raises(InputError, match=rf"{scale}: a parent is not among"):
            changed(orphaned, "parent", scale, 0, -2).validate()
    everyone = with_tensor(bag, "parent", "x20", torch.full_like(bag.parent["x20"], -1))
    everyone.validate()


def test_an_orphan_may_be_anywhere_but_a_child_only_in_its_parent() -> None:
    bag = without_first(make_bag(scales=("x10", "x20"), num_tiles=40), "x10", 2)
    moved = changed(bag, "grid", "x20", 0, torch.tensor([900, 900]))
    moved.validate()
    with pytest.raises(InputError, match="x20: a tile is not inside its parent"):
        changed(bag, "grid", "x20", -1, torch.tensor([900, 900])).validate()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_features_of_both_precisions_are_accepted(dtype: torch.dtype) -> None:
    bag = make_bag()
    replace(bag, features={n: t.to(dtype) for n, t in bag.features.items()}).validate()
    with pytest.raises(InputError, match="features must be float16 or float32"):
        replace(bag, features={n: t.double() for n, t in bag.features.items()}).validate()


def test_boxes_follow_from_the_grid() -> None:
    """Slide at 0.25 µm/px and tiles of 100 px: 400 level-0 pixels at x10, 200 at x20."""
    bag = make_bag(scales=("x10", "x20"), num_tiles=30, tile_px=100)
    for scale, side in (("x10", 400), ("x20", 200)):
        rows, columns = bag.grid[scale].long().T
        expected = torch.stack([columns, rows, columns + 1, rows + 1], 1) * side
        assert torch.equal(bag.boxes_px0(scale), expected)


def test_the_header_survives_its_metadata() -> None:
    scales = (Scale("x10", Mpp(0.92)), Scale("x20", Mpp(0.46)))
    header = make_bag(scales=scales, dims={"x10": 4, "x20": 5}).header
    metadata = header.pack()
    assert all(isinstance(value, str) for value in metadata.values())
    assert BagHeader.unpack(Header(metadata, {})) == header
    extent = Extent((20_000, 10_000), Mpp(0.25), (1000, 2000), False, False)
    odd = replace(header, extent=extent, slide_digest="ab")
    assert BagHeader.unpack(Header(odd.pack(), {})) == odd
    for name in (
        "bounds_px0",
        "size_is_extent",
        "mpp_is_known",
        "slide_digest",
    ):  # of an older file
        del metadata[name]
    assert BagHeader.unpack(Header(metadata, {})) == header


def test_the_bag_format_is_made_of_plain_values() -> None:
    found = make_bag(
        scales=("x10", "x20"), dims={"x10": 4, "x20": 5}, tile_px=64
    ).header.bag_format()
    assert found == json.loads(json.dumps(found))
    assert found["tile_px"] == 64
    assert {name: scale["mpp"] for name, scale in found["scales"].items()} == {"x10": 1, "x20": 0.5}
    widths = {name: scale["extractor"]["feature_dim"] for name, scale in found["scales"].items()}
    assert widths == {"x10": 4, "x20": 5}


def test_the_bag_format_of_some_scales_keeps_the_bags_order() -> None:
    header = make_bag(scales=("x5", "x10", "x20")).header
    assert header.bag_format(None) == header.bag_format()
    some = header.bag_format(["x20", "x5"])
    assert list(some["scales"]) == ["x5", "x20"]
    assert some["scales"]["x20"] == header.bag_format()["scales"]["x20"]
    two = make_bag(scales=("x5", "x20")).header.bag_format()
    assert describe_difference(some, two) is None


def test_an_extractor_card_survives_its_plain_form() -> None:
    plain = make_bag().header.bag_format()["scales"]["x10"]["extractor"]
    assert ExtractorCard.from_dict(json.loads(json.dumps(plain))) == make_card()


def test_features_of_another_precision_are_others_and_an_older_card_is_full_precision() -> None:
    header = make_bag().header
    half = {name: card.in_precision("bf16-mixed") for name, card in header.extractors.items()}
    full, mixed = header.bag_format(), replace(header, extractors=half).bag_format()
    words = "x10 features in precision bf16-mixed instead of 32-true"
    assert describe_difference(full, mixed) == words
    assert half["x10"].fingerprint not in (
        make_card().fingerprint,
        make_card().in_precision("16-mixed").fingerprint,
    )
    assert make_card().in_precision("32-true") == make_card()
    for scale in full["scales"].values():
        del scale["extractor"]["precision"]
    assert describe_difference(full, header.bag_format()) is None
    assert describe_difference(full, mixed) == words
    assert ExtractorCard.from_dict(full["scales"]["x10"]["extractor"]) == make_card()


def test_equal_formats_do_not_differ() -> None:
    ours, theirs = (make_bag(f"s{n}", num_tiles=n + 3).header.bag_format() for n in range(2))
    assert describe_difference(ours, theirs) is None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"tile_px": 512}, "tiles of 512 px instead of 256"),
        ({"scales": ("x5", "x20")}, "scales x5, x20 instead of x10, x20"),
        ({"scales": ("x20",)}, "scales x20 instead of x10, x20"),
        (
            {"scales": (Scale("x10", Mpp(1.0)), Scale("x20", Mpp(0.46)))},
            "x20 at 0.46 µm/px instead of 0.5",
        ),
        (
            {"fingerprint": "0123456789abcdef"},
            "x10 features of the extractor vit_small_patch16_224 (0123456789ab) "
            "instead of vit_small_patch16_224 (ffffffffffff)",
        ),
    ],
)
def test_a_difference_of_format_is_said_in_words(other: dict, words: str) -> None:
    wanted, found = make_bag().header.bag_format(), make_bag(**other).header.bag_format()
    assert describe_difference(wanted, found) == words


def test_bags_that_must_not_share_a_folder_differ_in_words() -> None:
    header = make_bag(scales=("x10", "x20"), dims={"x10": 4, "x20": 5}).header
    tiling = '{"min_tissue": 0.25, "tissue": {"mpp": 8.0, "scales": ["x10"]}}'
    header = replace(header, tiling=tiling, slide_digest="ab")
    assert describe_other_bag(header, replace(header, slide_id="other", slide_digest="cd")) == ""
    other = replace(header, tiling=tiling.replace("8.0", "4.0").replace("0.25", "0.5"))
    assert describe_other_bag(header, other) == "min_tissue 0.5 → 0.25, tissue.mpp 4.0 → 8.0"
    assert "tiles of 7 px" in describe_other_bag(header, replace(header, tile_px=TilePx(7)))
    fewer = replace(header, tiling='{"min_tissue": 0.25}')
    assert "tissue.mpp unknown → 8.0" in describe_other_bag(header, fewer)
    assert describe_other_bag(header, replace(fewer, slide_digest="")) == ""  # of an older version
