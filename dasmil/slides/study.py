"""The slides that a model or an extractor was fitted on, and how to find them in a cohort.

A slide is recognised by its digest (:func:`dasmil.slides.digest.sample_digest` of the slide file,
or :func:`dasmil.interop.features.digest.features_digest` of imported features). If one of the two
digests is not known, the slide_id decides. A slide is *met* if it was trained or validated on.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dasmil.errors import InputError, join_few
from dasmil.slides.cohort import SlideRow

LEFT_OUT = "left out"  # a labelled slide that the split of the study does not name
UNLABELLED = "unlabelled"
MET = {"train": "trained on", "val": "validated on"}  # the first has priority
PARTS_OF_RECORDS = (*MET, "test", LEFT_OUT, UNLABELLED)  # in order of priority


@dataclass(frozen=True)
class SlideRecord:
    """One slide, as a checkpoint records it.

    Parameters
    ----------
    patient_id: None if not known.
    split: train, val, test, left out or unlabelled.
    digest: "" if not known.
    """

    slide_id: str
    patient_id: str | None = None
    split: str = "train"
    digest: str = ""
    label: str | None = None


def read_records(values: Any) -> list[SlideRecord]:
    """Parse the records of a checkpoint or of ``extractors.json``.

    Older versions wrote the split of each slide_id, or only the slide_ids.

    Raises
    ------
    InputError
        if one of them is no record of a slide.
    """
    if isinstance(values, Mapping):
        values = [{"slide_id": slide_id, "split": part} for slide_id, part in values.items()]
    if not isinstance(values or (), list | tuple):
        raise InputError("the records of slides are no list; the file is damaged")
    return [_record(value) for value in values or ()]


def _record(value: Any) -> SlideRecord:
    given = {"slide_id": value} if isinstance(value, str) else value
    with suppress(TypeError):  # not of a slide
        record = SlideRecord(**given)
        texts = (record.slide_id, record.digest, record.patient_id or "", record.label or "")
        if all(isinstance(text, str) for text in texts) and record.split in PARTS_OF_RECORDS:
            return record
    raise InputError(f"{str(value)[:100]} is no record of a slide; the file is damaged")


def plain_records(records: Iterable[SlideRecord]) -> list[dict[str, str | None]]:
    """The inverse of :func:`read_records`; loads with ``weights_only=True``."""
    return [asdict(record) for record in records]


def is_same_study(one: Any, other: Any) -> bool:
    """Whether the records of two checkpoints give the same slides the same splits."""
    first, second = (
        {r.slide_id: r for r in read_records(values) if r.split != UNLABELLED}
        for values in (one, other)
    )
    if {r.slide_id: r.split for r in first.values()} != {
        r.slide_id: r.split for r in second.values()
    }:
        return False
    pairs = ((first[name].digest, second[name].digest) for name in first)
    return all(a == b for a, b in pairs if a and b)


def join_records(now: Iterable[SlideRecord], before: Iterable[SlideRecord]) -> list[SlideRecord]:
    """The slides of this training, then those that its initial weights met before."""
    return list(dict.fromkeys([*now, *(record for record in before if record.split in MET)]))


class Study:
    """Find the slides of a cohort among recorded slides.

    Parameters
    ----------
    records: of the slides of a model or an extractor.
    rows: the cohort.
    digests: of its slides, as far as known.
    other_cohort: whether equal slide_ids and patient_ids mean nothing, so that only digests count.
    """

    def __init__(
        self,
        records: Sequence[SlideRecord],
        rows: Sequence[SlideRow],
        digests: Mapping[str, str],
        other_cohort: bool = False,
    ):
        self._digests = digests
        self._by_name: dict[str, list[SlideRecord]] = defaultdict(list)
        self._by_digest: dict[str, SlideRecord] = {}
        self._by_file: dict[Path, SlideRecord] = {}
        self._patients: dict[str, str] = {}
        self._has_patients = any(record.patient_id for record in records)
        for record in sorted(records, key=lambda record: PARTS_OF_RECORDS.index(record.split)):
            if record.digest:
                self._by_digest.setdefault(record.digest, record)
            if not other_cohort:
                self._by_name[record.slide_id].append(record)
                if record.patient_id and record.split in MET:
                    self._patients.setdefault(record.patient_id, record.split)
        for row in rows:  # the cohort table may know more than an older checkpoint
            found = self.find(row)
            if found is not None and found.split in MET:
                self._by_file[row.file] = found
                if row.patient_id and self._patients.get(row.patient_id) != "train":
                    self._patients[row.patient_id] = found.split

    def find(self, row: SlideRow) -> SlideRecord | None:
        """The record of a slide; None if there is none."""
        digest = self._digests.get(row.slide_id, "")
        if digest in self._by_digest:
            return self._by_digest[digest]
        named = self._by_name.get(row.slide_id, ())
        same = (record for record in named if not (digest and record.digest))
        return next(same, None) or self._by_file.get(row.file)

    def part_of_patient(self, row: SlideRow) -> str | None:
        """The split, train or val, of other slides of the patient; None if there are none."""
        return self._patients.get(row.patient_id or "")

    def has_other_content(self, row: SlideRow) -> bool:
        """Whether a recorded slide has this slide_id, but other content."""
        return row.slide_id in self._by_name and self.find(row) is None

    def notes(self, rows: Sequence[SlideRow]) -> Iterator[str]:
        """Sentences about slides of ``rows`` that are not recognised by digest."""
        other = [row.slide_id for row in rows if self.has_other_content(row)]
        if other:
            yield (
                f"{len(other)} slide(s) have the name of a slide of the checkpoint but other "
                f"content, and count as other slides: {join_few(other)}"
            )
        if not self._by_digest:
            known = "" if self._has_patients else " and no patients, which the cohort table says"
            yield f"the checkpoint holds no digests of its slides, only their names{known}"
        elif unknown := [row.slide_id for row in rows if not self._digests.get(row.slide_id)]:
            yield (
                f"{len(unknown)} bag(s) hold no digest of their slide, only its name: "
                f"{join_few(unknown)}"
            )

    def describe(self, row: SlideRow) -> str:
        """The split of a slide for tables: of its record, ``new``, or ``patient in train``."""
        record, met = self.find(row), self.part_of_patient(row)
        if record is not None and (record.split in MET or met is None):
            return record.split
        return "new" if met is None else f"patient in {met}"


@dataclass(frozen=True)
class Place:
    """The split of a slide in an evaluation.

    Parameters
    ----------
    split: train, val, test or left out.
    met: if the slide is not evaluated because it, or its patient, was met: how.
    name: the slide_id, and its name in the checkpoint if that differs.
    """

    split: str
    met: str = ""
    name: str = ""

    @property
    def why(self) -> str:
        """Why the slide is not evaluated."""
        if self.met:
            return self.met
        return "left out of the split" if self.split == LEFT_OUT else f"in the part {self.split!r}"


def place_slides(
    rows: Sequence[SlideRow],
    study: Study,
    evaluated: str,
    marked: Mapping[str, str],
    asked: Mapping[str, str] | None = None,
    source: str = "the split",
) -> dict[str, Place]:
    """Assign each labelled slide its split in the evaluation of a model.

    A slide that the model was trained on is neither a val nor a test slide; one that it was
    validated on is no test slide. The same holds for all other slides of such a patient. The split
    of any other slide is that of the options, else of the study, else of the split column, else
    test.

    Parameters
    ----------
    study: of the model.
    evaluated: the split that is evaluated.
    marked: split per slide_id, from the split column or a split table.
    asked: split per slide_id from options (a split table, or drawn); None without options.
    source: of the splits, for messages: the table's name, or the options.

    Returns
    -------
    Place per slide_id.

    Raises
    ------
    InputError
        if the options or the table ask to evaluate a slide that must not be evaluated.
    """
    places: dict[str, Place] = {}
    refused: list[str] = []
    for row in rows:
        if row.label is None:
            continue
        record, mark = study.find(row), marked.get(row.slide_id)
        known = None if record is None or record.split == UNLABELLED else record.split
        claim = mark if asked is None else asked.get(row.slide_id, LEFT_OUT)
        met = ""
        name = row.slide_id
        if record is not None and record.slide_id != row.slide_id:
            name += f" (there {record.slide_id})"
        if known in MET:
            split, met = known, MET[known]
            if claim == evaluated and _is_forbidden(claim, known):
                refused.append(f"{name} ({met})")
            elif asked is not None and not (claim == "train" and "val" not in asked.values()):
                split = claim or LEFT_OUT
        else:
            split = (None if asked is None else claim) or known or claim or "test"
            part = study.part_of_patient(row)
            if _is_forbidden(split, part):
                split, met = LEFT_OUT, f"of a patient {MET[part or '']}"
                if mark == evaluated:
                    refused.append(f"{name} ({met}: {row.patient_id})")
        places[row.slide_id] = Place(split, met, name)
    if refused:
        raise InputError(
            f"{source}: {len(refused)} slide(s) of the part {evaluated!r} may not be evaluated "
            f"with this checkpoint: {join_few(refused)}; correct the split or leave the option "
            "out, or give --data.other_cohort true if equal slide_ids and patient_ids belong to "
            "another cohort"
        )
    return places


def _is_forbidden(split: str | None, met: str | None) -> bool:
    """Whether a slide of this split must not be one that was met in this way."""
    return (split == "test" and met in MET) or (split == "val" and met == "train")
