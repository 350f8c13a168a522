"""The files of an evaluation, and how they are read back.

====================== ==================================================================
``test_metrics.json``    flat, ``test/x20/auroc``; null if a metric is not defined
``test_metrics.csv``     the same as a table, with 95 % intervals
``test_slides.csv``      one row per slide: its label, and its probabilities at each scale
``test_evaluation.json`` classes, scales, thresholds, and the checkpoint
====================== ==================================================================

The last two hold the evaluation without loss: :func:`read_evaluation` reads it back.
``test_evaluation.json`` is written last; if it exists, the other files are complete.
"""

import json
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dasmil.errors import InputError, join_few
from dasmil.files import write_text
from dasmil.json_text import read_json_object
from dasmil.metrics import Evaluation
from dasmil.metrics.evaluated_slides import point_suffix
from dasmil.tables import read_csv, write_csv

SHORT_HASH = 12  # digits of a SHA-256 that name a checkpoint in messages and tables
METRIC_COLUMNS = ("scale", "level", "metric", "value", "low", "high", "n", "patients", "note")
SLIDE_COLUMNS = ("slide_id", "patient_id", "label")
REFUSED = "annotation_refused"  # column of the slides, if there is such a slide
CHECKPOINT = "checkpoint_sha256"  # last column of both tables
TEST_CHOSEN_NOTE = "threshold chosen on these very test slides: optimistically biased"
ADVICE = "evaluate the checkpoint again"


def evaluation_file(folder: Path, split: str) -> Path:
    """The file that exists only if the evaluation is complete."""
    return folder / f"{split}_evaluation.json"


def write_evaluation(
    folder: Path,
    split: str,
    evaluation: Evaluation,
    extra_metrics: Mapping[str, float] | None = None,
    about: Mapping[str, str | None] | None = None,
    *,
    pooling: Literal["mean", "max"] = "mean",
    failed: Collection[str] = (),
    refused: Mapping[str, str] | None = None,
) -> None:
    """Write the four files; those of an earlier evaluation of this split are replaced.

    If a slide has failed, there are no metrics: only the table of slides is written, unless a
    complete evaluation exists.

    The metrics are those of slides, and of patients too (``patient_auroc``) if a patient has
    several slides. In the JSON those of the finest scale appear without the scale as well.

    Parameters
    ----------
    split: ``val`` or ``test``.
    extra_metrics: metrics from elsewhere, with the names of the JSON without the split
        (``x20/instance_auroc``, ``loss``).
    about: the model, for ``test_evaluation.json``: checkpoint and its sha256, which is in the
        tables too.
    pooling: of a patient's slides; see :meth:`Evaluation.by_patient`.
    failed: slides whose output is not finite; their probabilities are empty.
    refused: slides that instance metrics leave out because their annotation is refused, with the
        reason; a column of the table of slides.
    """
    marker, digest = evaluation_file(folder, split), (about or {}).get(CHECKPOINT)
    if failed and marker.is_file():
        return
    marker.unlink(missing_ok=True)

    def write_table(name: str, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
        path = folder / f"{split}_{name}.csv"
        write_csv(path, [*columns, CHECKPOINT], ({**row, CHECKPOINT: digest} for row in rows))

    columns = [*SLIDE_COLUMNS, *_probability_columns(evaluation.scales, evaluation.classes)]
    columns += [REFUSED] if refused else []
    write_table("slides", columns, _slide_rows(evaluation, failed, refused or {}))
    if failed:
        return
    rows = [*_slide_and_patient_rows(split, evaluation, pooling)]
    metrics = _flat(split, rows, evaluation.scales[-1])
    extra = {name: _or_none(value) for name, value in (extra_metrics or {}).items()}
    metrics |= {f"{split}/{name}": value for name, value in extra.items()}
    extra_rows = _extra_rows(extra, evaluation.scales, refused or {})
    write_table("metrics", METRIC_COLUMNS, [*rows, *extra_rows])
    write_text(folder / f"{split}_metrics.json", json.dumps(metrics, indent=2) + "\n")
    description = {
        "part": split,
        **(about or {}),
        "classes": evaluation.classes,
        "scales": evaluation.scales,
        "thresholds": evaluation.thresholds,
        "specificity": evaluation.specificity,
        "patient_pooling": pooling,
    }
    write_text(marker, json.dumps(description, indent=2) + "\n")


def auroc_lines(split: str, evaluation: Evaluation) -> Iterator[str]:
    """One line per scale: AUROC of the slides, its 95 % interval, and the number of slides."""
    count = f"{len(evaluation.slide_ids)} slides of {len(set(evaluation.patients))} patients"
    note = evaluation.why_no_interval or evaluation.warning
    for scale in evaluation.scales:
        value = evaluation.metrics(scale, {"auroc"})["auroc"]
        low, high = evaluation.intervals(scale)["auroc"]
        auroc = "not defined" if isnan(value) else f"{value:.3f}"
        auroc += "" if isnan(low) else f", 95 % interval {low:.3f} to {high:.3f}"
        yield f"{split}: {scale}: AUROC {auroc}; {count}" + (f" ({note})" if note else "")


def _slide_and_patient_rows(
    split: str, evaluation: Evaluation, pooling: Literal["mean", "max"]
) -> Iterator[dict[str, Any]]:
    yield from _metric_rows(split, "slide", evaluation)
    if len(set(evaluation.patients)) == len(evaluation.patients):
        return
    try:
        patients = evaluation.by_patient(pooling)
    except InputError as error:
        warnings.warn(f"no metrics of patients: {error}", stacklevel=3)
        return
    yield from _metric_rows(split, "patient", patients)


def _metric_rows(split: str, level: str, evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """One row per metric and scale."""
    counts = {"n": len(evaluation.slide_ids), "patients": len(set(evaluation.patients))}
    common_note = evaluation.why_no_interval or evaluation.warning
    for scale in evaluation.scales:
        intervals = evaluation.intervals(scale)
        thresholds = (evaluation.thresholds or {}).get(scale, {})
        row = {"scale": scale, "level": level, **counts}
        for metric, value in evaluation.metrics(scale).items():
            low, high = map(_or_none, intervals[metric])
            note = "; ".join(filter(None, [_note(metric, thresholds), common_note]))
            values = {"value": _or_none(value), "low": low, "high": high, "note": note}
            yield {**row, "metric": metric, **values}
        if split == "test":
            for metric, value in evaluation.test_chosen_metrics(scale).items():
                yield {**row, "metric": metric, "value": _or_none(value), "note": TEST_CHOSEN_NOTE}


def _note(metric: str, thresholds: Mapping[str, float | Tensor]) -> str:
    if metric == "calibration_error":
        return "no interval: with few slides it is too large on average"
    for point, threshold in thresholds.items():
        if metric.endswith(point_suffix(point)):
            return f"above {threshold:.4f}, chosen on the validation slides ({point})"
    return ""


def _extra_rows(
    metrics: Mapping[str, float | None], scales: tuple[str, ...], refused: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    left_out = f"without {len(refused)} slide(s) whose annotation is refused: {join_few(refused)}"
    for name, value in metrics.items():
        words = name.split("/")
        metric = "/".join(word for word in words if word not in scales)
        is_instance = metric.startswith(("instance_auroc", "froc"))
        yield {
            "scale": next((word for word in words if word in scales), ""),
            "level": "instance" if is_instance else "slide",
            "metric": metric,
            "value": value,
            "note": left_out if is_instance and refused else "",
        }


def _flat(split: str, rows: list[dict[str, Any]], finest: str) -> dict[str, float | None]:
    """``test/x20/auroc`` → value; at the finest scale ``test/auroc`` too."""
    metrics = {}
    for row in rows:
        name = f"patient_{row['metric']}" if row["level"] == "patient" else row["metric"]
        metrics[f"{split}/{row['scale']}/{name}"] = row["value"]
        if row["scale"] == finest:
            metrics[f"{split}/{name}"] = row["value"]
    return metrics


def _or_none(value: float) -> float | None:
    return None if isnan(value) else value


def _probability_columns(scales: tuple[str, ...], classes: tuple[str, ...]) -> list[str]:
    return [f"prob/{scale}/{name}" for scale in scales for name in classes]


def _slide_rows(
    evaluation: Evaluation, failed: Collection[str], refused: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    columns = _probability_columns(evaluation.scales, evaluation.classes)
    probabilities = torch.cat(list(evaluation.probabilities.values()), dim=1).tolist()
    labels = [evaluation.classes[label] for label in evaluation.labels.tolist()]
    for slide_id, patient, label, values in zip(
        evaluation.slide_ids, evaluation.patients, labels, probabilities
    ):
        slide = {"slide_id": slide_id, "patient_id": patient, "label": label}
        known = {} if slide_id in failed else dict(zip(columns, values))
        why = {REFUSED: refused.get(slide_id)} if refused else {}
        yield {**slide, **known, **why}


def read_evaluation(folder: Path, split: str) -> Evaluation:
    """The evaluation that :func:`write_evaluation` wrote, without loss, sorted by slide_id.

    Raises
    ------
    InputError
        if a file is missing or damaged.
    """
    path, table = evaluation_file(folder, split), folder / f"{split}_slides.csv"
    description = _read_description(folder, split)
    try:
        classes, scales = tuple(description["classes"]), tuple(description["scales"])
        thresholds, specificity = description["thresholds"], float(description["specificity"])
    except (ValueError, KeyError, TypeError) as error:
        kind = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: describes no evaluation ({kind}); {ADVICE}") from error
    columns, rows = read_csv(table)
    missing = {*SLIDE_COLUMNS, *_probability_columns(scales, classes)} - set(columns)
    if missing or not rows:
        lack = f"column {', '.join(sorted(missing))}" if missing else "any slide"
        raise InputError(f"{table}: it lacks {lack}; {ADVICE}")
    twice = [name for name, times in Counter(row["slide_id"] for row in rows).items() if times > 1]
    if twice:
        raise InputError(f"{table}: slide {twice[0]} occurs twice; {ADVICE}")
    for row in rows:
        if row["label"] not in classes:
            raise InputError(
                f"{table} line {row.line}: label {row['label']!r} is none of {', '.join(classes)}; "
                f"{ADVICE}"
            )
    rows.sort(key=lambda row: row["slide_id"])
    return Evaluation(
        classes=classes,
        slide_ids=tuple(row["slide_id"] for row in rows),
        patients=tuple(row["patient_id"] for row in rows),
        labels=torch.tensor([classes.index(row["label"]) for row in rows]),
        probabilities={
            scale: _read_probabilities(rows, _probability_columns((scale,), classes), table)
            for scale in scales
        },
        thresholds=thresholds,
        specificity=specificity,
    )


def read_checkpoint(folder: Path, split: str) -> tuple[str, str]:
    """File name and SHA-256 of the evaluated checkpoint; "" if not known."""
    description = _read_description(folder, split)
    return description.get("checkpoint") or "", description.get(CHECKPOINT) or ""


def _read_description(folder: Path, split: str) -> dict[str, Any]:
    verb = "validate" if split == "val" else split
    advice = f"`python -m dasmil {verb} --ckpt_path … --bags … --output {folder}` writes it"
    return read_json_object(evaluation_file(folder, split), advice)


def _read_probabilities(
    rows: Sequence[Mapping[str, str]], columns: list[str], table: Path
) -> Tensor:
    """(n, P) float64 of a scale."""
    try:
        values = [[float(row[column]) for column in columns] for row in rows]
    except ValueError as error:
        raise InputError(f"{table}: {error}; {ADVICE}") from error
    probabilities = torch.tensor(values, dtype=torch.float64)
    if ((probabilities < 0) | (probabilities > 1)).any():
        raise InputError(f"{table}: {columns[0]} … contain numbers outside 0 to 1; {ADVICE}")
    return probabilities
