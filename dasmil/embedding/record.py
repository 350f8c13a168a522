"""What a DINO checkpoint records of its backbone; anyone may have written it, so it is checked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dasmil.errors import InputError
from dasmil.plain import NOTHING, TEXT, Kind, by_name, either, number, refuse_other, several, whole
from dasmil.slides.study import read_records
from dasmil.units import Scale

BACKBONE_PREFIX = "teacher.backbone."


def _accepted_by(parse: Callable[[Any], object], words: str) -> Kind:
    """Values that a function accepts."""

    def holds(value: Any) -> bool:
        try:
            parse(value)
        except (InputError, TypeError):
            return False
        return True

    return Kind(words, holds)


SCALE = _accepted_by(Scale.parse, "a scale such as x20")
STUDY = _accepted_by(read_records, "records of slides")
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
    """What a DINO checkpoint records of its backbone, under the key ``extractor``; plain values.

    Parameters
    ----------
    name: timm name of the backbone.
    options: arguments of the backbone that differ from the name's defaults, see
        :data:`dasmil.embedding.networks.OPTIONS`.
    image_size: side in pixels at which tiles are embedded.
    mean, std: the normalisation of RGB in 0..1.
    scale, mpp, tile_px: the tiles that the backbone was trained on; None if not known.
    trained_on: records of the slides that it has seen (:mod:`dasmil.slides.study`), as plain
        values, or slide_ids in older checkpoints; None if not known.
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
        """Check and return the record of a checkpoint.

        Parameters
        ----------
        values: the value of ``extractor`` in the checkpoint.
        where: the checkpoint, for messages.

        Raises
        ------
        InputError
            if a value is missing, unknown, or of another kind.
        """
        names = [field.name for field in fields(cls)]
        refuse_other(values, KINDS, f"{where}: its record of the extractor", required=names)
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
