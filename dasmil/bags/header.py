"""What a bag file holds beside its tensors, and how two bags differ; no torch."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from dasmil.bag_folder import BAG
from dasmil.geometry import TilesHeader
from dasmil.headers import TEXT, Header, fields_of, values_of
from dasmil.json_text import describe_changes, parse_json
from dasmil.plain import Kind, describe_fault, number, several, whole
from dasmil.units import Mpp, Scale, TilePx

FULL_PRECISION = "32-true"
WIDTH = whole(0, 2**20)  # of features, and of a tile in pixels
RGB = several(number(-1e6, 1e6), 3, 3)
CARD = {
    **{"name": TEXT, "fingerprint": TEXT, "mean": RGB, "std": RGB},
    **{"image_size": WIDTH, "feature_dim": WIDTH},
    **{"pooling": TEXT, "interpolation": TEXT, "precision": TEXT},
    "options": Kind("a dictionary", lambda value: isinstance(value, Mapping)),
}


@dataclass(frozen=True)
class ExtractorCard:
    """Everything needed to reproduce an extractor's features, or to reject those of another one.

    Parameters
    ----------
    name: timm name of the network.
    fingerprint: hash over its weights and all that is done to a tile before and after them.
    mean, std: the normalisation of RGB in 0..1.
    image_size: side in pixels to which a tile is resampled before it enters the network.
    feature_dim: width of the features.
    pooling: from tokens or maps to features: own (the network's head), cls, mean or cls_mean.
    interpolation: of that resampling.
    options: arguments of the network beside its name.
    precision: of the Trainer under which the network ran; older cards do not name it.
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
        """The card of this network in another precision, which gives other features.

        Parameters
        ----------
        precision: as the Trainer names it, such as ``bf16-mixed``.
        """
        if precision == self.precision:
            return self
        fingerprint = hashlib.sha256(f"{self.fingerprint} {precision}".encode()).hexdigest()
        return replace(self, fingerprint=fingerprint, precision=precision)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ExtractorCard":
        """The inverse of :meth:`as_dict`.

        Raises
        ------
        ValueError
            if a value is missing, unknown, or no card can have it.
        """
        required = ("name", "fingerprint", "mean", "std", "image_size", "feature_dim")
        if fault := describe_fault(values, CARD, required):
            raise ValueError(f"no extractor can have its card: {fault}")
        mean, std = (tuple(map(float, values[name])) for name in ("mean", "std"))
        return cls(**{**values, "mean": mean, "std": std})


@dataclass(frozen=True, kw_only=True)
class BagHeader(TilesHeader):
    """A bag without its tensors.

    Parameters
    ----------
    extractors: card per scale.
    num_tiles: of the finest scale.
    reader: version of the code that read the pixels; "" if it was not dasmil.
    num_damaged: tiles of the finest scale that were left out because they cannot be decoded.
    """

    extractors: Mapping[str, ExtractorCard]
    num_tiles: int
    reader: str = ""
    num_damaged: int = 0

    def without_damage(self) -> "BagHeader":
        """The header that the bag would have if all tiles could be decoded."""
        return replace(self, num_tiles=self.num_tiles + self.num_damaged, num_damaged=0)

    def bag_format(self, scales: Collection[str] | None = None) -> dict[str, Any]:
        """See :func:`bag_format`.

        Parameters
        ----------
        scales: names of those that the model reads; None for all.
        """
        read = [scale for scale in self.scales if scales is None or scale.name in scales]
        return bag_format(self.tile_px, read, self.extractors)

    def pack(self) -> dict[str, str]:
        """The entries of the file's header; ``ValueError`` if one is impossible."""
        scales = {scale.name: float(scale.mpp) for scale in self.scales}
        cards = {name: card.as_dict() for name, card in self.extractors.items()}
        return BAG.pack(
            values_of(self)
            | {
                "scales": json.dumps(scales),
                "num_tiles": self.num_tiles,
                "reader": self.reader,
                "size_is_extent": not self.extent.size_is_known,
                "mpp_is_known": self.extent.mpp_is_known,
                "num_damaged": self.num_damaged,
                "extractors": json.dumps(cards),
            }
        )

    @classmethod
    def unpack(cls, header: Header) -> "BagHeader":
        """The inverse of :meth:`pack`; older files lack some entries.

        Raises
        ------
        ValueError
            if an entry is missing or impossible.
        """
        values = BAG.unpack(header)
        scales, cards = _scales(values["scales"]), _cards(values["extractors"])
        if set(cards) != {scale.name for scale in scales}:
            raise ValueError(f"its extractors are of {', '.join(cards)}")
        own = {name: values[name] for name in ("num_tiles", "reader", "num_damaged")}
        return cls(**fields_of(values, scales), **own, extractors=cards)


@lru_cache(maxsize=16)  # all bags of a folder have the same text, and so below
def _scales(text: str) -> tuple[Scale, ...]:
    return tuple(Scale(name, Mpp(float(mpp))) for name, mpp in dict(parse_json(text)).items())


@lru_cache(maxsize=16)
def _cards(text: str) -> Mapping[str, ExtractorCard]:
    return {name: ExtractorCard.from_dict(card) for name, card in dict(parse_json(text)).items()}


def bag_format(
    tile_px: TilePx, scales: Sequence[Scale], extractors: Mapping[str, ExtractorCard]
) -> dict[str, Any]:
    """What all bags of one model share, as plain values; a checkpoint holds it."""
    return {
        "tile_px": int(tile_px),
        "scales": {
            scale.name: {"mpp": float(scale.mpp), "extractor": extractors[scale.name].as_dict()}
            for scale in scales
        },
    }


def describe_difference(wanted: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first difference of two bag formats, in words; None if they are the same."""
    if wanted["tile_px"] != other["tile_px"]:
        return f"tiles of {other['tile_px']} px instead of {wanted['tile_px']}"
    if list(wanted["scales"]) != list(other["scales"]):
        return f"scales {', '.join(other['scales'])} instead of {', '.join(wanted['scales'])}"
    for name, wanted_scale in wanted["scales"].items():
        scale = other["scales"][name]
        if wanted_scale["mpp"] != scale["mpp"]:
            return f"{name} at {scale['mpp']:g} µm/px instead of {wanted_scale['mpp']:g}"
        wanted_card, card = wanted_scale["extractor"], scale["extractor"]
        wanted_precision, precision = _precision(wanted_card), _precision(card)
        if precision != wanted_precision:
            return f"{name} features in precision {precision} instead of {wanted_precision}"
        if wanted_card["fingerprint"] != card["fingerprint"]:
            names = f"{_describe_card(card)} instead of {_describe_card(wanted_card)}"
            return f"{name} features of the extractor {names}"
        wanted_dim, dim = wanted_card["feature_dim"], card["feature_dim"]
        if wanted_dim != dim:  # all of mil4wsi's extractors have one fingerprint
            return f"{name} features {dim} wide instead of {wanted_dim}"
    return None


def describe_other_bag(wanted: BagHeader, other: BagHeader) -> str:
    """Why two bags must not be in one folder, in words; "" if they may.

    They share the :func:`bag_format` and the parameters of tiling or import. A bag without a digest
    of its slide is of an older version, which may have had fewer parameters.
    """
    if wanted.bag_format() != other.bag_format():
        return describe_difference(wanted.bag_format(), other.bag_format()) or "other extractors"
    return describe_changes(other.tiling, wanted.tiling, also_new=bool(other.slide_digest))


def _precision(card: Mapping[str, Any]) -> str:
    return str(card.get("precision", FULL_PRECISION))


def _describe_card(card: Mapping[str, Any]) -> str:
    """An extractor for a sentence; older checkpoints name no pooling."""
    pooling = card.get("pooling", "own")
    pooled = "" if pooling == "own" else f" with {pooling} pooling"
    return f"{card['name']}{pooled} ({card['fingerprint'][:12]})"
