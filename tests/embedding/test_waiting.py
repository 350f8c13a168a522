"""The share of waiting for pixels, and chunks that a GPU gets without waiting."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dasmil.embedding.dataset import WAIT, TileChunk
from dasmil.embedding.module import EmbeddingModule
from dasmil.embedding.waiting import Waiting

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@dataclass
class Machine:
    """The clock of the process, and when the queue of the GPU will be empty; in seconds."""

    now: float = 100.0
    done: float = 0.0

    def launch(self, seconds: float) -> None:
        """Give the GPU some work."""
        self.done = max(self.done, self.now) + seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.time = max(machine.done, machine.now)

        def query(self) -> bool:
            return self.time <= machine.now

        def synchronize(self) -> None:
            machine.now = max(machine.now, self.time)

        def elapsed_time(self, end: "Event") -> float:
            assert self.query() and end.query()
            return 1000 * (end.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr("dasmil.embedding.waiting.time.monotonic", lambda: machine.now)
    return machine


def run(machine: Machine, device: torch.device, reading: float, network: float) -> Waiting:
    """Ten chunks, each of which is read after the one before has been taken."""
    waiting = Waiting()
    waiting.begin(device)
    for _ in range(10):
        machine.now += reading
        waiting.end()
        if device == CUDA:
            machine.launch(network)
        else:
            machine.now += network
        waiting.begin(device)
    return waiting


@pytest.mark.parametrize(
    ("device", "reading", "network", "seconds"),
    [
        (CPU, 2.0, 3.0, 20.0),
        (CUDA, 3.0, 1.0, 3.0 + 9 * 2.0),  # the GPU is idle until the next chunk is there
        (CUDA, 1.0, 3.0, 1.0),  # the process waits, but the GPU does not
    ],
)
def test_waiting_is_the_time_in_which_the_networks_have_nothing_to_do(
    machine: Machine, device: torch.device, reading: float, network: float, seconds: float
) -> None:
    waiting = run(machine, device, reading, network)
    assert waiting.seconds() == pytest.approx(seconds)
    assert waiting.seconds() == pytest.approx(seconds)


def test_nothing_is_waited_for_before_the_first_chunk_is_asked_for(machine: Machine) -> None:
    waiting = Waiting()
    waiting.end()
    assert waiting.seconds() == 0


class Pixels:
    """In place of a tensor: remembers how it was copied."""

    def __init__(self) -> None:
        self.copies: list[tuple[torch.device, bool]] = []

    def to(self, device: torch.device, non_blocking: bool) -> "Pixels":
        self.copies.append((device, non_blocking))
        return self


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_only_a_copy_to_cuda_does_not_wait(kind: str) -> None:
    module = make_module()
    pixels: Any = Pixels()
    device = torch.device(kind)
    module.transfer_batch_to_device(TileChunk(0, tiles={"x20": pixels}), device, 0)
    assert pixels.copies == [(device, kind == "cuda")]


def make_module() -> EmbeddingModule:
    none: Any = SimpleNamespace()
    return EmbeddingModule({}, none, none, batch_size=1, num_workers=0, max_damaged_tiles=0.0)


def test_a_chunk_ends_the_waiting_unless_it_only_waits_for_other_workers(machine: Machine) -> None:
    module = make_module()
    for slide, seconds in ((0, 2.0), (WAIT, 2.0), (1, 4.0)):
        module.waiting.begin(CPU)
        machine.now += 2
        module.transfer_batch_to_device(TileChunk(slide), CPU, 0)
        assert module.waiting.seconds() == seconds


def test_the_pixels_of_a_chunk_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    tiles = {scale: torch.zeros(2, 3, 4, 4, dtype=torch.uint8) for scale in ("x10", "x20")}
    TileChunk(0, tiles=tiles).pin_memory()
    assert len(pinned) == 2


def test_a_run_on_the_cpu_pins_nothing_although_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pinning would open a context on the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module = make_module()
    sampler: Any = [0]
    module.make_sampler = lambda: sampler
    assert not module.predict_dataloader().pin_memory
