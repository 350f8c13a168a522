"""LightningModules: DAS-MIL, and the self-supervision of its extractors."""

from dasmil.modules.dino import DINOModule
from dasmil.modules.mil import DASMILModule

__all__ = ["DASMILModule", "DINOModule"]
