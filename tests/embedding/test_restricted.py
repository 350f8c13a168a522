import gzip
import os
import pickle
import resource
import tarfile
import warnings
import zipfile
from argparse import Namespace

import pytest
import torch
from torch_geometric import EdgeIndex

from dasmil.embedding.restricted import load_restricted
from dasmil.errors import InputError

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


def test_only_allowed_names_are_loaded_and_only_during_the_load(tmp_path):
    path = saved(tmp_path / "args.pth", {"args": Namespace(arch="vit_small")})
    assert load_restricted(path, (Namespace,))["args"].arch == "vit_small"
    stand_in = load_restricted(path, ((Fraction, "argparse.Namespace"),))["args"]
    assert type(stand_in) is Fraction
    with pytest.raises(
        InputError, match=r"args\.pth: is not loaded.*argparse\.Namespace', which no table needs"
    ):
        load_restricted(path, kind="table")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_hostile_file_runs_nothing(tmp_path, zipped):
    marker = tmp_path / "marker"
    content = {"weight": torch.ones(3), "args": Hostile(marker)}
    path = saved(tmp_path / "hostile.pth", content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"hostile\.pth: is not loaded: it asks for '\w+\.system'"):
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


def test_unreadable_files_are_refused_in_one_sentence(tmp_path):
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
        with pytest.raises(
            InputError, match=rf"{name}: damaged or cut short, or no torch file"
        ) as refused:
            load_restricted(tmp_path / name)
        assert len(str(refused.value)) - len(str(tmp_path)) < 200
    with pytest.raises(InputError, match=r"gone\.pth: does not exist"):
        load_restricted(tmp_path / "gone.pth")


def test_names_that_other_libraries_allow_are_refused(tmp_path):
    """Importing torch_geometric puts its classes on the list of the whole process."""
    path = saved(tmp_path / "edges.pth", EdgeIndex(torch.zeros(2, 3, dtype=torch.int64)))
    before = torch.serialization.get_safe_globals()
    assert EdgeIndex in before
    with pytest.raises(InputError, match=r"it asks for .*_rebuild_from_type"):
        load_restricted(path)
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_a_compressed_file_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("dasmil.embedding.restricted.ALWAYS_UNPACKED_BYTES", 1000)
    path = tmp_path / "zeros.pth.gz"
    path.write_bytes(gzip.compress(bytes(5000)))
    with pytest.raises(InputError, match=r"zeros.pth.gz: 40 bytes unpack to more than 1,000"):
        load_restricted(path)


# What takes memory


def rebuilt(path, out, change, compression=zipfile.ZIP_STORED):
    """A zip of torch.save with some of its members changed."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w", compression) as target:
        for member in source.infolist():
            kind = member.filename.split("/", 1)[1]
            target.writestr(member.filename, change(kind, source.read(member)))
    return out


def pickled(tmp_path, pickle_of_it):
    """A zip of torch.save whose pickle is another one."""
    path = saved(tmp_path / "whole.pth", CONTENT)
    return rebuilt(
        path, tmp_path / "bomb.pth", lambda kind, data: pickle_of_it if kind == "data.pkl" else data
    )


def compressed(tmp_path):
    path = saved(tmp_path / "zeros.pth", {"weight": torch.zeros(10**7)})
    return rebuilt(path, tmp_path / "bomb.pth", lambda kind, data: data, zipfile.ZIP_DEFLATED)


def with_lying_size(tmp_path, old, new):
    """The number of values of the storage, or of the tensor, is another one."""
    path = saved(tmp_path / "whole.pth", {"weight": torch.arange(1000.0)})

    def change(kind, data):
        return data.replace(old, new, 1) if kind == "data.pkl" else data

    return rebuilt(path, tmp_path / "bomb.pth", change)


def with_two_pickles(tmp_path):
    path = saved(tmp_path / "bomb.pth", CONTENT)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings(action="ignore"):
        archive.writestr("bomb/data.pkl", pickle.dumps(CONTENT["epoch"], 2))
    return path


THOUSAND, MANY = b"M\xe8\x03", b"J\xff\xff\xff\x7f"  # as a pickle holds numbers
BOMBS = {
    "deflated storage": compressed,
    "a tensor that is too large": lambda p: with_lying_size(p, THOUSAND + b"\x85", MANY + b"\x85"),
    "a value that repeats": lambda p: saved(
        p / "bomb.pth", {"weight": torch.ones(1).expand(10**6, 10**6)}
    ),
    "a tensor many times": lambda p: saved(
        p / "bomb.pth", {str(k): shared[:] for shared in [torch.ones(10**4)] for k in range(99)}
    ),
    "two pickles": with_two_pickles,
    "a bytearray": lambda p: pickled(p, b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."),
    "a tensor without storage": lambda p: pickled(
        p, b"\x80\x02ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R."
    ),
    "a stack global": lambda p: pickled(p, pickle.dumps(os.system, 4)),
    "an instance": lambda p: pickled(p, b"\x80\x02(ios\nsystem\n."),
    "an extension": lambda p: pickled(p, b"\x80\x02\x82\x01."),
    "no end": lambda p: pickled(p, b"\x80\x02]"),
    "deep lists": lambda p: pickled(p, b"\x80\x02" + b"(" * 10**5 + b"l" * 10**5 + b"."),
    "deep tuples": lambda p: pickled(p, b"\x80\x02)" + b"\x85" * 10**5 + b"."),
    "gzip of zeros": lambda p: gzipped(p / "bomb.pth"),
    "a FIFO": lambda p: fifo(p / "bomb.pth"),
    "a device": lambda p: device(p / "bomb.pth"),
    "TorchScript": lambda p: script(p / "bomb.pth"),
    "a tar": lambda p: tarred(p / "bomb.pth"),
}


def gzipped(path):
    path.write_bytes(gzip.compress(bytes(66 * 2**20), 1))
    return path


def fifo(path):
    os.mkfifo(path)
    return path


def device(path):
    path.symlink_to("/dev/zero")
    return path


def script(path):
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
    return path


def tarred(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return path


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_file_that_takes_more_memory_than_disk_is_refused(tmp_path, bomb):
    path = BOMBS[bomb](tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"bomb\.pth: ") as refused:
        load_restricted(path)
    assert "\n" not in str(refused.value) and "weights_only" not in str(refused.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # kB


def test_a_storage_is_never_larger_than_its_file(tmp_path):
    path = with_lying_size(tmp_path, THOUSAND + b"tq", MANY + b"tq")
    assert torch.equal(load_restricted(path)["weight"], CONTENT["weight"])


def test_a_bag_in_memory_does_not_change_with_its_file(tmp_path):
    path = saved(tmp_path / "file.pth", CONTENT)
    content = load_restricted(path)
    path.write_bytes(b"")
    assert torch.equal(content["weight"], CONTENT["weight"])


def test_tied_weights_and_views_are_read(tmp_path):
    weight = torch.arange(100.0)
    path = saved(tmp_path / "file.pth", {"a": weight, "b": weight, "c": (weight[5:9],), "d": [1]})
    content = load_restricted(path)
    assert torch.equal(content["a"], weight) and torch.equal(content["b"], weight)
    assert torch.equal(content["c"][0], weight[5:9])
    assert content["c"][0].untyped_storage().nbytes() == 16
