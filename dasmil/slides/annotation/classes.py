"""Which classes of an annotation are lesions."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dasmil.errors import InputError
from dasmil.slides.annotation.limits import shorten

Meaning = Literal["lesion", "excluded", "other"]


@dataclass(frozen=True)
class Classes:
    """What the classes of a format mean; names count without regard to case.

    Parameters
    ----------
    lesions: what is positive.
    excluded: what is cut out of the lesions.
    others: what says nothing about lesions, known as such. So is every name that ends with an
        asterisk, by QuPath's convention.
    all_else: whether every further name says nothing, too, or is refused.
    noun: what the format calls a class.
    """

    lesions: frozenset[str]
    excluded: frozenset[str]
    others: frozenset[str] = frozenset()
    all_else: bool = False
    noun: str = "class"

    def with_lesions(self, names: Collection[str] | None) -> "Classes":
        """These names alone are lesions; what is cut out stays so, all else says nothing."""
        if names is None:
            return self
        lesions = frozenset(name.strip().lower() for name in names)
        return replace(self, lesions=lesions, all_else=True)

    def meaning(self, path: Path, what: str, name: str, base: str | None = None) -> Meaning:
        """What a class says.

        Parameters
        ----------
        path, what: the file and its annotation, for the error.
        base: of a derived class ("Tumor" of "Tumor: Positive"); asked where the name is not known.

        Raises
        ------
        InputError
            when the class is not known.
        """
        for candidate in (name.strip().lower(), (base or name).strip().lower()):
            if candidate in self.lesions:
                return "lesion"
            if candidate in self.excluded:
                return "excluded"
            if candidate in self.others or candidate.endswith("*"):
                return "other"
        if self.all_else:
            return "other"
        raise InputError(
            f"{path}: {what} is of the {self.noun} {shorten(name)}, which is not known; lesions "
            f"are {_listed(self.lesions)}, what is cut out {_listed(self.excluded)}; to say "
            "yourself what is a lesion give --truth_classes, as '[Tumor]' or "
            "'[\"Tumor: Positive\"]'"
        )


def _listed(names: Collection[str]) -> str:
    *first, last = sorted(names)
    return f"{', '.join(first)} or {last}" if first else last
