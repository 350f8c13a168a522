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
    """The meaning of a format's classes; names ignore case.

    Parameters
    ----------
    lesions: positive classes.
    excluded: classes that are cut out of the lesions.
    others: known classes that are ignored. So is every name that ends with an asterisk, by QuPath's
        convention.
    all_else: whether every other name is ignored too, instead of refused.
    noun: the format's word for a class.
    """

    lesions: frozenset[str]
    excluded: frozenset[str]
    others: frozenset[str] = frozenset()
    all_else: bool = False
    noun: str = "class"

    def with_lesions(self, names: Collection[str] | None) -> "Classes":
        """Only these names are lesions; excluded classes stay so, all others are ignored."""
        if names is None:
            return self
        lesions = frozenset(name.strip().lower() for name in names)
        return replace(self, lesions=lesions, all_else=True)

    def meaning(self, path: Path, what: str, name: str, base: str | None = None) -> Meaning:
        """The meaning of a class.

        Parameters
        ----------
        path, what: the file and its annotation, for the error.
        base: of a derived class ("Tumor" of "Tumor: Positive"); used if the name is not known.

        Raises
        ------
        InputError
            if the class is not known.
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
            f"{path}: {what} has the unknown {self.noun} {shorten(name)}; lesions are "
            f"{_listed(self.lesions)}, excluded are {_listed(self.excluded)}; name the lesions "
            "yourself with --truth_classes, as '[Tumor]' or '[\"Tumor: Positive\"]'"
        )


def _listed(names: Collection[str]) -> str:
    *first, last = sorted(names)
    return f"{', '.join(first)} or {last}" if first else last
