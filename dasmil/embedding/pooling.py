"""From a timm network's tokens or feature maps to one vector an image."""

from typing import Any, Literal

import torch
from torch import Tensor

from dasmil.errors import InputError

Pooling = Literal["own", "cls", "mean", "cls_mean"]


def pool(network: Any, images: Tensor, pooling: Pooling) -> Tensor:
    """(N, 3, S, S) → (N, D); ``cls_mean`` gives (N, 2 D).

    ``own`` is what the network's own head makes before its classifier. The others take what
    ``forward_features`` gives as it is, without the norm that some networks put behind their own
    pooling: ``cls`` the class token; ``mean`` the mean of the patch tokens (never of class or
    register tokens), or of a convolutional network's map.

    Raises
    ------
    InputError
        when the network has no class token to take, or does not say which tokens are patches.
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
    """Over the patches alone."""
    if isinstance(features, Tensor) and features.ndim == 4:
        is_channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"  # Swin, for one
        return features.mean((1, 2) if is_channels_last else (2, 3))
    if not _tells_patches(network, features):
        raise InputError("which of its tokens are patches is not known; leave pooling out")
    return features[:, network.num_prefix_tokens :].mean(1)


def _tells_patches(network: Any, features: Any) -> bool:
    """Whether these are tokens (N, L, D), and timm says how many come before the patches'."""
    is_tokens = isinstance(features, Tensor) and features.ndim == 3
    return is_tokens and hasattr(network, "num_prefix_tokens")
