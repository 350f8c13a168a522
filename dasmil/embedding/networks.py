"""Networks of timm, by name and options."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import timm
from torch import nn

from dasmil.errors import InputError

RANDOM = "random:"
HUB = ("hf-hub:", "hf_hub:")
# what timm.create_model takes beside the arguments of a network, and what has a place of its own
NOT_OPTIONS = frozenset(
    {
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
        *("num_classes", "in_chans", "features_only", "scriptable", "exportable", "no_jit"),
    }
)


def create_backbone(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
    """A timm network without its classifier.

    Raises
    ------
    InputError
        when timm does not know the name, or its weights are neither cached nor reachable.
    """
    on_hub = name.startswith(HUB)
    if not on_hub and not timm.is_model(name):
        near = ", ".join(get_close_matches(name, timm.list_models(), 3))
        raise InputError(
            f"extractor {name!r}: neither a checkpoint file nor a timm model"
            + (f"; near it: {near}" if near else "")
        )
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except (TypeError, KeyError, AssertionError, RuntimeError):  # it does not fit the options
        raise
    except Exception as error:
        if not (pretrained or on_hub):
            raise
        raise InputError(
            f"extractor {name!r}: its pretrained weights are not in the local cache and cannot be "
            f"downloaded ({type(error).__name__}); download them once on a machine with a network, "
            + (
                "or name a file of weights"
                if on_hub
                else f"or write {RANDOM}{name} for random ones"
            )
        ) from error


def create_network(name: str, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    """A timm network with arguments that a user names, as plain values; layers by their names.

    Raises
    ------
    InputError
        when timm does not know it, does not take the arguments, or has no such weights.
    """
    refused = sorted(options.keys() & NOT_OPTIONS)
    if refused:
        raise InputError(
            f"extractor {name!r}: {', '.join(refused)} cannot be set under options; these are "
            "the network's own arguments, and a file of weights is named by weights"
        )
    try:
        json.dumps(options)  # the bag keeps them
        return create_backbone(name, pretrained=pretrained, **_with_layers(name, options))
    except InputError:
        raise
    except Exception as error:  # networks raise many kinds for arguments that they do not take
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].rstrip(": ")
        raise InputError(
            f"extractor {name!r}: timm does not make it"
            + (f" with the options {dict(options)}" if options else "")
            + f" ({reason})"
        ) from error


def _with_layers(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with classes for the names of layers; timm itself knows short ones, lower case."""
    made = dict(options)
    for key, value in options.items():
        if not (key.endswith("_layer") and isinstance(value, str)) or value.islower():
            continue
        made[key] = getattr(timm.layers, value, getattr(nn, value, None))
        layer = getattr(made[key], "func", made[key])  # SwiGLUPacked, for one, is a partial
        if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
            near = ", ".join(get_close_matches(value, [*dir(timm.layers), *dir(nn)], 3))
            raise InputError(
                f"extractor {name!r}: {key} {value!r} is no layer of timm.layers or torch.nn"
                + (f"; near it: {near}" if near else "")
            )
    return made


def resize_network(network: Any, name: str, image_size: int) -> None:
    """Let it take images of this side in px; a position embedding is resampled, as timm does it.

    Convolutional networks take any size, and are left as they are.
    """
    if not hasattr(network, "set_input_size"):
        return
    try:
        network.set_input_size(img_size=(image_size, image_size))
    except (AssertionError, ValueError, RuntimeError) as error:
        raise InputError(f"extractor {name!r}: no images of {image_size} px ({error})") from error


def nearest_sizes(network: Any, image_size: int) -> str:
    """The sides in px next to this one that a network's strides divide, in words."""
    strides = [info["reduction"] for info in getattr(network, "feature_info", ())]
    stride = max([*strides, *_patch(network)], default=1)
    below = image_size // stride * stride
    return " or ".join(f"{size}" for size in (below, below + stride) if size)


def _patch(network: Any) -> tuple[int, ...]:
    """Height and width of a ViT's patches in px; empty for other networks."""
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", ())
    return (patch, patch) if isinstance(patch, int) else tuple(patch)


def vit_backbone(name: str, image_size: int, **options: Any) -> nn.Module:
    """A timm ViT that also takes images of other sizes, as DINO's small crops need.

    Raises
    ------
    InputError
        when timm has no such ViT, or images of this size are no whole number of patches.
    """
    try:
        network = create_backbone(name, img_size=image_size, dynamic_img_size=True, **options)
    except TypeError as error:
        raise InputError(
            f"backbone {name!r} with {options}: not a ViT that takes crops of any size ({error})"
        ) from error
    refuse_cut_patches(network, name, "image_size", image_size)
    return network


def refuse_cut_patches(network: Any, name: str, what: str, size: int) -> None:
    """A ViT sees whole patches alone, unless it pads: the rest of an image is lost on it."""
    pads = getattr(getattr(network, "patch_embed", None), "dynamic_img_pad", False)
    cut = [patch for patch in _patch(network) if size % patch]
    if size < 1 or (cut and not pads):
        raise InputError(
            f"{what}: {size} px is no whole number of patches of {name}; take "
            f"{nearest_sizes(network, size)}"
        )
