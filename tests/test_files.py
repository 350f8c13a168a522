"""Files are whole or absent."""

import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dasmil.errors import InputError
from dasmil.files import atomic_path, map_files, must_be_file, write_text


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_only_when_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "slide.tiff"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == ".tiff"  # writers choose their format by it
        temporary.write_bytes(b"half")
        assert not path.exists()
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert names_in(path.parent) == ["slide.tiff"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_mode_that_the_user_wants(tmp_path: Path, umask: int) -> None:
    """Also where a library makes files that only their owner may read, as safetensors does."""
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "new" / "bag.safetensors") as temporary:
            save_file({"a": np.zeros(3)}, temporary)
        write_text(tmp_path / "new" / "table.csv", "")
    finally:
        os.umask(before)
    for path in (tmp_path / "new").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_block_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk full"), atomic_path(path) as temporary:
        temporary.write_text("half of the new")
        raise RuntimeError("disk full")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["table.csv"]


def test_files_of_one_stem_do_not_share_their_temporary(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "s.csv") as table, atomic_path(tmp_path / "s.txt") as text:
        table.write_text("1,2")
        text.write_text("two")
    assert (tmp_path / "s.csv").read_text() == "1,2"
    assert (tmp_path / "s.txt").read_text() == "two"


def test_text_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "note.txt", "0.5 µm/px\n")
    assert (tmp_path / "note.txt").read_bytes() == b"0.5 \xc2\xb5m/px\n"


def test_files_are_read_in_threads_that_outlive_it_and_that_a_forked_process_makes_for_itself():
    """A thread that ends while another process is forked may hang that process in Python 3.11."""
    assert list(map_files(abs, [-3, 2, -1])) == [3, 2, 1]
    assert any(thread.name.startswith("map_files") for thread in threading.enumerate())
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_absolute).get(timeout=60) == [3, 2, 1]


def _absolute() -> list[int]:
    return list(map_files(abs, [-3, 2, -1]))


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "nowhere").symlink_to("missing")
    for name in ("file", "link"):
        must_be_file(tmp_path / name, "give a file")
    refused = {
        "fifo": "is no regular file; give a file",
        "nowhere": "does not exist; give a file",
        "x" * 300: "does not exist; give a file",
        ".": "is a folder; give a file",
    }
    for name, sentence in refused.items():
        with pytest.raises(InputError, match=sentence):
            must_be_file(tmp_path / name, "give a file")
    with pytest.raises(InputError, match="is no regular file"):
        must_be_file(Path("/dev/zero"), "give a file")
