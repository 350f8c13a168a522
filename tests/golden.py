"""Reference tensors of the official programs, in ``tests/golden`` or the folder DASMIL_GOLDEN.

A method's case is a folder ``methods/<case>`` with ``inputs``, ``weights`` and
``expected_float64`` (safetensors): the output of the method's official program for these inputs and
weights, in double precision.

A case of mil4wsi is a folder ``<case>`` with ``expected.json``, ``expected.safetensors`` (float32)
and the files of mil4wsi: ``model.pt``, ``model_pyg22.pt`` and ``processed/test/data_0.pt``. The
repository holds no pickles: ``weights.safetensors`` and ``graph.safetensors`` take their place, and
``released_folder`` writes mil4wsi's files from them.

The tests read sizes, labels and case names from these folders, so other cases of the same layout
run too.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from bag_factory import make_card
from safetensors.torch import load_file
from torch import Tensor
from torch_geometric.data import Data

from dasmil.bags import BagGraph, BagHeader
from dasmil.bags.graph import BagHeaders
from dasmil.geometry import Extent
from dasmil.modules import MILModule, ModelCard
from dasmil.units import Mpp, Scale, TilePx

FOLDER = Path(os.environ.get("DASMIL_GOLDEN", Path(__file__).parent / "golden"))
TOLERANCE = 1e-9
OF_GRADIENTS = 1e-8
RELEASED = sorted(path.parent.name for path in FOLDER.glob("*/expected.json"))


def method_cases(prefix: str) -> list[str]:
    """The cases of a method, by the prefix of their folders."""
    return sorted(path.name for path in (FOLDER / "methods").glob(f"{prefix}*"))


@cache
def released_folder(case: str) -> Path:
    """A folder of mil4wsi's files for a case; skips the test if there is no such case."""
    source = FOLDER / case
    if (source / "model.pt").exists():
        return source
    if not source.is_dir():
        pytest.skip(f"no case {case} in {FOLDER}")
    folder = Path(_temporary().name) / case
    shutil.copytree(source, folder)
    (folder / "processed" / "test").mkdir(parents=True)
    weights = load_file(source / "weights.safetensors")
    torch.save(weights, folder / "model.pt")
    torch.save(_as_pyg22(weights), folder / "model_pyg22.pt")
    values = {
        key: value if value.is_floating_point() else value.long()
        for key, value in load_file(source / "graph.safetensors").items()
    }
    name = json.loads((source / "expected.json").read_text())["slide"]
    torch.save(Data(**values, name=name), folder / "processed" / "test" / "data_0.pt")
    return folder


@cache
def _temporary() -> tempfile.TemporaryDirectory:
    """One folder per process, removed at its end."""
    return tempfile.TemporaryDirectory(prefix="dasmil_golden_")


def _as_pyg22(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the keys of PyG 2.2, which holds a GAT's matrix twice."""
    renamed = {}
    for key, value in weights.items():
        ends = ("lin_src.weight", "lin_dst.weight") if "layers.0.lin." in key else (key,)
        renamed |= {key.replace("lin.weight", end) if end != key else key: value for end in ends}
    return renamed


def released_terms(key: str) -> dict[str, float | str]:
    """Options of the objective from their record: lambda=0.5,beta=0.8,tau=1.5,pool=mean."""
    values = dict(part.split("=") for part in key.split(","))
    return {
        "distillation": float(values["lambda"]),
        "criticality": float(values["beta"]),
        "temperature": float(values["tau"]),
        "children_pooling": values["pool"],
    }


def assert_released(value: Tensor, expected: Tensor, name: str = "") -> None:
    """Assert that float32 values are the expected ones, within 1e-5 of the largest or of 1."""
    atol = 1e-5 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(value, expected, rtol=0, atol=atol, msg=lambda t: f"{name}: {t}")


def assert_released_gradient(value: Tensor, expected: Tensor, name: str) -> None:
    """Assert that a float32 gradient is the expected one, within 1e-5 of its largest entry."""
    atol = max(1e-5 * float(expected.abs().max()), 1e-9)
    torch.testing.assert_close(value, expected, rtol=0, atol=atol, msg=lambda t: f"{name}: {t}")


class Case:
    """One case of a method.

    Parameters
    ----------
    name: of its folder.
    """

    def __init__(self, name: str):
        folder = FOLDER / "methods" / name
        self.inputs, self.weights, self.expected = (
            {
                key: _double(value)
                for key, value in load_file(folder / f"{file}.safetensors").items()
            }
            for file in ("inputs", "weights", "expected_float64")
        )
        self.label = int(self.inputs["label"])

    def graph(self) -> BagGraph:
        """A graph of one bag at x20, in double precision, whose features have a gradient."""
        features = self.inputs["features"].clone().requires_grad_()
        scale = Scale("x20", Mpp(0.5))
        card = make_card(features.shape[1])
        header = BagHeader(
            slide_id="slide",
            extent=Extent((8, 8), Mpp(0.5)),
            scales=(scale,),
            tile_px=TilePx(8),
            extractors={"x20": card},
            num_tiles=len(features),
        )
        return BagGraph(
            features={"x20": features},
            grid={"x20": torch.zeros(len(features), 2, dtype=torch.int32)},
            parent={},
            ptr={"x20": torch.tensor([0, len(features)])},
            labels=torch.tensor([self.label]),
            headers=BagHeaders([header]),
        )

    def bind(self, module: MILModule, num_classes: int, names: Mapping[str, str]) -> MILModule:
        """The module for these features, with the weights of the case, in double precision.

        Parameters
        ----------
        names: of each weight of the network, and of the official program.
        """
        (header,) = self.graph().headers
        classes = tuple(f"class {number}" for number in range(num_classes))
        module.bind(ModelCard(classes, header.bag_format()))
        state = {ours: self.weights[theirs] for ours, theirs in names.items()}
        module.network.double().load_state_dict(state)
        return module.eval()

    def compare(self, name: str, value: Tensor) -> None:
        """Assert that a value is the expected one; its axes of length 1 do not matter."""
        expected = self.expected[name]
        assert value.numel() == expected.numel(), name
        tolerance = OF_GRADIENTS if "grad" in name else TOLERANCE
        torch.testing.assert_close(
            value.detach().double().reshape(expected.shape),
            expected.double(),
            rtol=tolerance,
            atol=tolerance * float(expected.abs().max().clamp(min=1e-3)),
            msg=lambda text: f"{name}: {text}",
        )

    def compare_gradients(
        self, loss: Tensor, network: torch.nn.Module, graph: BagGraph, prefix: str, names: Mapping
    ) -> None:
        """Assert that the gradients of a loss are the expected ones; missing ones are zero."""
        network.zero_grad()
        graph.features["x20"].grad = None
        loss.backward(retain_graph=True)
        for ours, weight in network.named_parameters():
            expected = f"{prefix}grad.{names[ours]}"
            if expected in self.expected:
                assert weight.grad is not None, ours
                self.compare(expected, weight.grad)
            else:
                assert weight.grad is None or not weight.grad.any(), ours
        if f"{prefix}grad_input.features" in self.expected:
            self.compare(f"{prefix}grad_input.features", graph.features["x20"].grad)


def linear(ours: str, theirs: str) -> dict[str, str]:
    """Weight and bias of a linear layer."""
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value
