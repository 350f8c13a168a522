"""What a DINO checkpoint says of its backbone; a record may come from anyone, so it is checked."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from dasmil.errors import InputError
from dasmil.plain import NOTHING, TEXT, Kind, by_name, either, number, refuse_other, several, whole
from dasmil.slides.study import read_records
from dasmil.units import Scale

BACKBONE_PREFIX = "teacher.backbone."


def _is_scale(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(Scale.parse(value))
    except InputError:
        return False


def _are_records(value: Any) -> bool:
    try:
        return read_records(value) is not None
    except InputError:
        return False


SCALE = Kind("a scale such as x20", _is_scale)
STUDY = Kind("records of slides", _are_records)
KINDS = {
    "name": TEXT,
    "options": by_name(TEXT, Kind("an option of a network", lambda _: True), 0, 64),
    "image_size": whole(1, 2**13),
    "mean": several(number(-10, 10), 3, 3),
    "std": several(number(1e-6, 10), 3, 3),
    "scale": either(SCALE, NOTHING),
    "mpp": either(number(1e-3, 1e3), NOTHING),
    "tile_px": either(whole(1, 2**14), NOTHING),
    "trained_on": STUDY,
}


@dataclass(frozen=True)
class ExtractorRecord:
    """What a DINO checkpoint says of its backbone, under the key ``extractor``; plain values.

    Parameters
    ----------
    name: timm name of the backbone.
    options: arguments of the backbone that differ from the name's, see
        :data:`dasmil.embedding.networks.OPTIONS`.
    image_size: side in pixels at which tiles are to be embedded.
    scale, mpp, tile_px: the tiles it was trained on; None where not known.
    trained_on: records of the slides it has seen, :mod:`dasmil.slides.study`, as plain values
        (slide_ids in older checkpoints); None where not known.
    """

    name: str
    options: dict[str, Any]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: str | None
    mpp: float | None
    tile_px: int | None
    trained_on: Sequence[Any] | None

    @classmethod
    def read(cls, values: Any, where: object) -> "ExtractorRecord":
        """The record of a checkpoint.

        Parameters
        ----------
        values: what the checkpoint holds under ``extractor``.
        where: the checkpoint, for messages.

        Raises
        ------
        InputError
            when a value is missing, unknown, or of another kind.
        """
        names = [field.name for field in fields(cls)]
        refuse_other(values, KINDS, f"{where}: its record of the extractor", required=names)
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
