"""The files of an evaluation: figures for programs and for people, and all they are made of.

====================== ==================================================================
``test_metrics.json``    flat, ``test/x20/auroc``; null where a figure is not defined
``test_metrics.csv``     the same as a table, with 95 % intervals
``test_slides.csv``      each slide with its label and its probabilities at each scale
``test_evaluation.json`` classes, scales, thresholds, and which checkpoint they are of
====================== ==================================================================

The last two are the evaluation itself, to the last digit: :func:`read_evaluation` reads it back.
``test_evaluation.json`` is written last; where it stands, the others are complete.
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

from dasmil.errors import InputError, some_of
from dasmil.files import write_text
from dasmil.metrics import Evaluation
from dasmil.tables import read_csv, write_csv

SHORT_HASH = 12  # digits of a SHA-256 that name a checkpoint in sentences and tables
METRIC_COLUMNS = ("scale", "level", "metric", "value", "low", "high", "n", "patients", "note")
SLIDE_COLUMNS = ("slide_id", "patient_id", "label")
REFUSED = "annotation_refused"  # column of the slides, if there is such a slide
CHECKPOINT = "checkpoint_sha256"  # last column of both tables
TEST_CHOSEN_NOTE = "threshold chosen on these very test slides: no honest figure"


def evaluation_file(folder: Path, stage: str) -> Path:
    """The file that stands where an evaluation is complete."""
    return folder / f"{stage}_evaluation.json"


def write_evaluation(
    folder: Path,
    stage: str,
    evaluation: Evaluation,
    extra_metrics: Mapping[str, float] | None = None,
    about: Mapping[str, str | None] | None = None,
    *,
    pooling: Literal["mean", "max"] = "mean",
    failed: Collection[str] = (),
    refused: Mapping[str, str] | None = None,
) -> None:
    """Write the four files; those of an earlier evaluation of this part are replaced.

    If a slide has failed, there are no metrics: the table of slides alone is written, and not over
    an evaluation that is complete.

    Figures are of slides, and of patients too (``patient_auroc``) where a patient has several
    slides. Those of the finest scale stand in the JSON without a scale as well.

    Parameters
    ----------
    stage: ``val`` or ``test``.
    extra_metrics: what others have measured, named as in the JSON but for the stage
        (``x20/instance_auroc``, ``loss``).
    about: of the model, for ``test_evaluation.json``: checkpoint and its sha256, which the tables
        name too.
    pooling: of a patient's slides; see :meth:`Evaluation.by_patient`.
    failed: slides whose output is not finite; their probabilities are empty.
    refused: slides that the figures of instances leave out, since their annotation is refused, and
        why; a column of the table of slides.
    """
    slides, columns = folder / f"{stage}_slides.csv", _slide_columns(evaluation)
    digest = (about or {}).get(CHECKPOINT)

    if refused:
        columns.append(REFUSED)

    def write_table(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
        write_csv(path, [*columns, CHECKPOINT], ({**row, CHECKPOINT: digest} for row in rows))

    if failed:
        if not evaluation_file(folder, stage).is_file():
            empty = dict.fromkeys(_probability_columns(evaluation.scales, evaluation.classes))
            rows = _slide_rows(evaluation, refused)
            write_table(
                slides, columns, (r | empty if r["slide_id"] in failed else r for r in rows)
            )
        return
    evaluation_file(folder, stage).unlink(missing_ok=True)
    of_metrics = [
        *_rows_of_levels(stage, evaluation, pooling),
        *_extra_rows(extra_metrics or {}, evaluation.scales, refused),
    ]
    figures = _flat(stage, of_metrics, evaluation.scales[-1])
    figures |= {f"{stage}/{name}": _known(value) for name, value in (extra_metrics or {}).items()}
    write_table(slides, columns, _slide_rows(evaluation, refused))
    write_table(folder / f"{stage}_metrics.csv", METRIC_COLUMNS, of_metrics)
    write_text(folder / f"{stage}_metrics.json", json.dumps(figures, indent=2) + "\n")
    described = {
        "part": stage,
        **(about or {}),
        "classes": evaluation.classes,
        "scales": evaluation.scales,
        "thresholds": evaluation.thresholds,
        "specificity": evaluation.specificity,
        "patient_pooling": pooling,
    }
    write_text(evaluation_file(folder, stage), json.dumps(described, indent=2) + "\n")


def auroc_lines(stage: str, evaluation: Evaluation) -> Iterator[str]:
    """One line per scale: AUROC of the slides, its 95 % interval, and how many they are."""
    count = f"{len(evaluation.slide_ids)} slides of {len(set(evaluation.patients))} patients"
    note = evaluation.why_no_interval or evaluation.warning
    for scale in evaluation.scales:
        value = evaluation.metrics(scale, {"auroc"})["auroc"]
        low, high = evaluation.intervals(scale)["auroc"]
        auroc = "not defined" if isnan(value) else f"{value:.3f}"
        auroc += "" if isnan(low) else f", 95 % interval {low:.3f} to {high:.3f}"
        yield f"{stage}: {scale}: AUROC {auroc}; {count}" + (f" ({note})" if note else "")


def _rows_of_levels(
    stage: str, evaluation: Evaluation, pooling: Literal["mean", "max"]
) -> Iterator[dict[str, Any]]:
    yield from _rows(stage, "slide", evaluation)
    if len(set(evaluation.patients)) == len(evaluation.patients):
        return
    try:
        patients = evaluation.by_patient(pooling)
    except InputError as error:
        warnings.warn(f"no metrics of patients: {error}", stacklevel=3)
        return
    yield from _rows(stage, "patient", patients)


def _rows(stage: str, level: str, evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """Of the table, one per metric and scale."""
    about = {"n": len(evaluation.slide_ids), "patients": len(set(evaluation.patients))}
    for scale in evaluation.scales:
        intervals = evaluation.intervals(scale)
        row = {"scale": scale, "level": level, **about}
        for metric, value in evaluation.metrics(scale).items():
            low, high = map(_known, intervals[metric])
            notes = [_note(metric, (evaluation.thresholds or {}).get(scale, {}))]
            notes += [evaluation.why_no_interval or evaluation.warning]
            note = "; ".join(filter(None, notes))
            known = {"value": _known(value), "low": low, "high": high, "note": note}
            yield {**row, "metric": metric, **known}
        if stage == "test":
            for metric, value in evaluation.test_chosen_metrics(scale).items():
                yield {**row, "metric": metric, "value": _known(value), "note": TEST_CHOSEN_NOTE}


def _note(metric: str, thresholds: Mapping[str, float | Tensor]) -> str:
    if metric == "calibration_error":
        return "no interval: with few slides it is too large on average"
    for point, threshold in thresholds.items():
        if metric.endswith("_at_val_threshold" if point == "youden" else f"_at_val_{point}"):
            return f"above {threshold:.4f}, chosen on the validation slides ({point})"
    return ""


def _extra_rows(
    figures: Mapping[str, float], scales: tuple[str, ...], refused: Mapping[str, str] | None
) -> Iterator[dict[str, Any]]:
    note = (
        f"without {len(refused)} slide(s) whose annotation is refused: {some_of(refused)}"
        if refused
        else ""
    )
    for name, value in figures.items():
        words = name.split("/")
        metric = "/".join(word for word in words if word not in scales)
        level = "instance" if metric.startswith(("instance_auroc", "froc")) else "slide"
        yield {
            "scale": next((word for word in words if word in scales), ""),
            "level": level,
            "metric": metric,
            "value": _known(value),
            "note": note if level == "instance" else "",
        }


def _flat(stage: str, rows: list[dict[str, Any]], finest: str) -> dict[str, float | None]:
    """``test/x20/auroc`` → value; of the finest scale ``test/auroc`` too."""
    figures = {}
    for row in rows:
        if "n" not in row:
            continue  # measured by others, who have named it themselves
        name = f"patient_{row['metric']}" if row["level"] == "patient" else row["metric"]
        figures[f"{stage}/{row['scale']}/{name}"] = row["value"]
        if row["scale"] == finest:
            figures[f"{stage}/{name}"] = row["value"]
    return figures


def _known(value: float | None) -> float | None:
    return None if value is None or isnan(value) else value


def _slide_columns(evaluation: Evaluation) -> list[str]:
    return [*SLIDE_COLUMNS, *_probability_columns(evaluation.scales, evaluation.classes)]


def _probability_columns(scales: tuple[str, ...], classes: tuple[str, ...]) -> list[str]:
    return [f"prob/{scale}/{name}" for scale in scales for name in classes]


def _slide_rows(
    evaluation: Evaluation, refused: Mapping[str, str] | None
) -> Iterator[dict[str, Any]]:
    columns = _probability_columns(evaluation.scales, evaluation.classes)
    probabilities = torch.cat(list(evaluation.probabilities.values()), dim=1).tolist()
    labels = [evaluation.classes[label] for label in evaluation.labels.tolist()]
    for slide_id, patient, label, values in zip(
        evaluation.slide_ids, evaluation.patients, labels, probabilities
    ):
        slide = {"slide_id": slide_id, "patient_id": patient, "label": label}
        why = {REFUSED: refused.get(slide_id)} if refused else {}
        yield {**slide, **dict(zip(columns, values)), **why}


def read_evaluation(folder: Path, stage: str) -> Evaluation:
    """What :func:`write_evaluation` has written, to the last digit.

    Raises
    ------
    InputError
        when a file is missing, or is not what was written.
    """
    path, table = evaluation_file(folder, stage), folder / f"{stage}_slides.csv"
    if not path.is_file():
        verb = "validate" if stage == "val" else stage
        raise InputError(
            f"{path}: no such file; `python -m dasmil {verb} --ckpt_path … --bags … "
            f"--output {folder}` writes it"
        )
    described = _read_description(path)
    try:
        classes, scales = tuple(described["classes"]), tuple(described["scales"])
        thresholds, specificity = described["thresholds"], float(described["specificity"])
    except (ValueError, KeyError, TypeError) as error:
        raise _not_described(path, error) from error
    columns, rows = read_csv(table)
    missing = {*SLIDE_COLUMNS, *_probability_columns(scales, classes)} - set(columns)
    if missing or not rows:
        lack = f"column {', '.join(sorted(missing))}" if missing else "any slide"
        raise InputError(f"{table}: it lacks {lack}; evaluate the checkpoint again")
    twice = [name for name, times in Counter(row["slide_id"] for row in rows).items() if times > 1]
    if twice:
        raise InputError(
            f"{table}: slide {twice[0]} stands in it twice; evaluate the checkpoint again"
        )
    return Evaluation(
        classes=classes,
        slide_ids=tuple(row["slide_id"] for row in rows),
        patients=tuple(row["patient_id"] for row in rows),
        labels=torch.tensor([_label(row, classes, f"{table} line {row.line}") for row in rows]),
        probabilities={
            scale: _probabilities(rows, _probability_columns((scale,), classes), table)
            for scale in scales
        },
        thresholds=thresholds,
        specificity=specificity,
    )


def read_checkpoint(folder: Path, stage: str) -> tuple[str, str]:
    """File name and SHA-256 of the evaluated checkpoint; empty if not known."""
    described = _read_description(evaluation_file(folder, stage))
    return described.get("checkpoint") or "", described.get(CHECKPOINT) or ""


def _read_description(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise _not_described(path, error) from error


def _not_described(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: not the description of an evaluation ({type(error).__name__}: {error}); "
        "evaluate the checkpoint again"
    )


def _label(row: Mapping[str, str], classes: tuple[str, ...], where: str) -> int:
    if row["label"] not in classes:
        raise InputError(
            f"{where}: label {row['label']!r} is none of {', '.join(classes)}; "
            "evaluate the checkpoint again"
        )
    return classes.index(row["label"])


def _probabilities(rows: Sequence[Mapping[str, str]], columns: list[str], table: Path) -> Tensor:
    """(n, P) float64 of a scale."""
    try:
        values = [[float(row[column]) for column in columns] for row in rows]
    except ValueError as error:
        raise InputError(f"{table}: {error}; evaluate the checkpoint again") from error
    probabilities = torch.tensor(values, dtype=torch.float64)
    if ((probabilities < 0) | (probabilities > 1)).any():
        raise InputError(
            f"{table}: {columns[0]} … hold numbers that are no probabilities; "
            "evaluate the checkpoint again"
        )
    return probabilities
