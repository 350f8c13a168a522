"""The kind ``dino-checkpoint`` of the verb ``import``: DINO's weights → our checkpoint."""

import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from dasmil.embedding.networks import vit_backbone
from dasmil.embedding.record import BACKBONE_PREFIX, ExtractorRecord
from dasmil.embedding.restricted import is_state_dict, load_restricted, refuse_no_numbers
from dasmil.embedding.weights import Misfit
from dasmil.errors import InputError, join_few
from dasmil.files import atomic_path
from dasmil.units import Scale

NAMES = {  # by width; timm's ViT has the keys of the original
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
}


class NumpyScalar:
    """Replace NumPy's scalars: the optimizer's rates are such, and nothing here needs them."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


ALLOWED = (
    Namespace,
    (NumpyScalar, "numpy.dtype"),
    (NumpyScalar, "numpy.core.multiarray.scalar"),  # NumPy 1
    (NumpyScalar, "numpy._core.multiarray.scalar"),  # NumPy 2
    (NumpyScalar, "_codecs.encode"),  # of a scalar's bytes
)


def dino_checkpoint(
    file: Path,
    out: Path,
    network: Literal["teacher", "student"] = "teacher",
    image_size: int = 256,
    normalize: bool = True,
    scale: str | None = None,
    tile_px: int | None = None,
) -> int:
    """Convert a checkpoint of facebookresearch/dino into an extractor checkpoint for `embed`.

    The format is that of Caron et al., "Emerging Properties in Self-Supervised Vision
    Transformers", ICCV 2021.

    Parameters
    ----------
    file:
        checkpoint of a ViT-T, ViT-S or ViT-B, or only its backbone; gzip-compressed or not.
    out:
        the checkpoint to write.
    network:
        which network to take; DINO itself is evaluated by its teacher.
    image_size:
        side in pixels at which tiles are embedded, a multiple of the ViT's patch; the position
        embedding is resampled to it as in the original.
    normalize:
        whether to apply ImageNet's mean and std, as in DINO's training; false for features like
        those that mil4wsi released, which were extracted without.
    scale:
        the scale of the tiles that the weights were trained on, for example x20; by default tiles
        of any scale are embedded.
    tile_px:
        side in pixels of the tiles that the weights were trained on; by default tiles of any size
        are embedded.

    Returns
    -------
    The exit code, 0.

    Raises
    ------
    InputError
        if the file cannot be loaded safely, or its weights are not those of such a ViT.
    """
    if out.is_dir() or out.resolve() == file.resolve():
        raise InputError(f"{out}: a folder or the imported file itself; give another file to write")
    mpp = None if scale is None else Scale.parse(scale).mpp
    content = load_restricted(file, ALLOWED, "checkpoint of DINO")
    weights = _backbone_weights(content, network, file)
    name, patch = _architecture(weights, file)
    if image_size < patch or image_size % patch:
        raise InputError(
            f"image_size: {image_size} is not a multiple of {patch}, the patch of {file}; give one"
        )
    if "pos_embed" in weights:
        weights["pos_embed"] = _resample(weights["pos_embed"].float(), image_size // patch)
    options = {} if patch == 16 else {"patch_size": patch}
    with torch.device("meta"):
        wanted = vit_backbone(name, image_size, options).state_dict()
    if misfit := Misfit.of(wanted, weights):
        raise InputError(
            f"{file}: its weights do not fit {name} with patch {patch} ({misfit}); is it damaged?"
        )

    record = ExtractorRecord(
        name=name,
        options=options,
        image_size=image_size,
        mean=IMAGENET_DEFAULT_MEAN if normalize else (0.0, 0.0, 0.0),
        std=IMAGENET_DEFAULT_STD if normalize else (1.0, 1.0, 1.0),
        scale=scale,
        mpp=mpp,
        tile_px=tile_px,
        trained_on=None,
    )
    state = {f"{BACKBONE_PREFIX}{key}": weights[key].float() for key in wanted}
    with atomic_path(out) as temporary:
        torch.save({"extractor": asdict(record), "state_dict": state}, temporary)

    print(
        "the slides that these weights were trained on are not known: `fit` will warn that "
        "held-out slides may be among them"
    )
    epoch = f", epoch {content['epoch']}" if isinstance(content.get("epoch"), int) else ""
    print(
        f"imported {name} with patch {patch} ({network if network in content else 'backbone'} of "
        f"{file}{epoch}) for images of {image_size} px "
        f"{'with' if normalize else 'without'} ImageNet's normalisation; "
        f"use it with: embed --extractors.{scale or 'SCALE'} {out}"
    )
    return 0


def _backbone_weights(content: Any, network: str, file: Path) -> dict[str, Tensor]:
    """The backbone's weights under timm's keys."""
    content = content if isinstance(content, dict) else {}
    weights = content.get(network)
    if network == "teacher" and is_state_dict(content):
        weights = content  # only the teacher's backbone, as DINO's authors publish it
    if not is_state_dict(weights):
        raise InputError(
            f"{file}: not a checkpoint of DINO with a {network}; it holds "
            f"{join_few(list(map(str, content))) or 'no keys'}"
        )
    named = {
        str(key).removeprefix("module.").removeprefix("backbone."): weight
        for key, weight in weights.items()
    }
    named = {key: weight for key, weight in named.items() if not key.startswith("head.")}
    refuse_no_numbers(named, file)
    return named


def _architecture(weights: Mapping[str, Tensor], file: Path) -> tuple[str, int]:
    """timm's name of the ViT, and the side of its patch in pixels."""
    patches = weights.get("patch_embed.proj.weight", torch.empty(0))
    if patches.ndim != 4 or len(patches) not in NAMES:
        raise InputError(
            f"{file}: not a ViT-T, ViT-S or ViT-B of DINO, whose patch_embed.proj.weight is "
            f"{', '.join(map(str, NAMES))} wide; it holds {join_few(weights)}"
        )
    return NAMES[len(patches)], patches.shape[-1]


def _resample(position: Tensor, size: int) -> Tensor:
    """Position embedding (1, 1 + g², D) → (1, 1 + size², D), as DINO does in each forward pass.

    The 0.1 is from the original: the scale factor, not the size, sets where the grid is sampled.
    An embedding of another shape is returned unchanged.
    """
    grid = math.isqrt(max(0, position.shape[1] - 1)) if position.ndim == 3 else 0
    if grid in (0, size) or position.shape[1] != 1 + grid**2:
        return position
    patches = position[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # (1, D, g, g)
    factor = (size + 0.1) / grid
    patches = F.interpolate(patches, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([position[:, :1], patches.flatten(2).mT], dim=1)
