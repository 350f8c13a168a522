"""Create timm's networks by name and options; no other module creates them.

Name and options may come from a file that anyone wrote. So only names that timm knows and options
of an architecture are accepted. Nothing is fetched: :mod:`dasmil.embedding.hub` does that.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dasmil.errors import InputError, near
from dasmil.plain import SWITCH, WORD, either, number, refuse_other, several, whole

RANDOM = "random:"
MAX_PARAMETERS = 8 * 10**9  # timm's largest network has 6.7 · 10⁹
MAX_TOKENS = 2**14  # per image: 2048 px in patches of 16
SETTERS = {"normal_", "uniform_", "erfinv_", "clamp_", "mul_", "add_"}  # of a tensor's values
COUNT, AMOUNT = whole(0, 2**14), number(-1e4, 1e4)
DEPTHS = either(whole(0, 128), several(whole(0, 64), 1, 8))  # layers take time to create
COUNTS, AMOUNTS, SWITCHES = (either(k, several(k, 1, 16)) for k in (COUNT, AMOUNT, SWITCH))
# Arguments of timm's networks that a record or a user may set. Arguments that name a file, an
# address or code are not among them.
OPTIONS = {
    name: kind
    for kind, names in {
        DEPTHS: "depth depths layers",
        COUNTS: "img_size patch_size embed_dim embed_dims num_heads dims channels widths "
        "window_size kernel_size kernel_sizes reg_tokens num_reg_tokens ref_feat_shape "
        "swiglu_align_to num_kv_heads stem_size stem_width stem_stride base_width "
        "cardinality groups output_stride head_hidden_size num_features head_dim head_mul",
        AMOUNTS: "mlp_ratio mlp_ratios init_values norm_eps expand_ratio bottle_ratio "
        "layer_scale_init_value ls_init_value head_init_scale rope_temperature drop_rate "
        "drop_path_rate pos_drop_rate patch_drop_rate proj_drop_rate attn_drop_rate "
        "channel_multiplier width_mult depth_mult se_ratio",
        SWITCHES: "qkv_bias qkv_fused qk_norm proj_bias class_token no_embed_class pre_norm "
        "final_norm fc_norm pool_include_prefix dynamic_img_size dynamic_img_pad strict_img_size "
        "scale_attn_norm scale_mlp_norm scale_attn_inner scale_mlp swiglu_mlp fix_init "
        "use_abs_pos_emb use_rel_pos_bias use_shared_rel_pos_bias use_rot_pos_emb use_fc_norm "
        "use_post_norm use_pre_transformer_norm use_post_transformer_norm conv_mlp conv_bias "
        "use_grn avg_down distilled always_partition",
        WORD: "global_pool pos_embed weight_init attn_type rope_type stem_type rope_grid_indexing "
        "pad_type act_layer norm_layer mlp_layer attn_layer embed_layer conv_layer "
        "embed_norm_layer aa_layer se_layer",
    }.items()
    for name in names.split()
}


def create_network(
    name: str,
    options: Mapping[str, Any],
    overlay: Mapping[str, Any] | None = None,
    called: str | None = None,
) -> nn.Module:
    """Create a timm network without its classifier, with random weights unless an overlay has some.

    Parameters
    ----------
    name: timm's name.
    options: arguments of the network, as plain values; layers by their names.
    overlay: values that replace those of timm's pretrained configuration, see
        :class:`dasmil.embedding.hub.HubNetwork`; never from a record.
    called: the name that the user gave, if it is another one.

    Raises
    ------
    InputError
        if timm does not know the name, an option is unknown or of another kind, the network would
        be too large, or timm rejects the options.
    """
    where = f"extractor {(called or name)!r}"
    refuse_unknown(name, called)
    given = {key: value for key, value in options.items() if value is not None}
    refuse_other(given, OPTIONS, f"{where}: options")
    arguments = {**_with_layers(name, given), "num_classes": 0}
    file = (overlay or {}).get("file")
    try:
        if given:  # without options its size is known to be sane
            with torch.device("meta"), _ShapesOnly():
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
    except Exception as error:  # networks raise many kinds for arguments that they reject
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].rstrip(": ")
        words = f" with the options {given}" if given else ""
        raise InputError(f"{where}: timm cannot create it{words} ({reason})") from error


class _ShapesOnly(TorchFunctionMode):
    """Leave out what sets weights: on the device ``meta`` torch runs it in Python, for seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in SETTERS:
            return args[0] if args else kwargs["tensor"]  # nn.init names its argument
        return func(*args, **(kwargs or {}))


def refuse_unknown(name: str, called: str | None = None) -> None:
    """Raise :class:`InputError` unless a name is one of timm's own networks, with a tag or not."""
    if re.fullmatch(r"\w+(\.\w+)?", name) and timm.is_model(name):
        return
    raise InputError(
        f"extractor {(called or name)!r}: neither a checkpoint file nor a timm model"
        + near(name, timm.list_models())
    )


def _refuse_large(network: nn.Module, maximum: int, where: str) -> None:
    size = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
    if size > maximum:
        raise InputError(f"{where}: its options ask for {size:.1e} weights, limit {maximum:.1e}")


def _with_layers(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Replace names of layers by classes; timm itself knows short names, in lower case."""
    replaced = dict(options)
    for key, value in options.items():
        if not (key.endswith("_layer") and isinstance(value, str)) or value.islower():
            continue
        replaced[key] = getattr(timm.layers, value, getattr(nn, value, None))
        layer = getattr(replaced[key], "func", replaced[key])  # SwiGLUPacked is a partial
        if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
            raise InputError(
                f"extractor {name!r}: {key} {value!r} is no layer of timm.layers or torch.nn"
                + near(value, [*dir(timm.layers), *dir(nn)])
            )
    return replaced


def resize_network(network: Any, name: str, image_size: int) -> None:
    """Let a network take images of another side in px; timm resamples its position embedding.

    Convolutional networks take any size and do not change.

    Raises
    ------
    InputError
        if the network cannot take the size.
    """
    if not hasattr(network, "set_input_size"):
        return
    try:
        network.set_input_size(img_size=(image_size, image_size))
    except (AssertionError, ValueError, RuntimeError) as error:
        raise InputError(f"extractor {name!r}: no images of {image_size} px ({error})") from error


def nearest_sizes(network: Any, image_size: int) -> str:
    """The nearest sides in px that are multiples of a network's stride, in words."""
    stride = total_stride(network)
    below = image_size // stride * stride
    return " or ".join(f"{size}" for size in (below, below + stride) if size)


def total_stride(network: Any) -> int:
    """Pixels of the image per cell of a network's last feature map; 1 if timm does not tell."""
    strides = [info["reduction"] for info in getattr(network, "feature_info", ())]
    return max([*strides, *_patch(network)], default=1)


def _patch(network: Any) -> tuple[int, ...]:
    """Height and width of a ViT's patches in px; empty for other networks."""
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", ())
    return (patch, patch) if isinstance(patch, int) else tuple(patch)


def vit_backbone(name: str, image_size: int, options: Mapping[str, Any]) -> nn.Module:
    """Create a timm ViT that also takes images of other sizes, such as DINO's small crops.

    Parameters
    ----------
    name, options: as for :func:`create_network`.
    image_size: side in px of most images.

    Raises
    ------
    InputError
        if timm has no such ViT, or images of this size are no whole number of patches, or too many.
    """
    sizes = {"img_size": image_size, "dynamic_img_size": True}
    network = create_network(name, {**options, **sizes})
    refuse_cut_patches(network, name, "image_size", image_size)
    if math.prod(image_size // side for side in _patch(network)) > MAX_TOKENS:
        raise InputError(f"image_size: {image_size} px are over {MAX_TOKENS} patches of {name}")
    return network


def refuse_cut_patches(network: Any, name: str, what: str, size: int) -> None:
    """Raise :class:`InputError` if an image has a cut patch, which a ViT ignores unless it pads.

    Parameters
    ----------
    what: the setting, for the message.
    size: side of the image in px.
    """
    pads = getattr(getattr(network, "patch_embed", None), "dynamic_img_pad", False)
    cut = [patch for patch in _patch(network) if size % patch]
    if size < 1 or (cut and not pads):
        raise InputError(
            f"{what}: {size} px is no whole number of patches of {name}; take "
            f"{nearest_sizes(network, size)}"
        )
