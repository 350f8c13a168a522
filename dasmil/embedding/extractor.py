"""A frozen backbone with its normalisation: tiles in, one vector a tile out."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dasmil.bags.bag import ExtractorCard
from dasmil.errors import InputError
from dasmil.units import Scale

RANDOM = "random:"
CHECKPOINT_SUFFIXES = frozenset({".ckpt", ".pt", ".pth"})
BACKBONE_PREFIX = "teacher.backbone."


def create_backbone(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
    """A timm network without its classifier.

    Raises
    ------
    InputError
        when timm does not know the name, or its weights are neither cached nor reachable.
    """
    if not timm.is_model(name):
        near = ", ".join(get_close_matches(name, timm.list_models(), 3))
        raise InputError(
            f"extractor {name!r}: neither a checkpoint file nor a timm model"
            + (f"; near it: {near}" if near else "")
        )
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except Exception as error:
        if not pretrained:
            raise
        raise InputError(
            f"extractor {name!r}: its pretrained weights are not in the local cache and cannot be "
            f"downloaded ({type(error).__name__}); download them once on a machine with a network, "
            f"or write {RANDOM}{name} for random weights"
        ) from error


class Extractor(nn.Module):
    """A frozen network with all that is done to a tile before it.

    Parameters
    ----------
    backbone: images (N, 3, S, S) → features (N, D).
    name: its timm name.
    image_size: S; tiles of another size are resampled to it.
    mean, std: the normalisation of RGB in 0..1.
    trained_on: slide_ids whose pixels the weights have seen, which they may not be tested on; None
        where not known.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        name: str,
        image_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        trained_on: tuple[str, ...] | None = None,
    ):
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.trained_on = trained_on
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        with torch.inference_mode():
            feature_dim = int(backbone(torch.zeros(1, 3, image_size, image_size)).shape[1])
        settings = {"name": name, "image_size": image_size, "mean": mean, "std": std}
        self.card = ExtractorCard(
            name=name,
            fingerprint=_fingerprint(backbone.state_dict(), settings),
            mean=mean,
            std=std,
            image_size=image_size,
            feature_dim=feature_dim,
        )

    def forward(self, tiles: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 RGB → (N, D)."""
        x = tiles.to(self.mean.dtype, copy=True)
        if x.shape[-1] != self.card.image_size:
            size = (self.card.image_size, self.card.image_size)
            x = F.interpolate(x, size, mode="bilinear", antialias=True)
        x.sub_(255 * self.mean).div_(255 * self.std)  # in place: small networks wait for this
        return self.backbone(x)


def _fingerprint(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class ExtractorRecord:
    """What a DINO checkpoint says of its backbone, under the key ``extractor``; plain values.

    Parameters
    ----------
    name: timm name of the backbone.
    options: arguments of the backbone that differ from the name's.
    image_size: side in pixels at which tiles are to be embedded.
    scale, mpp, tile_px: the tiles it was trained on; None where not known.
    trained_on: the slide_ids it has seen; None where not known.
    """

    name: str
    options: dict[str, Any]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: str | None
    mpp: float | None
    tile_px: int | None
    trained_on: tuple[str, ...] | None


def load_extractor(source: str, scale: Scale, tile_px: int) -> Extractor:
    """An extractor from a DINO checkpoint file, or from timm by name.

    Parameters
    ----------
    source: path of a checkpoint of ``fit --config configs/dino.yaml`` or ``import``; or a timm name
        (pretrained weights); or ``random:`` and a timm name (random weights, the same at every
        call).
    scale, tile_px: the tiles it is to embed; a checkpoint of another scale is refused.
    """
    if Path(source).suffix in CHECKPOINT_SUFFIXES or Path(source).is_file():
        return _from_checkpoint(Path(source), scale, tile_px)
    name = source.removeprefix(RANDOM)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone(name, pretrained=name == source)
    config: dict[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    trained_on = None if name == source else ()  # random weights have seen nothing
    return Extractor(
        backbone, name, config["input_size"][-1], config["mean"], config["std"], trained_on
    )


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU; tensors and plain values only, never unpickled code."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be loaded safely as a checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path}: not a checkpoint of dasmil")
    return checkpoint


def _from_checkpoint(path: Path, scale: Scale, tile_px: int) -> Extractor:
    checkpoint = load_checkpoint(path)
    if "extractor" not in checkpoint:
        raise InputError(
            f"{path}: holds no extractor; give a checkpoint of `fit --config configs/dino.yaml`, "
            "or of `import dino-checkpoint`"
        )
    record = ExtractorRecord(**checkpoint["extractor"])
    mpp, trained_px = record.mpp or scale.mpp, record.tile_px or tile_px
    if abs(mpp / scale.mpp - 1) > 1e-6 or trained_px != tile_px:
        raise InputError(
            f"{path}: trained on {_tiles(record.scale, record.mpp, record.tile_px)}, asked to "
            f"embed {_tiles(scale.name, scale.mpp, tile_px)}; give the checkpoint of that scale"
        )
    backbone = vit_backbone(record.name, record.image_size, **record.options)
    prefix, weights = BACKBONE_PREFIX, checkpoint["state_dict"]
    weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    backbone.load_state_dict(weights)
    return Extractor(
        backbone,
        record.name,
        record.image_size,
        record.mean,
        record.std,
        record.trained_on,
    )


def _tiles(scale: str | None, mpp: float | None, tile_px: int | None) -> str:
    """The tiles in words, as far as known."""
    words = [scale, "tiles", tile_px and f"of {tile_px} px", mpp and f"({mpp:g} µm/px)"]
    return " ".join(str(word) for word in words if word)


def vit_backbone(name: str, image_size: int, **options: Any) -> nn.Module:
    """A timm ViT that also takes images of other sizes, as DINO's small crops need."""
    try:
        return create_backbone(name, img_size=image_size, dynamic_img_size=True, **options)
    except TypeError as error:
        raise InputError(
            f"backbone {name!r} with {options}: not a ViT that takes crops of any size ({error})"
        ) from error
