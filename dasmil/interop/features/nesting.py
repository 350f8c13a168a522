"""Nest the tiles of several magnifications, whichever tool extracted their features.

The rules, for all tools:

* The tiles of a scale lie on one grid, or on one per piece of tissue (CLAM). They do not overlap.
* A finer tile lies wholly inside one coarser tile and on its grid, or touches none. If grids cut
  each other's tiles, they cannot nest and the slide is refused.
* A finer tile inside no coarser one is an orphan; a coarser one without a finer one is childless.
  ``keep`` leaves both in the bag (parent -1; coarse tiles without children count, too: D12 in
  .github/docs/paper.md); ``drop`` removes both, as if they had not been cut.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial import KDTree

from dasmil.bags import Bag, ExtractorCard, all_finite
from dasmil.errors import InputError
from dasmil.interop.features.common_grid import IntArray
from dasmil.interop.features.digest import features_digest
from dasmil.interop.features.slide_bag import assemble_bag, count_unrelated
from dasmil.units import Scale

Orphans = Literal["keep", "drop"]
Dtype = Literal["keep", "float16", "float32"]


@dataclass(frozen=True)
class ScaleFeatures:
    """The tiles of one slide at one scale.

    Parameters
    ----------
    path: the file they come from, for messages.
    encoder: name of the network that made the features.
    features: (N, D).
    place: (N, 2) x, y of the top left corner.
    side: of a tile, in the unit of the places.
    """

    path: Path
    encoder: str
    features: npt.NDArray[Any]
    place: npt.NDArray[np.floating | np.integer]
    side: float


@dataclass(frozen=True)
class SlideFeatures:
    """One slide, coarse to fine.

    Parameters
    ----------
    scales: as a bag names them.
    tile_px: side of a tile as the extractors saw it.
    files: one per scale.
    size_px0: width and height; None if the files do not tell them.
    mpp_is_known: if False, places are in any unit instead of level-0 pixels.
    """

    slide_id: str
    scales: tuple[Scale, ...]
    tile_px: int
    files: tuple[ScaleFeatures, ...]
    size_px0: tuple[int, int] | None = None
    mpp_is_known: bool = True


def make_bag(
    slide: SlideFeatures,
    cards: Mapping[str, ExtractorCard],
    tiling: str,
    orphans: Orphans = "keep",
    dtype: Dtype = "keep",
) -> tuple[Bag, dict[str, Any]]:
    """The bag of a slide, and its columns of import.csv.

    Parameters
    ----------
    cards: of the extractors, per scale.
    tiling: for the header: JSON that identifies the import.

    Raises
    ------
    InputError
        if the grids cannot nest, or the bag would be invalid.
    """
    place, sides, unit_px0 = _to_integers(slide, _side_ratios(slide))
    scale = np.repeat(np.arange(len(slide.files)), [len(f.place) for f in slide.files])
    parent = _find_parents(place, scale, sides, slide)
    unrelated = count_unrelated(scale, parent, len(sides))
    features = [
        _to_dtype(file, dtype, cards[scale.name].feature_dim)
        for scale, file in zip(slide.scales, slide.files, strict=True)
    ]
    if orphans == "drop":
        kept = _with_relatives(scale, parent, len(sides) - 1)
        new_row = np.append(np.cumsum(kept) - 1, -1)
        features = [f[kept[scale == number]] for number, f in enumerate(features)]
        place, scale, parent = place[kept], scale[kept], new_row[parent[kept]]
    bag, columns = assemble_bag(
        cards,
        tiling=tiling,
        slide_id=slide.slide_id,
        scales=slide.scales,
        tile_px=slide.tile_px,
        features=features,
        place=place,
        scale=scale,
        parent=parent,
        sides=sides,
        slide_digest=features_digest(slide.files[-1].features, slide.files[-1].place),
        unit_px0=unit_px0,
        size_px0=slide.size_px0,
        mpp_is_known=slide.mpp_is_known,
    )
    return bag, {**columns, **unrelated, "rule": orphans}


def _side_ratios(slide: SlideFeatures) -> IntArray:
    """(M,) side of each scale's tiles in sides of the finest; they must be those of the scales."""
    ratios = []
    for scale, file in zip(slide.scales, slide.files, strict=True):
        expected = scale.mpp / slide.scales[-1].mpp
        actual = file.side / slide.files[-1].side
        if abs(actual / expected - 1) > 1e-4:
            raise InputError(
                f"{file.path}: its tiles are {actual:g} times as wide as those of "
                f"{slide.scales[-1].name}, {scale.name} would be {expected:g} times; tiles can "
                "nest only if all magnifications have the same tile size in pixels"
            )
        ratios.append(round(expected))
    return np.array(ratios)


def _to_integers(slide: SlideFeatures, ratios: IntArray) -> tuple[IntArray, IntArray, float]:
    """Places of all tiles as integers, sides of the scales' tiles, and their unit in level-0 px.

    Grids that start at the origin are counted in finest tiles, which undoes a tool's rounding;
    other grids are counted in level-0 pixels.
    """
    finest = slide.files[-1]
    unit_px0 = float(finest.side if slide.mpp_is_known else slide.tile_px)
    cells = [
        np.rint(file.place / file.side).astype(np.int64) * ratio
        for file, ratio in zip(slide.files, ratios, strict=True)
    ]
    distances = [
        np.abs(file.place - of_scale * finest.side).max(initial=0)
        for file, of_scale in zip(slide.files, cells, strict=True)
    ]
    if max(distances) <= max(1.0, 0.002 * finest.side):
        return np.concatenate(cells), ratios, unit_px0
    side = round(finest.side)
    places = np.concatenate([np.rint(file.place).astype(np.int64) for file in slide.files])
    return places.reshape(-1, 2), ratios * side, unit_px0 / side


def _find_parents(
    place: IntArray, scale: IntArray, sides: IntArray, slide: SlideFeatures
) -> npt.NDArray[np.int64]:
    """(N,) row of the tile of the next coarser scale that holds each tile, -1 for none."""
    parent = np.full(len(scale), -1, dtype=np.int64)
    for number, side in enumerate(sides.tolist()):
        own = np.flatnonzero(scale == number)
        _refuse_overlap(place[own], side, slide.files[number].path)
        above = np.flatnonzero(scale == number - 1)
        if number == 0 or len(own) == 0 or len(above) == 0:
            continue
        keys = {tuple(xy): row for xy, row in zip(place[above].tolist(), above.tolist())}
        for steps in product(range(sides[number - 1] // side), repeat=2):
            corners = place[own] - side * np.array(steps)
            holding = np.array([keys.get((x, y), -1) for x, y in corners.tolist()])
            parent[own] = np.where(parent[own] < 0, holding, parent[own])
        orphans = own[parent[own] < 0]
        if len(orphans):
            outer = int(sides[number - 1])
            tree = KDTree(place[above] + outer / 2)
            distance, _ = tree.query(place[orphans] + side / 2, p=np.inf)
            num_cut = int((distance < (outer + side) / 2 - 1e-6).sum())
            if num_cut:
                coarse, fine = (slide.scales[n].name for n in (number - 1, number))
                raise InputError(
                    f"{slide.files[number].path}: {num_cut} of its {len(own)} tiles lie across the "
                    f"edges of {coarse} tiles, so the grids of {coarse} and {fine} do not nest; "
                    "cut all magnifications again with one grid and no overlap (dasmil tile, or "
                    "TRIDENT with --overlap 0; CLAM with the same segmentation for each)"
                )
    return parent


def _refuse_overlap(place: IntArray, side: int, path: Path) -> None:
    if len(place) > 1:
        distance, _ = KDTree(place).query(place, k=2, p=np.inf)
        overlapping = int((distance[:, 1] < side).sum())
        if overlapping:
            raise InputError(
                f"{path}: {overlapping} of its tiles overlap each other; cut them again with a "
                "step as wide as a tile"
            )


def _with_relatives(scale: IntArray, parent: IntArray, last: int) -> npt.NDArray[np.bool_]:
    """(N,) tiles that have an ancestor at the coarsest and a descendant at the finest scale."""
    kept = np.ones(len(scale) + 1, dtype=bool)
    kept[-1] = False  # no parent
    for number in range(1, last + 1):
        rows = np.flatnonzero(scale == number)
        kept[rows] = kept[parent[rows]]
    for number in range(last - 1, -1, -1):
        children = np.flatnonzero((scale == number + 1) & kept[:-1])
        is_parent = np.zeros(len(scale) + 1, dtype=bool)
        is_parent[parent[children]] = True
        rows = np.flatnonzero(scale == number)
        kept[rows] &= is_parent[rows]
    return kept[:-1]


def _to_dtype(file: ScaleFeatures, dtype: Dtype, width: int) -> torch.Tensor:
    """The features in the dtype asked for; ``keep`` turns all but float16 into float32.

    Parameters
    ----------
    width: of the features, which a file without tiles need not tell.
    """
    features = torch.from_numpy(np.ascontiguousarray(file.features))
    if not len(features):
        features = features.reshape(0, width)
    if not all_finite(features):
        advice = "in float32 (float16 ends at 65,504)" if features.dtype == torch.float16 else ""
        raise InputError(
            f"{file.path}: some features are not finite; extract them again {advice}".rstrip()
        )
    own = torch.float16 if features.dtype == torch.float16 else torch.float32
    stored = features.to(own if dtype == "keep" else getattr(torch, dtype))
    if not all_finite(stored):
        is_half = stored.dtype == torch.float16
        advice = "give --dtype keep or float32" if is_half else "extract them again"
        name = str(stored.dtype).removeprefix("torch.")
        raise InputError(f"{file.path}: some features are too large for {name}; {advice}")
    return stored
