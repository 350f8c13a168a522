"""A slide as mil4wsi keeps it, read and checked.

mil4wsi (https://github.com/aimagelab/mil4wsi) pickles a torch_geometric ``Data`` for each slide, in
``processed/{train,test}/data_*.pt``: the features of all tiles, their places in level-0 pixels,
their parents and the edges between them.
"""

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
from dasmil.errors import InputError
from dasmil.interop.mil4wsi.grid import IntArray
from dasmil.names import name_fault
from dasmil.slides.cohort import MAX_ID_BYTES
from dasmil.units import Scale

SCALES = {1: Scale.parse("x5"), 2: Scale.parse("x10"), 3: Scale.parse("x20")}  # by their "level"
ALLOWED = (Data, DataEdgeAttr, DataTensorAttr, GlobalStorage)
MAX_PX0 = 2**31


@dataclass(frozen=True)
class PreparedGraph:
    """What one file says, in its own order and numbering of tiles.

    Parameters
    ----------
    features: (N, D) float16 or float32.
    level: (N,) 1 is x5, 2 is x10, 3 is x20.
    childof: (N,) row of the parent, -1 for none.
    place: (N, 2) x, y of the top left corner in level-0 pixels.
    edges: (2, E) of all scales and between them.
    """

    slide_id: str
    label: int
    features: Tensor
    level: IntArray
    childof: IntArray
    place: IntArray
    edges: IntArray


def read_prepared(path: Path) -> PreparedGraph:
    """A file of mil4wsi, checked.

    Raises
    ------
    InputError
        when it cannot be loaded safely, or is not what mil4wsi writes.
    """

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise InputError(f"{path}: {what}; it is no graph that mil4wsi prepared")

    kind = "graph of torch_geometric"
    data = load_restricted(path, ALLOWED, kind)
    require(isinstance(data, Data), f"it holds no {kind}")
    try:
        values = dict(data.to_dict())
    except Exception as error:  # what a graph is put together from may be of any kind
        raise InputError(f"{path}: cannot be read as a {kind} ({error})") from error
    name: Any = values.get("name")
    x: Any = values.get("x")
    edges: Any = values.get("edge_index")
    is_name = isinstance(name, str) and name == name.strip() and not name_fault(name, MAX_ID_BYTES)
    require(is_name, f"its name {str(name)[:300]} names no slide")
    require(_is_dense(x) and x.ndim == 2 and len(x) > 0, "x is not (N, D)")
    require(x.dtype in (torch.float16, torch.float32), "x is neither float16 nor float32")
    require(bool(torch.isfinite(x).all()), "some features are not finite")

    def whole(key: str, shape: tuple[int, ...], low: int, high: int) -> IntArray:
        value: Any = values.get(key)
        holds = _is_dense(value) and value.dtype in (torch.int32, torch.int64)
        require(holds and value.shape == shape, f"{key} is not {shape} whole numbers")
        array = value.numpy().astype(np.int64)
        require(bool(((array >= low) & (array < high)).all()), f"{key} has impossible values")
        return array

    num_edges = edges.shape[-1] if _is_dense(edges) and edges.ndim == 2 else 0
    xy = [whole(key, (len(x),), -MAX_PX0, MAX_PX0) for key in ("x_coord", "y_coord")]
    return PreparedGraph(
        slide_id=name,
        label=int(whole("y", (1,), -MAX_PX0, MAX_PX0)[0]),
        features=x.detach(),
        level=whole("level", (len(x),), min(SCALES), max(SCALES) + 1),
        childof=whole("childof", (len(x),), -1, len(x)),
        place=np.stack(xy, axis=1),
        edges=whole("edge_index", (2, num_edges), 0, len(x)),
    )


def _is_dense(value: Any) -> bool:
    """A tensor on the CPU with all its values in the file, not one value shown a billion times."""
    is_tensor = isinstance(value, Tensor) and value.layout == torch.strided
    return (
        is_tensor
        and value.device.type == "cpu"
        and value.untyped_storage().nbytes() >= value.nbytes
    )
