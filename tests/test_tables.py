"""Tables are read as they were written, and as spreadsheets save them."""

from pathlib import Path

import pytest

from dasmil.errors import InputError
from dasmil.tables import read_csv, write_csv


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_row_that_cannot_be_written_leaves_the_old_table(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_csv(path, ["a"], [{"a": 1}])
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        write_csv(path, ["a"], [{"a": 2}, {"b": 3}])
    assert read_csv(path) == (["a"], [{"a": "1"}])
    assert names_in(tmp_path) == ["table.csv"]


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
    assert str(caught.value) == f"{path} line 4: it does not have the 2 cells of the header"


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
    with pytest.raises(InputError, match="line 3: it does not have the 2 cells"):
        read_csv(path)


def test_a_column_that_occurs_twice_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("slide_id,label,path, label\ns1,tumour,a.svs,\n")
    with pytest.raises(InputError, match="the column label occurs twice"):
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
