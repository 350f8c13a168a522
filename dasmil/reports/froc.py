"""Files of an evaluation of lesions: detections and FROC curves."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dasmil.files import write_text
from dasmil.metrics.froc import FALSE_POSITIVES, Detections, Froc
from dasmil.reports.shown import save_figure, show_finest
from dasmil.tables import write_csv


def write_detections(path: Path, found: Detections) -> None:
    """Write confidence, x and y in level-0 pixels without a header, for Camelyon16's script."""
    rows = zip(found.scores.tolist(), found.xy_px0.tolist(), strict=True)
    write_text(path, "".join(f"{score!r},{x},{y}\n" for score, (x, y) in rows))


def write_froc(folder: Path, curves: Mapping[str, Froc]) -> None:
    """Write ``froc.csv`` and ``froc.png``.

    Parameters
    ----------
    curves: per scale.
    """
    rows = [
        {"scale": scale, "false_positives_per_slide": fps, "sensitivity": sensitivity}
        for scale, curve in curves.items()
        for fps, sensitivity in curve.at.items()
    ]
    write_csv(folder / "froc.csv", list(rows[0]), rows)
    save_figure(folder / "froc.png", froc_figure(curves), dpi=150)


def froc_figure(curves: Mapping[str, Froc]) -> Figure:
    """The curve of each scale over a log axis of false positives, with dots where it is read."""
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.add_subplot()
    low, high = FALSE_POSITIVES[0] / 2, FALSE_POSITIVES[-1] * 2
    scales, left_out = show_finest(list(curves))
    for scale in scales:
        curve = curves[scale]
        at = np.geomspace(low, high, 500)
        ascending = curve.false_positives[::-1], curve.sensitivity[::-1]
        (line,) = axes.plot(at, np.interp(at, *ascending), label=f"{scale}: {curve.score:.3f}")
        axes.plot(list(curve.at), list(curve.at.values()), "o", color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_xticks(FALSE_POSITIVES, [f"{value:g}" for value in FALSE_POSITIVES])
    axes.set(xlim=(low, high), ylim=(-0.01, 1.01))
    axes.set(xlabel="false positives per slide (mean)", ylabel="sensitivity (lesions found)")
    title = "FROC as in Camelyon16; mean sensitivity at the dots"
    axes.set_title("\n".join(filter(None, [title, left_out])))
    axes.legend(loc="best")
    return figure
