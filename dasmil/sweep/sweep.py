"""The verb ``sweep``: rows of a table, each fitted and tested with several seeds."""

import sys
from pathlib import Path

from dasmil.errors import InputError
from dasmil.files import write_csv, write_text
from dasmil.sweep.figure import draw
from dasmil.sweep.processes import fit_and_test, gpu_slots, gpus
from dasmil.sweep.runs import SweepRow, plan, refuse_other_runs
from dasmil.sweep.table import CSV_COLUMNS, Cell, csv_rows, markdown


def sweep(
    output: Path,
    bags: Path,
    rows: tuple[SweepRow, ...] = (),
    configs: tuple[str, ...] = (),
    base: tuple[str, ...] = ("configs/dasmil.yaml",),
    columns: tuple[str, ...] = ("auroc", "accuracy"),
    seeds: tuple[int, ...] = (0, 1, 2),
    title: str = "",
    name: str = "sweep",
    jobs: int = 1,
) -> int:
    """Fit and test each row's configs with each seed; print, write and draw the test figures.

    A run that is done is not done again, one that was broken off goes on from its last epoch; rows
    of several tables with the same configs share their runs in one output folder. A run that fails
    costs one line and the others go on.

    Parameters
    ----------
    output:
        folder for the runs, ``<configs>/seed_<n>/`` each, and for the table.
    bags:
        folder of bags, as for fit.
    rows:
        of the table, see configs/sweep/.
    configs:
        rows without a table, one a config.
    base:
        configs below those of every row. A config that is not at hand is looked for in dasmil's
        own configs.
    columns:
        figures of test_metrics.json without their leading test/, for example x20/auroc.
    seeds:
        each row is fitted with every seed.
    title:
        of the table.
    name:
        of the table's files in the output folder.
    jobs:
        runs at the same time; each has a GPU of its own as far as there are several.

    Returns
    -------
    The exit code: 1 when a run failed, 130 when stopped by Ctrl-C, else 0.
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
    table = plan(rows, base, seeds, output.resolve(), bags.resolve())
    runs = list(dict.fromkeys(run for runs_of_row in table for run in runs_of_row))
    refuse_other_runs(runs)
    try:
        well = fit_and_test(runs, columns[0], gpu_slots(jobs, gpus()))
    except KeyboardInterrupt:
        print("sweep: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    cells = [
        {column: Cell(tuple(run.figure(column) for run in runs_of_row)) for column in columns}
        for runs_of_row in table
    ]
    text = markdown(title or name, bags, seeds, rows, cells)
    write_text(output / f"{name}.md", text)
    write_csv(output / f"{name}.csv", CSV_COLUMNS, csv_rows(rows, cells))
    draw(output / f"{name}.png", title or name, rows, cells)
    print(f"\n{text}\ntable {output / f'{name}.md'}, picture {output / f'{name}.png'}", flush=True)
    return int(not well)
