"""Bags whose tile scores are known, each tile's first feature, and their annotations."""

import csv
import json
from itertools import product
from pathlib import Path

import torch
from bag_factory import CLASSES, with_changes, write_bags
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from dasmil.bags import bag_path, join_graphs, read_bag, write_bag
from dasmil.bags.output import ScaleOutput
from dasmil.callbacks.instance_truth import InstanceTruth
from dasmil.data import BagDataModule

SIZE_PX0 = (4096, 4096)  # 8 x 8 tiles of x20, 512 px wide


class FirstFeature(LightningModule):
    """The instance logit of a tile is its first feature."""

    def _outputs(self, graph):
        outputs = {}
        for scale, features in graph.features.items():
            logits, rows = features[:, :1], torch.zeros(len(features), dtype=torch.int64)
            bag = torch.zeros(graph.num_bags, 1)
            outputs[scale] = ScaleOutput(bag, logits, logits, rows, rows == 0)
        return outputs

    def test_step(self, graph, batch_idx):
        return self._outputs(graph)

    def validation_step(self, graph, batch_idx):
        return self._outputs(graph)


def set_logits(folder: Path, slide_id: str, logit) -> None:
    """A bag of all tiles of the slide, with ``logit(scale, row, column)`` as features."""
    old = read_bag(bag_path(folder, slide_id))
    grid, features, parent = {}, {}, {}
    for number, scale in enumerate(old.scales):
        side = 4 * 2**number
        cells = list(product(range(side), repeat=2))
        if number:  # in the order of the parents
            cells.sort(key=lambda cell: (cell[0] // 2, cell[1] // 2))
            parent[scale] = torch.tensor([r // 2 * 4 + c // 2 for r, c in cells]).int()
        grid[scale] = torch.tensor(cells).int()
        values = torch.tensor([float(logit(scale, r, c)) for r, c in cells])
        features[scale] = values[:, None].expand(-1, 6).half().contiguous()
    bag = with_changes(old, size_px0=SIZE_PX0, features=features, grid=grid, parent=parent)
    write_bag(bag_path(folder, slide_id), bag)


def box_xml(left, top, right, bottom) -> str:
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    text = "".join(f'<Coordinate Order="{n}" X="{x}" Y="{y}"/>' for n, (x, y) in enumerate(corners))
    return (
        '<ASAP_Annotations><Annotations><Annotation Name="a" Type="Polygon" PartOfGroup="_0">'
        f"<Coordinates>{text}</Coordinates></Annotation></Annotations></ASAP_Annotations>"
    )


def write_judged_bags(root):
    """Two tumour slides whose upper left quarter is the lesion, one normal slide.

    In slide t1 the lesion's tiles score highest; in t2 one tile outside scores higher still. The
    normal slide scores as t1 does outside, but for one tile.
    """
    labels = {"t1": "tumour", "t2": "tumour", "n1": "normal"}
    folder = write_bags(root / "bags", labels, dict.fromkeys(labels, "test"))

    def lesion(row, column, side):
        return row < side // 2 and column < side // 2

    def side(scale):
        return {"x10": 4, "x20": 8}[scale]

    set_logits(folder, "t1", lambda s, r, c: 2 if lesion(r, c, side(s)) else -1)
    corner = {"x10": (3, 3), "x20": (7, 7)}
    set_logits(
        folder, "t2", lambda s, r, c: 3 if (r, c) == corner[s] else 2 * lesion(r, c, side(s)) - 1
    )
    set_logits(folder, "n1", lambda s, r, c: 1.5 if (r, c) == corner[s] else -1)
    truth = root / "truth"
    truth.mkdir()
    for name in ("t1", "t2"):
        (truth / f"{name}.xml").write_text(box_xml(0, 0, 2048, 2048))
    return folder


def run(folder, callback, stage="test", classes=CLASSES, batch_size=2):
    data = BagDataModule(folder, classes, num_workers=0)
    loader = data.test_dataloader
    data.test_dataloader = lambda: DataLoader(  # its own has one slide a batch
        loader().dataset, batch_size, collate_fn=join_graphs
    )
    if stage == "validate":
        data.val_part = "test"
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder.parent,
    )
    getattr(trainer, stage)(FirstFeature(), datamodule=data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def tile_rows(tmp_path, slide_id):
    with open(tmp_path / "out" / "instance_truth" / f"{slide_id}.csv", newline="") as file:
        return list(csv.DictReader(file))


def refusal(bags: Path, slide_id: str) -> str:
    """Why the annotation of a slide, and of no other, is refused."""
    callback = InstanceTruth(bags.parent / "truth")
    run(bags, callback)
    assert list(callback.refused) == [slide_id] and callback.metrics
    return callback.refused[slide_id]


def set_header(folder: Path, slide_id: str, **changes) -> None:
    bag = read_bag(bag_path(folder, slide_id))
    write_bag(bag_path(folder, slide_id), with_changes(bag, **changes))


def geojson(left, top, right, bottom) -> str:
    corners = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    geometry = {"type": "Polygon", "coordinates": [corners]}
    properties = {"classification": {"name": "Tumor"}}
    return json.dumps({"type": "Feature", "geometry": geometry, "properties": properties})
