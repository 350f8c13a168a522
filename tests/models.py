"""Modules of a method from flat options, and their checkpoints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from dasmil.bags.neighbours import Neighbours
from dasmil.json_text import flatten
from dasmil.methods import DASMIL
from dasmil.methods.dasmil import DASMILNetwork, NetworkOptions
from dasmil.modules import MILModule, ModelCard
from dasmil.modules.options import nested_options, typed_options
from dasmil.nn import GAT


def make_module(
    method: type[MILModule] = DASMIL,
    classes: Sequence[str] = ("normal", "tumour"),
    bag_format: Mapping[str, Any] | None = None,
    split: Any = (),
    thresholds: Mapping[str, Mapping[str, float]] | None = None,
    **options: Any,
) -> MILModule:
    """A module, bound to bags if their format is given.

    Parameters
    ----------
    options: of the method or of one of its groups, such as ``hidden_dim=8``.
    """
    module = method(**typed_options(method, nested_options(method, options)))
    if bag_format is not None:
        weights = options.get("class_weights")
        weights = tuple(weights) if isinstance(weights, list) else None
        card = ModelCard(tuple(classes), bag_format, split, "val", thresholds, weights)
        module.bind(card)
    return module


def save_untrained(path: Path, **options: Any) -> None:
    """Write the checkpoint of a small module that has not been trained, as a Trainer writes it."""
    torch.manual_seed(0)
    small = {"hidden_dim": 8, "out_dim": 8, "query_dim": 4, "heads": 1}
    module = make_module(**{**small, **options})
    module.trainer = trainer = Trainer(logger=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)


def make_network(
    in_dims: Mapping[str, int],
    num_logits: int = 1,
    hidden_dim: int = 384,
    out_dim: int = 256,
    heads: int = 3,
    **options: Any,
) -> DASMILNetwork:
    """DAS-MIL's network from options that stand side by side."""
    given = NetworkOptions(hidden_dim, out_dim, heads, **options)
    return DASMILNetwork(in_dims, num_logits, given)


def leaves(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of all groups side by side, by the last part of their names."""
    return {name.rsplit(".", 1)[-1]: value for name, value in flatten(options).items()}


class ReferenceGAT(GAT):
    """The layer as PyG's GATConv computes it; it has the same weights."""

    def _attend(self, x: Tensor, neighbours: Neighbours) -> Tensor:
        return self.conv(x, neighbours.edge_index())

    def _in_blocks(self, x: Tensor, neighbours: Neighbours, into: Tensor | None) -> Tensor:
        x = x.to(self.conv.bias.dtype)
        h = self.gate(self._attend(x, neighbours))
        return h if self.residual == "none" else x + h


def with_gatconv(network: nn.Module) -> nn.Module:
    """The network with PyG's layers in the place of ours; the weights stay."""
    for module in network.modules():
        if isinstance(module, GAT):
            module.__class__ = ReferenceGAT
    return network
