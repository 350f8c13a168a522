import gzip
import os
import pickle
from argparse import Namespace

import pytest
import torch
from torch_geometric import EdgeIndex

from dasmil.errors import InputError
from dasmil.interop.restricted import load_restricted

CONTENT = {"weight": torch.arange(1000.0), "epoch": 3}


class Hostile:
    """Makes a file the moment it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Fraction:
    pass


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("compressed", [True, False], ids=["gz", "plain"])
def test_both_formats_of_torch_are_read_compressed_or_not(tmp_path, zipped, compressed):
    path = saved(tmp_path / "file.pth", CONTENT, _use_new_zipfile_serialization=zipped)
    if compressed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    content = load_restricted(path)
    assert torch.equal(content["weight"], CONTENT["weight"]) and content["epoch"] == 3


def test_only_what_is_allowed_is_loaded_and_only_meanwhile(tmp_path):
    path = saved(tmp_path / "args.pth", {"args": Namespace(arch="vit_small")})
    assert load_restricted(path, (Namespace,))["args"].arch == "vit_small"
    stand_in = load_restricted(path, ((Fraction, "argparse.Namespace"),))["args"]
    assert type(stand_in) is Fraction
    with pytest.raises(
        InputError, match=r"args\.pth: is not loaded.*argparse\.Namespace, which no table needs"
    ):
        load_restricted(path, kind="table")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_hostile_file_runs_nothing(tmp_path, zipped):
    marker = tmp_path / "marker"
    content = {"weight": torch.ones(3), "args": Hostile(marker)}
    path = saved(tmp_path / "hostile.pth", content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"hostile\.pth: is not loaded: it asks for \w+\.system"):
        load_restricted(path, (Namespace,))
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the file was hostile indeed


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_hostile_pickle_that_torch_never_wrote_runs_nothing(tmp_path, protocol):
    marker = tmp_path / "marker"
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Hostile(marker), protocol))
    with pytest.raises(InputError, match=r"bare\.pkl"):
        load_restricted(tmp_path / "bare.pkl")
    assert not marker.exists()


def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path):
    whole = saved(tmp_path / "whole.pth", CONTENT).read_bytes()
    files = {
        "cut.pth": whole[:2000],
        "cut.pth.gz": gzip.compress(whole)[:1000],
        "damaged.pth.gz": gzip.compress(whole)[:40] + b"x" * 400,
        "empty.pth": b"",
        "text.pth": b"slide_id,path,label\n",
        "other.pth": b"\x10\0\0\0\0\0\0\0{}              ",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: truncated, or no torch file") as refused:
            load_restricted(tmp_path / name)
        assert len(str(refused.value)) - len(str(tmp_path)) < 200
    with pytest.raises(InputError, match=r"gone\.pth: no such file"):
        load_restricted(tmp_path / "gone.pth")


def test_what_other_libraries_allow_is_not_allowed_here(tmp_path):
    """Importing torch_geometric puts its classes on the list of the whole process."""
    path = saved(tmp_path / "edges.pth", EdgeIndex(torch.zeros(2, 3, dtype=torch.int64)))
    before = torch.serialization.get_safe_globals()
    assert EdgeIndex in before
    with pytest.raises(InputError, match="it asks for torch_geometric"):
        load_restricted(path)
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_a_compressed_file_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("dasmil.interop.restricted.MAX_UNPACKED_BYTES", 1000)
    path = tmp_path / "zeros.pth.gz"
    path.write_bytes(gzip.compress(bytes(5000)))
    with pytest.raises(InputError, match=r"zeros.pth.gz: unpacks to more than"):
        load_restricted(path)
