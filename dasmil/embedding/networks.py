"""Networks of timm, by name and options: the one place where they are made.

Name and options may come from a file of anyone, so they are data: names that timm knows, options of
an architecture. Nothing is fetched here; :mod:`dasmil.embedding.hub` fetches what a user has named.
"""

import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from dasmil.errors import InputError
from dasmil.plain import SWITCH, WORD, either, number, refuse_other, several, whole

RANDOM = "random:"
MAX_PARAMETERS = 8 * 10**9  # timm's largest network has 6.7 · 10⁹
MAX_TOKENS = 2**14  # of an image: 2048 px in patches of 16
COUNT, AMOUNT = whole(0, 2**14), number(-1e4, 1e4)
DEPTHS = either(whole(0, 128), several(whole(0, 64), 1, 8))  # layers take time to make
COUNTS, AMOUNTS, SWITCHES = (either(k, several(k, 1, 16)) for k in (COUNT, AMOUNT, SWITCH))
# arguments of timm's networks that a record or a user may set; those that name a file, an address
# or code of another place are none of them
OPTIONS = {
    **dict.fromkeys(("depth", "depths", "layers"), DEPTHS),
    **dict.fromkeys(
        (
            *("img_size", "patch_size", "embed_dim", "embed_dims", "num_heads", "dims", "channels"),
            *("widths", "window_size", "kernel_size", "kernel_sizes"),
            *("reg_tokens", "num_reg_tokens", "ref_feat_shape", "swiglu_align_to", "num_kv_heads"),
            *("stem_size", "stem_width", "stem_stride", "base_width", "cardinality", "groups"),
            *("output_stride", "head_hidden_size", "num_features", "head_dim", "head_mul"),
        ),
        COUNTS,
    ),
    **dict.fromkeys(
        (
            *("mlp_ratio", "mlp_ratios", "init_values", "norm_eps", "expand_ratio", "bottle_ratio"),
            *("layer_scale_init_value", "ls_init_value", "head_init_scale", "rope_temperature"),
            *("drop_rate", "drop_path_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate"),
            *("attn_drop_rate", "channel_multiplier", "width_mult", "depth_mult", "se_ratio"),
        ),
        AMOUNTS,
    ),
    **dict.fromkeys(
        (
            *("qkv_bias", "qkv_fused", "qk_norm", "proj_bias", "class_token", "no_embed_class"),
            *("pre_norm", "final_norm", "fc_norm", "pool_include_prefix", "dynamic_img_size"),
            *("dynamic_img_pad", "strict_img_size", "scale_attn_norm", "scale_mlp_norm"),
            *("scale_attn_inner", "scale_mlp", "swiglu_mlp", "fix_init", "use_abs_pos_emb"),
            *("use_rel_pos_bias", "use_shared_rel_pos_bias", "use_rot_pos_emb", "use_fc_norm"),
            *("use_post_norm", "use_pre_transformer_norm", "use_post_transformer_norm"),
            *("conv_mlp", "conv_bias", "use_grn", "avg_down", "distilled", "always_partition"),
        ),
        SWITCHES,
    ),
    **dict.fromkeys(
        (
            *("global_pool", "pos_embed", "weight_init", "attn_type", "rope_type", "stem_type"),
            *("rope_grid_indexing", "pad_type"),
            *("act_layer", "norm_layer", "mlp_layer", "attn_layer", "embed_layer", "conv_layer"),
            *("embed_norm_layer", "aa_layer", "se_layer"),
        ),
        WORD,
    ),
}


def create_network(
    name: str,
    options: Mapping[str, Any],
    overlay: Mapping[str, Any] | None = None,
    called: str | None = None,
) -> nn.Module:
    """A timm network without its classifier; its weights are random unless an overlay names a file.

    Parameters
    ----------
    name: as timm knows it.
    options: arguments of the network, as plain values; layers by their names.
    overlay: of timm's pretrained configuration, see :mod:`dasmil.embedding.hub`; never from a
        record.
    called: what the user calls it, if that is another name.

    Raises
    ------
    InputError
        when timm does not know the name, an option is none of an architecture or of another kind,
        the network would be too large, or timm does not take the options.
    """
    where = f"extractor {(called or name)!r}"
    refuse_unknown(name, called)
    given = {key: value for key, value in options.items() if value is not None}
    refuse_other(given, OPTIONS, f"{where}: options")
    arguments = {**_with_layers(name, given), "num_classes": 0}
    file = (overlay or {}).get("file")
    try:
        if given:  # else it is as large as timm has made it
            with torch.device("meta"):  # shapes alone
                sketch = timm.create_model(name, pretrained=False, **arguments)
            _refuse_large(sketch, Path(file).stat().st_size if file else MAX_PARAMETERS, where)
        return timm.create_model(
            name,
            pretrained=file is not None,
            pretrained_cfg_overlay=dict(overlay or {}),
            **arguments,
        )
    except InputError:
        raise
    except Exception as error:  # networks raise many kinds for arguments that they do not take
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].rstrip(": ")
        raise InputError(
            f"{where}: timm does not make it"
            + (f" with the options {given}" if given else "")
            + f" ({reason})"
        ) from error


def refuse_unknown(name: str, called: str | None = None) -> None:
    """Raise :class:`InputError` unless a name is one of timm's own networks, with a tag or not."""
    if re.fullmatch(r"\w+(\.\w+)?", name) and timm.is_model(name):
        return
    near = ", ".join(get_close_matches(name, timm.list_models(), 3))
    raise InputError(
        f"extractor {(called or name)!r}: neither a checkpoint file nor a timm model"
        + (f"; near it: {near}" if near else "")
    )


def _refuse_large(network: nn.Module, most: int, where: str) -> None:
    found = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
    if found > most:
        raise InputError(
            f"{where}: its options ask for {found:.1e} weights, more than {most:.1e}; take others"
        )


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
    """The sides in px next to this one that a network's stride divides, in words."""
    stride = total_stride(network)
    below = image_size // stride * stride
    return " or ".join(f"{size}" for size in (below, below + stride) if size)


def total_stride(network: Any) -> int:
    """Pixels of the image between two places of a network's last map; 1 where it does not say."""
    strides = [info["reduction"] for info in getattr(network, "feature_info", ())]
    return max([*strides, *_patch(network)], default=1)


def _patch(network: Any) -> tuple[int, ...]:
    """Height and width of a ViT's patches in px; empty for other networks."""
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", ())
    return (patch, patch) if isinstance(patch, int) else tuple(patch)


def vit_backbone(name: str, image_size: int, options: Mapping[str, Any]) -> nn.Module:
    """A timm ViT that also takes images of other sizes, as DINO's small crops need.

    Parameters
    ----------
    name, options: as :func:`create_network` takes them.
    image_size: side in px of the images that it is made for.

    Raises
    ------
    InputError
        when timm has no such ViT, or images of this size are no whole number of patches, or of too
        many.
    """
    sizes = {"img_size": image_size, "dynamic_img_size": True}
    network = create_network(name, {**options, **sizes})
    refuse_cut_patches(network, name, "image_size", image_size)
    if math.prod(image_size // side for side in _patch(network)) > MAX_TOKENS:
        raise InputError(
            f"image_size: {image_size} px are more than {MAX_TOKENS} patches of {name}; take fewer"
        )
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
