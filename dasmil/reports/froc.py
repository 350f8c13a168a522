"""Files of an evaluation of instances: tiles with their truth, detections, and FROC curves."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from torch import Tensor

from dasmil.bags import Bag
from dasmil.files import atomic_path, write_text
from dasmil.metrics.froc import FALSE_POSITIVES, Detections, Froc
from dasmil.reports.shown import show_finest
from dasmil.tables import write_csv


def write_instance_truth(
    path: Path,
    bag: Bag,
    overlap: Mapping[str, npt.NDArray[Any]],
    truth: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    positive_class: str,
) -> None:
    """Write the tiles of a slide, placed by the same columns as in ``instances/<slide_id>.csv``.

    Parameters
    ----------
    overlap: per scale (N_s,) share of each tile that is marked, or its number of points.
    truth: per scale (N_s,) bool.
    scores: per scale (N_s,) probabilities of the positive class.
    """
    columns = ["slide_id", "scale", "row", "col", "x0_px0", "y0_px0", "size_px0"]
    columns += ["overlap", "positive", f"prob/{positive_class}"]

    def records() -> Iterator[dict[str, Any]]:
        for scale in scores:
            values = zip(
                bag.grid[scale].tolist(),
                bag.boxes_px0(scale).tolist(),
                overlap[scale].tolist(),
                truth[scale].int().tolist(),
                scores[scale].tolist(),
                strict=True,
            )
            for (row, col), (left, top, right, _), *judged in values:
                place = [bag.slide_id, scale, row, col, left, top, right - left]
                yield dict(zip(columns, [*place, *judged], strict=True))

    write_csv(path, columns, records())


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
    with atomic_path(folder / "froc.png") as temporary:
        froc_figure(curves).savefig(temporary, dpi=150)


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
