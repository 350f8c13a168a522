"""Files are whole or absent; tables come back as they were written."""

import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dasmil.errors import InputError
from dasmil.files import atomic_path, map_files, must_be_file, write_text
from dasmil.slides.digest import SAMPLE_BYTES, file_state, sample_digest
from dasmil.tables import read_csv, write_csv


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


def test_a_row_that_cannot_be_written_leaves_the_old_table(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_csv(path, ["a"], [{"a": 1}])
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        write_csv(path, ["a"], [{"a": 2}, {"b": 3}])
    assert read_csv(path) == (["a"], [{"a": "1"}])
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


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    rows = [
        {"slide_id": "a, b", "label": 'say "no"', "mpp": 0.25},
        {"slide_id": "zweizeilig\nµ", "label": None},
    ]
    write_csv(path, ["slide_id", "label", "mpp"], rows)
    assert read_csv(path) == (
        ["slide_id", "label", "mpp"],
        [
            {"slide_id": "a, b", "label": 'say "no"', "mpp": "0.25"},
            {"slide_id": "zweizeilig\nµ", "label": "", "mpp": ""},
        ],
    )


def test_byte_order_mark_spaces_and_blank_lines_are_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b"\xef\xbb\xbfslide_id , path\r\n s1 ,\ta b.svs \r\n\r\ns2,c.svs\r\n")
    assert read_csv(path) == (
        ["slide_id", "path"],
        [{"slide_id": "s1", "path": "a b.svs"}, {"slide_id": "s2", "path": "c.svs"}],
    )


@pytest.mark.parametrize("row", ["s2", "s2,b.svs,tumour"], ids=["too short", "too long"])
def test_a_row_of_another_length_is_refused_with_its_line(tmp_path: Path, row: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f"slide_id,path\ns1,a.svs\n\n{row}\n")
    with pytest.raises(InputError) as caught:
        read_csv(path)
    assert str(caught.value) == f"{path} line 4: it has not the 2 cells of the header"


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_csv(tmp_path / "none.csv")
    assert str(caught.value) == f"{tmp_path / 'none.csv'}: no such table"


def test_a_table_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin1.csv"
    path.write_bytes("slide_id,label\ns1,gutartig ä\n".encode("latin-1"))
    with pytest.raises(InputError, match="not a CSV table in UTF-8") as caught:
        read_csv(path)
    assert str(caught.value).startswith(f"{path} line 2: ")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "text",
    [
        "slide_id,label\ns1,ä b\n",
        "slide_id;label;\r\ns1;ä b;\r\n;;\r\n",
        "slide_id\tlabel\ns1\tä b\n",
    ],
    ids=["commas", "semicolons and an empty column", "tabs"],
)
def test_a_table_is_read_as_spreadsheets_save_it(tmp_path: Path, text: str, encoding: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode(encoding))
    assert read_csv(path) == (["slide_id", "label"], [{"slide_id": "s1", "label": "ä b"}])


def test_a_delimiter_in_quotes_is_text_and_a_first_line_may_name_another(
    tmp_path: Path,
) -> None:
    path = tmp_path / "table.csv"
    path.write_text('slide_id,"x;y;z"\ns1,"1;2"\n')
    assert read_csv(path)[1] == [{"slide_id": "s1", "x;y;z": "1;2"}]
    path.write_text("sep=|\nslide_id|path\ns1|a,b.svs\n")
    assert read_csv(path)[1] == [{"slide_id": "s1", "path": "a,b.svs"}]
    path.write_text("sep=|\nslide_id|path\ns1\n")
    with pytest.raises(InputError, match="line 3: it has not the 2 cells"):
        read_csv(path)


def test_a_column_that_stands_twice_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("slide_id,label,path, label\ns1,tumour,a.svs,\n")
    with pytest.raises(InputError, match="the column label stands twice"):
        read_csv(path)


@pytest.mark.parametrize("head", [b"PK\x03\x04", b"\xd0\xcf\x11\xe0"], ids=["xlsx", "xls"])
def test_a_spreadsheet_is_refused_with_advice(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "cohort.xlsx"
    path.write_bytes(head + bytes(100))
    with pytest.raises(InputError, match="a spreadsheet; save it as CSV"):
        read_csv(path)


def test_an_empty_table_has_no_columns(tmp_path: Path) -> None:
    path = tmp_path / "empty.csv"
    path.write_text("")
    assert read_csv(path) == ([], [])


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
