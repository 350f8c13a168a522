"""The status table says what files, lines and claims say together."""

import os
from pathlib import Path

import pytest

from dasmil.cli import main
from dasmil.errors import InputError
from dasmil.tables import read_csv
from dasmil.work.status import Status
from dasmil.work.worker import Worker


def describe(path: Path) -> dict[str, object]:
    if path.read_text() == "damaged":
        raise InputError(f"{path}: damaged")
    return {"state": "done", "tiles/x20": int(path.read_text()), "message": ""}


def make_status(folder: Path, slide_ids: str = "abcdef") -> Status:
    return Status(folder, slide_ids, ["tiles/x20"], lambda s: folder / "out" / s, describe)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path


def states(status: Status) -> str:
    return " ".join(row["state"] for row in status.update())


def test_each_state_has_its_cause(folder: Path) -> None:
    status = make_status(folder)
    assert states(status) == "waiting waiting waiting waiting waiting waiting"
    with Worker(folder) as worker:
        for slide_id in "abcde":
            worker.claim(slide_id)
        (folder / "out" / "a").write_text("7")
        worker.settle("a", {"state": "done", "tiles/x20": 7})
        worker.settle("b", {"state": "failed", "message": "no such file"})
        worker.settle("c", {"state": "done"})  # and then somebody removes its file
        (folder / "out" / "f").write_text("5")  # its worker was killed before it said so
        assert states(status) == "done failed waiting running running done"
        rows = {row["slide_id"]: row for row in status.rows}
        assert f"process {os.getpid()}" in rows["d"]["message"]
        assert rows["f"]["tiles/x20"] == 5
        assert "is gone" in rows["c"]["message"]
    assert states(status) == "done failed waiting waiting waiting done"


def test_a_file_that_cannot_be_read_waits_and_says_so(folder: Path) -> None:
    (folder / "out" / "a").write_text("damaged")
    status = make_status(folder, "a")
    assert states(status) == "waiting"
    assert status.rows[0]["message"] == f"{folder / 'out' / 'a'}: damaged"


def test_the_table_has_the_columns_and_the_order_of_the_cohort(folder: Path) -> None:
    with Worker(folder) as worker:
        for slide_id in "ba":
            worker.claim(slide_id)
            (folder / "out" / slide_id).write_text("7")
            worker.settle(slide_id, {"state": "done", "tiles/x20": 7, "seconds": 1.5})
    make_status(folder, "abc").write()
    columns, rows = read_csv(folder / "status.csv")
    assert columns == ["slide_id", "state", "tiles/x20", "seconds", "message"]
    assert [(r["slide_id"], r["state"], r["tiles/x20"], r["seconds"]) for r in rows] == [
        ("a", "done", "7", "1.5"),
        ("b", "done", "7", "1.5"),
        ("c", "waiting", "", ""),
    ]


def test_complaints_name_ten_of_a_kind(folder: Path) -> None:
    slide_ids = [f"s{number:02}" for number in range(14)]
    with Worker(folder) as worker:
        for slide_id in slide_ids[:13]:
            worker.claim(slide_id)
            worker.settle(slide_id, {"state": "failed", "message": "why"})
    status = Status(folder, slide_ids, [], lambda s: folder / "out" / s, describe)
    status.update()
    lines = status.summary("tile").splitlines()
    assert lines[0] == "failed: s00: why"
    assert lines[10] == "failed: and 3 more"
    assert lines[-1].startswith("tile: 0 done, 13 failed, 1 waiting; see ")


def test_the_verb_knows_folders_of_tiles_and_of_bags(road, capsys) -> None:
    assert main(["status", str(road.tiles), str(road.bags)]) == 0
    text = capsys.readouterr().out
    assert text.count("11 slides: 11 done") == 2
    for folder in (road.tiles, road.bags):
        _, rows = read_csv(folder / "status.csv")
        for scale in ("x10", "x20"):
            total = sum(int(row[f"tiles/{scale}"]) for row in rows)
            assert text.count(f"{scale}: {total:,} tiles") == 2


def test_a_verb_without_arguments_names_its_required_ones(tmp_path: Path, capsys) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "neither tiling.json nor extractors.json" in capsys.readouterr().err
