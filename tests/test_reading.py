"""Reading processes hand over the same tensors with little shared memory, and never hang."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dasmil import reading

SHAPES = ((3, 4, 5), (0, 7), ())


class Tensors(Dataset):
    """Of several dtypes and layouts."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5) + index
        return {
            "channels last": image.to(memory_format=torch.channels_last),
            "part of another": image[:, 1:, ::2],
            "expanded": torch.tensor([index]).expand(3, 2),
            "bf16": torch.full((2, 2), index, dtype=torch.bfloat16),
            "bool": image > 50,
            "empty": torch.empty(0, 7),
            "scalar": torch.tensor(float(index)),
        }


class TooLarge(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> object:
        return Unsendable()


class Unsendable:
    def __reduce__(self) -> tuple:
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")


def load(dataset: Dataset) -> list:
    return list(DataLoader(dataset, batch_size=None, **reading.reader_options(2)))


@pytest.mark.parametrize("free", [64 * 2**20, 2**40], ids=["small", "large"])
def test_tensors_arrive_as_they_are(free: int, monkeypatch, capsys) -> None:
    monkeypatch.setattr(reading, "_shared_bytes", lambda: free)
    reading._print_small_memory.cache_clear()
    dataset = Tensors()
    for _ in range(2):
        for expected, found in zip(map(dataset.__getitem__, range(4)), load(dataset), strict=True):
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
            image = found["channels last"]
            assert image.is_contiguous(memory_format=torch.channels_last)
            assert found["channels last"].is_shared() == (free > reading.SMALL_BYTES)
    assert capsys.readouterr().out.count("64 MB of shared memory are free") == (free < 2**30)


@pytest.mark.slow
def test_a_reader_that_cannot_pass_its_chunk_ends_the_run_with_a_sentence(capfd) -> None:
    """multiprocessing would print a traceback, and the loader wait for ever."""
    with pytest.raises(RuntimeError) as caught:
        load(TooLarge())
    assert "a reading process has ended" in reading.describe_lost_reader(caught.value)
    said = capfd.readouterr().err
    assert "cannot hand over what it has read (unable to write to file" in said
    assert "Traceback" not in said


def test_other_errors_are_none_of_a_lost_process() -> None:
    assert reading.describe_lost_reader(RuntimeError("out of memory")) == ""


SMALL_SHM = ["unshare", "--map-root-user", "--mount", "bash", "-c"]
MOUNT = f"mount -t tmpfs -o size=64m tmpfs {reading.SHARED_MEMORY}"
LARGE = """
import torch
from torch.utils.data import DataLoader
from dasmil.reading import reader_options

class Large(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.full((40 * 2**20,), index, dtype=torch.uint8)

for index, tensor in enumerate(DataLoader(Large(), batch_size=None, **reader_options(1))):
    assert tensor.eq(index).all()
"""


def _can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*SMALL_SHM, MOUNT], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not _can_mount(), reason="mounting a small /dev/shm is not allowed here")
def test_more_is_read_than_dockers_shared_memory_holds() -> None:
    """Of 64 MB, by a process that reads 80 MB ahead."""
    run = [*SMALL_SHM, f'{MOUNT} && exec "$0" -c "$1"', sys.executable, LARGE]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "64 MB of shared memory are free" in done.stdout
