"""Read and check a slide as mil4wsi stores it.

mil4wsi (https://github.com/aimagelab/mil4wsi) pickles one torch_geometric ``Data`` per slide, in
``processed/{train,test}/data_*.pt``: the features of all tiles, their places in level-0 pixels,
their parents and the edges between them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import GlobalStorage

from dasmil.embedding.restricted import load_restricted
from dasmil.errors import InputError, explaining
from dasmil.interop.features.common_grid import IntArray
from dasmil.names import name_fault
from dasmil.slides.cohort import MAX_ID_BYTES
from dasmil.units import Scale

SCALES = {1: Scale.parse("x5"), 2: Scale.parse("x10"), 3: Scale.parse("x20")}  # by their "level"
KIND = "graph of torch_geometric"
ALLOWED = (Data, DataEdgeAttr, DataTensorAttr, GlobalStorage)
MAX_PX0 = 2**31


@dataclass(frozen=True)
class PreparedGraph:
    """The content of one file, in its own order and numbering of tiles.

    Parameters
    ----------
    features: (N, D) float16 or float32.
    level: (N,) 1 is x5, 2 is x10, 3 is x20.
    childof: (N,) row of the parent, -1 for none.
    place: (N, 2) x, y of the top left corner in level-0 pixels.
    edges: (2, E) of all scales and between them.
    """

    path: Path
    slide_id: str
    label: int
    features: Tensor
    level: IntArray
    childof: IntArray
    place: IntArray
    edges: IntArray

    @property
    def scales(self) -> tuple[Scale, ...]:
        """Those that the file has, coarse to fine."""
        return tuple(SCALES[level] for level in np.unique(self.level))


def read_name(path: Path) -> tuple[str, int]:
    """slide_id and label of a file; its features are not read.

    Raises
    ------
    InputError
        if it cannot be loaded safely, or has neither.
    """
    return _Checked(path, copy=False).name()


def read_prepared(path: Path) -> PreparedGraph:
    """Read and check a file of mil4wsi.

    Raises
    ------
    InputError
        if it cannot be loaded safely, or is not what mil4wsi writes.
    """
    checked = _Checked(path)
    slide_id, label = checked.name()
    x: Any = checked.values.get("x")
    edges: Any = checked.values.get("edge_index")
    checked.require(_is_dense(x) and x.ndim == 2 and len(x) > 0, "x is not (N, D)")
    is_half_or_single = x.dtype in (torch.float16, torch.float32)
    checked.require(is_half_or_single, "x is neither float16 nor float32")
    checked.require(bool(torch.isfinite(x).all()), "some features are not finite")
    num_edges = edges.shape[-1] if _is_dense(edges) and edges.ndim == 2 else 0
    integers = checked.integers
    xy = [integers(key, (len(x),), -MAX_PX0, MAX_PX0) for key in ("x_coord", "y_coord")]
    return PreparedGraph(
        path=path,
        slide_id=slide_id,
        label=label,
        features=x.detach(),
        level=integers("level", (len(x),), min(SCALES), max(SCALES) + 1),
        childof=integers("childof", (len(x),), -1, len(x)),
        place=np.stack(xy, axis=1),
        edges=integers("edge_index", (2, num_edges), 0, len(x)),
    )


class _Checked:
    """The values of a file, which are checked when they are taken.

    Parameters
    ----------
    copy: as for :func:`load_restricted`.
    """

    def __init__(self, path: Path, copy: bool = True):
        self.path = path
        data = load_restricted(path, ALLOWED, KIND, copy=copy)
        self.require(isinstance(data, Data), f"it holds no {KIND}")
        with explaining(f"{path}: cannot be read as a {KIND}", "prepare the graph again"):
            self.values: Mapping[str, Any] = dict(data.to_dict())

    def require(self, holds: bool, fault: str) -> None:
        if not holds:
            raise InputError(
                f"{self.path}: {fault}, so it is no graph of mil4wsi; prepare the graph again"
            )

    def name(self) -> tuple[str, int]:
        """slide_id and label."""
        name: Any = self.values.get("name")
        is_name = isinstance(name, str) and name == name.strip()
        is_name = is_name and not name_fault(name, MAX_ID_BYTES)
        self.require(is_name, f"its name {str(name)[:300]} names no slide")
        return name, int(self.integers("y", (1,), -MAX_PX0, MAX_PX0)[0])

    def integers(self, key: str, shape: tuple[int, ...], low: int, high: int) -> IntArray:
        """The integers of a key, of this shape and in [low, high)."""
        value: Any = self.values.get(key)
        is_integer = _is_dense(value) and value.dtype in (torch.int32, torch.int64)
        self.require(is_integer and value.shape == shape, f"{key} is not {shape} whole numbers")
        array: IntArray = value.numpy().astype(np.int64)
        is_within = bool(((array >= low) & (array < high)).all())
        self.require(is_within, f"{key} has impossible values")
        return array


def _is_dense(value: Any) -> bool:
    """Whether all values of a CPU tensor are stored, not one value repeated a billion times."""
    is_tensor = isinstance(value, Tensor) and value.layout == torch.strided
    return (
        is_tensor
        and value.device.type == "cpu"
        and value.untyped_storage().nbytes() >= value.nbytes
    )
