"""How often the 95 % intervals hold the true value, and how often the paired test errs.

``python tests/benchmarks/interval_coverage.py`` prints three Markdown tables: AUROC's interval
beside its rivals, the intervals of the other metrics, and the paired test. It takes about 20
minutes on one core; ``--draws 200`` gives a first look, ``--part`` one of the tables, ``--seed``
other draws than those on which the constants of ``intervals.py`` were chosen.

Scores are normal in both classes. A slide's score is the sum of a part that all slides of its
patient share, and one of its own; the share of the first in the variance is the correlation.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.stats import norm, rankdata

from dasmil.metrics.clustered_slides import ClusteredSlides
from dasmil.metrics.evaluated_slides import Inputs
from dasmil.metrics.intervals import (
    BRIER_SLIDES,
    MIN_PATIENTS,
    auroc_interval,
    average_precision_interval,
    sensitivity_interval,
)
from dasmil.metrics.jackknife import auroc_without
from dasmil.metrics.paired import swap_test
from dasmil.metrics.score_intervals import (
    Interval,
    f1_interval,
    proportion_interval,
    score_interval,
)
from dasmil.metrics.slide import (
    Array,
    BoolArray,
    IntArray,
    auroc,
    average_precision,
    f1,
    sensitivity_at_specificity,
)

AUROCS = (0.76, 0.85, 0.92, 0.96, 0.99)
CORRELATIONS = (0.0, 0.5, 0.9)
HOLDS = 0.93
Z = float(norm.ppf(0.975))


@dataclass(frozen=True)
class Design:
    """Which slides there are, and whose they are."""

    group: str
    name: str
    positive: BoolArray
    patients: IntArray

    @property
    def slides(self) -> ClusteredSlides:
        return ClusteredSlides(self.positive, self.patients)

    @property
    def correlations(self) -> tuple[float, ...]:
        """One slide per patient: there is nothing to correlate."""
        return (0.0,) if len(np.unique(self.patients)) == len(self.patients) else CORRELATIONS


def design(group: str, name: str, *kinds: tuple[int, int, int]) -> Design:
    """Of so many patients, each with so many positive and so many negative slides."""
    each = [slides for patients, *slides in kinds for _ in range(patients)]
    positive = [side for slides in each for side in [True] * slides[0] + [False] * slides[1]]
    patients = np.repeat(np.arange(len(each)), [sum(slides) for slides in each])
    return Design(group, name, np.array(positive), patients)


def designs() -> Iterator[Design]:
    for slides, share, per_patient in product((40, 50, 130), (0.3, 0.5), (1, 2, 5, 20)):
        num = slides // per_patient
        positive = round(share * num + 1e-9)
        group = "1 slide per patient" if per_patient == 1 else f"{per_patient} slides per patient"
        yield design(
            group,
            f"{slides} slides, {positive} + {num - positive} patients",
            (positive, per_patient, 0),
            (num - positive, 0, per_patient),
        )
    few = "5 to 20 patients"
    for positive, negative in ((5, 5), (6, 14), (10, 10)):
        name = f"{positive} + {negative} patients"
        for per_patient in (1, 20):
            kinds = (positive, per_patient, 0), (negative, 0, per_patient)
            of = "1 slide per patient" if per_patient == 1 else few
            yield design(of, f"{name} of {per_patient}", *kinds)
    for num in (5, 10, 20):
        yield design(few, f"{num} patients of 10 + 10 slides", (num, 10, 10))
    glas = (3, 11, 0), (4, 0, 11), (3, 6, 5)
    yield design(few, "3 + 4 patients of 11 slides, 3 of 6 + 5", *glas)


def effects(design: Design, correlation: float, draws: int, rng: np.random.Generator) -> Array:
    """(draws, n) standard normal, correlated inside a patient."""
    of_patients = rng.standard_normal((draws, design.patients.max() + 1))[:, design.patients]
    own = rng.standard_normal((draws, len(design.patients)))
    return np.sqrt(correlation) * of_patients + np.sqrt(1 - correlation) * own


def scores(
    design: Design, area: float, correlation: float, draws: int, rng: np.random.Generator
) -> Array:
    """(draws, n) whose AUROC over pairs of slides of different patients is the area."""
    apart = np.sqrt(2) * norm.ppf(area)
    return effects(design, correlation, draws, rng) + apart * design.positive


def placements(values: Array, design: Design) -> Array:
    """(draws, n) share of the other class that each slide is on the right side of."""
    positive = design.positive
    ranks, found = rankdata(values, axis=-1), np.empty_like(values)
    for of_class in (positive, ~positive):
        below = ranks[:, of_class] - rankdata(values[:, of_class], axis=-1)
        found[:, of_class] = below / (~of_class).sum()
    found[:, ~positive] = 1 - found[:, ~positive]
    return found


def rivals(values: Array, design: Design) -> dict[str, Interval]:
    """Other intervals of the AUROC; DeLong's with clusters as Obuchowski, and Student's t."""
    value, slides = auroc(values, design.positive), design.slides
    centred = placements(values, design) - value[:, None]
    group = np.eye(design.patients.max() + 1)[design.patients]
    parts, variance = [], 0.0
    for of_class, num in zip((design.positive, ~design.positive), slides.num_patients):
        parts.append((centred * of_class) @ group / of_class.sum())
        variance = variance + num / (num - 1) * np.square(parts[-1]).sum(axis=1)
    num = design.patients.max() + 1
    delong = np.sqrt(variance + 2 * num / (num - 1) * (parts[0] * parts[1]).sum(axis=1))
    inside = np.clip(value, 1e-9, 1 - 1e-9)
    logit, slope = np.log(inside / (1 - inside)), 1 / (inside * (1 - inside))
    m, n = design.positive.sum(), (~design.positive).sum()

    def hanley(theta: Array, m: float = m, n: float = n) -> Array:
        first, second = theta / (2 - theta), 2 * theta**2 / (1 + theta)
        own = theta * (1 - theta) + (m - 1) * (first - theta**2) + (n - 1) * (second - theta**2)
        return np.sqrt(np.maximum(own, 0) / (m * n))

    mean, zero = (m + n) / 2, np.zeros_like(value)
    patients = (sum(slides.num_patients)) / 2
    scale = np.sqrt(mean**2 / (m * n))
    return {
        "DeLong": (value - slides.quantile * delong, value + slides.quantile * delong),
        "logit DeLong": tuple(
            1 / (1 + np.exp(-(logit + sign * slides.quantile * delong * slope))) for sign in (-1, 1)
        ),
        "Hanley-McNeil": (value - Z * hanley(value), value + Z * hanley(value)),
        "Newcombe of slides": score_interval(
            value, lambda theta: scale * hanley(theta, mean, mean), Z, zero
        ),
        "Newcombe of patients": score_interval(
            value, lambda theta: hanley(theta, patients, patients), Z, zero
        ),
    }


def bootstrap(values: Array, design: Design, rng: np.random.Generator) -> dict[str, Interval]:
    """Percentile and BCa intervals of 400 draws of slides within their class, one per patient."""
    ours, other = np.flatnonzero(design.positive), np.flatnonzero(~design.positive)
    found = []
    for row in values:
        drawn = [rng.choice(side, (400, len(side))) for side in (ours, other)]
        labels = np.arange(len(row)) < len(ours)
        found.append(auroc(row[np.concatenate(drawn, axis=1)], labels))
    drawn_values, value = np.array(found), auroc(values, design.positive)
    below = (drawn_values < value[:, None]).mean(axis=1)
    below += (drawn_values == value[:, None]).mean(axis=1) / 2
    bias = norm.ppf(np.clip(below, 1 / 800, 1 - 1 / 800))
    without = auroc_without(values, design.positive, design.patients)
    skew = without.mean(axis=0) - without
    spread = np.maximum(np.square(skew).sum(axis=0), 1e-12)
    speed = (skew**3).sum(axis=0) / (6 * spread**1.5)
    levels = [
        norm.cdf(bias + (bias + z) / np.maximum(1 - speed * (bias + z), 1e-9)) for z in (-Z, Z)
    ]
    rows = list(zip(drawn_values, *levels))
    return {
        "percentile bootstrap": tuple(np.quantile(drawn_values, [0.025, 0.975], axis=1)),
        "BCa bootstrap": tuple(
            np.array([np.quantile(row[0], row[end]) for row in rows]) for end in (1, 2)
        ),
    }


def coverage(interval: Interval, truth: float) -> float:
    low, high = interval
    return float(np.mean((low <= truth + 1e-9) & (truth - 1e-9 <= high)))


def width(interval: Interval) -> float:
    return float(np.mean(np.clip(interval[1], 0, 1) - np.clip(interval[0], 0, 1)))


@dataclass(frozen=True)
class Cell:
    """What is measured of one design, AUROC and correlation: per method coverage and width."""

    design: Design
    auroc: float
    correlation: float
    coverage: dict[str, float]
    width: dict[str, float]


def cells(
    draws: int,
    wanted: Sequence[Design] | None = None,
    areas: Sequence[float] = AUROCS,
    with_bootstrap: bool = False,
    seed: int = 0,
) -> Iterator[Cell]:
    """Of each design with patients enough, AUROC and correlation."""
    for one in designs() if wanted is None else wanted:
        if min(one.slides.num_patients) < MIN_PATIENTS:
            continue
        for area, correlation in product(areas, one.correlations):
            rng = np.random.default_rng([3 * seed, round(100 * area), round(10 * correlation)])
            values = scores(one, area, correlation, draws, rng)
            found = {"ours": auroc_interval(values, one.positive, one.patients)}
            found |= rivals(values, one)
            if with_bootstrap and len(one.correlations) == 1 and len(one.positive) == 40:
                found |= bootstrap(values, one, rng)
            yield Cell(
                one,
                area,
                correlation,
                {name: coverage(interval, area) for name, interval in found.items()},
                {name: width(interval) for name, interval in found.items()},
            )


def ratios(found: Sequence[Cell]) -> Iterator[float]:
    """Our width in units of the narrowest rival's that holds, for each cell of one design.

    Nobody knows the AUROC and the correlation beforehand, so a rival must hold for all of them.
    """
    holding = [
        name
        for name in found[0].coverage
        if name == "ours" or min(cell.coverage.get(name, 0) for cell in found) >= HOLDS
    ]
    for cell in found:
        yield cell.width["ours"] / min(cell.width[name] for name in holding)


def auroc_table(found: Sequence[Cell]) -> str:
    """Per group of designs the range of coverage and the widths; then each method over all."""
    lines = ["| | cells | coverage of ours | worst cell | width of the narrowest that holds |"]
    lines += ["| --- | ---: | ---: | --- | ---: |"]
    for group in dict.fromkeys(cell.design.group for cell in found):
        of_group = [cell for cell in found if cell.design.group == group]
        covered = [cell.coverage["ours"] for cell in of_group]
        worst = of_group[int(np.argmin(covered))]
        of_designs = [
            [cell for cell in of_group if cell.design.name == name]
            for name in dict.fromkeys(cell.design.name for cell in of_group)
        ]
        wider = [ratio for of_design in of_designs for ratio in ratios(of_design)]
        lines.append(
            f"| {group} | {len(of_group)} | {min(covered):.3f} to {max(covered):.3f} "
            f"| {worst.design.name}, AUROC {worst.auroc}, correlation {worst.correlation} "
            f"| {np.median(wider):.2f} ×, at most {max(wider):.2f} × |"
        )
    lines += ["", "| method | cells | lowest coverage | cells below 0.93 | mean width |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for name in dict.fromkeys(name for cell in found for name in cell.coverage):
        of_method = [cell for cell in found if name in cell.coverage]
        covered = [cell.coverage[name] for cell in of_method]
        lines.append(
            f"| {name} | {len(of_method)} | {min(covered):.3f} "
            f"| {sum(c < HOLDS for c in covered)} "
            f"| {np.mean([cell.width[name] for cell in of_method]):.3f} |"
        )
    none = [one.name for one in designs() if min(one.slides.num_patients) < MIN_PATIENTS]
    why = f"No interval, as a class has fewer than {MIN_PATIENTS} patients"
    return "\n".join([*lines, "", f"{why}: {'; '.join(dict.fromkeys(none))}."])


def other_metrics(
    design: Design, area: float, correlation: float, draws: int, rng: np.random.Generator
) -> dict[str, tuple[float, float]]:
    """Per metric coverage and width; the truth is the mean over the draws.

    Probabilities are those of a calibrated model of equal classes; called above one half.
    """
    values = scores(design, area, correlation, draws, rng)
    apart = np.sqrt(2) * norm.ppf(area)
    probabilities = 1 / (1 + np.exp(-apart * (values - apart / 2)))
    called, positive, patients = probabilities > 0.5, design.positive, design.patients
    within, quantile = design.slides.correlations(values)[0], design.slides.quantile
    every = np.ones_like(positive)
    right, errors = called == positive, np.square(probabilities - positive)

    def proportion(hits: Array, of: BoolArray, most: float = 1) -> tuple[Array, Interval]:
        interval = proportion_interval(hits.astype(float), of, patients, within, quantile, most)
        return hits[:, of].mean(axis=1), interval

    found = {
        "accuracy": proportion(right, every),
        "sensitivity": proportion(right, positive),
        "specificity": proportion(right, ~positive),
        "f1": (
            f1(called, positive),
            f1_interval(called, positive, patients, within, quantile),
        ),
        "brier": proportion(errors, every, BRIER_SLIDES),
        "average_precision": (
            average_precision(values, positive),
            average_precision_interval(values, positive, patients),
        ),
        "sensitivity_at_specificity_0.9": (
            sensitivity_at_specificity(values, positive, 0.9),
            sensitivity_interval(values, positive, patients, 0.9),
        ),
    }
    return {
        name: (coverage(interval, float(value.mean())), width(interval))
        for name, (value, interval) in found.items()
    }


def few_designs() -> list[Design]:
    """A part of the grid, for what takes long."""
    wanted = (
        *("40 slides, 12 + 28 patients", "130 slides, 65 + 65 patients"),
        *("40 slides, 6 + 14 patients", "130 slides, 8 + 18 patients", "5 + 5 patients of 20"),
        *("10 patients of 10 + 10 slides", "3 + 4 patients of 11 slides, 3 of 6 + 5"),
    )
    return [one for one in designs() if one.name in wanted]


def other_table(draws: int, seed: int = 0) -> str:
    lines = ["| metric | lowest coverage | highest | mean width |", "| --- | ---: | ---: | ---: |"]
    found: dict[str, list[tuple[float, float]]] = {}
    for one in few_designs():
        for area, correlation in product((0.76, 0.92, 0.99), one.correlations):
            rng = np.random.default_rng([3 * seed + 1, round(100 * area), round(10 * correlation)])
            for name, measured in other_metrics(one, area, correlation, draws, rng).items():
                found.setdefault(name, []).append(measured)
    for name, measured in found.items():
        covered, widths = zip(*measured)
        lines.append(
            f"| {name} | {min(covered):.3f} | {max(covered):.3f} | {np.mean(widths):.3f} |"
        )
    return "\n".join(lines)


def rejections(
    design: Design,
    areas: tuple[float, float],
    correlation: float,
    common: float,
    draws: int,
    swaps: int = 99,
    seed: int = 0,
) -> float:
    """Share of draws with p of at most 0.05, for two models of these AUROCs.

    ``common`` is the correlation of the two models' scores of a slide within its class.
    """
    key = [3 * seed + 2, *(round(100 * area) for area in areas), round(10 * correlation)]
    rng = np.random.default_rng(key)
    shared = effects(design, correlation, draws, rng)
    models = [
        np.sqrt(common) * shared
        + np.sqrt(1 - common) * effects(design, correlation, draws, rng)
        + np.sqrt(2) * norm.ppf(area) * design.positive
        for area in areas
    ]
    labels = design.positive.astype(int)
    rejected = 0
    for number, pair in enumerate(zip(*models)):
        one, other = (
            [Inputs(np.stack([-row, row], axis=-1), {}, labels, None, 0.9)] for row in pair
        )
        p = swap_test(one, other, design.patients, ["auroc"], swaps, number)["auroc"]
        rejected += p <= 0.05  # nan is not
    return rejected / draws


def test_table(draws: int, seed: int = 0) -> str:
    lines = ["| | AUROC | correlation | rejected, models correlated by 0.5 | by 0.9 |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for one in few_designs():
        for area, correlation in product((0.76, 0.92, 0.99), one.correlations):
            each = [
                rejections(one, (area, area), correlation, common, draws, seed=seed)
                for common in (0.5, 0.9)
            ]
            lines.append(f"| {one.name} | {area} | {correlation} | {each[0]:.3f} | {each[1]:.3f} |")
    (alternative,) = [one for one in designs() if one.name == "130 slides, 65 + 65 patients"]
    power = rejections(alternative, (0.92, 0.82), 0, 0.5, draws, 199, seed)
    lines += ["", f"Power for 0.92 against 0.82, 65 + 65 slides, correlated by 0.5: {power:.2f}."]
    return "\n".join(lines)


PARTS: dict[str, Callable[[int, int], str]] = {
    "auroc": lambda draws, seed: auroc_table(list(cells(draws, with_bootstrap=True, seed=seed))),
    "others": other_table,
    "test": test_table,
}


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=2000, help="of each cell")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0, help="of the simulation")
    options = parser.parse_args(args)
    for part in options.part:
        print(f"{PARTS[part](options.draws, options.seed)}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
