"""Features and places of tiles at several magnifications, from whatever tool, as a bag.

The rules, for all tools:

* tiles of a scale lie on one grid, or on one for every piece of tissue (CLAM); they do not overlap;
* a finer tile lies wholly inside one coarser tile and on its grid, or touches none at all. Grids
  that cut each other's tiles cannot nest: the slide is refused;
* a finer tile that no coarser one holds is an orphan, a coarser one that holds none is childless.
  ``keep`` leaves both in the bag (parent -1; every coarse tile is looked at, as by default D12 of
  the paper page); ``drop`` removes both, as if they had not been cut.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial import KDTree

from dasmil.bags import Bag, BagHeader, ExtractorCard, all_finite
from dasmil.errors import InputError
from dasmil.interop.features.digest import features_digest
from dasmil.interop.mil4wsi.bags import in_order_of_parents
from dasmil.interop.mil4wsi.grid import place_on_grid
from dasmil.units import Mpp, Scale, TilePx

IntArray = npt.NDArray[np.int64]
Orphans = Literal["keep", "drop"]
Dtype = Literal["keep", "float16", "float32"]

NEAR = 0.1  # an mpp may be so far from its scale's; scanners of one magnification differ by less


@dataclass(frozen=True)
class ScaleFeatures:
    """The tiles of one slide at one scale.

    Parameters
    ----------
    path: the file they come from, for messages.
    features: (N, D).
    place: (N, 2) x, y of the top left corner.
    side: of a tile, in the unit of the places.
    """

    path: Path
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
    files: one a scale.
    slide_mpp: µm per level-0 pixel.
    size_px0: width and height; None where the files do not say.
    mpp_is_known: as in :class:`~dasmil.bags.BagHeader`.
    """

    slide_id: str
    scales: tuple[Scale, ...]
    tile_px: int
    files: tuple[ScaleFeatures, ...]
    slide_mpp: float
    size_px0: tuple[int, int] | None
    mpp_is_known: bool = True


def make_bag(
    slide: SlideFeatures,
    cards: Mapping[str, ExtractorCard],
    tiling: str,
    orphans: Orphans = "keep",
    dtype: Dtype = "keep",
) -> tuple[Bag, dict[str, Any]]:
    """The bag of a slide, and what import.csv says of it.

    Raises
    ------
    InputError
        when the grids cannot nest, or a promise of the bag is broken.
    """
    ratios = _ratios(slide)
    place, sides, unit_px0 = _on_integers(slide, ratios)
    scale = np.repeat(np.arange(len(slide.files)), [len(f.place) for f in slide.files])
    parent = _parents(place, scale, sides, slide)
    has_child = np.zeros(len(scale) + 1, dtype=bool)  # the last one is that of no parent
    has_child[parent] = True
    last = len(slide.files) - 1
    orphaned = (scale > 0) & (parent < 0)
    childless = (scale < last) & ~has_child[:-1]
    figures: dict[str, Any] = {
        "orphans": int(orphaned.sum()),
        "childless": int(childless.sum()),
        "rule": orphans,
    }
    features = [
        _as_stored(file, dtype, cards[scale.name].feature_dim)
        for scale, file in zip(slide.scales, slide.files, strict=True)
    ]
    rows_of_file = np.concatenate([np.arange(len(f.place)) for f in slide.files])
    if orphans == "drop":
        kept = _with_relatives(scale, parent, last)
        renumbered = np.append(np.cumsum(kept) - 1, -1)
        place, scale, rows_of_file = place[kept], scale[kept], rows_of_file[kept]
        parent = renumbered[parent[kept]]
    if (place % sides[scale, None] == 0).all():
        cells, moved = (place // sides[scale, None])[:, ::-1], np.zeros_like(place)
    else:
        cells, moved = place_on_grid(place, scale, parent, sides)
    rows, parents = in_order_of_parents(scale, parent, len(slide.files))
    names = [s.name for s in slide.scales]
    finest = slide.scales[-1]
    side_px0 = sides[-1] * unit_px0
    extent = np.ceil(((cells + 1) * sides[scale, None]).max(0, initial=0) * unit_px0).astype(int)
    size_px0 = slide.size_px0 or (max(1, int(extent[1])), max(1, int(extent[0])))
    header = BagHeader(
        slide_id=slide.slide_id,
        scales=slide.scales,
        tile_px=TilePx(slide.tile_px),
        slide_mpp=Mpp(slide.tile_px * finest.mpp / side_px0),
        size_px0=size_px0,
        size_is_extent=slide.size_px0 is None,
        mpp_is_known=slide.mpp_is_known,
        tiling=tiling,
        extractors=dict(cards),
        num_tiles=len(rows[-1]),
        slide_digest=features_digest(slide.files[-1].features, slide.files[-1].place),
    )
    bag = Bag(
        header,
        features={n: f[rows_of_file[r]] for n, f, r in zip(names, features, rows, strict=True)},
        grid={n: torch.from_numpy(cells[r].astype(np.int32)) for n, r in zip(names, rows)},
        parent={n: torch.from_numpy(p) for n, p in zip(names[1:], parents, strict=True)},
    )
    distance = np.abs(moved).max(1, initial=0) * unit_px0
    figures |= {f"tiles/{name}": number for name, number in bag.num_tiles().items()}
    figures |= {
        "moved": int((distance > 0).sum()),
        "max_moved_px0": round(float(distance.max(initial=0)), 1),
    }
    return bag, figures


def _ratios(slide: SlideFeatures) -> IntArray:
    """Side of each scale's tiles in sides of the finest; whole, and those of the scales."""
    ratios = []
    for scale, file in zip(slide.scales, slide.files, strict=True):
        wanted = scale.mpp / slide.scales[-1].mpp
        found = file.side / slide.files[-1].side
        if abs(found / wanted - 1) > 1e-4:
            raise InputError(
                f"{file.path}: its tiles are {found:g} times as wide as those of "
                f"{slide.scales[-1].name}, {scale.name} would be {wanted:g} times; tiles can nest "
                "only where all magnifications have the same tile size in pixels"
            )
        ratios.append(round(wanted))
    return np.array(ratios)


def _on_integers(slide: SlideFeatures, ratios: IntArray) -> tuple[IntArray, IntArray, float]:
    """Places of all tiles as whole numbers, sides of the scales' tiles, and the unit in level-0 px.

    Grids that start at the origin are counted in finest tiles, which forgives what a tool rounds;
    other grids in level-0 pixels.
    """
    finest = slide.files[-1]
    unit_px0 = slide.tile_px * slide.scales[-1].mpp / slide.slide_mpp
    cells = [
        np.rint(file.place / file.side).astype(np.int64) * ratio
        for file, ratio in zip(slide.files, ratios, strict=True)
    ]
    off = [
        np.abs(file.place - found * finest.side).max(initial=0)
        for file, found in zip(slide.files, cells, strict=True)
    ]
    if max(off) <= max(1.0, 0.002 * finest.side):
        return np.concatenate(cells), ratios, unit_px0
    side = round(finest.side)
    places = np.concatenate([np.rint(file.place).astype(np.int64) for file in slide.files])
    return places.reshape(-1, 2), ratios * side, unit_px0 / side


def _parents(
    place: IntArray, scale: IntArray, sides: IntArray, slide: SlideFeatures
) -> npt.NDArray[np.int64]:
    """(N,) row of the tile of the next coarser scale that holds each, -1 for none."""
    parent = np.full(len(scale), -1, dtype=np.int64)
    for number in range(len(sides)):
        own = np.flatnonzero(scale == number)
        _refuse_overlap(place[own], int(sides[number]), slide, number)
        above = np.flatnonzero(scale == number - 1)
        if number == 0 or len(own) == 0 or len(above) == 0:
            continue
        keys = {tuple(xy): row for xy, row in zip(place[above].tolist(), above.tolist())}
        side, ratio = int(sides[number]), int(sides[number - 1] // sides[number])
        for steps in product(range(ratio), repeat=2):
            corners = place[own] - side * np.array(steps)
            found = np.array([keys.get((x, y), -1) for x, y in corners.tolist()])
            parent[own] = np.where(parent[own] < 0, found, parent[own])
        lonely = own[parent[own] < 0]
        if len(lonely):
            outer = int(sides[number - 1])
            centres = place[above] + outer / 2
            reach = (outer + side) / 2
            distance, _ = KDTree(centres).query(place[lonely] + side / 2, p=np.inf)
            cut = int((distance < reach - 1e-6).sum())
            if cut:
                raise InputError(
                    f"{slide.files[number].path}: {cut} of its {len(own)} tiles lie across the "
                    f"edges of {slide.scales[number - 1].name} tiles, so the grids of "
                    f"{slide.scales[number - 1].name} and {slide.scales[number].name} do not nest; "
                    "cut all magnifications anew with one grid and no overlap (dasmil tile, or "
                    "TRIDENT with --overlap 0; CLAM with the same segmentation for each)"
                )
    return parent


def _refuse_overlap(place: IntArray, side: int, slide: SlideFeatures, number: int) -> None:
    if len(place) > 1:
        distance, _ = KDTree(place).query(place, k=2, p=np.inf)
        overlapping = int((distance[:, 1] < side).sum())
        if overlapping:
            raise InputError(
                f"{slide.files[number].path}: {overlapping} of its tiles overlap each other; cut "
                "them anew with a step as wide as a tile"
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
        held = np.zeros(len(scale) + 1, dtype=bool)
        held[parent[children]] = True
        rows = np.flatnonzero(scale == number)
        kept[rows] &= held[rows]
    return kept[:-1]


def _as_stored(file: ScaleFeatures, dtype: Dtype, width: int) -> torch.Tensor:
    """float16 and float32 as they are, all else as float32; or what was asked for.

    Parameters
    ----------
    width: of the features, which a file without tiles need not say.
    """
    found = torch.from_numpy(np.ascontiguousarray(file.features))
    if not len(found):
        found = found.reshape(0, width)
    if not all_finite(found):
        again = "in float32 (float16 ends at 65,504)" if found.dtype == torch.float16 else "again"
        raise InputError(f"{file.path}: some features are not finite; extract it {again}")
    own = found.dtype if found.dtype in (torch.float16, torch.float32) else torch.float32
    kept = own if dtype == "keep" else getattr(torch, dtype)
    stored = found.to(kept)
    if not all_finite(stored):
        is_half = kept == torch.float16
        raise InputError(
            f"{file.path}: some features are too large for {str(kept).removeprefix('torch.')}; "
            + ("give --dtype keep or float32" if is_half else "extract it again")
        )
    return stored


def check_mpp(path: Path, scale: Scale, mpp: float, within: float = NEAR) -> None:
    """Refuse tiles of another magnification than the scale's."""
    if abs(mpp / scale.mpp - 1) > within:
        raise InputError(
            f"{path}: its tiles have {mpp:.3g} µm/px, {scale.name} is {scale.mpp:g}; give the "
            "folder of that magnification, or name the scale as it is"
        )


def same(values: Sequence[Any], what: str, path: Path) -> Any:
    """The value that the files of a slide share."""
    if len(set(values)) > 1:
        some = ", ".join(map(str, values))
        raise InputError(f"{path}: {what} differs from scale to scale ({some}); a bag has one")
    return values[0]
