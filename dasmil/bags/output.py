"""The output of a method at one scale, which losses and reports read."""

from dataclasses import dataclass

from torch import Tensor

from dasmil.errors import InputError


@dataclass  # not frozen: Lightning converts its fields under mixed precision
class ScaleOutput:
    """The output at one scale, for B bags with N tiles in all and C logits.

    Parameters
    ----------
    bag_logits: (B, C), y in the paper.
    instance_logits: (N, C), z in the paper; None if a method has none.
    attention: (N, C); sums to one over the tiles of a bag. None if a method has none. A method with
        one attention for all logits repeats it.
    bag_index: (N,) the bag of each row.
    shown: (N,) bool, False for a tile that the head does not see, whose attention is zero; None if
        it sees all. (D12: coarse tiles without children. D numbers: .github/docs/paper.md.)

    A method whose loss needs more returns a subclass with more fields.

    Raises
    ------
    ValueError
        naming the first tensor of another shape.
    """

    bag_logits: Tensor
    instance_logits: Tensor | None
    attention: Tensor | None
    bag_index: Tensor
    shown: Tensor | None = None

    def __post_init__(self) -> None:
        shape = (*self.bag_index.shape, *self.bag_logits.shape[1:])  # (N, C)
        if self.bag_logits.ndim != 2 or self.bag_index.ndim != 1:
            raise ValueError(
                f"ScaleOutput: bag_logits {tuple(self.bag_logits.shape)} must be (B, C) and "
                f"bag_index {tuple(self.bag_index.shape)} (N,)"
            )
        for name in ("instance_logits", "attention"):
            values = getattr(self, name)
            if values is not None and values.shape != shape:
                raise ValueError(
                    f"ScaleOutput: {name} {tuple(values.shape)} must be (N, C), here {shape}"
                )

    def tile_scores(self) -> Tensor:
        """(N, C) scores that rank tiles: their logits, else their attention.

        Raises
        ------
        InputError
            if the method has neither.
        """
        scores = self.attention if self.instance_logits is None else self.instance_logits
        if scores is None:
            raise InputError("this method scores only slides, not tiles; leave --truth out")
        return scores
