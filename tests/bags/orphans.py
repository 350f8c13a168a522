"""Bags with orphans, as other tools' grids give them."""

from bag_factory import with_changes

from dasmil.bags import Bag


def without_first(bag: Bag, scale: str, count: int) -> Bag:
    """The bag without the first tiles of a scale but the finest; their children become orphans."""
    finer = bag.scales[bag.scales.index(scale) + 1]
    parent = {name: rows[count:] if name == scale else rows for name, rows in bag.parent.items()}
    rows = bag.parent[finer]
    parent[finer] = (rows - count).clamp(min=-1)
    return with_changes(
        bag,
        features={n: t[count:] if n == scale else t for n, t in bag.features.items()},
        grid={n: t[count:] if n == scale else t for n, t in bag.grid.items()},
        parent=parent,
    )
