"""Reference tensors of the official programs, in ``tests/golden`` or where DASMIL_GOLDEN says.

Each case is a folder ``methods/<case>`` with ``inputs``, ``weights`` and ``expected_float64``
(safetensors): what the official program of a method made of these inputs and weights in double
precision. Only numbers are kept. Sizes and labels are read from the files, so that other cases of
the same layout run too.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from bag_factory import make_card
from safetensors.torch import load_file
from torch import Tensor

from dasmil.bags import BagGraph, BagHeader
from dasmil.bags.graph import BagHeaders
from dasmil.modules import MILModule, ModelCard
from dasmil.units import Mpp, Scale, TilePx

FOLDER = Path(os.environ.get("DASMIL_GOLDEN", Path(__file__).parent / "golden"))
TOLERANCE = 1e-9
OF_GRADIENTS = 1e-8


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
            *("slide", (scale,), TilePx(8), Mpp(0.5), (8, 8), "", {"x20": card}, len(features))
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
