"""LightningDataModules: graphs for the methods, pixels for self-supervision."""

from dasmil.data.bags import BagDataModule
from dasmil.data.split import SplitOptions
from dasmil.data.tiles import TileDataModule
from dasmil.data.views import ViewOptions

__all__ = ["BagDataModule", "SplitOptions", "TileDataModule", "ViewOptions"]
