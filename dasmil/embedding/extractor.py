"""A frozen network with its normalisation: tiles → one feature vector per tile."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import Tensor, nn

from dasmil.bags.bag import ExtractorCard
from dasmil.embedding.hub import HubNetwork, fetch_network, is_on_hub
from dasmil.embedding.networks import (
    RANDOM,
    create_network,
    nearest_sizes,
    resize_network,
    total_stride,
    vit_backbone,
)
from dasmil.embedding.pooling import Pooling, pool
from dasmil.embedding.record import BACKBONE_PREFIX, ExtractorRecord
from dasmil.embedding.restricted import load_checkpoint, refuse_no_numbers
from dasmil.embedding.weights import load_weights, print_once, refuse_other_keys
from dasmil.errors import InputError
from dasmil.slides.study import SlideRecord, plain_records, read_records
from dasmil.units import Scale

CHECKPOINT_SUFFIXES = frozenset({".ckpt", ".pt", ".pth", ".safetensors", ".bin"})
WEIGHTS_ONLY = "to give a file of weights, name its network too: model NAME and weights FILE"
Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class ExtractorSource:
    """Where an extractor comes from, and which settings of its source to change.

    Parameters
    ----------
    model:
        a timm name, random:NAME (random weights), hf-hub:ORG/NAME@REVISION (without @REVISION the
        newest), or a DINO checkpoint.
    weights:
        file of weights (.safetensors, .pth, .pt, .bin) instead of timm's pretrained ones; every
        key must fit the network.
    pooling:
        own, as the network's head pools; cls, the class token; mean, the mean of the patch tokens
        or of a convolutional network's map; cls_mean, both concatenated.
    image_size:
        side in px to which tiles are resampled; default: timm's for that name.
    mean:
        of RGB in 0..1, subtracted from tiles; default: timm's for that name.
    std:
        of RGB in 0..1, by which tiles are divided; default: timm's for that name.
    interpolation:
        for tiles whose side is not image_size; default: timm's for that name.
    options:
        arguments of the timm network, such as {init_values: 1e-5, dynamic_img_size: true}; layers
        by name, such as {mlp_layer: SwiGLUPacked, act_layer: SiLU}.
    """

    model: str
    weights: str | None = None
    pooling: Pooling = "own"
    image_size: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Interpolation | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def asked(self) -> dict[str, Any]:
        """The model and the settings that differ from the defaults, as plain values."""
        default = ExtractorSource(self.model)
        return {
            key: value
            for key, value in asdict(self).items()
            if key == "model" or value != getattr(default, key)
        }


class Extractor(nn.Module):
    """A frozen network with the preprocessing of its tiles and the pooling of its features.

    Parameters
    ----------
    backbone: images (N, 3, S, S) → features (N, D).
    name: its timm name.
    image_size: S; whole tiles of another size are resampled to it.
    mean, std: the normalisation of RGB in 0..1.
    trained_on: the slides whose pixels the weights have seen, on which they must not be tested;
        None if not known.
    pooling: see :func:`dasmil.embedding.pooling.pool`.
    interpolation: of the resampling, antialiased as PIL's.
    options: arguments of the backbone beside its name, as plain values.

    Raises
    ------
    InputError
        if the network cannot pool in this way, or takes no images of that size.
    """

    mean: Tensor
    std: Tensor
    repository: str | None = None  # on the hub, with the commit

    def __init__(
        self,
        backbone: nn.Module,
        name: str,
        image_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        trained_on: Sequence[SlideRecord] | None = None,
        pooling: Pooling = "own",
        interpolation: Interpolation = "bilinear",
        options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if min(std) <= 0:
            raise InputError(f"extractor {name!r}: its std {std} must be above 0")
        self.backbone = backbone.eval().requires_grad_(False)
        self.trained_on = None if trained_on is None else plain_records(trained_on)
        self.pooling: Pooling = pooling
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        settings = {
            "name": name,
            "mean": mean,
            "std": std,
            "image_size": image_size,
            "pooling": pooling,
            "interpolation": interpolation,
            "options": json.loads(json.dumps(dict(options or {}))),  # as a bag file returns them
        }
        self.card = ExtractorCard(
            fingerprint=_fingerprint(backbone.state_dict(), settings),
            feature_dim=self._feature_dim(name, image_size),
            **settings,
        )

    def _feature_dim(self, name: str, image_size: int) -> int:
        try:
            if image_size < 1:
                raise ValueError("no pixel")
            features = self._features_of_noise(image_size)
        except InputError as error:
            raise InputError(f"extractor {name!r}: {error}") from error
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise InputError(
                f"extractor {name!r}: cannot embed images of {image_size} px ({reason}); give an "
                f"image_size that it takes, such as {nearest_sizes(self.backbone, image_size)}"
            ) from error
        if (
            image_size % total_stride(self.backbone)
            and torch.equal(features, self._features_of_noise(image_size, border=1))
            and not torch.equal(features, self._features_of_noise(image_size, border=image_size))
        ):
            raise InputError(
                f"extractor {name!r}: it ignores the right and lower border of an image of "
                f"{image_size} px, which is no whole patch; choose an image_size of "
                f"{nearest_sizes(self.backbone, image_size)}"
            )
        return features.shape[1]

    def _features_of_noise(self, image_size: int, border: int = 0) -> Tensor:
        """(1, D) of one fixed image whose last ``border`` rows and columns are inverted."""
        images = torch.rand(
            1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)
        )
        inner = image_size - border
        images[..., inner:, :] = 1 - images[..., inner:, :]
        images[..., :inner, inner:] = 1 - images[..., :inner, inner:]
        with torch.inference_mode():
            return pool(self.backbone, images, self.pooling)

    def forward(self, tiles: Tensor) -> Tensor:
        """Embed tiles (N, 3, H, W) uint8 RGB as features (N, D)."""
        x = tiles.to(torch.float32, copy=True)
        if x.shape[-1] != self.card.image_size:
            size = (self.card.image_size, self.card.image_size)
            x = F.interpolate(x, size, mode=self.card.interpolation, antialias=True)
            x.round_().clamp_(0, 255)  # as PIL does: bicubic overshoots
        x.sub_(255 * self.mean).div_(255 * self.std)  # in place: else slower than small networks
        return pool(self.backbone, x.to(self.mean.dtype), self.pooling)


def _fingerprint(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_extractor(source: str | ExtractorSource, scale: Scale, tile_px: int) -> Extractor:
    """Load an extractor from a DINO checkpoint file, or from timm by name.

    A timm network has timm's normalisation, image size and interpolation for that name. Whole tiles
    are resampled: timm's ``crop_pct``, which crops the border off, is ignored.

    Parameters
    ----------
    source: path of a checkpoint of ``fit --config configs/dino.yaml`` or ``import``; or a timm name
        (pretrained weights); or ``random:`` and a timm name (random weights, the same at every
        call); or an :class:`ExtractorSource`.
    scale, tile_px: the tiles to embed.

    Raises
    ------
    InputError
        if the source cannot be read, its settings contradict each other, or it is a checkpoint of
        another scale or tile size.
    """
    if isinstance(source, str):
        source = ExtractorSource(source)
    path = Path(source.model)
    if path.suffix in CHECKPOINT_SUFFIXES or path.is_file():
        return _from_checkpoint(path, source, scale, tile_px)
    return _from_timm(source)


def _from_timm(source: ExtractorSource) -> Extractor:
    name = source.model.removeprefix(RANDOM)
    is_random = name != source.model
    if is_random and source.weights:
        raise InputError(
            f"extractor {source.model!r}: it names both random weights and the file "
            f"{source.weights}; leave one of them out"
        )
    network = HubNetwork(name)
    if is_on_hub(name) or not (is_random or source.weights):
        network = fetch_network(name, with_weights=source.weights is None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_network(
            network.name, {**network.options, **source.options}, network.overlay, name
        )
    if source.weights:
        load_weights(backbone, name, Path(source.weights))
        if source.mean is None or source.std is None:
            print_once(
                f"{source.weights}: tiles are normalised with timm's mean and std of {name}; set "
                "both if these weights were trained with others"
            )
    elif network.repository:
        refuse_no_numbers(backbone.state_dict(), network.repository)
        print_once(f"extractor {name!r}: read from hf-hub:{network.repository}")
    config = resolve_data_config({}, model=backbone)
    native_size = source.options.get("img_size", config["input_size"][-1])
    if not isinstance(native_size, int):
        raise InputError(f"extractor {name!r}: img_size must be one whole number, tiles are square")
    image_size = native_size if source.image_size is None else source.image_size
    if image_size != native_size:
        resize_network(backbone, name, image_size)
    extractor = Extractor(
        backbone,
        name,
        image_size,
        tuple(source.mean or config["mean"]),
        tuple(source.std or config["std"]),
        () if is_random else None,  # random weights have seen no slide
        source.pooling,
        source.interpolation or config["interpolation"],
        source.options,
    )
    extractor.repository = network.repository
    return extractor


def _from_checkpoint(path: Path, source: ExtractorSource, scale: Scale, tile_px: int) -> Extractor:
    if path.suffix in (".safetensors", ".bin"):
        raise InputError(f"{path}: {WEIGHTS_ONLY}")
    checkpoint = load_checkpoint(path)
    if "extractor" not in checkpoint:
        raise InputError(
            f"{path}: holds no extractor; give a checkpoint of `fit --config configs/dino.yaml`, "
            f"or of `import dino-checkpoint`; {WEIGHTS_ONLY}"
        )
    asked = sorted(source.asked().keys() - {"model", "pooling"})
    if asked:
        raise InputError(f"{path}: a DINO checkpoint holds {', '.join(asked)} itself; leave it out")
    record = ExtractorRecord.read(checkpoint["extractor"], path)
    mpp, trained_px = record.mpp or scale.mpp, record.tile_px or tile_px
    if abs(mpp / scale.mpp - 1) > 1e-6 or trained_px != tile_px:
        raise InputError(
            f"{path}: trained on {_tiles(record.scale, record.mpp, record.tile_px)}, asked to "
            f"embed {_tiles(scale.name, scale.mpp, tile_px)}; give the checkpoint of that scale"
        )
    weights = _backbone_of(checkpoint.get("state_dict"))
    try:
        with torch.device("meta"):  # compare the weights before memory is allocated
            sketch = vit_backbone(record.name, record.image_size, record.options)
        refuse_other_keys(sketch, weights, path)
        backbone = vit_backbone(record.name, record.image_size, record.options)
    except InputError as error:
        raise InputError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    backbone.load_state_dict(weights)
    return Extractor(
        backbone,
        record.name,
        record.image_size,
        record.mean,
        record.std,
        None if record.trained_on is None else read_records(record.trained_on),
        source.pooling,
        options=record.options,
    )


def _backbone_of(weights: Any) -> dict[str, Any]:
    """The weights of the teacher's backbone; :func:`refuse_other_keys` checks them."""
    named = weights.items() if isinstance(weights, Mapping) else ()
    return {
        key.removeprefix(BACKBONE_PREFIX): weight
        for key, weight in named
        if isinstance(key, str) and key.startswith(BACKBONE_PREFIX)
    }


def _tiles(scale: str | None, mpp: float | None, tile_px: int | None) -> str:
    """Tiles in words, as far as known."""
    words = [scale, "tiles", tile_px and f"of {tile_px} px", mpp and f"({mpp:g} µm/px)"]
    return " ".join(str(word) for word in words if word)
