"""The verb ``sweep``: fit and test the rows of a table with several seeds and folds."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dasmil.errors import InputError
from dasmil.experiments.sweep.bag_steps import Embedding, plan_bags
from dasmil.experiments.sweep.figure import draw
from dasmil.experiments.sweep.processes import do_steps, gpus, make_slots
from dasmil.experiments.sweep.runs import Run, SweepRow, plan
from dasmil.experiments.sweep.steps import Fold, in_order, refuse_other_steps
from dasmil.experiments.sweep.table import CSV_COLUMNS, Cell, csv_rows, describe_runs, markdown
from dasmil.files import must_exist, write_text
from dasmil.tables import write_csv


def sweep(
    output: Path,
    bags: Path | None = None,
    cohort: Path | None = None,
    scales: tuple[str, ...] = ("x10", "x20"),
    tile: tuple[str, ...] = ("configs/tile.yaml",),
    extractor: tuple[str, ...] = ("configs/dino.yaml",),
    embed: tuple[str, ...] = (),
    truth: Path | None = None,
    truth_classes: tuple[str, ...] = (),
    rows: tuple[SweepRow, ...] = (),
    configs: tuple[str, ...] = (),
    base: tuple[str, ...] = ("configs/mil.yaml",),
    columns: tuple[str, ...] = ("auroc", "accuracy"),
    seeds: tuple[int, ...] = (0, 1, 2),
    folds: int | None = None,
    title: str = "",
    name: str = "sweep",
    jobs: int = 1,
) -> int:
    """Fit and test each row's configs with each seed in each fold; write a table and a figure.

    The bags are given, or created from the cohort: tiles once, then per fold one DINO extractor
    per scale, trained only on that fold's training slides, and the fold's bags.

    Steps that are done are skipped, and an interrupted fit goes on from its last epoch. Rows of
    several tables with the same configs share their runs in one output folder. If a step fails,
    it and the steps that need it are reported in one line each, and the others go on.

    Parameters
    ----------
    output:
        folder for tiles/, extractors/, bags/, the runs (<configs>/fold_<k>/seed_<n>/) and the
        table.
    bags:
        folder of bags, as for fit.
    cohort:
        cohort table, as for tile, from which the bags are created; instead of bags.
    scales:
        scales of the tiles, one extractor each; only with a cohort.
    tile:
        configs of the verb tile; only with a cohort.
    extractor:
        configs of fit for an extractor; only with a cohort.
    embed:
        configs of the verb embed; only with a cohort.
    truth:
        folder of annotations, as for test: evaluate instances and lesions too.
    truth_classes:
        classes (QuPath) or groups (ASAP) of the annotations that are lesions, as for test; quote
        one with a colon: '["Tumor: Positive"]'.
    rows:
        rows of the table, each with label, configs, set and paper; see configs/sweep/.
    configs:
        configs that are a row each, if there is no table of rows.
    base:
        configs below those of every row. A config that is not found from the current folder is
        looked for in dasmil's own configs.
    columns:
        metrics in test_metrics.json without the leading test/, for example x20/auroc; without a
        scale they are those of the finest scale.
    seeds:
        each row is fitted with every seed.
    folds:
        number of folds of a cross-validation: each row is fitted once per fold and seed.
    title:
        title of the table.
    name:
        name of the table's files in the output folder.
    jobs:
        number of steps that run at the same time. They share the cores, and the GPUs if there are
        several.

    Returns
    -------
    The exit code: 1 if a step failed, else 0.

    Raises
    ------
    InputError
        if options contradict each other, or the folder holds steps with other settings.
    """
    rows = (*rows, *(SweepRow(Path(config).stem, (config,)) for config in configs))
    seeds = tuple(dict.fromkeys(seeds))
    if not rows:
        raise InputError(
            "sweep: nothing to run; give --configs, or rows by --config configs/sweep/table2.yaml"
        )
    for option, value in (("columns", columns), ("seeds", seeds), ("jobs", jobs > 0)):
        if not value:
            raise InputError(f"sweep: --{option} must be at least one")
    if folds is not None and folds < 2:
        raise InputError(f"sweep: --folds {folds} must be at least two, or not be given")
    if truth is not None and not truth.is_dir():
        raise InputError(f"{truth}: no such folder; give --truth a folder of annotations")
    if truth_classes and truth is None:
        raise InputError("sweep: --truth_classes needs --truth, the annotations' folder")

    all_folds = [None] if folds is None else [Fold(number, folds) for number in range(folds)]
    sources: Mapping[Fold | None, Path | Embedding]
    if bags is not None and cohort is None:
        must_exist(bags, "give --bags the folder that embed wrote")
        if not (bags / "cohort.csv").is_file():
            raise InputError(f"{bags}: has no cohort.csv; give --bags the folder that embed wrote")
        source, sources = bags, dict.fromkeys(all_folds, bags.resolve())
    elif cohort is not None and bags is None:
        made_by = {"tile": tile, "extractor": extractor, "embed": embed}
        embeddings = plan_bags(output.resolve(), cohort.resolve(), scales, all_folds, **made_by)
        source, sources = cohort, embeddings
    else:
        raise InputError(
            "sweep: give either --bags, the folder that embed wrote, or --cohort, the table of "
            "slides from which to create the bags"
        )
    truth = truth.resolve() if truth is not None else None
    table = plan(rows, base, seeds, output.resolve(), sources, truth, truth_classes)
    runs = [run for runs_of_row in table for run in runs_of_row]
    steps = in_order(sorted(runs, key=lambda run: run.fold.number if run.fold else 0))
    refuse_other_steps(steps)
    do_steps(steps, columns[0], make_slots(jobs, gpus(), os.cpu_count() or 1))
    if not any(run.done for run in runs):
        print("sweep: no run succeeded, so no table is written", flush=True)
        return 1

    cells = [
        {column: Cell(tuple(run.metric(column) for run in runs_of_row)) for column in columns}
        for runs_of_row in table
    ]
    text = markdown(title or name, source, describe_runs(seeds, folds), rows, cells)
    write_text(output / f"{name}.md", text)
    write_csv(output / f"{name}.csv", CSV_COLUMNS, csv_rows(rows, cells))
    draw(output / f"{name}.png", title or name, rows, cells)
    print(f"\n{text}\ntable {output / f'{name}.md'}, picture {output / f'{name}.png'}", flush=True)
    if not all(run.done for run in runs):
        return 1
    compare_rows(rows, table, output / f"{name}_compare")
    return 0


def compare_rows(rows: Sequence[SweepRow], table: Sequence[Sequence[Run]], output: Path) -> None:
    """Compare each row with the first: write compare.md, .csv and .png into ``output``."""
    from dasmil.experiments.compare.compare import compare  # it needs torch

    labels: dict[Path, str] = {}
    for row, runs in zip(rows, table):
        labels.setdefault(runs[0].row, row.label)  # rows with the same configs are one
    planned = {run.folder for runs in table for run in runs}
    found = {path.parent for folder in labels for path in folder.rglob("run.json")}
    if found - planned:
        print(
            f"sweep: no {output.name}, because {min(found - planned)} is a run with another seed "
            "or other folds than this table; choose another --output to compare its rows"
        )
        return
    compare(tuple(labels), labels=tuple(labels.values()), output=output)
