"""A slide file has one digest under any name; another file has another one."""

import os
from pathlib import Path

import pytest

from dasmil.errors import InputError
from dasmil.slides.digest import SAMPLE_BYTES, file_state, sample_digest


def test_a_slide_is_recognised_under_another_name_and_time(tmp_path: Path) -> None:
    content = os.urandom(1_000_000)
    one, other = tmp_path / "one.svs", tmp_path / "other.tiff"
    one.write_bytes(content)
    other.write_bytes(content)
    os.utime(other, (0, 0))
    assert sample_digest(one) == sample_digest(other)
    assert file_state(one) != file_state(other)


@pytest.mark.parametrize("place", [0, 999_999, 500_000])
def test_other_bytes_of_the_same_size_are_another_slide(tmp_path: Path, place: int) -> None:
    path = tmp_path / "slide.svs"
    content = bytearray(1_000_000)
    path.write_bytes(content)
    before = sample_digest(path)
    around = slice(max(0, place - 50_000), place + 50_000)  # another picture differs everywhere
    content[around] = b"x" * len(content[around])
    path.write_bytes(content)
    assert len(content) == 1_000_000
    assert sample_digest(path) != before


@pytest.mark.parametrize("size", [0, 1, SAMPLE_BYTES, SAMPLE_BYTES + 1])
def test_small_files_are_sampled_too(tmp_path: Path, size: int) -> None:
    path = tmp_path / "slide.png"
    path.write_bytes(bytes(size))
    before = sample_digest(path)
    path.write_bytes(bytes(size + 1))
    assert sample_digest(path) != before


def test_a_slide_of_many_files_is_all_of_them(tmp_path: Path) -> None:
    """MIRAX: what is named in a table is a thumbnail, the pixels lie in the folder beside it.

    What others leave there makes no other slide of it, or one that was trained on would be tested.
    """
    index, folder = tmp_path / "s.mrxs", tmp_path / "s"
    index.write_bytes(b"thumbnail")
    folder.mkdir()
    for name in ("Data0000.dat", "Data0001.dat", "Slidedat.ini", "1.DCM"):
        (folder / name).write_bytes(b"pixels" * 1000)
    before, of_folder = sample_digest(index), sample_digest(folder)
    state = file_state(index)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._1.dcm", "notes.txt"):
        (folder / name).write_text("of a desktop")
    assert (sample_digest(index), file_state(index)) == (before, state)
    for name in ("Data0001.dat", "Slidedat.ini", "1.DCM"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(b"others" * 1000)
        assert sample_digest(index) != before
        assert sample_digest(folder) != of_folder
        (folder / name).write_bytes(content)
    assert sample_digest(folder) == of_folder


def test_a_slide_that_is_not_there_has_no_digest(tmp_path: Path) -> None:
    for function in (sample_digest, file_state):
        with pytest.raises(InputError, match="no such file"):
            function(tmp_path / "lost.svs")
