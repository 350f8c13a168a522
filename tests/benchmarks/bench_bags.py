"""What a training waits for: bags from their files to its graphs, and a cohort being opened."""

import ctypes
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from bag_factory import CLASSES, write_cohort_csv
from bags.hollow import write_hollow
from cases import WIDTH, make_bag, make_model, training_step
from table import Row, seconds
from torch.utils.data import DataLoader, Dataset
from torch_geometric.data import Data
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import GlobalStorage

from dasmil.bags import BagGraph, bag_graph, bag_path, read_bag, write_bag
from dasmil.data import BagDataModule

TARGET = "input below a tenth of the compute"
PYG = "torch.load of PyG Data, float32, int64 edges"


torch.serialization.add_safe_globals([Data, DataEdgeAttr, DataTensorAttr, GlobalStorage])


def measure(quick: bool) -> Iterator[Row]:
    num_tiles, num_bags, num_headers = (64, 2, 4) if quick else (12_000, 8, 2_000)
    num_workers = 0 if quick else 2
    with tempfile.TemporaryDirectory() as folder:
        yield from measure_reading(Path(folder), num_tiles, num_bags, num_workers)
    with tempfile.TemporaryDirectory() as folder:
        yield from measure_opening(Path(folder), num_tiles, num_headers)


def measure_reading(folder: Path, num_tiles: int, num_bags: int, num_workers: int) -> Iterator[Row]:
    slide_ids = write_cohort(folder, num_bags)
    for slide_id in slide_ids:
        write_bag(bag_path(folder, slide_id), make_bag(num_tiles, slide_id=slide_id))
    path, other = (bag_path(folder, slide_id) for slide_id in slide_ids[:2])
    graph = bag_graph(read_bag(path), 1)
    torch.save(pyg_data(graph), folder / "pyg.pt")
    bag = f"one bag, {bag_size(graph)} tiles"

    kept = open_bags(folder, "ram").train_dataloader().dataset

    def from_bag(path: Path = path) -> BagGraph:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a reading process
        made = bag_graph(read_bag(path), 1)
        torch.set_num_threads(threads)
        return made

    def from_pyg() -> Data:
        return torch.load(folder / "pyg.pt", weights_only=True)

    step, ours, peer, again, cold, cold_peer = seconds(
        training_step(make_model("gather", dropout=True), graph),
        from_bag,
        from_pyg,
        lambda: kept[0],
        lambda: (forget(other), from_bag(other)),  # that no graph holds
        lambda: (forget(folder / "pyg.pt"), from_pyg()),
    )
    limit = {"limit": step * 100, "limit_is": "a tenth of its training step", "target": TARGET}
    of_pyg = {"peer": peer * 1e3, "peer_is": PYG}
    yield Row("input", f"{bag}: file → graph, one core", "ms", ours * 1e3, **of_pyg, **limit)
    of_cold = {"peer": cold_peer * 1e3, "peer_is": PYG}
    yield Row("input", f"{bag}: the same from disk", "ms", cold * 1e3, **of_cold, **limit)
    yield Row("input", f"{bag}: cache ram", "ms", again * 1e3, **of_pyg, **limit)
    if torch.cuda.is_available():
        yield from measure_gpu(folder, graph, bag)

    ours, peer = seconds(
        *(
            through(loader)
            for loader in (
                open_bags(folder, "none", num_workers).train_dataloader(),
                DataLoader(
                    PygDataset(folder / "pyg.pt", num_bags),
                    batch_size=None,
                    num_workers=num_workers,
                    persistent_workers=num_workers > 0,
                ),
            )
        )
    )
    yield Row(
        "input",
        f"epoch of {num_bags} such bags, {num_workers} reading processes, without its compute",
        "s",
        ours,
        peer,
        f"{PYG}, {num_workers} reading processes",
        step * num_bags / 10,
        "a tenth of its training steps",
        TARGET,
    )


def measure_gpu(folder: Path, graph: BagGraph, bag: str) -> Iterator[Row]:
    """A bag from where it is kept to the GPU."""
    there = graph.to("cuda")
    pinned = graph.pin_memory()

    def to_gpu(source: BagGraph) -> Any:
        def way() -> None:
            source.to("cuda", non_blocking=True)
            torch.cuda.synchronize()

        return way

    step, ram, device, peer = seconds(
        training_step(make_model("gather", dropout=True, device="cuda"), there),
        to_gpu(pinned),
        to_gpu(there),
        lambda: torch.load(folder / "pyg.pt", weights_only=True).to("cuda"),
    )
    for cache, ours in (("ram", ram), ("device", device)):
        yield Row(
            "input",
            f"{bag}: cache {cache} → GPU",
            "ms",
            ours * 1e3,
            peer * 1e3,
            PYG,
            step * 100,
            "a tenth of its training step on the GPU",
            TARGET,
        )


def measure_opening(folder: Path, num_tiles: int, num_bags: int) -> Iterator[Row]:
    paths = [bag_path(folder, slide_id) for slide_id in write_cohort(folder, num_bags - 2)]
    for path in paths:
        write_hollow(path, num_tiles // 4, WIDTH)
    process = psutil.Process()
    before = process.memory_info().rss
    start = time.perf_counter()
    data = open_bags(folder, "none")
    ours = time.perf_counter() - start
    grown = process.memory_info().rss - before
    cached = sum(in_page_cache(path) for path in paths)
    assert len(data.rows) == num_bags

    some = paths[: max(num_bags // 100, 1)]
    start = time.perf_counter()
    for path in some:
        path.read_bytes()
    every = (time.perf_counter() - start) * num_bags / len(some)
    total = sum(path.stat().st_size for path in paths)

    case = f"open {num_bags:,} bags of {num_tiles:,} tiles"
    read_all = f"reading all, by what {len(some)} take"
    yield Row("input", case, "s", ours, every, read_all, target="seconds; no bag is read")
    yield Row("input", f"{case}: read of them", "MB", cached / 1e6, total / 1e6, "reading all")
    yield Row("input", f"{case}: memory grown", "MB", grown / 1e6)


def write_cohort(folder: Path, num_training: int) -> list[str]:
    """So many slides for training, and two more for validation."""
    slide_ids = [f"s{number:04}" for number in range(num_training + 2)]
    labels = {slide_id: CLASSES[n % 2] for n, slide_id in enumerate(slide_ids)}
    parts = {s: "train" if n < num_training else "val" for n, s in enumerate(slide_ids)}
    write_cohort_csv(folder / "cohort.csv", labels, parts)
    return slide_ids


def open_bags(folder: Path, cache: str, num_workers: int = 0) -> BagDataModule:
    data = BagDataModule(folder, CLASSES, num_workers=num_workers, cache=cache)  # type: ignore[arg-type]
    data.setup("fit")
    return data


def bag_size(graph: BagGraph) -> str:
    return " + ".join(f"{len(x):,} {scale}" for scale, x in reversed(graph.features.items()))


def pyg_data(graph: BagGraph) -> Data:
    """As the released code keeps a slide: the tiles of all scales together, and their edges."""
    x = torch.cat([features.float() for features in graph.features.values()])
    return Data(x=x, edge_index=graph.union.edge_index(), childof=graph.parent["x20"])


class PygDataset(Dataset[Data]):
    def __init__(self, path: Path, length: int):
        self.path = path
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Data:
        return torch.load(self.path, weights_only=True)


def through(loader: Any) -> Any:
    def way() -> None:
        for _ in loader:
            pass

    return way


def forget(path: Path) -> None:
    """Let the system hold nothing of a file in memory."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_page_cache(path: Path) -> int:
    """Bytes of a file that the system holds in memory, since somebody has read or written them."""
    libc = ctypes.CDLL(None, use_errno=True)
    data = np.memmap(path, np.uint8, "r")
    page = os.sysconf("SC_PAGE_SIZE")
    held = np.zeros(-(-data.nbytes // page), np.uint8)
    address, size = ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes)
    if libc.mincore(address, size, held.ctypes.data_as(ctypes.c_void_p)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int((held & 1).sum()) * page
