"""A full disk ends a run with one sentence; with some space the same command goes on."""

import errno
import os
import subprocess
from pathlib import Path

import pytest
from faults import InThisProcess
from road import RANDOM, embed_command, tile_command

import dasmil.slides.tile
from dasmil.cli import main
from dasmil.slides.cohort import read_cohort
from dasmil.tables import read_csv


def slides_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def bags(road, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bags")
    assert main(embed_command(road.tiles, folder, RANDOM)) == 0
    return folder


@pytest.mark.parametrize(
    ("verb", "room"),
    [
        ("tile", 12),
        ("embed", 3),
        *(pytest.param("tile", room, marks=pytest.mark.slow) for room in (3, 21)),
    ],
)
def test_the_first_file_that_does_not_fit_ends_the_run(
    road, bags, tmp_path, monkeypatch, capsys, verb, room
) -> None:
    monkeypatch.setattr(dasmil.slides.tile, "ChildProcess", InThisProcess)
    reference = road.tiles if verb == "tile" else bags
    args = tile_command(road.cohort, tmp_path) if verb == "tile" else None
    args = args or embed_command(road.tiles, tmp_path, RANDOM)
    left = [room]

    def flush_until_full(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.name.endswith((".safetensors", ".png")):  # of others it depends when they come
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", flush_until_full)
        code = main(args)
    assert code == 2
    error = capsys.readouterr().err
    assert "its disk is full; free some space and run the same command again" in error
    assert str(tmp_path) in error and "Traceback" not in error
    done = slides_in(tmp_path)
    assert 0 < len(done) < len(slides_in(reference))
    _, rows = read_csv(tmp_path / "status.csv")
    states = [row["state"] for row in rows]
    assert (states.count("done"), states.count("failed")) == (len(done), 0)

    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert main(args) == 0
    assert slides_in(tmp_path) == slides_in(reference)
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["tile", "embed"])
def test_a_disk_that_is_really_full(road, bags, tmp_path, capsys, verb) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount a small disk")
    try:
        args = tile_command(road.cohort, disk) if verb == "tile" else None
        args = args or embed_command(road.tiles, disk, RANDOM)
        assert main(args) == 2
        assert "its disk is full" in capsys.readouterr().err
        reference = slides_in(road.tiles if verb == "tile" else bags)
        done = slides_in(disk)
        assert len(done) < len(read_cohort(road.cohort))
        assert all(reference[name] == found for name, found in done.items())
        grow = ["mount", "-o", "remount,size=100m", str(disk)]
        subprocess.run(grow, capture_output=True, check=True)
        assert main(args) == 0
        assert slides_in(disk) == reference
        assert not [path for path in disk.rglob(".*.tmp*")]
    finally:
        subprocess.run(["umount", str(disk)], capture_output=True, check=True)


@pytest.mark.parametrize(("verb", "what"), [("tile", "mkdir"), ("embed", "link")])
def test_a_disk_without_room_for_a_folder_or_a_claim(
    road, tmp_path, monkeypatch, capsys, verb, what
) -> None:
    monkeypatch.setattr(dasmil.slides.tile, "ChildProcess", InThisProcess)
    args = tile_command(road.cohort, tmp_path / "out") if verb == "tile" else None
    args = args or embed_command(road.tiles, tmp_path / "out", RANDOM)

    def full(path: Path, *_: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "mkdir") if what == "mkdir" else (os, "link")), full)
        assert main(args) == 2
    error = capsys.readouterr().err
    assert "its disk is full; free some space" in error and "Traceback" not in error
    assert main(args) == 0
