"""No name of a file of strangers becomes a path elsewhere, a command, or a terminal's sequence."""

import ast
from pathlib import Path

import pytest

import dasmil
from dasmil.bags import bag_path
from dasmil.errors import InputError, error_text, escape_controls, join_few
from dasmil.names import name_fault, path_inside
from dasmil.slides.tile_slide import qc_path
from dasmil.slides.tile_table import tiles_path
from dasmil.tables import read_csv, write_csv

LEAVING = ["/x/y", "/../../x", "..", ".", "", "../x", "a/b", ".hidden", "a\0b", "a\nb", "a\x1b[2J"]
LEAVING += ["x" * 300, "ä" * 128, "=1+1", "@SUM(A1)", "\tx", "\rx", " ", "\udce9", "a\x9bb"]
# places that make file names of names which the program or the user chose
OTHERS = {
    *("demo/run.py", "demo/slides.py", "reports/evaluation_files.py", "reports/figures.py"),
    *(
        "callbacks/evaluation_writer.py",
        "experiments/sweep/runs.py",
        "experiments/sweep/steps.py",
        "experiments/sweep/sweep.py",
        "lightning_cli.py",
    ),
    *("work/board.py", "work/worker.py", "interop/features/export.py", "interop/features/clam.py"),
}


@pytest.mark.parametrize("name", LEAVING)
def test_a_name_that_leaves_its_folder_is_no_path(tmp_path: Path, name: str) -> None:
    assert name_fault(name)
    for names in ((name,), ("a", name), (name, "a.csv")):
        with pytest.raises(InputError, match="cannot read or write there"):
            path_inside(tmp_path, *names)


@pytest.mark.parametrize("make", [bag_path, tiles_path, qc_path])
@pytest.mark.parametrize("name", [n for n in LEAVING if n.strip() not in ("",)])
def test_the_files_of_a_slide_lie_in_their_folder(tmp_path: Path, make, name: str) -> None:
    with pytest.raises(InputError):
        make(tmp_path, name)
    assert make(tmp_path, "16.1-A (2)").is_relative_to(tmp_path)


@pytest.mark.parametrize("name", ["16.1", "-1", "+1", "a b", "x" * 255, "case=7", "ä@b", "'q'"])
def test_other_names_stay_as_they_are(tmp_path: Path, name: str) -> None:
    assert name_fault(name) == ""
    assert path_inside(tmp_path, name) == tmp_path / name


def test_no_other_place_makes_file_names_of_names() -> None:
    root = Path(dasmil.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_path = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
            if is_path and isinstance(node.right, ast.JoinedStr):
                found.add(path.relative_to(root).as_posix())
    assert found <= OTHERS


CELLS = [
    "=1+1",
    "@SUM(A1)",
    "\t=x",
    "\rx",
    "'=x",
    "''@",
    "'x",
    "-1",
    "+1",
    "a=b",
    "",
    "1,5",
    "ä\nb",
]


def test_a_spreadsheet_executes_no_cell_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_csv(path, ["=a", "b"], [{"=a": cell, "b": 1} for cell in CELLS])
    assert not any(
        cell.startswith(("=", "@", "\t", "\r"))
        for line in path.read_text().split("\r\n")
        for cell in line.replace('"', "").split(",")
    )
    columns, rows = read_csv(path, verbatim=("=a",))
    assert columns == ["=a", "b"]
    assert [row["=a"] for row in rows] == CELLS


def test_a_table_of_another_tool_is_read_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("slide_id,note\n=1,'quoted'\n")
    assert read_csv(path)[1] == [{"slide_id": "=1", "note": "'quoted'"}]


def test_messages_escape_control_characters() -> None:
    text = "a\x1b[2J\x07\rb\x9b1m\tc\nd"
    expected = "a\\x1b[2J\\x07\\rb\\x9b1m\tc\nd"
    assert (
        escape_controls(text) == str(InputError(text)) == error_text(InputError(text)) == expected
    )
    assert error_text(OSError(text)) == f"OSError: {expected}"
    assert join_few([text]) == expected
