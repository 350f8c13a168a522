"""LightningDataModules: graphs for DAS-MIL, pixels for self-supervision."""

from dasmil.data.bags import BagDataModule
from dasmil.data.tiles import TileDataModule

__all__ = ["BagDataModule", "TileDataModule"]
