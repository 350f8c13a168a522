"""A slide as a method reads it: its tiles, and their features per scale."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from dasmil.bags.header import BagHeader, ExtractorCard
from dasmil.errors import InputError
from dasmil.geometry import Int32Array, Tiles


@dataclass(frozen=True)
class Bag:
    """The tiles of one slide and their features; a bag without tiles is legal.

    Parameters
    ----------
    tiles: where they are.
    features: per scale (N_s, D_s) float16 or float32.
    extractors: card per scale.
    reader, num_damaged: as in :class:`~dasmil.bags.BagHeader`.
    """

    tiles: Tiles
    features: Mapping[str, Tensor]
    extractors: Mapping[str, ExtractorCard]
    reader: str = ""
    num_damaged: int = 0

    @classmethod
    def from_header(
        cls,
        header: BagHeader,
        features: Mapping[str, Tensor],
        grid: Mapping[str, Tensor],
        parent: Mapping[str, Tensor],
    ) -> "Bag":
        """The bag of a header and tensors.

        Parameters
        ----------
        features, grid, parent: per scale, as in a :class:`Bag` and its
            :class:`~dasmil.geometry.Tiles`; grid and parent on the CPU.
        """
        tiles = Tiles(
            **header.header_fields(),
            grid={name: _as_array(rows) for name, rows in grid.items()},
            parent={name: _as_array(rows) for name, rows in parent.items()},
        )
        return cls(tiles, features, header.extractors, header.reader, header.num_damaged)

    @cached_property
    def header(self) -> BagHeader:
        """The bag without its tensors."""
        return BagHeader(
            **self.tiles.header_fields(),
            extractors=self.extractors,
            num_tiles=len(self.tiles.grid[self.scales[-1]]),
            reader=self.reader,
            num_damaged=self.num_damaged,
        )

    @property
    def slide_id(self) -> str:
        return self.tiles.slide_id

    @property
    def scales(self) -> tuple[str, ...]:
        """Names, coarse to fine."""
        return self.tiles.scale_names

    @cached_property
    def grid(self) -> Mapping[str, Tensor]:
        """Per scale (N_s, 2) int32 row, col; views of the tiles' arrays."""
        return {name: torch.from_numpy(rows) for name, rows in self.tiles.grid.items()}

    @cached_property
    def parent(self) -> Mapping[str, Tensor]:
        """Per scale but the coarsest (N_s,) int32; views of the tiles' arrays."""
        return {name: torch.from_numpy(rows) for name, rows in self.tiles.parent.items()}

    def num_tiles(self) -> dict[str, int]:
        """Tiles per scale."""
        return self.tiles.num_tiles()

    def boxes_px0(self, scale: str) -> Tensor:
        """(N_s, 4) left, top, right, bottom in level-0 pixels."""
        return torch.from_numpy(self.tiles.boxes_px0(scale))

    def select(self, scales: Collection[str]) -> "Bag":
        """The bag with these scales only; a tile's parent is its ancestor in the next one left.

        Raises
        ------
        InputError
            if the bag lacks one of them.
        """
        missing = [name for name in scales if name not in self.scales]
        if missing or not scales:
            self._refuse(
                f"asked for the scales {', '.join(scales)}, it has {', '.join(self.scales)}"
            )
        chosen = [name for name in self.scales if name in scales]
        parent = {}
        for coarse, fine in pairwise(chosen):
            between = self.scales[self.scales.index(coarse) + 1 : self.scales.index(fine) + 1]
            parent[fine] = ancestor_rows([self.parent[name] for name in between]).numpy()
        tiles = replace(
            self.tiles,
            scales=tuple(scale for scale in self.tiles.scales if scale.name in scales),
            grid={name: self.tiles.grid[name] for name in chosen},
            parent=parent,
        )
        features = {name: self.features[name] for name in chosen}
        extractors = {name: self.extractors[name] for name in chosen}
        return replace(self, tiles=tiles, features=features, extractors=extractors)

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
        """Check that every feature is finite; the one promise that needs to read all of them."""
        for name, features in self.features.items():
            if not all_finite(features):
                self._refuse(f"{name}: some features are not finite")

    def validate_structure(self) -> None:
        """Check every other promise; of features only shape and dtype."""
        names = self.scales
        if set(self.features) != set(names):
            self._refuse(f"features of one of the scales {', '.join(names)} are missing")
        if set(self.extractors) != set(names):
            self._refuse(f"the header must name the extractors of {', '.join(names)}")
        if fault := self.tiles.fault(complete=False):
            self._refuse(fault)
        for name in names:
            features, num_tiles = self.features[name], len(self.tiles.grid[name])
            if features.ndim != 2 or len(features) != num_tiles:
                self._refuse(f"{name}: features {tuple(features.shape)} for {num_tiles} tiles")
            if features.shape[1] != self.extractors[name].feature_dim:
                self._refuse(f"{name}: features are not as wide as their extractor's")
            if features.dtype not in (torch.float16, torch.float32):
                self._refuse(f"{name}: features must be float16 or float32, not {features.dtype}")

    def _refuse(self, reason: str) -> None:
        raise InputError(f"bag {self.slide_id}: {reason}; embed the slide again")


def _as_array(rows: Tensor) -> Int32Array:
    """The same numbers; other types than int32, which are refused, as int64: NumPy lacks some."""
    return (rows if rows.dtype == torch.int32 else rows.long()).numpy()


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
