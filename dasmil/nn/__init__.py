"""Building blocks of the methods: pure torch modules, one operator per file.

They import neither Lightning nor losses and read no files. D numbers: .github/docs/paper.md.
"""

from dasmil.bags.output import ScaleOutput
from dasmil.nn.gat import GAT
from dasmil.nn.mil_head import MILHead
from dasmil.nn.pgnn import PGNN
from dasmil.nn.pooling_head import PoolingHead
from dasmil.nn.standardize import Standardize

__all__ = ["GAT", "PGNN", "MILHead", "PoolingHead", "ScaleOutput", "Standardize"]
