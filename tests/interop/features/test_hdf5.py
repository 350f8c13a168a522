"""Feature files of strangers: nothing outside is read, nothing unpacks without a bound."""

import os
import zlib
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
from feature_files import CELLS, write_clam, write_trident

from dasmil.bags import bag_path
from dasmil.cli import main
from dasmil.errors import InputError
from dasmil.interop.features.hdf5 import open_h5, read_features, read_places
from dasmil.tables import read_csv

SECRET = b"320 bytes of another file"


def features(file: h5py.File) -> np.ndarray:
    return np.ones((len(CELLS), 8), np.float32)


def external_storage(file: h5py.File, folder: Path) -> None:
    file.create_dataset("features", (48, 8), "f4", external=[(str(folder / "secret"), 0, 1536)])


def external_link(file: h5py.File, folder: Path) -> None:
    file["features"] = h5py.ExternalLink(str(folder / "other.h5"), "features")


def link_through_a_group(file: h5py.File, folder: Path) -> None:
    file["there"] = h5py.ExternalLink(str(folder / "other.h5"), "/")
    file["features"] = h5py.SoftLink("/there/features")


def link_to_a_fifo(file: h5py.File, folder: Path) -> None:
    file["features"] = h5py.ExternalLink(str(folder / "fifo"), "features")


def virtual(file: h5py.File, folder: Path) -> None:
    layout = h5py.VirtualLayout((48, 8), "f4")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "features", (48, 8), "f4")
    file.create_virtual_dataset("features", layout)


def beside(file: h5py.File, folder: Path) -> None:
    """The features are sound; something else leads out of the file."""
    file["features"] = features(file)
    file["more/deep"] = h5py.ExternalLink(str(folder / "other.h5"), "features")


def link_into_nothing(file: h5py.File, folder: Path) -> None:
    file["features"] = h5py.SoftLink("/nowhere")


def link_in_a_circle(file: h5py.File, folder: Path) -> None:
    file["features"] = h5py.SoftLink("/round")
    file["round"] = h5py.SoftLink("/features")


def group(file: h5py.File, folder: Path) -> None:
    file.create_group("features")


def many_things(file: h5py.File, folder: Path) -> None:
    file["features"] = features(file)
    for number in range(2000):
        file[f"g{number}"] = h5py.SoftLink("/features")


def claims(file: h5py.File, folder: Path) -> None:
    """10^12 entries that nobody has written."""
    file.create_dataset("features", (10**6, 10**6), "f4", chunks=(64, 64))


def zeros(file: h5py.File, folder: Path) -> None:
    """0.5 GB that a few hundred kB unpack to."""
    some = file.create_dataset("features", (2**17, 1024), "f4", chunks=(2**13, 1024), compression=9)
    chunk = zlib.compress(bytes(2**25), 9)
    for start in range(0, 2**17, 2**13):
        some.id.write_direct_chunk((start, 0), chunk)


def stream(file: h5py.File, folder: Path) -> None:
    """A chunk of 1.5 kB whose stream goes on for 1 GB."""
    some = file.create_dataset("features", (48, 8), "f4", chunks=(48, 8), compression="gzip")
    packer = zlib.compressobj(9)
    block = bytes(2**24)
    data = b"".join([*(packer.compress(block) for _ in range(64)), packer.flush()])
    some.id.write_direct_chunk((0, 0), data)


def huge_chunk(file: h5py.File, folder: Path) -> None:
    file.create_dataset(
        "features", (48, 8), "f4", chunks=(48, 2**23), maxshape=(48, None), compression="gzip"
    )


def text(file: h5py.File, folder: Path) -> None:
    file["features"] = features(file)
    attributes = dict(file["coords"].attrs)
    del file["coords"]
    file["coords"] = np.array([["1", "2"]] * 48, dtype="S3")
    file["coords"].attrs.update(attributes)


def complex_numbers(file: h5py.File, folder: Path) -> None:
    file["features"] = features(file) + 1j


def infinite(file: h5py.File, folder: Path) -> None:
    file["features"] = features(file) * np.inf


def ragged(file: h5py.File, folder: Path) -> None:
    some = file.create_dataset("features", (48,), h5py.vlen_dtype(np.float32))
    some[:] = [np.ones(8, np.float32)] * 48


def attribute(name: str, value: object):
    def change(file: h5py.File, folder: Path) -> None:
        file["features"] = features(file)
        file["coords"].attrs[name] = value

    change.__name__ = f"{name} {str(value)[:20]}"
    return change


HOSTILE = [
    *(external_storage, external_link, link_through_a_group, link_to_a_fifo, virtual, beside),
    *(link_into_nothing, link_in_a_circle, group, many_things, claims, zeros, stream, huge_chunk),
    *(text, complex_numbers, infinite, ragged),
    *(attribute("patch_size", value) for value in (0.4, -256, np.nan, 1e300, "x", [256] * 100)),
    *(attribute("level0_width", value) for value in (-5, 0, 0.5, np.inf, 1e300, b"wide")),
    *(attribute("patch_size_level0", value) for value in (0, 1e-300, 1e300, np.nan)),
    *(attribute("level0_magnification", value) for value in (0, np.nan, 1e-300, 1e300)),
    *(attribute("target_magnification", value) for value in (0, np.inf)),
]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_hostile_file_costs_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "secret").write_bytes(SECRET * 100)
    os.mkfifo(tmp_path / "fifo")
    write_trident(tmp_path, "s1", 20, CELLS)
    folder = write_trident(tmp_path, "s2", 20, CELLS)
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["features"] = np.full((48, 8), 7.0, np.float32)
    for number, change in enumerate(HOSTILE):
        write_trident(tmp_path, f"a{number:02}", 20, CELLS)  # they come first
        with h5py.File(folder / f"a{number:02}.h5", "a") as file:
            del file["features"]
            change(file, tmp_path)
    os.mkfifo(folder / "b1.h5")
    (folder / "b2.h5").mkdir()
    (folder / "b3.h5").symlink_to("b3.h5")
    (folder / "b4.h5").write_bytes(b"")
    before = psutil.Process().memory_info().rss
    bags = tmp_path / "BAGS"
    assert main(["import", "trident", str(bags), "--features.x20", str(folder)]) == 1
    assert psutil.Process().memory_info().rss - before < 0.4e9
    rows = {row["slide_id"]: row for row in read_csv(bags / "import.csv")[1]}
    states = {slide_id: row["state"] for slide_id, row in rows.items()}
    assert [s for s, state in states.items() if state == "done"] == ["s1", "s2"]
    for number, change in enumerate(HOSTILE):
        message = rows[f"a{number:02}"]["message"]
        kind = message.split(":")[0]
        assert message and not kind.endswith(("Error", "Exception")), (change.__name__, message)
        assert not bag_path(bags, f"a{number:02}").exists()
    text = capsys.readouterr()
    assert "Traceback" not in text.out + text.err
    with capsys.disabled():
        print(f"\nh5: {len(HOSTILE) + 4} tried, {len(states) - 2} refused, 0 wrong")


def test_links_inside_the_file_are_followed(tmp_path: Path) -> None:
    folder = write_trident(tmp_path, "s1", 20, CELLS)
    with h5py.File(folder / "s1.h5", "a") as file:
        file.move("features", "deep/features")
        file["features"] = h5py.SoftLink("/deep/features")
        file["more"] = file["deep"]
        file["deep/round"] = file["deep"]  # a circle of hard links
    with open_h5(folder / "s1.h5") as file:
        assert read_features(file, "features").shape == (48, 8)
        assert read_places(file).shape == (48, 2)


def test_compressed_features_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    values = np.random.default_rng(0).standard_normal((3000, 512)).astype(np.float16)
    with h5py.File(path, "w") as file:
        for name, options in (
            ("gzip", {"compression": "gzip", "shuffle": True, "fletcher32": True}),
            ("lzf", {"compression": "lzf"}),
            ("whole", {"compression": 1, "chunks": (3000, 512)}),
        ):
            file.create_dataset(name, data=values, **options)
    with open_h5(path) as file:
        for name in ("gzip", "lzf", "whole"):
            np.testing.assert_array_equal(read_features(file, name), values)


@pytest.mark.parametrize("patch_size", [0.4, -1])
@pytest.mark.parametrize("downsample", [1.0, np.nan, 0.0, 1e300])
def test_clams_patches_are_checked(tmp_path: Path, patch_size: float, downsample: float) -> None:
    from dasmil.interop.features.clam import read_patches

    write_clam(tmp_path, "s1", np.array(CELLS) * 256, level=0, downsample=1.0)
    path = tmp_path / "patches" / "s1.h5"
    assert read_patches(path).tile_px == 256
    for name, value in (("patch_size", patch_size), ("downsample", (downsample,) * 2)):
        if value == (1.0, 1.0):
            continue
        with h5py.File(path, "a") as file:
            file["coords"].attrs[name] = value
        with pytest.raises(InputError, match=str(path)):
            read_patches(path)
        with h5py.File(path, "a") as file:
            file["coords"].attrs["patch_size"] = 256


def test_a_file_that_is_open_is_closed_if_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["features"] = h5py.ExternalLink("b.h5", "features")
    with pytest.raises(InputError, match="features is a link to another file"), open_h5(path):
        pass
    with h5py.File(path, "a") as file:  # a file that is open for reading cannot be written
        del file["features"]
