"""Files of weights: read without running anything that is in them, and loaded strictly."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dasmil.embedding.restricted import is_state_dict, load_checkpoint, refuse_no_numbers
from dasmil.errors import InputError, some_of
from dasmil.files import must_be_file

WRAPPERS = ("state_dict", "model", "teacher")
PREFIXES = ("module.", "backbone.")
HEADS = ("head", "fc")  # classifiers; timm names a network's own in its configuration
OPTIONS = {  # part of a key → the network's option that decides whether there is such a key
    ".ls1.": "init_values",
    "reg_token": "reg_tokens",
    "fc_norm.": "global_pool",
    ".q_norm.": "qk_norm",
    ".mlp.norm.": "mlp_layer",
}


def load_weights(network: nn.Module, name: str, path: Path) -> None:
    """Put a file's weights into a timm network without classifier; every key must fit.

    A file is a state dict, or holds one under ``state_dict``, ``model`` or ``teacher`` (which is
    taken where a ``student`` is beside it). ``module.`` and then ``backbone.`` is taken off the
    keys when all but the classifier's begin with it. What is dropped, and said, is the classifier
    alone: ``head.*``, ``fc.*`` and what timm calls so, where the network has no such key.

    Parameters
    ----------
    path: .safetensors, or a file of torch.save (.pth, .pt, .bin) with nothing but tensors and plain
        values.

    Raises
    ------
    InputError
        when the file cannot be read safely, keys are missing, unexpected or of another shape, or
        values are complex, NaN or infinite.
    """
    wanted = network.state_dict()
    heads = _heads(network)
    weights = _without_prefixes(_state_dict(path), heads)
    dropped = [key for key in weights if key not in wanted and key.startswith(heads)]
    weights = {key: weight for key, weight in weights.items() if key not in dropped}

    if misfit := Misfit.of(wanted, weights):
        reshaped = {key: weights[key] for key in misfit.reshaped}
        cause = _likely_cause(network, misfit.missing, misfit.unexpected, reshaped)
        raise InputError(f"{path}: these weights do not fit {name} ({misfit}); {cause}")
    refuse_no_numbers(weights, path)
    network.load_state_dict(weights)
    if dropped:
        say(f"{path}: its classifier is not needed and is left out: {', '.join(dropped)}")


@dataclass(frozen=True)
class Misfit:
    """Keys of weights that are not those of a network.

    Parameters
    ----------
    reshaped: keys of another shape, and the two shapes in words.
    """

    missing: Sequence[str]
    unexpected: Sequence[str]
    reshaped: Mapping[str, str]

    @classmethod
    def of(cls, wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> "Misfit | None":
        """The difference between what a network has and what a file holds; None if they agree."""
        found = cls(
            [key for key in wanted if key not in weights],
            [key for key in weights if key not in wanted],
            {
                key: f"{key} {tuple(weight.shape)} instead of {tuple(wanted[key].shape)}"
                for key, weight in weights.items()
                if key in wanted and weight.shape != wanted[key].shape
            },
        )
        return found if any((found.missing, found.unexpected, found.reshaped)) else None

    def __str__(self) -> str:
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.reshaped.values(),
        }
        return "; ".join(f"{kind}: {some_of(keys)}" for kind, keys in kinds.items() if keys)


def refuse_other_keys(network: nn.Module, weights: Any, where: object) -> None:
    """Raise :class:`InputError` if a checkpoint's weights are not numbers for this network.

    Parameters
    ----------
    network: may lie on torch's meta device, where it takes no memory.
    """
    if not is_state_dict(weights):
        raise InputError(f"{where}: holds no weights by name; give a whole checkpoint")
    if misfit := Misfit.of(network.state_dict(), weights):
        raise InputError(
            f"{where}: its weights are not those of its model ({misfit}); it was changed, or "
            "written by another version of dasmil"
        )
    refuse_no_numbers(weights, where)


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by key, out of a wrapper that holds them."""
    content = _read(path)
    if is_state_dict(content):
        return content
    held = [key for key in WRAPPERS if is_state_dict(content.get(key))]
    if len(held) != 1:
        what = f"several sets of weights ({', '.join(held)})" if held else "no weights"
        raise InputError(
            f"{path}: {what} where they are looked for, at the top or under one of "
            f"{', '.join(WRAPPERS)} (a student alone is not taken: DINO's result is its teacher); "
            f"it holds {some_of(content)}: save the state dict of the network alone"
        )
    if held == ["teacher"] and "student" in content:
        say(f"{path}: holds a teacher and a student; the teacher is taken")
    return content[held[0]]


def _read(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        return load_checkpoint(path, kind="state dict")
    must_be_file(path, "give the file of weights")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from error


def _heads(network: nn.Module) -> tuple[str, ...]:
    config = getattr(network, "pretrained_cfg", {})
    own = config.get("classifier") or ()
    names = (own,) if isinstance(own, str) else tuple(own)
    return tuple(f"{name}." for name in {*HEADS, *names})


def _without_prefixes(weights: dict[str, Tensor], heads: tuple[str, ...]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        body = [key for key in weights if not key.startswith(heads)]
        if body and all(key.startswith(prefix) for key in body):
            weights = {key.removeprefix(prefix): weight for key, weight in weights.items()}
    return weights


def _likely_cause(
    network: nn.Module,
    missing: Collection[str],
    unexpected: Collection[str],
    of_another_shape: Mapping[str, Tensor],
) -> str:
    if missing and not of_another_shape:
        for key in unexpected:
            prefix = next((key.removesuffix(m) for m in missing if key.endswith(f".{m}")), None)
            if prefix and all(prefix + m in unexpected for m in missing):
                return f"all keys begin with {prefix!r}: save them without it"
    if not missing and not unexpected and set(of_another_shape) == {"pos_embed"}:
        size = _trained_size(network, of_another_shape["pos_embed"])
        return "they were trained at another image size" + (
            f": give `options: {{img_size: {size}}}`, and image_size where tiles are to enter at "
            "another one"
            if size
            else "; give it as img_size in options"
        )
    hints = {
        option
        for part, option in OPTIONS.items()
        if any(part in f".{key}" for key in (*missing, *unexpected))
    }
    if hints:
        return f"the cause may be the network's options ({', '.join(sorted(hints))})"
    return "the cause may be another architecture, or another option of it"


def _trained_size(network: Any, position: Tensor) -> int | None:
    """Side in px of the images that a position embedding (1, T, D) is for; None if not a square."""
    prefix = network.state_dict()["pos_embed"].shape[1] - network.patch_embed.num_patches
    side = math.isqrt(max(0, position.shape[1] - prefix))
    if side == 0 or side**2 + prefix != position.shape[1]:
        return None
    return side * int(network.patch_embed.patch_size[0])


@rank_zero_only
def say(sentence: str) -> None:
    """Print it, in one process of many."""
    print(sentence)
