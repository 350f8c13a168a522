"""What one of two processes computes for both; the processes are forks that meet in a file."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bag_factory import CLASSES, write_bags

from dasmil.bags import Bag
from dasmil.data import BagDataModule
from dasmil.data.distributed import compute_once
from dasmil.errors import InputError

LABELS: dict[str, str | None] = {f"{c}{n}": CLASSES[c == "t"] for n in range(8) for c in "nt"}


def in_two(folder: Path, task: Callable[[int], Any]) -> list[Any]:
    """What a task returns in each of two processes, given its rank."""

    def run(rank: int) -> None:
        meeting = f"file://{folder / 'meeting'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
        torch.save(task(rank), folder / f"result{rank}")
        dist.destroy_process_group()

    children = []
    for rank in range(2):
        if (child := os.fork()) == 0:
            code = 1
            try:
                run(rank)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    return [torch.load(folder / f"result{rank}") for rank in range(2)]


def test_the_statistics_of_two_processes_are_read_once_and_are_those_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = BagDataModule(write_bags(tmp_path / "bags", LABELS), CLASSES)
    data.setup("fit")
    expected = data.train_statistics()
    read_bag, reads = BagDataModule.read_bag, []

    def remember(self: BagDataModule, slide_id: str) -> Bag:
        reads.append(slide_id)
        return read_bag(self, slide_id)

    monkeypatch.setattr(BagDataModule, "read_bag", remember)
    (first, its_reads), (second, no_reads) = in_two(
        tmp_path, lambda rank: (data.train_statistics(), reads)
    )
    assert its_reads == [row.slide_id for row in data.rows_of("train")] and not no_reads
    for found in (first, second):
        assert list(found) == list(expected)
        for scale, values in expected.items():
            assert all(torch.equal(one, other) for one, other in zip(values, found[scale]))


def test_bad_input_of_the_first_process_is_raised_in_both(tmp_path: Path) -> None:
    def refuse() -> None:
        raise InputError("bag n0: broken")

    def task(rank: int) -> str:
        with pytest.raises(InputError) as caught:
            compute_once(refuse)
        return str(caught.value)

    assert in_two(tmp_path, task) == ["bag n0: broken"] * 2


def test_one_process_computes_itself() -> None:
    assert compute_once(lambda: 3) == 3
