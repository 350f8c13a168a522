"""Methods that work at one scale."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dasmil.errors import InputError
from dasmil.modules.mil import MILModule


class SingleScaleModule(MILModule):
    """A method that works at one scale; it overrides :meth:`build_network`.

    Parameters
    ----------
    scale:
        scale to read; null: the finest scale of the bags.
    options:
        options of :class:`dasmil.modules.MILModule`.
    """

    def __init__(self, scale: str | None = None, **options: Any):
        super().__init__(**options)
        self.scale = scale

    def build_network(self, scale: str, in_dim: int, num_logits: int) -> nn.Module:
        """Make the network, which turns a BagGraph into a dictionary of one ScaleOutput.

        Parameters
        ----------
        scale: scale to read.
        in_dim: width of its tile features.
        num_logits: C; 1 for two classes with one logit.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override build_network")

    def build(self, in_dims: Mapping[str, int], num_logits: int) -> nn.Module:
        """Make the network of the one scale."""
        if len(in_dims) > 1:
            raise InputError(f"{type(self).__name__} reads one scale, not {', '.join(in_dims)}")
        ((scale, in_dim),) = in_dims.items()
        return self.build_network(scale, in_dim, num_logits)

    def choose_scales(self, available: Sequence[str]) -> Sequence[str]:
        """The scale of the option, or the finest one."""
        scale = self.scale or available[-1]
        if scale not in available:
            raise InputError(
                f"model.scale: {scale} is none of the scales of the bags, {', '.join(available)}"
            )
        return [scale]
