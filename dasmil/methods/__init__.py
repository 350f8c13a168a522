"""One file per method. ``model.class_path`` names the class; there is no other registry."""

from dasmil.methods.abmil import ABMIL
from dasmil.methods.clam import CLAM
from dasmil.methods.dasmil import DASMIL
from dasmil.methods.dtfd import DTFD
from dasmil.methods.load import load

__all__ = ["ABMIL", "CLAM", "DASMIL", "DTFD", "load"]
