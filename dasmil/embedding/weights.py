"""Files of weights: read without running their code, and loaded strictly."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dasmil.embedding.restricted import is_state_dict, load_checkpoint, refuse_no_numbers
from dasmil.errors import InputError, explaining, join_few
from dasmil.files import must_be_file

WRAPPERS = ("state_dict", "model", "teacher")
PREFIXES = ("module.", "backbone.")
HEADS = ("head", "fc")  # classifiers; timm's configuration names a network's own
OPTION_OF_KEY = {  # part of a key → the option by which a network has such keys
    ".ls1.": "init_values",
    "reg_token": "reg_tokens",
    "fc_norm.": "global_pool",
    ".q_norm.": "qk_norm",
    ".mlp.norm.": "mlp_layer",
}


def load_weights(network: nn.Module, name: str, path: Path) -> None:
    """Load a file's weights into a timm network without classifier; every key must fit.

    A file is a state dict, or holds one under ``state_dict``, ``model`` or ``teacher`` (even if it
    also holds a ``student``). The prefix ``module.`` and then ``backbone.`` is removed if all keys
    but the classifier's have it. Only the classifier is dropped, with a printed note: ``head.*``,
    ``fc.*`` and the keys that timm calls so, if the network has no such key.

    Parameters
    ----------
    name: of the network, for messages.
    path: .safetensors, or a file of torch.save (.pth, .pt, .bin) that holds only tensors and plain
        values.

    Raises
    ------
    InputError
        if the file cannot be read safely, keys are missing, unexpected or of another shape, or
        values are complex, NaN or infinite.
    """
    wanted = network.state_dict()
    heads = _heads(network)
    weights = _without_prefixes(_state_dict(path), heads)
    dropped = [key for key in weights if key not in wanted and key.startswith(heads)]
    weights = {key: weight for key, weight in weights.items() if key not in dropped}

    if misfit := Misfit.of(wanted, weights):
        cause = _likely_cause(network, misfit, weights)
        raise InputError(f"{path}: these weights do not fit {name} ({misfit}); {cause}")
    refuse_no_numbers(weights, path)
    network.load_state_dict(weights)
    if dropped:
        print_once(f"{path}: its classifier is not needed and is left out: {', '.join(dropped)}")


@dataclass(frozen=True)
class Misfit:
    """How the keys of weights differ from those of a network.

    Parameters
    ----------
    missing, unexpected: keys that only the network has, and that only the weights have.
    reshaped: keys of another shape → the two shapes in words.
    """

    missing: Sequence[str]
    unexpected: Sequence[str]
    reshaped: Mapping[str, str]

    @classmethod
    def of(cls, wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> "Misfit | None":
        """The difference between a network's state dict and weights; None if they fit."""
        misfit = cls(
            [key for key in wanted if key not in weights],
            [key for key in weights if key not in wanted],
            {
                key: f"{key} {tuple(weight.shape)} instead of {tuple(wanted[key].shape)}"
                for key, weight in weights.items()
                if key in wanted and weight.shape != wanted[key].shape
            },
        )
        return misfit if any((misfit.missing, misfit.unexpected, misfit.reshaped)) else None

    def __str__(self) -> str:
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.reshaped.values(),
        }
        return "; ".join(f"{kind}: {join_few(keys)}" for kind, keys in kinds.items() if keys)


def refuse_other_keys(network: nn.Module, weights: Any, where: object) -> None:
    """Raise :class:`InputError` unless a checkpoint's weights are finite and fit a network.

    Parameters
    ----------
    network: may be on torch's meta device, where it takes no memory.
    weights: the value of ``state_dict`` in the checkpoint.
    where: the checkpoint, for messages.
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
    """The tensors of a file by key, from the top level or from a wrapper."""
    content = _read(path)
    if is_state_dict(content):
        return content
    wrappers = [key for key in WRAPPERS if is_state_dict(content.get(key))]
    if len(wrappers) != 1:
        held = f"several sets of weights ({', '.join(wrappers)})" if wrappers else "no weights"
        raise InputError(
            f"{path}: holds {held} at its top level or under one of {', '.join(WRAPPERS)} (a "
            "student is not accepted: DINO's result is its teacher), but "
            f"{join_few(content)}; save only the state dict of the network"
        )
    if wrappers == ["teacher"] and "student" in content:
        print_once(f"{path}: holds a teacher and a student; the teacher is used")
    return content[wrappers[0]]


def _read(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        return load_checkpoint(path, kind="state dict")
    advice = "give the file of weights"
    must_be_file(path, advice)
    with explaining(f"{path}: not a whole safetensors file", advice, SafetensorError, OSError):
        return load_file(path)


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


def _likely_cause(network: nn.Module, misfit: "Misfit", weights: Mapping[str, Tensor]) -> str:
    missing, unexpected, reshaped = misfit.missing, misfit.unexpected, set(misfit.reshaped)
    if missing and not reshaped:
        for key in unexpected:
            prefix = next((key.removesuffix(m) for m in missing if key.endswith(f".{m}")), None)
            if prefix and all(prefix + m in unexpected for m in missing):
                return f"all keys begin with {prefix!r}: save them without it"
    if not missing and not unexpected and reshaped == {"pos_embed"}:
        size = _trained_size(network, weights["pos_embed"])
        return "they were trained at another image size" + (
            f": give `options: {{img_size: {size}}}`, and image_size if tiles enter at another one"
            if size
            else "; give it as img_size in options"
        )
    options = {
        option
        for part, option in OPTION_OF_KEY.items()
        if any(part in f".{key}" for key in (*missing, *unexpected))
    }
    if options:
        return f"the cause may be the network's options ({', '.join(sorted(options))})"
    return "the cause may be another architecture, or another option of it"


def _trained_size(network: Any, position: Tensor) -> int | None:
    """Side in px of the images of a position embedding (1, T, D); None if it is not square."""
    prefix = network.state_dict()["pos_embed"].shape[1] - network.patch_embed.num_patches
    side = math.isqrt(max(0, position.shape[1] - prefix))
    if side == 0 or side**2 + prefix != position.shape[1]:
        return None
    return side * int(network.patch_embed.patch_size[0])


@rank_zero_only
def print_once(sentence: str) -> None:
    """Print a sentence; of several processes only rank 0 does."""
    print(sentence)
