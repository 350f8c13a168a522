"""A timm network's tokens or feature map → one vector per image."""

from typing import Any, Literal

import torch
from torch import Tensor

from dasmil.errors import InputError

Pooling = Literal["own", "cls", "mean", "cls_mean"]


def pool(network: Any, images: Tensor, pooling: Pooling) -> Tensor:
    """Embed images (N, 3, S, S) as features (N, D), or (N, 2 D) with ``cls_mean``.

    ``own`` is the output of the network's own head before its classifier. The other poolings use
    the output of ``forward_features``, without the norm that some networks apply after their own
    pooling: ``cls`` is the class token; ``mean`` is the mean of the patch tokens (not of class or
    register tokens), or of a convolutional network's map.

    Raises
    ------
    InputError
        if the network has no class token, does not tell which tokens are patches, or has no pooling
        of its own.
    """
    if pooling == "own":
        features = network(images)
        if not isinstance(features, Tensor) or features.ndim != 2:
            raise InputError("it does not pool by itself; name a pooling: cls, mean or cls_mean")
        return features
    features = network.forward_features(images)
    parts = []
    if pooling in ("cls", "cls_mean"):
        if getattr(network, "cls_token", None) is None or not _tells_patches(network, features):
            raise InputError(f"pooling {pooling} needs a class token, which it lacks; take mean")
        parts.append(features[:, 0])
    if pooling in ("mean", "cls_mean"):
        parts.append(_mean(network, features))
    return torch.cat(parts, dim=1)


def _mean(network: Any, features: Any) -> Tensor:
    """(N, D), over the patches only."""
    if isinstance(features, Tensor) and features.ndim == 4:
        is_channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"  # such as Swin
        return features.mean((1, 2) if is_channels_last else (2, 3))
    if not _tells_patches(network, features):
        raise InputError("which of its tokens are patches is not known; leave pooling out")
    return features[:, network.num_prefix_tokens :].mean(1)


def _tells_patches(network: Any, features: Any) -> bool:
    """Whether features are tokens (N, L, D), and timm gives the number before the patches."""
    is_tokens = isinstance(features, Tensor) and features.ndim == 3
    return is_tokens and hasattr(network, "num_prefix_tokens")
