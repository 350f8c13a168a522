"""A slide as the model sees it: per scale the features, the integer grid and the parents."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from dasmil.errors import InputError
from dasmil.headers import Header
from dasmil.json_text import describe_changes, parse_json
from dasmil.units import IntArray, Mpp, PyramidGrid, Scale, TilePx

FULL_PRECISION = "32-true"
MAX_WIDTH = 2**20  # of features, and of a tile in pixels


@dataclass(frozen=True)
class ExtractorCard:
    """What must be known about a frozen extractor to make, or to refuse, features for a model.

    Parameters
    ----------
    name: timm name of the network.
    fingerprint: hash over its weights and all that is done to a tile before and after them.
    mean, std: the normalisation of RGB in 0..1.
    image_size: side in pixels to which a tile is resampled before it enters the network.
    feature_dim: width of the features.
    pooling: from tokens or maps to features: own (the network's head), cls, mean or cls_mean.
    interpolation: of that resampling.
    options: what the network was made with beside its name.
    precision: of the Trainer under which the network ran; cards of before it was kept say nothing.
    """

    name: str
    fingerprint: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    feature_dim: int
    pooling: str = "own"
    interpolation: str = "bilinear"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    precision: str = FULL_PRECISION

    def __str__(self) -> str:
        """What happens to a tile, in one line."""
        mean, std = (
            " ".join(f"{value:.3f}" for value in values) for values in (self.mean, self.std)
        )
        precision = "" if self.precision == FULL_PRECISION else f" in {self.precision}"
        return (
            f"tiles at {self.image_size} px, less {mean}, by {std} → {self.name}, {self.pooling} "
            f"pooling{precision} → {self.feature_dim} features"
        )

    def in_precision(self, precision: str) -> "ExtractorCard":
        """The card of this network under a Trainer of another precision: its features are others.

        Parameters
        ----------
        precision: as the Trainer names it, such as ``bf16-mixed``.
        """
        if precision == self.precision:
            return self
        fingerprint = hashlib.sha256(f"{self.fingerprint} {precision}".encode()).hexdigest()
        return replace(self, fingerprint=fingerprint, precision=precision)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ExtractorCard":
        """The inverse of ``dataclasses.asdict``.

        Raises
        ------
        KeyError, TypeError, ValueError
            if a value is missing, unknown, or no card can have it.
        """
        mean, std = (tuple(map(float, values[name])) for name in ("mean", "std"))
        card = cls(**{**values, "mean": mean, "std": std})
        texts = (card.name, card.fingerprint, card.pooling, card.interpolation, card.precision)
        sizes = (card.image_size, card.feature_dim)
        if (
            not all(isinstance(text, str) for text in texts)
            or not all(type(size) is int and 0 <= size < MAX_WIDTH for size in sizes)
            or not all(len(v) == 3 and all(map(isfinite, v)) for v in (mean, std))
            or not isinstance(card.options, Mapping)
        ):
            raise ValueError(f"no extractor can have the card {str(values)[:200]}")
        return card


@dataclass(frozen=True)
class BagHeader:
    """All that a bag file says beside its tensors; scales run from coarse to fine.

    Parameters
    ----------
    size_px0: width and height of the slide.
    tiling: tissue and tiling parameters, JSON.
    num_tiles: of the finest scale.
    reader: version of the code that read the pixels; nothing where they were not ours.
    bounds_px0: left and top of what was scanned (``openslide.bounds-x, -y``), from which QuPath
        counts; 0, 0 where that is not known.
    size_is_extent: the slide's size is not known, ``size_px0`` is how far the tiles reach.
    mpp_is_known: where False, places are in pixels of the finest scale instead of level 0, and
        ``slide_mpp`` is that scale's.
    slide_digest: of the slide file (:func:`dasmil.slides.digest.sample_digest`); "" if it is not
        known.
    num_damaged: tiles of the finest scale that were left out since they cannot be decoded.
    """

    slide_id: str
    scales: tuple[Scale, ...]
    tile_px: TilePx
    slide_mpp: Mpp
    size_px0: tuple[int, int]
    tiling: str
    extractors: Mapping[str, ExtractorCard]
    num_tiles: int
    reader: str = ""
    bounds_px0: tuple[int, int] = (0, 0)
    size_is_extent: bool = False
    mpp_is_known: bool = True
    slide_digest: str = ""
    num_damaged: int = 0

    def without_damage(self) -> "BagHeader":
        """The header that the bag would have if all tiles could be decoded."""
        return replace(self, num_tiles=self.num_tiles + self.num_damaged, num_damaged=0)

    @property
    def geometry(self) -> PyramidGrid:
        return PyramidGrid(self.scales, self.tile_px, self.slide_mpp)

    def bag_format(self, scales: Collection[str] | None = None) -> dict[str, Any]:
        """What all bags of one model share, as plain values; a checkpoint holds it.

        Parameters
        ----------
        scales: those that the model reads; all where None.
        """
        return {
            "tile_px": int(self.tile_px),
            "scales": {
                s.name: {"mpp": float(s.mpp), "extractor": _plain(self.extractors[s.name])}
                for s in self.scales
                if scales is None or s.name in scales
            },
        }


def _plain(card: ExtractorCard) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(card).items()}


def describe_difference(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """The first way in which two bag formats differ, in words; None when they are the same."""
    if wanted["tile_px"] != found["tile_px"]:
        return f"tiles of {found['tile_px']} px instead of {wanted['tile_px']}"
    if list(wanted["scales"]) != list(found["scales"]):
        return f"scales {', '.join(found['scales'])} instead of {', '.join(wanted['scales'])}"
    for name, scale in wanted["scales"].items():
        other = found["scales"][name]
        if scale["mpp"] != other["mpp"]:
            return f"{name} at {other['mpp']:g} µm/px instead of {scale['mpp']:g}"
        ours, theirs = scale["extractor"], other["extractor"]
        wanted_precision, precision = _precision(ours), _precision(theirs)
        if precision != wanted_precision:
            return f"{name} features in precision {precision} instead of {wanted_precision}"
        if ours["fingerprint"] != theirs["fingerprint"]:
            return (
                f"{name} features of the extractor {_in_words(theirs)} instead of {_in_words(ours)}"
            )
        if ours["feature_dim"] != theirs["feature_dim"]:  # all of mil4wsi's count as one extractor
            return f"{name} features {theirs['feature_dim']} wide instead of {ours['feature_dim']}"
    return None


def describe_other_bag(wanted: BagHeader, found: BagHeader) -> str:
    """How bags differ that must not lie in one folder, in words; "" where they may.

    They share all that :meth:`BagHeader.bag_format` holds, and the parameters of tiling or import.
    A bag without a digest of its slide is of an older version, which may have had fewer parameters.
    """
    if wanted.bag_format() != found.bag_format():
        return describe_difference(wanted.bag_format(), found.bag_format()) or "other extractors"
    return describe_changes(found.tiling, wanted.tiling, also_new=bool(found.slide_digest))


def _precision(card: Mapping[str, Any]) -> str:
    return str(card.get("precision", FULL_PRECISION))


def _in_words(card: Mapping[str, Any]) -> str:
    """An extractor for a sentence; checkpoints from before there was a choice say no pooling."""
    pooling = card.get("pooling", "own")
    pooled = "" if pooling == "own" else f" with {pooling} pooling"
    return f"{card['name']}{pooled} ({card['fingerprint'][:12]})"


@dataclass(frozen=True)
class Bag:
    """The tiles of one slide; a bag without tiles is legal.

    Parameters
    ----------
    features: per scale (N_s, D_s) float16 or float32.
    grid: per scale (N_s, 2) int32 row, col; in the order of the parents.
    parent: per scale but the coarsest (N_s,) int32, row in the next coarser scale; -1 for a tile
        without a parent, which only imported bags have.
    """

    header: BagHeader
    features: Mapping[str, Tensor]
    grid: Mapping[str, Tensor]
    parent: Mapping[str, Tensor]

    @property
    def slide_id(self) -> str:
        return self.header.slide_id

    @property
    def scales(self) -> tuple[str, ...]:
        """Names, coarse to fine."""
        return tuple(scale.name for scale in self.header.scales)

    def num_tiles(self) -> dict[str, int]:
        return {name: len(self.grid[name]) for name in self.scales}

    def boxes_px0(self, scale: str) -> Tensor:
        """(N_s, 4) left, top, right, bottom in level-0 pixels."""
        number = self.scales.index(scale)
        return torch.from_numpy(self.header.geometry.boxes_px0(number, self.grid[scale].numpy()))

    def select(self, scales: Collection[str]) -> "Bag":
        """The bag with these scales alone; a parent is then the ancestor in the next one left.

        Raises
        ------
        InputError
            when the bag lacks one of them.
        """
        missing = [name for name in scales if name not in self.scales]
        if missing or not scales:
            self._refuse(
                f"asked for the scales {', '.join(scales)}, it has {', '.join(self.scales)}"
            )
        chosen = [name for name in self.scales if name in scales]
        parent = {
            fine: ancestor_rows(self._steps(coarse, fine)) for coarse, fine in pairwise(chosen)
        }
        header = replace(
            self.header,
            scales=tuple(scale for scale in self.header.scales if scale.name in scales),
            extractors={name: self.header.extractors[name] for name in chosen},
            num_tiles=len(self.grid[chosen[-1]]),
        )
        features = {name: self.features[name] for name in chosen}
        return Bag(header, features, {name: self.grid[name] for name in chosen}, parent)

    def _steps(self, coarse: str, fine: str) -> list[Tensor]:
        first, last = self.scales.index(coarse) + 1, self.scales.index(fine) + 1
        return [self.parent[name] for name in self.scales[first:last]]

    def validate(self) -> None:
        """Check every promise of the format.

        Raises
        ------
        InputError
            naming the slide, the scale and the promise that does not hold.
        """
        self.validate_structure()
        self.validate_features()

    def validate_features(self) -> None:
        """Check that every feature is finite; the one promise that needs all of them looked at."""
        for name, features in self.features.items():
            if not all_finite(features):
                self._refuse(f"{name}: some features are not finite")

    def validate_structure(self) -> None:
        """Check every other promise; of features only shape and dtype are looked at."""
        names = self.scales
        if set(self.features) != set(names) or set(self.grid) != set(names):
            self._refuse(f"features or grid of the scales {', '.join(names)} are missing")
        if set(self.parent) != set(names[1:]):
            self._refuse("every scale but the coarsest needs parents")
        if len(self.grid[names[-1]]) != self.header.num_tiles:
            self._refuse("the number of tiles is not the header's")
        if set(self.header.extractors) != set(names):
            self._refuse(f"the header must name the extractors of {', '.join(names)}")
        geometry = self.header.geometry
        for number, name in enumerate(names):
            features, grid = self.features[name], self.grid[name]
            if features.ndim != 2 or grid.shape != (len(features), 2):
                self._refuse(
                    f"{name}: features {tuple(features.shape)} for grid {tuple(grid.shape)}"
                )
            if features.shape[1] != self.header.extractors[name].feature_dim:
                self._refuse(f"{name}: features are not as wide as their extractor's")
            if features.dtype not in (torch.float16, torch.float32):
                self._refuse(f"{name}: features must be float16 or float32, not {features.dtype}")
            above = _as_array(self.grid[names[number - 1]]) if number else None
            parent = _as_array(self.parent[name]) if number else None
            if fault := geometry.fault(number, _as_array(grid), parent, above, orphans=True):
                self._refuse(f"{name}: {fault}")

    def _refuse(self, reason: str) -> None:
        raise InputError(f"bag {self.slide_id}: {reason}; embed the slide again")


def _as_array(places: Tensor) -> IntArray:
    """The same numbers; other types than int32 become int64, since NumPy does not know them all."""
    return (places if places.dtype == torch.int32 else places.long()).numpy()


def ancestor_rows(parents: Sequence[Tensor]) -> Tensor:
    """(N,) row of each finest tile's ancestor in the coarsest scale, -1 for none.

    Parameters
    ----------
    parents: of each scale between the two, coarse to fine; the last is the finest tiles' own.
    """
    rows = parents[-1]
    for parent in reversed(parents[:-1]):
        rows = torch.cat([parent, parent.new_full((1,), -1)])[rows.long()]  # row -1 reads -1
    return rows


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # nan passes through minimum and maximum; isfinite of all takes 20 times as long
    return not values.numel() or bool(torch.isfinite(torch.stack(values.aminmax())).all())


def header_to_metadata(header: BagHeader) -> dict[str, str]:
    """The header as safetensors wants it: strings."""
    return {
        "slide_id": header.slide_id,
        "slide_mpp": repr(float(header.slide_mpp)),
        "size_px0": json.dumps(list(header.size_px0)),
        "tile_px": str(header.tile_px),
        "scales": json.dumps({scale.name: float(scale.mpp) for scale in header.scales}),
        "tiling": header.tiling,
        "num_tiles": str(header.num_tiles),
        "reader": header.reader,
        "bounds_px0": json.dumps(list(header.bounds_px0)),
        "size_is_extent": json.dumps(header.size_is_extent),
        "mpp_is_known": json.dumps(header.mpp_is_known),
        "slide_digest": header.slide_digest,
        "num_damaged": str(header.num_damaged),
        "extractors": json.dumps({name: _plain(c) for name, c in header.extractors.items()}),
    }


def header_from_metadata(header: Header) -> BagHeader:
    """The inverse of :func:`header_to_metadata`; older files lack some entries.

    Raises
    ------
    ValueError
        if an entry is missing or impossible.
    """
    scales, cards = _scales(header.text("scales")), _cards(header.text("extractors"))
    geometry = header.geometry(scales)
    if set(cards) != {scale.name for scale in scales}:
        raise ValueError(f"its extractors are of {', '.join(cards)}")
    return BagHeader(
        slide_id=header.slide_id(),
        scales=scales,
        tile_px=geometry.tile_px,
        slide_mpp=geometry.slide_mpp,
        size_px0=header.size_px0(),
        tiling=header.parameters(),
        num_tiles=header.whole("num_tiles", 0, 2**40),
        reader=header.text("reader"),
        bounds_px0=header.bounds_px0(),
        size_is_extent=header.flag("size_is_extent", "false"),
        mpp_is_known=header.flag("mpp_is_known", "true"),
        slide_digest=header.text("slide_digest", ""),
        num_damaged=header.whole("num_damaged", 0, 2**40, "0"),
        extractors=cards,
    )


@lru_cache(maxsize=16)
def _scales(text: str) -> tuple[Scale, ...]:
    return tuple(Scale(name, Mpp(float(mpp))) for name, mpp in dict(parse_json(text)).items())


@lru_cache(maxsize=16)  # all bags of a folder share theirs
def _cards(text: str) -> Mapping[str, ExtractorCard]:
    return {name: ExtractorCard.from_dict(card) for name, card in dict(parse_json(text)).items()}
